"""What runs that were killed left behind: states that say Running, and files that were not finished."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tensorpress.files import write_whole
from tensorpress.tasks.alive import is_gone, own_mark

if TYPE_CHECKING:
    from tensorpress.artifact import Store

TAG = "process-"
"""Tag of a flow run: which process works on it. It has it from its first moment on."""
AT_WORK = ("RUNNING", "PENDING", "SCHEDULED", "CANCELLING")


@contextlib.contextmanager
def running(store: Path, flow_run_id: str | None = None) -> Iterator[None]:
    """Say in the store that this process works on a flow run: the one of this id, or those that begin within.

    `store/running/<name>.json` stays behind when the process is killed, and tells the next sweep whom it was about.
    """
    from prefect import tags

    mark = own_mark()
    name = flow_run_id or f"{TAG}{mark['pid']}-{mark['born']}"
    note = store / "running" / f"{name}.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps({**mark, "flow_run_id": flow_run_id, "tag": None if flow_run_id else name}))
    try:
        with contextlib.nullcontext() if flow_run_id else tags(name):
            yield
    finally:
        note.unlink(missing_ok=True)


def sweep(store: Store) -> None:
    """Tell Prefect of the flow runs that were killed, and remove what they had begun to write; one sweep at a time.

    Asks the server that Prefect's settings name. MLflow is told by `tasks.tracking.close_dead_runs`.
    """
    with store.lock_if_free("sweep") as held:
        if held:
            sweep_prefect(store.root)
            _sweep_files(store)


def sweep_prefect(store: Path, own: str | None = None) -> int:
    """Mark as Crashed the flow runs, with their tasks, whose processes on this machine are gone; returns how many.

    `own` is the flow run that asks: if it is done once more, only what it had begun before is marked. A server that does not answer is
    no error: the next sweep tells it. One that knows nothing of them had another database.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException

    swept = 0
    for note, known in _dead(store):
        with contextlib.suppress(PrefectException, httpx.HTTPError, RuntimeError, OSError, ValueError, KeyError):
            with get_client(sync_client=True) as client:
                swept += _mark_crashed(client, known, own)
            if json.loads(note.read_text(encoding="utf-8")) == known:  # not that of a run which is done once more
                note.unlink(missing_ok=True)
    return swept


def _dead(store: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for note in (store / "running").glob("*.json"):
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
            if is_gone(known):
                yield note, known
        except (OSError, ValueError, AttributeError):  # it ends just now; a disk that was full
            continue


def _mark_crashed(client: Any, known: dict[str, Any], own: str | None) -> int:
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelled, Crashed

    about = {"id": {"any_": [known["flow_run_id"]]}} if known["flow_run_id"] else {"tags": {"all_": [known["tag"]]}}
    runs = client.read_flow_runs(flow_run_filter=filters.FlowRunFilter.model_validate(about))
    at_work = filters.TaskRunFilter.model_validate({"state": {"type": {"any_": AT_WORK}}})
    state: Any = Crashed(message="its process was gone")
    swept = 0
    for run in runs:  # a worker tells of the run itself, but not of its tasks, nor of the runs that it began
        of_run = filters.FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
        for task in client.read_task_runs(flow_run_filter=of_run, task_run_filter=at_work):
            client.set_task_run_state(task.id, state, force=True)
        below = filters.FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [run.id]}})
        for child in client.read_flow_runs(flow_run_filter=below):
            swept += _mark_crashed(client, {"flow_run_id": child.id}, own)
        again = str(run.id) == own or (
            run.state_type == StateType.SCHEDULED and known["flow_run_id"]
        )  # somebody pressed Retry
        if run.state_type is not None and run.state_type.value in AT_WORK and not again:
            cancelled = run.state_type == StateType.CANCELLING
            client.set_flow_run_state(run.id, Cancelled() if cancelled else state, force=True)
            swept += 1
    return swept


def _sweep_files(store: Store) -> None:
    from tensorpress.tasks.litter import litter, remove_litter

    for item in litter(store, time.time()):
        if item.kind in ("part", "trash"):
            with contextlib.suppress(OSError):
                remove_litter(store, item)
