"""Processes that a server starts and answers for: begun, watched, begun again when they die, ended with all they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from tensorpress.errors import StepError
from tensorpress.tasks.alive import die_with_parent

RESTARTS = 5
"""So often in ten minutes a process is begun again; after that something is wrong with it."""


class Child:
    """One process. `healthy` says whether it does its work; its output goes to a log file."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, healthy: Callable[[], bool]
    ):
        self.name, self.command, self.environment, self.log, self.healthy = name, command, environment, log, healthy
        self.process: subprocess.Popen[bytes] | None = None
        self.begun: list[float] = []

    def start(self) -> None:
        """Begin it, in a session of its own: Ctrl-C reaches us alone, and we end it in order."""
        self.begun.append(time.monotonic())
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command),
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )

    @property
    def dead(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def wait_healthy(self, seconds: float) -> None:
        """Wait until it answers. Raises StepError with the end of its log when it does not."""
        end = time.monotonic() + seconds
        while not self.healthy():
            if self.dead:
                code = self.process.returncode if self.process else "?"
                raise StepError(f"{self.name} ended at its start (exit code {code}): {self._last_words()}")
            if time.monotonic() > end:
                raise StepError(f"{self.name} did not answer within {seconds:.0f} s; its log: {self.log}")
            time.sleep(0.1)

    def revive(self) -> bool:
        """Begin it again if it died; False when it did so too often."""
        if not self.dead:
            return True
        recent = [moment for moment in self.begun if time.monotonic() - moment < 600]
        self._end_group()
        if len(recent) > RESTARTS:
            return False
        self.start()
        return True

    def end_below(self, patience: float = 5.0) -> None:
        """End what it started, and leave it a moment to tell of that: a worker reports how its runs ended."""
        if self.process is not None:
            end_all(descendants(self.process.pid), patience)
            time.sleep(0.5)

    def stop(self, patience: float = 5.0) -> None:
        """End it and all that it started."""
        if self.process is None:
            return
        family = descendants(self.process.pid)
        if not self.dead:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        end_all(family, patience)
        if not self.dead:
            self.process.kill()
            self.process.wait()
        self._end_group()

    def _end_group(self) -> None:
        """End what it left behind: MLflow's own server outlives a killed parent, and keeps its port."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        try:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            lines = []
        return lines[-1].strip()[:300] if lines else f"it said nothing in {self.log}"


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below one."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def end_all(family: Sequence[psutil.Process], patience: float) -> None:
    """SIGTERM to each, and SIGKILL to those that are still there."""
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=patience)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()


def answers_at(address: str) -> Callable[[], bool]:
    """A check that an address answers with 200."""

    def check() -> bool:
        with contextlib.suppress(httpx.HTTPError, OSError):
            return httpx.get(address, timeout=2.0, trust_env=False).status_code == 200
        return False

    return check


def clean_environment() -> dict[str, str]:
    """The environment for children, without what points at other servers."""
    foreign = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID")
    return {name: value for name, value in os.environ.items() if name not in foreign}
