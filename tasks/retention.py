"""What of a store is kept and what may go: artifacts by the time of their last use and by size, and what dead processes left.

The last use of an artifact is the time of its record: written when it is made, renewed when it is measured or found again. A time
in the future (the clock was set back) counts as now. Never removed: champions and what they come from, what a running run uses,
what somebody works on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tensorpress.artifact import RECORD, Store
from tensorpress.errors import InputError
from tensorpress.pictures.tables import human_bytes
from tensorpress.tasks.litter import (
    DIGEST,
    TRASH,
    Item,
    age,
    bytes_of,
    is_held,
    item_of,
    litter,
    remove_litter,
    unlink_lock,
)
from tensorpress.tasks.tracking import has_runs, open_client
from tensorpress.tasks.tracking.champions import champions
from tensorpress.tasks.tracking.usage import delete_runs, in_use, mark_removed, of_last_runs, old_runs, run_folder


@dataclass(frozen=True)
class Rule:
    """What may go; None: no such bound."""

    unused_seconds: float | None = None
    """Artifacts go that were not used for longer."""
    store_bytes: float | None = None
    """Artifacts go until the store is no larger, what was not used longest first."""
    keep_last: int = 0
    """The artifacts of so many last runs stay."""
    run_seconds: float | None = None
    """Runs go, with their metrics and pictures, that began longer ago."""


@dataclass(frozen=True)
class Survey:
    """What would go from a store, and which artifacts would stay."""

    goes: list[Item]
    stays: list[Item]
    bytes: int
    """Of all files in the store."""

    @property
    def freed(self) -> int:
        return sum(item.bytes for item in self.goes)


def survey(store: Store, rule: Rule) -> Survey:
    """Look at a store; nothing is removed. Raises InputError for a folder that is no store, and for a champion's file that
    cannot be read.
    """
    if not (store.root / "models").is_dir():
        raise InputError(f"store: {store.root} is no store: it has no folder `models`; name another with --store")
    now = time.time()
    protected = _protected(store, rule)
    total = bytes_of(store.root)
    goes = [*litter(store, now), *_runs(store, rule)]
    left = total - sum(item.bytes for item in goes)
    evaluations = _evaluations(store, now)
    may_go: list[Item] = []
    stays: list[Item] = []
    for item in sorted(_artifacts(store, now), key=lambda item: (-item.age, item.name)):
        why = protected.get(item.name) or ("somebody works on it" if is_held(store, item.name) else "")
        (stays if why else may_go).append(replace(item, why=why))
    for item in may_go:
        old = rule.unused_seconds is not None and item.age > rule.unused_seconds
        if old or (rule.store_bytes is not None and left > rule.store_bytes):
            why = "not used for longer than asked" if old else "the store is larger than asked"
            parts = [replace(item, why=why), *evaluations.get(item.name, [])]
            goes += parts
            left -= sum(part.bytes for part in parts)
        else:
            stays.append(replace(item, why="within the bounds" if _bounded(rule) else "no bound was given"))
    return Survey(goes, stays, total)


def clean(store: Store, found: Survey) -> list[Item]:
    """Remove what a survey found; returns what is gone now. What was taken up meanwhile stays."""
    client = _client(store)
    gone: list[Item] = []
    evaluations: dict[str, list[Item]] = {}
    for item in found.goes:
        if item.kind == "evaluation":
            evaluations.setdefault(item.title, []).append(item)
    for item in found.goes:
        if item.kind == "artifact":
            if _remove_artifact(store, item.name, evaluations.get(item.name, []), client):
                gone += [item, *evaluations.get(item.name, [])]
        elif item.kind not in ("evaluation", "run") and remove_litter(store, item):
            gone.append(item)
    runs = [item for item in found.goes if item.kind == "run"]
    if runs and client is not None:
        delete_runs(client, store.root, [item.name for item in runs])
        gone += runs
    return gone


def retain(store: Store, rule: Rule) -> str:
    """Hold a store to a rule, as a nightly run does at its end; returns one line that says what was removed."""
    gone = clean(store, survey(store, rule))
    artifacts = sum(item.kind == "artifact" for item in gone)
    runs = sum(item.kind == "run" for item in gone)
    freed = human_bytes(sum(item.bytes for item in gone))
    return f"removed {artifacts} artifacts, {runs} runs and {len(gone) - artifacts - runs} other files: {freed}"


def _protected(store: Store, rule: Rule) -> dict[str, str]:
    """Digest -> why it stays whatever the bounds; the strongest reason last."""
    client = _client(store)
    reasons = {} if client is None else of_last_runs(client, rule.keep_last)
    reasons |= {} if client is None else in_use(client)
    named = list(champions(store))
    for champion in named:
        reasons |= dict.fromkeys(
            _ancestors(store, champion["digest"]), f"the champion of {champion['line']} comes from it"
        )
    return reasons | {champion["digest"]: f"champion of {champion['line']}" for champion in named}


def _ancestors(store: Store, digest: str) -> set[str]:
    """Artifacts of the store that an artifact was made from, however far back."""
    found: set[str] = set()
    waiting = [digest]
    while waiting:
        record = _record(store.folder(waiting.pop()))
        chain = [link.get("digest") for link in record.get("chain", [])]
        for name in (*chain, record.get("parent"), record.get("base")):  # base: a model that was an artifact itself
            if isinstance(name, str) and DIGEST.fullmatch(name) and name not in found and store.folder(name).is_dir():
                found.add(name)
                waiting.append(name)
    return found - {digest}


def _remove_artifact(store: Store, name: str, evaluations: list[Item], client: Any) -> bool:
    """Take an artifact away under its lock: whoever reads the store sees all of it or nothing. False where it must stay now."""
    trash = store.root / "models" / f"{TRASH}{name}-{os.getpid()}"
    with store.lock_if_free(name) as held:
        if not held or name in _protected(store, Rule()) or not store.folder(name).is_dir():
            return False
        for item in evaluations:
            item.path.unlink(missing_ok=True)
        store.folder(name).rename(trash)
        shutil.rmtree(store.scratch(name), ignore_errors=True)
        unlink_lock(store, name)
    if client is not None:
        mark_removed(client, name)
    shutil.rmtree(trash)
    return True


def _runs(store: Store, rule: Rule) -> list[Item]:
    client = _client(store)
    if client is None or rule.run_seconds is None:
        return []
    kept = [champion["run_id"] for champion in champions(store)]
    ids = old_runs(client, rule.run_seconds, kept)
    why = "older than asked"
    return [
        Item("run", run_id, path, bytes_of(path), 0, why) for run_id in ids for path in [run_folder(store.root, run_id)]
    ]


def _evaluations(store: Store, now: float) -> dict[str, list[Item]]:
    """What is remembered of each artifact's measures, by its digest."""
    found: dict[str, list[Item]] = {}
    for path in (store.root / "evaluations").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            subject = json.loads(path.read_text(encoding="utf-8")).get("subject")
            if isinstance(subject, str):
                item = replace(item_of("evaluation", path, now, "its artifact goes"), title=subject)
                found.setdefault(subject, []).append(item)
    return found


def _artifacts(store: Store, now: float) -> Iterator[Item]:
    for path in (store.root / "models").iterdir():
        if DIGEST.fullmatch(path.name) and path.is_dir():
            used = path / RECORD if (path / RECORD).is_file() else path
            title = str(_record(path).get("title", ""))
            yield Item("artifact", path.name, path, bytes_of(path), age(used, now), title=title)


def _record(folder: Path) -> dict[str, Any]:
    """The record of an artifact, or nothing where it cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _client(store: Store) -> Any:
    return open_client(store.root) if has_runs(store.root) else None


def _bounded(rule: Rule) -> bool:
    return rule.unused_seconds is not None or rule.store_bytes is not None
