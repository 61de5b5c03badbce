"""Champions: one artifact for each line of runs (recipe, base model, evaluation), in MLflow's registry under the alias `champion`.

What is the champion is written in `champions/<line>.json` of the store; the registry follows it and can be made again from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tensorpress import digest
from tensorpress.artifact import Store, write_whole
from tensorpress.errors import InputError, StepError
from tensorpress.tasks.contest import (
    SAME_MACHINE,
    SPEED_TOLERANCE,
    TOLERANCE,
    Change,
    Decision,
    best_of,
    candidate,
    compare,
    why_none,
)

ALIAS = "champion"
LOCK = "champions"


def decide(
    client: MlflowClient,
    store: Store,
    document: Mapping[str, Any],
    tolerance: float = TOLERANCE,
    speed_tolerance: float = SPEED_TOLERANCE,
    promote: bool = True,
) -> Decision:
    """Hold a run against the champion of its line, and promote its candidate when no metric got worse beyond the tolerance.

    With `promote` false nothing is promoted; the decision says what would be. Raises InputError for a champion's file that
    cannot be read, StepError when the candidate is gone from the store.
    """
    with store.lock(LOCK):
        line = line_of(client, document)
        before, found = champion_of(store, line), candidate(document)
        if found is None:
            stays = [f"{_named(before)} stays the champion"] if before else []
            return Decision("none", line, before, None, [], [why_none(document), *stays])
        changes = compare(found, before, tolerance, speed_tolerance) if before else []
        worse = [change.says for change in changes if change.verdict == "worse"]
        if before and before["digest"] == found["digest"]:
            if promote:
                before = _followed(client, store, _measured_again(store, before, found), found["run_id"])
            says = [f"{_named(found)} is the champion already", *worse]
            return Decision("unchanged", line, before, found, changes, says)
        if worse and before:
            says = [f"{_named(before)} stays the champion: {_named(found)} is worse in {len(worse)} metrics", *worse]
            return Decision("worse", line, before, found, changes, says)
        after = _promote(client, store, line, found, document) if promote else before
    became = "became" if promote else "would become"
    instead = f" in place of {_named(before)}" if before else ", the first of its line"
    gained = [change.says for change in changes if change.verdict == "better"]
    says = [f"{_named(found)} {became} the champion{instead}", *gained]
    return Decision("promoted" if before else "first", line, after, found, changes, says)


def register(client: MlflowClient, store: Store, document: Mapping[str, Any]) -> str | None:
    """Register the best leaf of a run as a version of its line, without an alias; returns the version.

    None when the run has no candidate. An artifact that is a version already is not registered again.
    """
    found = candidate(document)
    if found is None:
        return None
    with store.lock(LOCK):
        return str(_version(client, line_of(client, document), found, found["run_id"]).version)


def restore(client: MlflowClient, store: Store) -> None:
    """Give every champion its version and alias in a registry that lost them."""
    with store.lock(LOCK):
        for champion in champions(store):
            _followed(client, store, champion, None)


def champions(store: Store) -> Iterator[dict[str, Any]]:
    """All champions of a store. Raises InputError for a file that cannot be read: what it protects is not known then."""
    for path in sorted((store.root / "champions").glob("*.json")):
        yield _read(path)


def champion_of(store: Store, line: str) -> dict[str, Any] | None:
    """The champion of a line, if it has one. Raises InputError."""
    path = store.root / "champions" / f"{line}.json"
    return _read(path) if path.is_file() else None


def line_of(client: MlflowClient, document: Mapping[str, Any]) -> str:
    """The name of a run's line, as `quickstart on demo 3f2a91bc`, legal in MLflow's registry and as a file's.

    The digits stand for the base model's bytes, the evaluation text, and how it is cut into windows.
    """
    run = client.get_run(document["mlflow_run_id"])
    recipe = document["recipe"]
    spec = recipe.get("data", {}).get("evaluation", {})
    texts = sorted(item.dataset.digest for item in (run.inputs.dataset_inputs if run.inputs else []))
    what = [document["original_digest"], texts, spec.get("samples"), spec.get("length")]
    source = Path(recipe.get("model", {}).get("source", "demo")).name
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", source)[:60]
    return f"{document['name']} on {base} {digest.of_json(what)[:8]}"


def _promote(
    client: MlflowClient, store: Store, line: str, artifact: Mapping[str, Any], document: Mapping[str, Any]
) -> dict[str, Any]:
    with store.lock(artifact["digest"]):  # `clean` removes under this lock
        if (
            not store.folder(artifact["digest"]).is_dir() and store.artifact(artifact["digest"]) is None
        ):  # a worker made it
            raise StepError(f"{artifact['node']}: its artifact {artifact['digest'][:12]} is gone from the store")
        before = champion_of(store, line) or {}
        champion = {
            "line": line,
            "node": artifact["node"],
            "digest": artifact["digest"],
            "path": artifact["path"],
            "metrics": artifact["metrics"],
            "best": best_of(before.get("best", {}), artifact["metrics"]),
            "conditions": _machine(artifact),
            "run_id": document["mlflow_run_id"],
            "version": str(_version(client, line, artifact, artifact["run_id"]).version),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _write(store, champion)
    client.set_registered_model_alias(line, ALIAS, champion["version"])
    return champion


def _followed(client: MlflowClient, store: Store, champion: dict[str, Any], run_id: str | None) -> dict[str, Any]:
    """Bring the registry to where the champion's file is: a process may have died between the two. Returns the champion."""
    version = str(_version(client, champion["line"], champion, run_id).version)
    client.set_registered_model_alias(champion["line"], ALIAS, version)
    if version != champion["version"]:
        champion = {**champion, "version": version}
        _write(store, champion)
    return champion


def _version(client: MlflowClient, line: str, artifact: Mapping[str, Any], run_id: str | None) -> ModelVersion:
    """The version of a line that an artifact is; it is registered, by reference, if it was not. `run_id`: its step's run."""
    known = [v for v in client.search_model_versions(f"name = '{line}'") if v.tags.get("digest") == artifact["digest"]]
    if known:
        return known[0]
    try:
        client.get_registered_model(line)
    except MlflowException:
        client.create_registered_model(line)
    tags = {"digest": artifact["digest"], "node": artifact["node"], "path": artifact["path"], "weights": "by reference"}
    model_id = client.get_run(run_id).data.tags.get("tensorpress.model_id") if run_id else None
    source = Path(artifact["path"]).as_uri()
    if model_id and not client.tracking_uri.startswith("sqlite:"):  # a server takes no folder for a source but its own
        source = client.get_logged_model(model_id).artifact_location
    version = client.create_model_version(line, source=source, run_id=run_id, tags=tags, model_id=model_id)
    if model_id:
        others = json.loads(client.get_logged_model(model_id).tags.get("mlflow.modelVersions", "[]"))
        this = {"name": line, "version": str(version.version)}
        if this not in others:
            client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps([*others, this])})
    return version


def _measured_again(store: Store, champion: dict[str, Any], artifact: Mapping[str, Any]) -> dict[str, Any]:
    """The champion with the figures of today where those of quality differ: the same bytes were measured by other code.

    The line's best then begins anew.
    """
    quality = best_of({}, artifact["metrics"])
    if quality == best_of({}, champion["metrics"]):
        return champion
    champion = {**champion, "metrics": artifact["metrics"], "best": quality, "conditions": _machine(artifact)}
    _write(store, champion)
    return champion


def _machine(artifact: Mapping[str, Any]) -> dict[str, Any]:
    return {key: artifact["conditions"].get(key) for key in SAME_MACHINE}


def _write(store: Store, champion: Mapping[str, Any]) -> None:
    write_whole(store.root / "champions" / f"{champion['line']}.json", json.dumps(champion, indent=1))


def _read(path: Path) -> dict[str, Any]:
    try:
        champion = json.loads(path.read_text(encoding="utf-8"))
        if {"line", "digest", "metrics", "path", "node", "version"} <= set(champion):
            return dict(champion)
        reason = "something is missing in it"
    except (OSError, ValueError, TypeError) as error:
        reason = str(error)
    raise InputError(f"{path}: cannot be read as a champion ({reason}); remove it, and the next run names a new one")


def _named(artifact: Mapping[str, Any] | None) -> str:
    return f"{artifact['node']} {artifact['digest'][:12]}" if artifact else "nothing"


__all__ = [
    "Change",
    "Decision",
    "candidate",
    "champion_of",
    "champions",
    "compare",
    "decide",
    "line_of",
    "register",
    "restore",
]
