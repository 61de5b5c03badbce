"""Where a task finds model folders: the handle of another machine names paths that are not there on this one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorpress.artifact import Store
from tensorpress.errors import InputError, StepError
from tensorpress.remote import VARIABLE
from tensorpress.source import resolve
from tensorpress.tasks.planning import known_source


def root_folder(store: Store, root: Mapping[str, str]) -> Path:
    """The folder of the original, on this machine. `root` is the handle: `path`, `digest`, `source`.

    Raises StepError where machines share the store and this one has not the same model.
    """
    folder = Path(root["path"])
    if store.remote is None:
        return folder
    try:
        if not folder.is_dir():
            folder = resolve(root.get("source") or root["path"])
        found = known_source(folder, store).digest
    except InputError as error:
        raise StepError(f"the original is not on this machine: {error}") from None
    if found != root["digest"]:
        raise StepError(f"{folder}: is another model on this machine than where the run began")
    return folder


def artifact_folder(store: Store, name: str, path: str | Path) -> Path:
    """The folder of an artifact that another task made, `path` where it was made: fetched if that was another machine.

    Raises StepError where it is not to be had.
    """
    if store.remote is None:
        if Path(path).is_dir():
            return Path(path)
        raise StepError(f"{path} is not there; if it was made on another machine, both need {VARIABLE}")
    artifact = store.artifact(name)
    if artifact is None:
        raise StepError(f"artifact {name[:12]} is neither in {store.root} nor in {store.remote.shown}")
    return artifact.folder


def located(
    store: Store, job: Mapping[str, Any], subject: Mapping[str, Any], is_original: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job of a measurement and its subject, with the paths that their folders have on this machine. Raises StepError."""
    root = root_folder(store, job["root"])
    folder = root if is_original else artifact_folder(store, subject["digest"], subject["path"])
    return {**job, "root": {**job["root"], "path": str(root)}}, {**subject, "path": str(folder)}
