"""Digests: of files, of configuration, of the code that does the work."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CHUNK = 1 << 22


def of_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no spaces); the same value gives the same digest anywhere."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            state.update(piece)
    return state.hexdigest()


def of_files(paths: list[Path], root: Path) -> str:
    """SHA-256 over names (relative to `root`) and contents."""
    return of_json({path.relative_to(root).as_posix(): of_file(path) for path in sorted(paths)})


def of_code(*folders: Path) -> str:
    """Fingerprint of Python sources: files, or whole folders (not their sub-folders)."""
    files: dict[str, str] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.py")) if folder.is_dir() else [folder]:
            files[f"{folder.name}/{path.name}"] = of_file(path)
    return of_json(files)
