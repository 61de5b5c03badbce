"""Registers the loading plug-in when transformers is there: at once, or as soon as it is imported.

So `import tensorpress` costs nothing until a model is opened.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

HOME = "transformers.modeling_utils"
"""What every way to a model imports: `AutoModel` and the architectures' own classes."""


def install() -> None:
    """Register with transformers now if it opens models already, else as soon as it can. Safe to call twice."""
    if HOME in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


def _register() -> None:
    importlib.import_module("tensorpress.quantizer")  # registers itself


class _AfterTransformers(MetaPathFinder):
    """Lets `_register` follow the first import of transformers' `modeling_utils`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == HOME else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
