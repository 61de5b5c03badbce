"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

WATCHED = (
    "tensorpress",
    "torch",
    "transformers",
    "tensorly",
    "safetensors",
    "numpy",
    "prefect",
    "mlflow",
    "optimum",
    "gptqmodel",
)


def versions() -> dict[str, str]:
    """Version of Python and of every watched package that is installed."""
    found = {"python": platform.python_version()}
    for name in WATCHED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
