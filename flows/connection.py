"""Which Prefect server a store's commands talk to."""

from __future__ import annotations

from pathlib import Path

from tensorpress.flows.access import lets_in
from tensorpress.flows.server import answers, known_servers


def find_server(store: Path) -> tuple[str, str | None] | None:
    """Address and credentials of the server to use: that of PREFECT_API_URL, the store's own, or one on port 4200.

    None where none answers that lets us in.
    """
    for address, auth in known_servers(store):
        if answers(address) and lets_in(address, auth):
            return address, auth
    return None
