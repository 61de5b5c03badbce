"""What a run shows in the Prefect UI while it runs: progress of long steps, a table of results, a link to MLflow."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.exceptions import FailedRun, PrefectException

from tensorpress.errors import InputError, StepError
from tensorpress.pictures.tables import human_seconds, present, write
from tensorpress.tasks.progress import MLFLOW_VARIABLE, task_sink

LONG, BETWEEN = 3.0, 2.0
"""Seconds after which work is long enough to be shown, and between two updates."""
NO_SERVER = (PrefectException, httpx.HTTPError, OSError, RuntimeError)
PAGES = "?workflowType=machine_learning"
"""Without it, MLflow 3.17 shows a run among the evaluations of an application, and the way back ends at those, not at the runs."""


def key(text: str) -> str:
    """A name as Prefect wants the keys of artifacts: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


class _Progress:
    """One progress artifact for each piece of work that takes long; a server that does not answer is no error."""

    def __init__(self, label: str):
        self.label = label
        self.began: dict[str, float] = {}
        self.shown: dict[str, tuple[UUID, float]] = {}
        self.lost = False
        """Whether the server did not answer: it is not asked again, since every request would be tried for a minute."""

    def __call__(self, node: str, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        began = self.began.setdefault(what, now)
        artifact, last = self.shown.get(what, (None, -BETWEEN))
        over = done >= total
        soon = over or now - began < LONG if artifact is None else now - last < BETWEEN and not over
        if soon or self.lost:
            return
        share = 100.0 * done / max(total, 1)
        try:
            if artifact is None:
                name = key(f"{self.label} {what}")
                artifact = create_progress_artifact(share, key=name, description=f"{self.label}: {what}")  # type: ignore[assignment]
            else:
                update_progress_artifact(artifact, progress=share)
        except NO_SERVER:
            self.lost = True
        if artifact is not None:
            self.shown[what] = artifact, now


@contextlib.contextmanager
def progress_shown(label: str) -> Iterator[None]:
    """Show the progress of what the task of this thread does."""
    with task_sink(_Progress(label)):
        yield


def show_table(name: str, markdown: str, description: str) -> None:
    """Leave a table with the run, under one key, so that runs can be leafed through."""
    with contextlib.suppress(*NO_SERVER):
        create_markdown_artifact(markdown, key=key(name), description=description)


def show_link(experiment_id: str, run_id: str) -> str | None:
    """Leave a link to the MLflow run; returns it, or None where no MLflow server was named."""
    address = os.environ.get(MLFLOW_VARIABLE)
    if not address:
        return None
    link = f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}{PAGES}"
    with contextlib.suppress(*NO_SERVER):
        create_link_artifact(
            link, link_text="This run in MLflow", key="mlflow-run", description="metrics, pictures, report"
        )
    return link


class _KnownFailures(logging.Filter):
    """Drops the traceback that Prefect's engine logs for every flow and task that failed: the state says it in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if isinstance(record.exc_info, tuple) else None
        return kind is None or not issubclass(kind, (InputError, StepError, FailedRun))


def say_failures_once() -> None:
    """Log a failure that we told in the state of a flow or task run once, without a traceback."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _KnownFailures) for known in logger.filters):
            logger.addFilter(_KnownFailures())


def results_rows(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a run's results: the original, then every leaf; the headline metrics that the leaves have."""
    leaves = [artifact for artifact in document["artifacts"] if artifact["leaf"]]
    shown = present([leaf["metrics"] for leaf in leaves], headline=True)
    rows = [["original", "", *(write(metric.key, document["original"].get(metric.key)) for metric in shown)]]
    for leaf in leaves:
        made = leaf["error"] or ("from the store" if leaf["cached"] else human_seconds(leaf["seconds"] or 0))
        rows.append([leaf["node"], made, *(write(metric.key, leaf["metrics"].get(metric.key)) for metric in shown)])
    return ["branch", "made", *(metric.label for metric in shown)], rows
