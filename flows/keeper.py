"""A Prefect server that the runs of one store share: the first of them starts it, the last one ends it.

`python -m tensorpress.flows.keeper FOLDER STORE PORT` is its process. Runs and server meet in a folder of this machine: `lock` is
held by who starts, joins or leaves; `users` is shared by all that use the server; `server.json` says where it is. The server
waits to have `users` alone, so that it ends, too, when the last of them was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from tensorpress.files import write_whole
from tensorpress.starting import starting
from tensorpress.tasks.alive import is_gone, mark_of

PREFIX = "tensorpress-prefect-"
PATIENCE = 8.0
"""Seconds that a server has to end."""


class Meeting:
    """Where the runs of a store meet their server."""

    def __init__(self, store: Path, folder: Path | None = None):
        self.store = store
        self.folder = folder or _meeting_place(store)
        self._users: int | None = None

    def join(self, port: int) -> dict[str, str]:
        """Use the server from now on; it is started at `port` where there is none. Returns its mark, with its `address`."""
        with self.alone():
            self._users = _locked(self.folder / "users", fcntl.LOCK_SH)
            known = self._known()
            return known if known and not is_gone(known) else self._start(known["port"] if known else str(port))

    def is_dead(self) -> bool:
        """Whether the server died."""
        known = self._known()
        return known is not None and is_gone(known)

    def last_words(self) -> str:
        """The end of what the server said."""
        for log in (self.folder / "home/server.log", self.store / "prefect/server.log", self.folder / "server.log"):
            with contextlib.suppress(OSError):
                lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
                if lines:
                    return lines[-1][:300]
        return "it said nothing"

    def revive(self) -> None:
        """Start the server again, where it was, if it died."""
        with self.alone():
            known = self._known()
            if known and is_gone(known):
                self._start(known["port"])

    def keep(self) -> None:
        """From now on the store is to have the server's database in the end."""
        (self.folder / "keep").touch()

    def leave(self) -> None:
        """Use the server no longer; the last one ends it."""
        if self._users is None:
            return
        with self.alone():
            os.close(self._users)
            self._users = None
            known = self._known()
            if known and not self.is_used():
                _end(known)
                self.settle()

    def is_used(self) -> bool:
        """Whether any run uses the server; whoever asks holds the place's lock."""
        handle = _locked(self.folder / "users", fcntl.LOCK_EX)
        if handle is not None:
            os.close(handle)
        return handle is None

    def settle(self) -> None:
        """Give the store what it is to keep and remove the rest, when the server has ended; nobody else uses this place meanwhile."""
        shared, passing = self.store / "prefect", self.folder / "home"
        if (self.folder / "keep").exists() and passing.is_dir() and not shared.exists():
            part = self.store / f".part-prefect-{os.getpid()}"
            with contextlib.suppress(OSError):  # a disk that is full
                shutil.copytree(passing, part)
                part.rename(shared)
            shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the place's lock: nobody starts, joins or leaves meanwhile."""
        lock = None
        while lock is None:
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            lock = _locked(self.folder / "lock", fcntl.LOCK_EX, wait=True)
        try:
            yield
        finally:
            os.close(lock)

    def _known(self) -> dict[str, str] | None:
        """The server that was started here last."""
        try:
            return dict(json.loads((self.folder / "server.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def _start(self, port: str) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API_")}
        with (self.folder / "server.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tensorpress.flows.keeper", str(self.folder), str(self.store), port],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        server = {**mark_of(process.pid), "port": port, "address": f"http://127.0.0.1:{port}/api"}
        write_whole(self.folder / "server.json", json.dumps(server))
        return server


def sweep_places() -> None:
    """Remove the meeting places of this user whose server died, unless a run is there to start it again."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        place = Meeting(Path(), folder)
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and place.is_dead():
                with place.alone():
                    if place.is_dead() and not place.is_used():
                        shutil.rmtree(folder, ignore_errors=True)


def home_of(folder: Path, store: Path) -> tuple[Path, FileLock | None]:
    """Where the server's database is: in the store, whose lock is then held; in the meeting place where the store has no such
    folder yet, so that nothing is written before a run's input was checked, or where another server has it.
    """
    passing, shared = folder / "home", store / "prefect"
    there = False
    with contextlib.suppress(OSError):  # a name that is too long, a folder that may not be entered
        there = shared.is_dir() and not passing.is_dir()
    if there:
        lock = FileLock(shared / "server.lock")
        with contextlib.suppress(Timeout, OSError):
            lock.acquire(blocking=False)
            return shared, lock
    passing.mkdir(exist_ok=True)
    return passing, None


def main(folder: Path, store: Path, port: int) -> None:
    """Be the server."""
    home, _lock = home_of(folder, store)
    os.environ |= {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}",
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "TENSORPRESS_ALLOWED_HOSTS": "127.0.0.1,localhost",
    }
    log = os.open(home / "server.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    with starting():
        import uvicorn

        from tensorpress.flows.prefect_app import create

        application = create()
    config = uvicorn.Config(application, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    threading.Thread(target=_serve_while_used, args=(Meeting(store, folder), server), daemon=True).start()
    server.run()


def _serve_while_used(meeting: Meeting, server: Any) -> None:
    """End the process when all its users were killed; one that leaves in order ends it itself."""
    while True:
        time.sleep(0.5)
        with meeting.alone():
            if not meeting.is_used():
                server.should_exit = True
                time.sleep(1.0)
                meeting.settle()
                os._exit(0)


def _end(server: dict[str, str]) -> None:
    with contextlib.suppress(psutil.Error, ValueError):
        process = psutil.Process(int(server["pid"]))
        if not is_gone(server):
            process.terminate()
            if psutil.wait_procs([process], timeout=PATIENCE)[1]:
                process.kill()
                process.wait(1)


def _meeting_place(store: Path) -> Path:
    """A folder of this user alone, by the store's name; a passing one where somebody else has taken the name."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(store))).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"{PREFIX}{os.getuid()}-{name}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        seen = folder.lstat()
        ours = seen.st_uid == os.getuid() and seen.st_mode & 0o170077 == 0o040000
    except OSError:
        ours = False
    return folder if ours else Path(tempfile.mkdtemp(prefix=PREFIX))


def _locked(path: Path, kind: int, wait: bool = False) -> int | None:
    """A descriptor that holds a file's lock; None where it cannot be had now, or the file has gone meanwhile."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == path.stat().st_ino:
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
