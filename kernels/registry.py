"""Which backend computes an operation: each says whether it can run a layer here; the plain reference always can.

A backend is a function (layer, x) -> y with a name. `choose` sets the backend of one layer; `names_in_use` tells a
speed figure which kernels made it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Kernel = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation."""

    operation: str
    name: str
    run: Kernel
    can_run: Callable[[Any], bool]


_backends: dict[str, dict[str, Backend]] = {}


def register(operation: str, name: str, run: Kernel, can_run: Callable[[Any], bool] = lambda layer: True) -> None:
    """Add a backend; the last that was registered and can run a layer is preferred over the ones before it."""
    _backends.setdefault(operation, {})[name] = Backend(operation, name, run, can_run)


def backends(operation: str) -> dict[str, Backend]:
    return dict(_backends.get(operation, {}))


def operations() -> list[str]:
    return sorted(_backends)


def chosen(operation: str, layer: Any) -> Backend:
    """The backend that will compute `layer`. Raises ValueError when the one asked for is unknown or cannot."""
    known = _backends[operation]
    if layer.kernel != "auto":
        if layer.kernel not in known:
            raise ValueError(f"kernel {layer.kernel!r} is not known for {operation}; known: {', '.join(known)}")
        if not known[layer.kernel].can_run(layer):
            raise ValueError(f"kernel {layer.kernel!r} cannot run {layer}")
        return known[layer.kernel]
    return next(b for b in reversed(known.values()) if b.can_run(layer))


def kernel_for(operation: str, layer: Any, x: torch.Tensor) -> Kernel:
    return chosen(operation, layer).run


def names_in_use(model: nn.Module) -> dict[str, int]:
    """How many layers of `model` each kernel computes: {"quantized_linear:reference": 56, "dense:torch": 1}."""
    counts: dict[str, int] = {}
    for module in model.modules():
        operation = getattr(module, "operation", None) or _operation_of(module)
        if operation is None:
            continue
        name = f"{operation}:{chosen(operation, module).name}" if operation in _backends else f"{operation}:torch"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _operation_of(module: nn.Module) -> str | None:
    kind = type(module).__name__
    return {"QuantizedLinear": "quantized_linear", "MPOLinear": "mpo_linear", "Linear": "dense", "Conv1D": "dense"}.get(
        kind
    )
