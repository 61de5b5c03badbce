"""Which backend is fastest for a layer on this machine: measured at the first call of a shape, remembered in a file.

A choice holds for one machine (processor, instruction set, threads, versions of torch and of the compiled code), shape, precision and size
of batch. The file is a note: where it cannot be read or written, choices are measured again.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tensorpress.files import write_whole

if TYPE_CHECKING:
    from tensorpress.kernels.registry import Backend

REPEATS = 3
HOPELESS = 3.0
"""A backend whose second run takes this many times the best of another is not run again."""
UNTRIED = 10.0
"""A backend that is predicted to take this many times the best of another is not run at all: it could be minutes."""
BATCHES = (1, 8, 64, 512)
"""Rows up to which a choice holds; beyond the last there is one for all."""
_lock = threading.RLock()
_measuring = threading.local()
if hasattr(os, "register_at_fork"):  # a child has none of the threads that may hold it
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.RLock()))


def notes_file() -> Path:
    """Where choices are remembered; a place that cannot be written where the user has no home."""
    own, base = os.environ.get("TENSORPRESS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(own) if own else (Path(base) if base else Path("~/.cache").expanduser()) / "tensorpress"
    except RuntimeError:
        folder = Path(os.devnull)
    return folder / "kernels.json"


def batch_of(rows: int) -> str:
    """The size of batch that `rows` inputs belong to: `1`, `8`, `64`, `512` or `more`."""
    return next((str(most) for most in BATCHES if rows <= most), "more")


def fastest(key: str, candidates: Sequence[Backend], layer: Any, x: torch.Tensor) -> Backend:
    """The fastest of the backends for a layer of this key on inputs like `x`: as remembered, else measured on `x` itself."""
    if getattr(_measuring, "now", False):  # a backend that hands a call on
        return candidates[0]
    names = {backend.name: backend for backend in candidates}
    machine = _machine(str(x.device), torch.get_num_threads())
    with _lock:
        known = _notes(notes_file()).setdefault(machine, {})
        found = known.get(key)
        if not isinstance(found, dict) or found.get("of") != sorted(names) or found.get("fastest") not in names:
            seconds, short = _measure(candidates, layer, x)
            found = {"fastest": min(seconds, key=lambda name: seconds[name]), "of": sorted(names), "seconds": seconds}
            known[key] = found
            if not short:
                _remember(machine, key, found)
        return names[found["fastest"]]


@torch.no_grad()
def _measure(candidates: Sequence[Backend], layer: Any, x: torch.Tensor) -> tuple[dict[str, float], bool]:
    """Seconds of the best run of each backend, after one that makes what it keeps, and whether memory was short for one just now.

    Such a one is left out, and one that is predicted to be far slower than another.
    """
    _measuring.now = True
    seconds: dict[str, float] = {}
    short = False
    try:
        for backend in candidates:
            if backend.room(layer) > _free_bytes() / 4 and (seconds or backend is not candidates[-1]):
                short = True
                continue
            best = min(seconds.values(), default=float("inf"))
            if seconds and backend.expected(layer, x) > UNTRIED * best:
                continue
            runs: list[float] = []
            for _ in range(REPEATS + 1):
                runs.append(_time(backend, layer, x))
                if len(runs) > 1 and runs[-1] > HOPELESS * best:
                    break
            seconds[backend.name] = min(runs[1:])  # in the first it makes what it keeps
    finally:
        _measuring.now = False
    return seconds, short


def _free_bytes() -> float:
    """Memory of the machine that nothing uses, not even as a cache; endless where the system does not say."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _time(backend: Backend, layer: Any, x: torch.Tensor) -> float:
    began = time.perf_counter()
    backend.run(layer, x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began


@functools.cache
def _machine(device: str, threads: int) -> str:
    """What a choice depends on besides the layer and its inputs."""
    from tensorpress.kernels import cpu_linear

    where = torch.device(device)
    name = device_name(where)
    if where.type == "cpu":
        name += f", {cpu_linear.instructions()}, {threads} threads"
    return f"{name}; torch {torch.__version__}; {cpu_linear.fingerprint()[:12]}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = next((line for line in lines if line.startswith("model name")), "")
    return named.partition(":")[2].strip() or platform.processor() or platform.machine()


@functools.cache
def _notes(file: Path) -> dict[str, dict[str, Any]]:
    """What a file remembers, read once; empty where it cannot be used."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def _remember(machine: str, key: str, found: dict[str, Any]) -> None:
    """Add a choice to the file as it is now: other processes write it too, and the last of two at once wins."""
    file = notes_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        notes = _notes.__wrapped__(file)
        notes.setdefault(machine, {})[key] = found
        write_whole(file, json.dumps(notes, indent=1, sort_keys=True))
    except OSError:
        pass
