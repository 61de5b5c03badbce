"""The token of a store's servers: made once, kept in a file that only its owner can read, sent with every request."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

USER = "tensorpress"
LOOPBACK = ("127.0.0.1", "localhost")


def serve_folder(store: Path) -> Path:
    """Folder of what a store's servers keep to themselves, open to its owner alone."""
    folder = store / "serve"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def read_token(store: Path) -> str | None:
    """The token of the store's servers; None where none was made or it is somebody else's."""
    try:
        return (store / "serve" / "token").read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def make_token(store: Path) -> tuple[str, bool]:
    """The token of the store's servers, and whether it was made just now."""
    known = read_token(store)
    if known:
        return known, False
    made = secrets.token_urlsafe(24)
    write_private(serve_folder(store) / "token", made + "\n")
    return made, True


def write_private(path: Path, text: str) -> None:
    """Write a file that nobody but its owner can read, at no moment."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)


def credentials(token: str) -> str:
    """User and token as Prefect's settings take them."""
    return f"{USER}:{token}"


def lets_in(address: str, auth: str | None, seconds: float = 2.0) -> bool:
    """Whether the Prefect API at `address` takes these credentials (`user:token`, or None where it asks for none)."""
    pair = tuple(auth.split(":", 1)) if auth and ":" in auth else None
    try:
        answer = httpx.get(f"{address}/admin/version", auth=pair, timeout=seconds, trust_env=False)  # type: ignore[arg-type]
    except (httpx.HTTPError, ValueError, OSError):
        return False
    return answer.status_code == 200


@dataclass(frozen=True)
class State:
    """What others may know of a store's servers: `serve/state.json`."""

    pid: int
    created: float
    """Start of the process, in seconds since the epoch: a number that was given to another process again is noticed."""
    prefect: str
    mlflow: str


def read_state(store: Path) -> State | None:
    """The servers of a store, if they run."""
    try:
        state = State(**json.loads((store / "serve" / "state.json").read_text(encoding="utf-8")))
        alive = abs(psutil.Process(state.pid).create_time() - state.created) < 1.0
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    return state if alive else None
