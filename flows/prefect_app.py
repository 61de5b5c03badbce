"""Prefect's server as tensorpress starts it: only for requests that name a host it was started for.

Prefect itself takes any Host header, so that a foreign page whose name is made to point here could reach it.
"""

from __future__ import annotations

import os
from typing import Any

HOSTS_VARIABLE = "TENSORPRESS_ALLOWED_HOSTS"


def create() -> Any:
    """The ASGI application, for `uvicorn --factory`."""
    from prefect.server.api.server import create_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = os.environ[HOSTS_VARIABLE].split(",")
    return TrustedHostMiddleware(create_app(final=True), allowed_hosts=hosts, www_redirect=False)
