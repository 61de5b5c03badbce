"""Task: measure one artifact (or the original); what was measured before on the same bytes is remembered."""

from __future__ import annotations

import time
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tensorpress.artifact import Artifact, Store
from tensorpress.tasks.card import card_of
from tensorpress.tasks.folders import located
from tensorpress.tasks.measuring import measure_within
from tensorpress.tasks.show import progress_shown
from tensorpress.tasks.step import use_threads
from tensorpress.tasks.tracking import Tracker


@task(name="evaluate", task_run_name="evaluate {label}", cache_policy=NO_CACHE, persist_result=False)
def run_evaluation(
    label: str,
    job: dict[str, Any],
    subject: dict[str, Any],
    original: dict[str, Any] | None,
    tracking: dict[str, str],
) -> dict[str, Any]:
    """Measure the folder of `subject`; `original` is the result for the original, or None when this is the original.

    Returns {"metrics", "conditions", "texts", "seconds", "cached"}.
    """
    start = time.monotonic()
    use_threads(job["threads"])
    tracker = Tracker(tracking)
    run_id = subject.get("run_id")
    try:
        store = Store(job["store"]).open()
        job, subject = located(store, job, subject, is_original=original is None)
        with progress_shown(f"evaluate {label}"):
            result = measure_within(job, subject, original, subject.get("node", "original"))
    except BaseException as error:
        if run_id:
            tracker.fail(run_id, error)
        raise
    tracker.measured(run_id or tracking["run_id"], result, None if run_id else "original.")
    if run_id:
        tracker.close_step(subject, None, result["metrics"])
        with store.lock(subject["digest"]):
            record = {**Artifact(store.folder(subject["digest"])).record, "metrics": result["metrics"]}
            store.note(subject["digest"], record, card_of(record))
    return {**result, "work_seconds": time.monotonic() - start}
