"""Which Prefect server a store's commands talk to."""

from __future__ import annotations

import os
from pathlib import Path

from tensorpress.flows.access import credentials, lets_in, read_state, read_token
from tensorpress.flows.server import DEFAULT_ADDRESS, answers


def find_server(store: Path) -> tuple[str, str | None] | None:
    """Address and credentials of the server to use: that of PREFECT_API_URL, the store's own, or one on port 4200.

    None where none answers that lets us in.
    """
    token = read_token(store)
    own = [os.environ.get("PREFECT_API_AUTH_STRING"), credentials(token) if token else None, None]
    state = read_state(store)
    served = f"{state.prefect}/api" if state else None
    for address in dict.fromkeys([os.environ.get("PREFECT_API_URL"), served, DEFAULT_ADDRESS]):
        if address and answers(address):
            for auth in dict.fromkeys(own):
                if lets_in(address, auth):
                    return address, auth
    return None
