"""The place where machines share artifacts and measurements: an fsspec address, such as `s3://bucket/prefix` or `file:///mnt/share`.

Layout: `models/<digest>/tensorpress.json`, the record, is written last, and without it the artifact is not there; its card
`README.md` beside it; its files in `models/<digest>/<digest of the files>/`, so that bytes of two machines never mix in one
artifact; `evaluations/<digest>.json`; `locks/<name>/` (see `tensorpress.lease`). What comes from there is input from outside.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem

from tensorpress import digest
from tensorpress.checks import one_line
from tensorpress.errors import InputError, StepError

VARIABLE = "TENSORPRESS_REMOTE"
"""Environment variable with the address; without it a store is a folder of one machine."""
ANSWER = 8.0
"""Seconds that the address has to answer when it is first asked."""
RECORD, CARD = "tensorpress.json", "README.md"
S3 = ("s3", "s3a")

_log = logging.getLogger("tensorpress")


def remote_here() -> Remote | None:
    """The remote that the environment names, None where it names none. Nothing is asked of it yet."""
    address = os.environ.get(VARIABLE, "").strip()
    return _remote(address, os.getpid()) if address else None


@lru_cache(maxsize=16)
def _remote(address: str, _process: int) -> Remote:  # connections do not outlive a fork
    return Remote(address)


class Remote:
    """Files on an fsspec address, by keys such as `models/<digest>/README.md`.

    Opened when first used: InputError within `ANSWER` seconds where it cannot be used. After that every method raises
    StepError with one line when the address stops answering.
    """

    def __init__(self, address: str):
        self.address = address
        self.shown = re.sub(r"//[^/]*@", "//", address)
        """The address without a password."""
        self._opening = threading.Lock()
        self._files: AbstractFileSystem | None = None
        self._root = ""

    def open(self) -> Remote:
        """Find out whether it answers, can be written, and creates files exclusively, which locks need. Raises InputError."""
        with self._opening:
            if self._files is None:
                files, self._root = self._filesystem()
                self._within_seconds(files)
                self._files = files
        return self

    def _filesystem(self) -> tuple[AbstractFileSystem, str]:
        protocol, path = split_protocol(self.address)
        local = protocol in ("file", "local")
        if not protocol or "::" in self.address or not path.strip("/") or (local and not path.startswith("/")):
            raise InputError(
                f"store: {VARIABLE}: found {self.shown!r}; an address is file:///folder or s3://bucket/prefix"
            )
        if protocol == "memory":
            raise InputError(f"store: {self.shown}: is the memory of one process; nothing else could read it")
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        try:
            files, root = fsspec.core.url_to_fs(self.address, **options, **({"auto_mkdir": True} if local else {}))
        except ImportError as error:
            hint = "; pip install 'tensorpress[s3]'" if protocol in S3 else ""
            raise InputError(f"store: {self.shown}: {one_line(error)}{hint}") from None
        except Exception as error:  # every filesystem has errors of its own
            raise InputError(f"store: {self.shown}: {one_line(error)}") from None
        writer = getattr(files, "_pipe_file", None)
        if not local and (writer is None or "mode" not in inspect.signature(writer).parameters):
            raise InputError(
                f"store: {self.shown}: files of {protocol}:// cannot be created exclusively, which locks need; "
                "file:// and s3:// can"
            )
        if local and not Path(root).parent.is_dir():
            raise InputError(f"store: {self.shown}: there is no folder {Path(root).parent}")
        return files, root.rstrip("/")

    def _within_seconds(self, files: AbstractFileSystem) -> None:
        outcome: list[Exception | None] = []

        def ask() -> None:
            try:
                self._try_exclusive(files)
                outcome.append(None)
            except Exception as error:
                outcome.append(error)

        asking = threading.Thread(target=ask, daemon=True)  # name service and retries know no limit of their own
        asking.start()
        asking.join(ANSWER)
        if not outcome:
            raise InputError(f"store: {self.shown} does not answer within {ANSWER:.0f} s")
        (error,) = outcome
        if isinstance(error, InputError):
            raise error
        if error is not None:
            raise InputError(f"store: {self.shown} cannot be used: {one_line(error)}")

    def _try_exclusive(self, files: AbstractFileSystem) -> None:
        key = f"{self._root}/locks/.exclusive"
        if self._create(files, key, uuid.uuid4().bytes) and self._create(files, key, uuid.uuid4().bytes):
            raise InputError(
                f"store: {self.shown}: writes over a file that was to be created only once, so locks would not hold; "
                "an S3 server must know conditional writes (If-None-Match)"
            )

    @property
    def files(self) -> AbstractFileSystem:
        self.open()
        assert self._files is not None
        return self._files

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (InputError, StepError):
            raise
        except Exception as error:  # every filesystem has errors of its own
            raise StepError(f"store: {self.shown}: {one_line(error)}") from None

    def _key(self, key: str) -> str:
        self.open()
        return f"{self._root}/{key}"

    # --- files

    def read(self, key: str) -> bytes | None:
        """The bytes of a small file; None where there is none."""
        with self._asking(), contextlib.suppress(FileNotFoundError):
            return _read(self.files, self._key(key))
        return None

    def write(self, key: str, value: bytes) -> None:
        """Write a small file whole or not at all, over what was there."""
        path = self._key(key)
        with self._asking():
            if not isinstance(self.files, LocalFileSystem):
                _make_folder(self.files, path)
                self.files.pipe_file(path, value)
                return
            part = f"{path}.part-{uuid.uuid4().hex}"
            self.files.pipe_file(part, value)
            self.files.mv(part, path)

    def create(self, key: str, value: bytes) -> bool:
        """Write a small file that nobody wrote before; False where somebody did. `value` must be like no other's."""
        path = self._key(key)
        with self._asking():
            return self._create(self.files, path, value)

    @staticmethod
    def _create(files: AbstractFileSystem, path: str, value: bytes) -> bool:
        try:
            if isinstance(files, LocalFileSystem):
                with files.open(path, "xb") as file:  # its pipe_file looks first and writes then
                    file.write(value)
            else:
                _make_folder(files, path)
                files.pipe_file(path, value, mode="create")
            return True
        except Exception as error:
            with contextlib.suppress(FileNotFoundError):
                return _read(files, path) == value  # ours: the answer to our first try was lost
            if "Conflict" in str(error):  # S3: another one is being written just now
                return False
            raise

    def names(self, folder: str, prefix: str) -> list[str]:
        """Names of the files in a folder that begin with `prefix`."""
        path = self._key(folder)
        with self._asking(), contextlib.suppress(FileNotFoundError):
            # `find` with a prefix is one request in S3, `ls` of an empty folder lists the one above it as well
            found = self.files.find(path, prefix=prefix)
            return [name for name in (item.rsplit("/", 1)[1] for item in found) if name.startswith(prefix)]
        return []

    def remove(self, key: str) -> None:
        """Remove a file that may be gone."""
        with self._asking(), contextlib.suppress(FileNotFoundError):
            self.files.rm_file(self._key(key))

    # --- artifacts

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of an artifact that is there; None where there is none that can be used."""
        return self._record(name, self.read(f"models/{name}/{RECORD}"))

    def _record(self, name: str, content: bytes | None) -> dict[str, Any] | None:
        if content is None:
            return None
        problem = problem_of_record(content, name)
        if problem:
            _log.warning("store: %s: artifact %s is not used: %s", self.shown, name[:12], problem)
        return None if problem else json.loads(content)

    def fetch(self, name: str, into: Path) -> bool:
        """Bring an artifact into a new folder; False where there is none. Its bytes are as they came: whoever takes them checks."""
        content = self.read(f"models/{name}/{RECORD}")
        record = self._record(name, content)
        if content is None or record is None:
            return False
        into.mkdir(parents=True)
        for file in record["files"]:
            path = self._key(_file_key(name, record, file))
            with self._asking(), contextlib.suppress(FileNotFoundError):
                self.files.get_file(path, str(into / file))
        (into / CARD).write_bytes(self.read(f"models/{name}/{CARD}") or b"")
        (into / RECORD).write_bytes(content)
        return True

    def upload(self, name: str, folder: Path) -> None:
        """Send the files of an artifact. It is not there yet: see `commit`."""
        record = json.loads((folder / RECORD).read_bytes())
        for file in record["files"]:
            path = self._key(_file_key(name, record, file))
            with self._asking():
                _make_folder(self.files, path)
                self.files.put_file(str(folder / file), path)

    def commit(self, name: str, folder: Path) -> None:
        """Send card and record of an artifact whose files were sent: now it is there."""
        self.write(f"models/{name}/{CARD}", (folder / CARD).read_bytes())
        self.write(f"models/{name}/{RECORD}", (folder / RECORD).read_bytes())

    def renew(self, name: str, folder: Path) -> None:
        """Send card and record again if the artifact that is there has the same files."""
        record, there = json.loads((folder / RECORD).read_bytes()), self.record(name)
        if there is not None and there != record and there["files"] == record["files"]:
            self.commit(name, folder)


def problem_of_record(content: bytes, name: str) -> str | None:
    """Why a record that came from outside names no files that could be fetched; None where it does."""
    try:
        record = json.loads(content)
        if record["digest"] != name:
            return f"its record is that of {str(record['digest'])[:12]!r}"
        for file in {**record["files"]}:
            if not _is_plain(file):
                return f"{file[:80]!r} is not a plain file name"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "its record cannot be read"
    return None


def _is_plain(file: str) -> bool:
    """Whether a name is that of a file in the folder itself, whatever it is joined to."""
    taken = file in ("", ".", "..", RECORD, CARD)
    return not taken and file.isprintable() and not set(file) & {"/", "\\"} and len(file.encode()) <= 200


def _file_key(name: str, record: dict[str, Any], file: str) -> str:
    return f"models/{name}/{digest.of_json(record['files'])[:16]}/{file}"


def _read(files: AbstractFileSystem, path: str) -> bytes:
    once = {"max_concurrency": 1} if files.protocol == S3 else {}  # no question for the length before
    return bytes(files.cat_file(path, **once))


def _make_folder(files: AbstractFileSystem, path: str) -> None:
    """S3 has no folders; the local filesystem makes them by itself."""
    if files.protocol != S3 and not isinstance(files, LocalFileSystem):
        files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
