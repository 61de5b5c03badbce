"""Where a flow run works. The store and the folder belong to the machine, not to a run's parameters: the same form is sent to any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

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


def enter_folder() -> None:
    """Go to the folder that a worker set for its runs: Prefect starts each of them in a passing one."""
    if FOLDER_VARIABLE in os.environ and _place.get() is None:
        os.chdir(os.environ[FOLDER_VARIABLE])


@contextmanager
def working_in(store: Path, folder: Path) -> Iterator[None]:
    """Let runs within work in this store, with relative paths from this folder."""
    token = _place.set(Place(store.absolute(), folder.absolute()))
    try:
        yield
    finally:
        _place.reset(token)
