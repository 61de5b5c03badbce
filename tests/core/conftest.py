"""Addresses that machines could share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["file", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address that machines share, of either kind."""
    return str(request.getfixturevalue("s3")) if request.param == "s3" else f"file://{tmp_path}/share"
