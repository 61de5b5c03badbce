"""tensorpress: a model compression pipeline as a DAG workflow.

Importing it registers the loading plug-in: from then on `transformers.AutoModelForCausalLM.from_pretrained` opens
artifacts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorpress import plugin
from tensorpress.errors import InputError, StepError

if TYPE_CHECKING:
    from tensorpress.api import compress
    from tensorpress.artifact import Artifact
    from tensorpress.loading import load
    from tensorpress.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Artifact", "InputError", "Recipe", "StepError", "compress", "load"]

plugin.install()

_HOMES = {"Artifact": "artifact", "Recipe": "recipe", "compress": "api", "load": "loading"}


def __getattr__(name: str) -> Any:
    """Import the heavier names when they are asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tensorpress' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"tensorpress.{_HOMES[name]}"), name)
