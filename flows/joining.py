"""`worker`: this machine works on the runs of servers elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx

from tensorpress.errors import InputError
from tensorpress.flows.access import USER, credentials, lets_in, serve_folder
from tensorpress.flows.children import Child
from tensorpress.flows.place import FOLDER_VARIABLE, STORE_VARIABLE
from tensorpress.flows.server import answers
from tensorpress.flows.serving import START_SECONDS, worker_environment, worker_of


def check_servers(api: str, mlflow: str, token: str) -> None:
    """Refuse servers that do not answer, or do not take the token. Raises InputError."""
    if not answers(api, 5.0):
        raise InputError(f"{api}: no Prefect server answers there; give the address that `serve` printed")
    if not lets_in(api, credentials(token), 5.0):
        raise InputError(f"{api}: does not take this token")
    try:
        answer = httpx.post(
            f"{mlflow}/api/2.0/mlflow/experiments/search",
            json={"max_results": 1},
            auth=(USER, token),
            timeout=5.0,
            trust_env=False,
        )
    except (httpx.HTTPError, httpx.InvalidURL):
        raise InputError(f"--mlflow {mlflow}: no MLflow server answers there") from None
    if answer.status_code != 200:
        raise InputError(f"--mlflow {mlflow}: does not take this token (status {answer.status_code})")


@contextlib.contextmanager
def joined(api: str, mlflow: str, token: str, limit: int, store: Path) -> Iterator[Child]:
    """A worker for the servers at these addresses, ended with its runs. Raises StepError when it does not come up."""
    environment = worker_environment(api, token, mlflow, limit) | {
        STORE_VARIABLE: str(store),
        FOLDER_VARIABLE: str(Path.cwd()),
        "PREFECT_HOME": str(store / "prefect"),
        "MLFLOW_TRACKING_URI": mlflow,
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": token,
    }
    child = worker_of(api, token, environment, limit, serve_folder(store) / f"worker-{os.getpid()}.log")
    child.start()
    try:
        child.wait_healthy(START_SECONDS)
        yield child
    finally:
        child.end_below()
        child.stop()
