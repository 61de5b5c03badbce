"""What dead processes left in a store, what it takes on the disk, and how it goes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

from tensorpress.artifact import Store

HOUR, DAY = 3600.0, 86_400.0
STALE_PART, STALE_SCRATCH, STALE_LOG = HOUR, 7 * DAY, 30 * DAY
"""Seconds after which what nobody holds a lock of is taken for left behind."""
TRASH = ".trash-"
DIGEST = re.compile(r"[0-9a-f]{32}")
"""Names of artifacts."""

Kind = Literal["artifact", "evaluation", "part", "scratch", "lock", "log", "trash", "run"]


@dataclass(frozen=True)
class Item:
    """Something in the store: what it is, and why it goes or stays."""

    kind: Kind
    name: str
    path: Path
    bytes: int
    age: float
    """Seconds since its last use."""
    why: str = ""
    title: str = ""


def litter(store: Store, now: float) -> Iterator[Item]:
    """What dead processes left in a store, and lock files that nobody holds."""
    root = store.root
    for path in (root / "models").glob(f"{TRASH}*"):
        yield item_of("trash", path, now, "a removal that was not finished")
    folders = [root, *(folder for folder in root.iterdir() if folder.is_dir())]
    for path in (path for folder in folders for path in folder.glob(".part-*")):
        guard = _guard(path)
        if not is_held(store, guard) if guard else age(path, now) > STALE_PART:
            yield item_of("part", path, now, "nobody writes it any more")
    for path in (root / "scratch").glob("*"):
        done = store.folder(path.name).is_dir()
        if (done or age(path, now) > STALE_SCRATCH) and not is_held(store, path.name):
            yield item_of("scratch", path, now, "the step is finished" if done else "the step was never finished")
    for path in (root / "locks").glob("*.lock"):
        if not is_held(store, path.stem):
            yield item_of("lock", path, now, "nobody holds it")
    yield from _logs(root, now)


def _logs(root: Path, now: float) -> Iterator[Item]:
    """Old logs of servers that are not at work."""
    for folder, lock in ((root / "prefect", "server.lock"), (root / "serve", "lock")):
        if not _is_locked(folder / lock):
            for path in folder.glob("*.log"):
                number = path.stem.rpartition("-")[2]
                alive = number.isdigit() and psutil.pid_exists(int(number))
                if age(path, now) > STALE_LOG and not alive:
                    yield item_of("log", path, now, "of a server that is gone")


def remove_litter(store: Store, item: Item) -> bool:
    """Remove what was left behind: what a lock guards only while that is held here. False where somebody took it up."""
    guard = _guard(item.path)
    if guard is None:
        delete(item.path)
        return True
    with store.lock_if_free(guard) as held:
        if held:
            if item.kind != "lock":
                delete(item.path)
            unlink_lock(store, guard)
    return held


def unlink_lock(store: Store, name: str) -> None:
    """Remove the file of a lock that is held: who waits for it sees that the file has no name any more, and makes another."""
    (store.root / "locks" / f"{name}.lock").unlink(missing_ok=True)


def _guard(path: Path) -> str | None:
    """The name of the lock that a file or folder is only touched under."""
    if path.parent.name == "locks":
        return path.stem
    digest = DIGEST.search(path.name) if path.parent.name in ("models", "scratch") else None
    return digest[0] if digest and not path.name.startswith(TRASH) else None


def is_held(store: Store, name: str) -> bool:
    return _is_locked(store.root / "locks" / f"{name}.lock")


def _is_locked(path: Path) -> bool:
    """Whether somebody holds a lock; no file is made for the question."""
    if not path.is_file():
        return False
    try:
        with FileLock(path).acquire(blocking=False):
            return False
    except Timeout:
        return True


def item_of(kind: Kind, path: Path, now: float, why: str) -> Item:
    return Item(kind, path.name, path, bytes_of(path), age(path, now), why)


def age(path: Path, now: float) -> float:
    """Seconds since a file was written; 0 for a time in the future, or for what is gone."""
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return 0.0


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(_length(file) for file in _files(path))


def _files(path: Path) -> Iterable[Path]:
    if path.is_dir() and not path.is_symlink():
        return (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    return [path]


def _length(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
