"""A Prefect server for one run: the one that answers already, else one of our own that goes when the run ends.

This module must be used before `prefect` is imported: settings are read then.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from filelock import FileLock, Timeout

from tensorpress.errors import StepError

START_SECONDS = 90.0
DEFAULT_ADDRESS = "http://127.0.0.1:4200/api"
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_CLI_PROMPT": "false",
}


def answers(address: str, seconds: float = 0.5) -> bool:
    """Whether a Prefect API answers at `address` (as http://127.0.0.1:4200/api)."""
    try:
        return httpx.get(f"{address}/health", timeout=seconds, trust_env=False).json() is True
    except (httpx.HTTPError, ValueError, OSError):
        return False


class PrefectServer:
    """The server of one run. `wait` returns its address; `stop` ends it if it is ours."""

    def __init__(self, store: Path):
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        self.process: subprocess.Popen[bytes] | None = None
        self._own: FileLock | None = None
        self._passing: tempfile.TemporaryDirectory[str] | None = None
        self._waited = False
        self._later: Path | None = None
        """Where the passing folder is kept in the end: a store that had none."""
        given = os.environ.get("PREFECT_API_URL")
        self.address = next((a for a in (given, DEFAULT_ADDRESS) if a and answers(a)), "")
        if self.address:
            return
        port = _free_port()
        self.address = f"http://127.0.0.1:{port}/api"
        home = self._home(store / "prefect")
        log = (home / "server.log").open("wb")
        environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}
        environment.pop("PREFECT_API_URL", None)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "prefect",
                "server",
                "start",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            preexec_fn=_die_with_parent,
        )

    def _home(self, shared: Path) -> Path:
        """The store's own folder for Prefect's database; a passing one where there is none yet or another run's server has it.

        So nothing is written into a store before the run's input was checked; in the end the store gets it.
        """
        there = False
        with contextlib.suppress(OSError):  # a name that is too long, a folder that may not be entered
            there = shared.is_dir()
        if there:
            self._own = FileLock(shared / "server.lock")
            with contextlib.suppress(Timeout, OSError):
                self._own.acquire(blocking=False)
                return shared
        self._passing = tempfile.TemporaryDirectory(prefix="tensorpress-prefect-", ignore_cleanup_errors=True)
        self._later = None if there else shared
        return Path(self._passing.name)

    def wait(self) -> str:
        """Wait until the server answers; sets PREFECT_API_URL. Raises StepError when it does not come up."""
        self._waited = True
        end = time.monotonic() + START_SECONDS
        while not answers(self.address, 2.0):
            if self.process is not None and self.process.poll() is not None:
                raise StepError(f"the Prefect server did not start (exit code {self.process.returncode})")
            if time.monotonic() > end:
                raise StepError(f"the Prefect server did not answer within {START_SECONDS:.0f} s at {self.address}")
            time.sleep(0.1)
        os.environ["PREFECT_API_URL"] = self.address
        return self.address

    def stop(self) -> None:
        """End the server if this run started it."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._own is not None:
            self._own.release()
        if self._passing is not None:
            if self._waited and self._later is not None and not self._later.exists():
                part = self._later.with_name(f".part-prefect-{os.getpid()}")
                with contextlib.suppress(OSError):
                    shutil.copytree(self._passing.name, part)
                    part.rename(self._later)
                shutil.rmtree(part, ignore_errors=True)
            self._passing.cleanup()


@contextlib.contextmanager
def prefect_server(store: Path) -> Iterator[PrefectServer]:
    """A server that is stopped at the end, however the run ends."""
    server = PrefectServer(store)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Let flows of this process talk to the server at `address`, also where Prefect was imported before it was known."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs"):  # errors are told once, by us
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with temporary_settings({PREFECT_API_URL: address}):
        yield


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Linux: the server gets SIGTERM when the run that started it is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
