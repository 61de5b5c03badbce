"""What would be run, and processes that know nothing of the one that tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INHERITED = ("MAKE", "MFLAGS", "PREFECT_", "PYTHONPATH")


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., str]:
    """`fresh("print(1)")`: what Python prints that runs the code, or the command, in an empty folder."""

    def run(code: str | list[str], *arguments: str, cwd: Path | None = None, **variables: str) -> str:
        command = [sys.executable, "-c", code] if isinstance(code, str) else code
        folder = tmp_path / "empty"
        folder.mkdir(exist_ok=True)
        quiet = {"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "true"}
        ended = subprocess.run(
            [*command, *arguments],
            env={**clean_environment(), **quiet, **variables},
            cwd=cwd or folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        return ended.stdout

    return run


@pytest.fixture
def make_prints(tmp_path: Path) -> Callable[[str], list[str]]:
    """`make_prints("install")`: the commands of a target where nothing is installed yet; none is run."""

    def run(target: str) -> list[str]:
        places = [f"VENV={tmp_path}/venv", f"GPTQ_VENV={tmp_path}/gptq"]
        ended = subprocess.run(
            ["make", "--dry-run", target, *places],
            env=clean_environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.splitlines()

    return run
