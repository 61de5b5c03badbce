"""A Prefect server for a run: the one that answers already, else one that the runs of a store share and that goes with the last.

This module must be used before `prefect` is imported: settings are read then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tensorpress.errors import StepError
from tensorpress.flows.access import credentials, lets_in, read_state, read_token
from tensorpress.flows.keeper import Meeting, sweep_places
from tensorpress.flows.place import here
from tensorpress.tasks.alive import is_gone
from tensorpress.tasks.progress import MLFLOW_VARIABLE

START_SECONDS = 90.0
REVIVALS = 5
"""So often a run starts its server again."""
AUTH_VARIABLE = "PREFECT_API_AUTH_STRING"
DEFAULT_ADDRESS = "http://127.0.0.1:4200/api"
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_DATABASE_TIMEOUT": "90",  # seconds that a server waits for its database while another program has it
    "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
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
    """The server of a run. `wait` returns its address; `stop` ends it if it is ours and no other run of the store uses it."""

    def __init__(self, store: Path):
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        self._meeting: Meeting | None = None
        self._stopped = threading.Event()
        self._watcher: threading.Thread | None = None
        found, served = find_server(store), read_state(store)
        self._named_mlflow = False
        if (
            found
            and served
            and found[0] == f"{served.prefect}/api"
            and not {MLFLOW_VARIABLE, "MLFLOW_TRACKING_URI"} & set(os.environ)
        ):
            self._named_mlflow = True
            os.environ[MLFLOW_VARIABLE] = served.mlflow  # runs leave a link to it
        if found is not None:  # Prefect's settings get what it wants to see, and nothing else
            self.address, auth = found
            os.environ.pop(AUTH_VARIABLE, None)
            os.environ |= {AUTH_VARIABLE: auth} if auth else {}
            return
        self._meeting = Meeting(store)
        self.mark = self._meeting.join(_free_port())
        self.address = self.mark["address"]

    def wait(self) -> str:
        """Wait until the server answers; sets PREFECT_API_URL. Raises StepError when it does not come up."""
        end = time.monotonic() + START_SECONDS
        while not answers(self.address, 2.0):
            if self._meeting is not None and is_gone(self.mark):
                raise StepError(f"the Prefect server did not start: {self._meeting.last_words()}")
            if time.monotonic() > end:
                raise StepError(f"the Prefect server did not answer within {START_SECONDS:.0f} s at {self.address}")
            time.sleep(0.1)
        os.environ["PREFECT_API_URL"] = self.address
        if self._meeting is not None:
            self._meeting.keep()
            self._watcher = threading.Thread(target=self._watch, args=(self._meeting,), daemon=True)
            self._watcher.start()
        return self.address

    def stop(self) -> None:
        """Use the server no longer."""
        self._stopped.set()
        if self._named_mlflow:
            os.environ.pop(MLFLOW_VARIABLE, None)
        if self._watcher is not None:  # it must not take for dead what is ended here
            self._watcher.join()
        if self._meeting is not None:
            if os.environ.get("PREFECT_API_URL") == self.address:
                del os.environ["PREFECT_API_URL"]
            self._meeting.leave()

    def _watch(self, meeting: Meeting) -> None:
        """Start the server again when it dies, where it was and with what it knew: what asks it then has an answer a little later."""
        for _ in range(REVIVALS):
            while not meeting.is_dead():
                if self._stopped.wait(1.0):
                    return
            meeting.revive()


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
    """Let flows of this process talk to the server at `address`, also where Prefect was imported before it was known.

    The server first hears of runs of the store that were killed; if this process is, the next one tells of it.
    """
    from prefect.exceptions import PrefectException
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    from tensorpress.artifact import Store
    from tensorpress.tasks.sweep import running, sweep

    for name in (
        "prefect",
        "prefect.flow_runs",
        "prefect.task_runs",
        "prefect._internal",
    ):  # errors are told once, by us
        logging.getLogger(name).setLevel(logging.CRITICAL)
    settings = {PREFECT_API_URL: address, PREFECT_API_AUTH_STRING: os.environ.get(AUTH_VARIABLE)}
    store = Store(here().store).open()
    with temporary_settings(settings):
        sweep_places()
        sweep(store)
        try:
            with running(store.root):
                yield
        except (PrefectException, httpx.HTTPError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise StepError(
                f"the Prefect server at {address} failed: {reason}; what was finished is kept, run the same command again to go on"
            ) from None


def find_server(store: Path) -> tuple[str, str | None] | None:
    """Address and credentials of the first of `known_servers` that answers and lets us in; None where none does."""
    for address, auth in known_servers(store):
        if answers(address) and lets_in(address, auth):
            return address, auth
    return None


def known_servers(store: Path) -> list[tuple[str, str | None]]:
    """Addresses where a server may be, each with the credentials that it may see: nobody else gets them.

    Those of the environment are for PREFECT_API_URL, the store's token for the store's own servers; whoever listens on port 4200
    besides is asked without any.
    """
    given, served, token = os.environ.get("PREFECT_API_URL"), read_state(store), read_token(store)
    own = [(f"{served.prefect}/api", credentials(token) if token else None)] if served else []
    named = [(given, os.environ.get(AUTH_VARIABLE))] if given else []
    if given and own and given == own[0][0]:
        named = []
    return [*named, *own, *([] if own else [(DEFAULT_ADDRESS, None)])]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
