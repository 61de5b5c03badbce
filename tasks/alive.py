"""Whether the process that left a mark is still there: a number alone does not tell, since numbers are given again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import psutil


def own_mark() -> dict[str, str]:
    """What this process is known by."""
    return mark_of(os.getpid())


def mark_of(pid: int) -> dict[str, str]:
    """What a process is known by: `host`, `pid`, and `born`, which no other process of that number has."""
    return {"host": platform.node(), "pid": str(pid), "born": _born(pid) or ""}


def is_gone(mark: Mapping[str, str]) -> bool:
    """Whether the process of a mark has surely ended; of another machine's processes nothing is sure."""
    if mark.get("host") != platform.node() or not mark.get("pid", "").isdigit():
        return False
    born = _born(int(mark["pid"]))
    return born is None or (bool(mark.get("born")) and mark["born"] != born)


def die_with_parent(number: int) -> None:
    """Linux: let this process get a signal when the thread that started it is gone. Elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, number)


def _born(pid: int) -> str | None:
    """When a process began, in the kernel's own count since the machine started: clocks may be set. None for one that ended."""
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _born_elsewhere(pid)
    except OSError:  # it ends just now
        return None
    return None if state in "ZX" else f"{_boot()}-{fields[18]}"


@lru_cache(maxsize=1)
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]


def _born_elsewhere(pid: int) -> str | None:
    """On systems without /proc."""
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
