"""An S3 server of this process, and addresses that machines could share."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3-compatible server on 127.0.0.1. As in S3, a conditional write is one step: moto alone looks first, then writes."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    one_at_a_time, put = threading.Lock(), S3Response.put_object

    def put_object(self: Any) -> Any:
        with one_at_a_time:
            return put(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_object)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        httpx.put(f"http://{host}:{port}/bucket", trust_env=False).raise_for_status()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://bucket/prefix`, a fresh prefix, which this process and those that it starts find by their environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    return f"s3://bucket/{uuid.uuid4().hex}/prefix"


@pytest.fixture(params=["file", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address that machines share, of either kind."""
    return str(request.getfixturevalue("s3")) if request.param == "s3" else f"file://{tmp_path}/share"
