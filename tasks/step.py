"""Task: one step on one branch; takes a handle to the parent's folder, returns a handle to the artifact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from tensorpress.tasks.making import make_artifact
from tensorpress.tasks.planning import Job
from tensorpress.tasks.show import progress_shown
from tensorpress.tasks.tracking import Tracker


@task(name="step", task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def run_step(label: str, job: dict[str, Any], parent: dict[str, Any], tracking: dict[str, str], last: bool) -> Any:
    """Make the artifact of a job, or find it in the store; its MLflow run is a child of the flow's, and ends here if this is
    the `last` task about it.

    Returns {"node", "path", "digest", "cached", "seconds", "report", "run_id", "use", "config",
    "work_seconds"}. The store is the cache: an artifact is taken
    only when its bytes on disk are those that were written.
    """
    start = time.monotonic()
    work = Job(**job)
    use_threads(work.threads)
    tracker = Tracker(tracking)
    run_id = tracker.start_step(work)
    try:
        with progress_shown(label):
            made = make_artifact(work, Path(parent["path"]))
        result = {**made, "run_id": run_id, "use": work.use, "config": work.config}
        tracker.step_done(run_id, work, result)
        if last:
            tracker.close_step(result, None)
    except BaseException as error:
        tracker.fail(run_id, error)
        raise
    say_made(label, result)
    result["work_seconds"] = time.monotonic() - start
    return Completed(name="Cached", message="found in the store", data=result) if result["cached"] else result


def use_threads(count: int) -> None:
    """Let torch use so many threads in this task's thread; 0 leaves it as it is."""
    if count:
        torch.set_num_threads(count)


def say_made(label: str, result: dict[str, Any]) -> None:
    """One line in the flow run's log."""
    size = result["size"]
    how = "found in the store" if result["cached"] else f"made in {result['seconds']:.1f} s"
    get_run_logger().info("%s: %s, %.3f of the original's 16-bit weights", label, how, size["size_ratio"])
