"""An MLflow client that waits for a database that others have locked, and says in one line what it cannot do."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any, cast

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")  # a minute: a server that is started again is waited for

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from tensorpress.errors import StepError

LOCKED_SECONDS = 90.0
"""So long a database may be locked by others, beyond the 20 s that each request of MLflow waits by itself."""
CLOSED_SECONDS = 60.0
"""So long after a failure nothing more is asked: each request would wait its minute again."""
DISK = ("disk is full", "disk I/O error", "readonly database", "unable to open database", "No space left")
GONE = ("failed with exception", "failed with timeout exception", "failed with error code 5")


def open_patient(address: str) -> MlflowClient:
    """A client of the database or server at an address; its methods raise StepError when that cannot be reached or written."""
    return cast(MlflowClient, _Patient(address))


class _Patient:
    def __init__(self, address: str):
        self._address = address
        self._closed: tuple[float, StepError] | None = None
        self._client: MlflowClient = self._ask(MlflowClient, address)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        return functools.partial(self._ask, value) if callable(value) else value

    def _ask(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if self._closed and time.monotonic() - self._closed[0] < CLOSED_SECONDS:
            raise StepError(str(self._closed[1]))
        end = time.monotonic() + LOCKED_SECONDS
        while True:
            try:
                return method(*arguments, **named)
            except (MlflowException, SQLAlchemyError, OSError) as error:
                locked = "database is locked" in str(error)
                if locked and time.monotonic() < end:
                    time.sleep(0.2)
                    continue
                problem = _problem(error, locked, self._address)
                if problem is None:
                    raise
                self._closed = time.monotonic(), problem
                raise problem from None


def _problem(error: Exception, locked: bool, address: str) -> StepError | None:
    """What is told of an error that is not the caller's own."""
    text = str(error)
    if locked:
        return StepError(f"tracking: {address} is locked by another program for more than {LOCKED_SECONDS:.0f} s")
    if any(sign in text for sign in GONE):
        return StepError(f"tracking: {address} does not answer; what was finished is kept")
    found = next((sign for sign in DISK if sign in text), None)
    if isinstance(error, OSError) and error.filename and not isinstance(error, FileNotFoundError):
        return StepError(f"tracking: {error.filename} cannot be written: {error.strerror}")
    return StepError(f"tracking: {address} cannot be written: {found}") if found else None
