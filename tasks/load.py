"""Task: check the source model and hand on a handle to its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tensorpress.artifact import Store
from tensorpress.tasks.planning import known_source


@task(name="load", task_run_name="load {source}", cache_policy=NO_CACHE, persist_result=False)
def load_model(source: str, folder: str, store: str) -> dict[str, Any]:
    """Check the model folder whole; returns its handle {"path", "digest"}."""
    handle = known_source(Path(folder), Store(store).open())
    return {"path": handle.path, "digest": handle.digest}
