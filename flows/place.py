"""Where a flow run works. The store and the folder belong to the machine, not to a run's parameters: the same form is sent to any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

Parameters = TypeVar("Parameters", bound=BaseModel)
POOL = "tensorpress"
"""The work pool whose workers run the deployments."""
STORE_VARIABLE, FOLDER_VARIABLE = "TENSORPRESS_STORE", "TENSORPRESS_FOLDER"


@dataclass(frozen=True)
class Place:
    """`store`: artifacts, measurements, tracking; `folder`: where relative paths of a written recipe begin."""

    store: Path
    folder: Path


_place: ContextVar[Place | None] = ContextVar("place", default=None)


def here() -> Place:
    """The place that was set, else that of the environment (a worker sets it for its runs), else the working folder."""
    store, folder = os.environ.get(STORE_VARIABLE, "mlruns"), os.environ.get(FOLDER_VARIABLE, ".")
    return _place.get() or Place(Path(store).expanduser().absolute(), Path(folder).expanduser().absolute())


def asked_for(form: type[Parameters]) -> Parameters:
    """The parameters of the flow run that begins, for its name."""
    from prefect.runtime import flow_run

    given = flow_run.parameters["parameters"]
    return given if isinstance(given, form) else form.model_validate(given)


@contextmanager
def at_work() -> Iterator[Place]:
    """The place of a flow run that works within.

    A worker's run goes to the folder that the worker set, since Prefect starts it in a passing one, and leaves a note in the store
    while it works: if it is killed, the next run tells of what it had begun. The command line does both by itself.
    """
    from prefect.context import get_run_context

    from tensorpress.tasks.show import say_failures_once
    from tensorpress.tasks.sweep import running, sweep_prefect

    say_failures_once()
    if FOLDER_VARIABLE not in os.environ or _place.get() is not None:
        yield here()
        return
    os.chdir(os.environ[FOLDER_VARIABLE])
    flow_run = getattr(get_run_context(), "flow_run", None)
    own = str(flow_run.id) if flow_run else None
    sweep_prefect(here().store, own)
    with running(here().store, own):
        yield here()


@contextmanager
def working_in(store: Path, folder: Path) -> Iterator[None]:
    """Let runs within work in this store, with relative paths from this folder."""
    token = _place.set(Place(store.absolute(), folder.absolute()))
    try:
        yield
    finally:
        _place.reset(token)
