"""Which artifacts the runs of a store use, and what MLflow is told when artifacts or runs are removed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from tensorpress.errors import StepError
from tensorpress.tasks.litter import DIGEST
from tensorpress.tasks.tracking import close_dead_runs, own_database

FLOW_RUNS = "tags.tensorpress.recipe != ''"
AT_ONCE = 200


def in_use(client: MlflowClient) -> dict[str, str]:
    """Digests of the artifacts that running runs made, found or began with, and why they must stay."""
    close_dead_runs(client)
    used: dict[str, str] = {}
    for run in _search(client, f"{FLOW_RUNS} and attributes.status = 'RUNNING'"):
        why = f"used by the running run {run.info.run_id[:8]}"
        used |= dict.fromkeys(_digests(client, run), why)
        used |= dict.fromkeys(DIGEST.findall(Path(run.data.tags.get("tensorpress.model", "")).name), why)
    return used


def of_last_runs(client: MlflowClient, count: int) -> dict[str, str]:
    """Digests of the artifacts of the last `count` runs, and why they stay."""
    runs = _search(client, FLOW_RUNS, count) if count else []
    return {digest: f"of the last runs: {run.info.run_id[:8]}" for run in runs for digest in _digests(client, run)}


def mark_removed(client: MlflowClient, digest: str) -> None:
    """Tag the runs and the registered versions of an artifact that is removed with the time."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for run in _search(client, f"tags.tensorpress.digest = '{digest}'"):
        client.set_tag(run.info.run_id, "tensorpress.removed", now)
    for version in client.search_model_versions(f"tags.digest = '{digest}'"):
        client.set_model_version_tag(version.name, str(version.version), "removed", now)


def old_runs(client: MlflowClient, seconds: float, kept: Iterable[str]) -> list[str]:
    """Ids of the runs that began more than `seconds` ago, and of their steps; not those that run, nor the `kept`."""
    before, names = int((time.time() - seconds) * 1000), set(kept)
    found = _search(client, f"{FLOW_RUNS} and attributes.start_time < {before} and attributes.status != 'RUNNING'")
    return [
        run_id
        for run in found
        if run.info.run_id not in names
        for run_id in (*(child.info.run_id for child in _children(client, run)), run.info.run_id)
    ]


def delete_runs(client: MlflowClient, store: Path, ids: list[str]) -> None:
    """Delete runs with what MLflow keeps of them: for good in the store's own database, as MLflow's pages do it elsewhere.

    Raises StepError when MLflow does not.
    """
    for run_id in ids:
        client.delete_run(run_id)
    if client.tracking_uri != own_database(store):
        return
    for start in range(0, len(ids), AT_ONCE):
        chosen = ids[start : start + AT_ONCE]
        uri = client.tracking_uri
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri, "--tracking-uri", uri]
        ended = subprocess.run([*command, "--run-ids", ",".join(chosen)], capture_output=True, text=True, check=False)
        if ended.returncode:
            reason = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise StepError(f"mlflow gc: runs could not be deleted for good: {reason}")
        for run_id in chosen:
            shutil.rmtree(run_folder(store, run_id), ignore_errors=True)


def run_folder(store: Path, run_id: str) -> Path:
    """Where the store's own database keeps the files of a run."""
    return store / "artifacts" / run_id


def _digests(client: MlflowClient, parent: Any) -> list[str]:
    return [child.data.tags.get("tensorpress.digest", "") for child in _children(client, parent)]


def _children(client: MlflowClient, parent: Any) -> list[Any]:
    return _search(client, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")


def _search(client: MlflowClient, which: str, count: int | None = None) -> list[Any]:
    """Runs, the latest first: all, or the first `count`."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: list[Any] = []
    token = None
    while experiments and (count is None or len(found) < count):
        page = client.search_runs(
            experiments,
            which,
            max_results=min(1000, count or 1000),
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        found += page
        token = page.token
        if not token:
            break
    return found[:count]
