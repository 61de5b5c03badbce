"""The demo model's corpus: the standard library of the running Python, split into train and held-out modules."""

from __future__ import annotations

import sysconfig
from pathlib import Path

# Held out with their tests, so that nothing of them is seen in training: small and middling modules of different kinds.
HELD_OUT = [
    "statistics",
    "textwrap",
    "heapq",
    "csv",
    "configparser",
    "shlex",
    "queue",
    "fractions",
    "calendar",
    "tarfile",
    "sched",
    "graphlib",
    "cmd",
    "pprint",
    "netrc",
    "bisect",
    "colorsys",
    "dataclasses",
    "selectors",
    "string",
]
# Tables and generated text rather than code that people write.
LEFT_OUT = ("pydoc_data", "encodings", "site-packages", "__pycache__", "lib2to3/tests/data", "test/encoded_modules")
LARGEST_FILE = 300_000
"""Bytes; above it lie data tables."""


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def module_name(path: Path) -> str:
    """Name that a module shares with its tests: `test/test_csv.py` and `csv.py` both give `csv`."""
    relative = path.relative_to(standard_library())
    parts = [part.removesuffix(".py") for part in relative.parts]
    parts = [part for part in parts if part not in ("test", "idlelib", "Lib")] or parts
    return parts[0].removeprefix("test_").lstrip("_")


def sources() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Read the library; return (train, held out), each a sorted list of (relative path, text)."""
    root = standard_library()
    train: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in LEFT_OUT) or path.stat().st_size > LARGEST_FILE:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) < 200 or text in seen:
            continue
        seen.add(text)
        (held_out if module_name(path) in HELD_OUT else train).append((name, text))
    return train, held_out
