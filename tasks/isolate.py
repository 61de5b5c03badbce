"""Work in a process of its own: stopped when it takes too long or too much memory, and when it dies, it dies alone.

What is said between the two is lines of JSON; see `tensorpress.tasks.child`, the other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import IO, Any

import psutil

from tensorpress.errors import InputError, StepError
from tensorpress.tasks.progress import reporter

Clock = Callable[[], AbstractContextManager[Any]]
"""`with clock():` around work says that its time counts: the wait for a lock does not."""
SWITCH = "TENSORPRESS_ISOLATE"
"""Environment variable: `1` isolates work that has no limits as well."""
BETWEEN = 0.2
"""Seconds between two looks at what the process takes."""
GIB = 1 << 30

_at_work: set[_Process] = set()


def is_isolated(limits: Mapping[str, float | None] | None) -> bool:
    """Whether work with these limits gets a process of its own."""
    return any(value is not None for value in (limits or {}).values()) or os.environ.get(SWITCH) == "1"


def run_isolated(
    entry: str, arguments: Mapping[str, Any], limits: Mapping[str, float | None] | None, label: str
) -> Any:
    """Call the function `entry` ("module:function") with JSON-able `arguments` and a `clock` in a process of its own; return
    what it returns, as JSON has it. Progress is reported here under `label`.

    Limits are `seconds` of wall time and `memory` in GiB (resident, with the process's own children). InputError and StepError are
    raised here with the text that they have there; StepError also when a limit stops the work, or it dies.
    """
    import torch

    process = _Process(entry, arguments, torch.get_num_threads())
    _at_work.add(process)
    try:
        return process.answer(limits or {}, reporter(label))
    finally:
        process.end()
        _at_work.discard(process)


def stop_isolated() -> None:
    """Stop at once all that runs isolated, from whatever thread; the work fails with "was stopped"."""
    for process in list(_at_work):
        process.kill("was stopped")


class _Process:
    def __init__(self, entry: str, arguments: Mapping[str, Any], threads: int):
        self.problem: str | None = None
        """Why it was killed, if we did it."""
        self.peak = 0
        self.began: float | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tensorpress.tasks.child"],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.last_words: deque[bytes] = deque(maxlen=20)
        self.threads = [
            threading.Thread(target=_read, args=(self.process.stdout, self.lines.put, self.lines.put), daemon=True),
            threading.Thread(target=_read, args=(self.process.stderr, self.last_words.append), daemon=True),
        ]
        for thread in self.threads:
            thread.start()
        request = {"entry": entry, "arguments": dict(arguments), "parent": os.getpid()}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:  # it died already; that is told below
            pipe.write(json.dumps(request).encode())

    def answer(self, limits: Mapping[str, float | None], report: Callable[[str, int, int], None]) -> Any:
        """Wait for what it returns. Raises InputError, StepError."""
        result: dict[str, Any] = {}
        looked = -BETWEEN
        while True:
            if time.monotonic() - looked >= BETWEEN:
                self._watch(limits)
                looked = time.monotonic()
            try:
                line = self.lines.get(timeout=BETWEEN)
            except queue.Empty:
                continue
            if line is None:
                break
            try:
                said = json.loads(line)
            except ValueError:  # killed while it spoke
                continue
            if "progress" in said:
                report(*said["progress"])
            elif "clock" in said:
                self.began = time.monotonic() if said["clock"] else None
            else:
                result = said
        if self.problem is None and "result" in result:
            return result["result"]
        if self.problem is None and "refused" in result:
            raise InputError(*result["refused"])
        raise StepError(self.problem or result.get("failed") or self._death())

    def _watch(self, limits: Mapping[str, float | None]) -> None:
        used = _memory(self.process.pid)
        self.peak = max(self.peak, used)
        most, seconds = limits.get("memory"), limits.get("seconds")
        if most is not None and used > most * GIB:
            self.kill(f"needed more than {most:g} GiB (limits.memory) and was stopped")
        elif seconds is not None and self.began is not None and time.monotonic() - self.began > seconds:
            self.kill(f"took longer than {seconds:g} s and was stopped (limits.seconds)")

    def _death(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return f"was killed by signal 9, most likely for want of memory (its peak was {self.peak / GIB:.1f} GiB)"
        self.threads[1].join(1.0)
        words = [line.decode(errors="replace").strip() for line in self.last_words]
        last = next((f": {line[:300]}" for line in reversed(words) if line), "")
        return f"was killed by signal {-code}{last}" if code < 0 else f"its process ended (exit code {code}){last}"

    def kill(self, problem: str) -> None:
        """Kill it with all that it started; the work fails with this problem."""
        self.problem = self.problem or problem
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Nothing of it is left after this."""
        if self.process.poll() is None and self.problem is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5 if sys.exc_info()[0] is None else 0.0)
        self.kill("was stopped")
        self.process.wait()


def _read(pipe: IO[bytes], take: Callable[[bytes], None], at_end: Callable[[None], None] | None = None) -> None:
    with contextlib.suppress(ValueError, OSError), pipe:
        for line in pipe:
            take(line)
    if at_end is not None:
        at_end(None)


def _memory(pid: int) -> int:
    """Resident bytes of a process and of all below it."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += member.memory_info().rss
    return total
