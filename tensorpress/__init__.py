"""tensorpress: a model compression pipeline as a DAG workflow.

Importing it registers the loading plug-in: from then on `transformers.AutoModelForCausalLM.from_pretrained` opens
artifacts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorpress.errors import InputError, StepError
from tensorpress.loading import load, register

if TYPE_CHECKING:
    from tensorpress.api import compress
    from tensorpress.artifact import Artifact
    from tensorpress.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Artifact", "InputError", "Recipe", "StepError", "compress", "load"]

register()


def __getattr__(name: str) -> Any:
    """Import the heavier names when they are asked for."""
    if name == "Artifact":
        from tensorpress.artifact import Artifact

        return Artifact
    if name == "Recipe":
        from tensorpress.recipe import Recipe

        return Recipe
    if name == "compress":
        from tensorpress.api import compress

        return compress
    raise AttributeError(f"module 'tensorpress' has no attribute {name!r}")
