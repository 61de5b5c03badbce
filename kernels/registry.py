"""Which backend computes an operation: each says whether it can run a layer here; the plain reference always can.

A backend is a function (layer, x) -> y with a name. A layer's `kernel` names its backend, or is `auto`: then the fastest of those that
compute the reference's numbers up to rounding is measured and remembered (`measured`). The environment's
TENSORPRESS_KERNELS takes the place of `auto`. `names_in_use` tells a speed figure which kernels made it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tensorpress.kernels import measured

Kernel = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation."""

    operation: str
    name: str
    run: Kernel
    can_run: Callable[[Any], bool]
    automatic: bool
    """Whether `auto` may take it."""
    room: Callable[[Any], int]
    """Bytes that a call takes and gives back."""
    expected: Callable[[Any, torch.Tensor], float]
    """The seconds that are predicted for a call; 0 where nothing is."""


VARIABLE = "TENSORPRESS_KERNELS"
LAST = "last_kernel"
"""Of a layer: what was asked last, and the answer."""
_backends: dict[str, dict[str, Backend]] = {}


def register(
    operation: str,
    name: str,
    run: Kernel,
    can_run: Callable[[Any], bool] = lambda layer: True,
    *,
    automatic: bool = True,
    room: Callable[[Any], int] = lambda layer: 0,
    expected: Callable[[Any, torch.Tensor], float] = lambda layer, x: 0.0,
) -> None:
    """Add a backend. Of those that `auto` may take, the first that can run a layer is measured first."""
    _backends.setdefault(operation, {})[name] = Backend(operation, name, run, can_run, automatic, room, expected)


def backends(operation: str) -> dict[str, Backend]:
    return dict(_backends.get(operation, {}))


def operations() -> list[str]:
    return sorted(_backends)


def asked_for() -> str:
    """What the environment puts in the place of `auto`; `auto` if nothing."""
    return os.environ.get(VARIABLE) or "auto"


def triton_runs(tensor: torch.Tensor) -> bool:
    """Whether Triton is installed and can compute on a tensor: on a GPU, or anywhere in its interpreter (TRITON_INTERPRET=1)."""
    there = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return there and importlib.util.find_spec("triton") is not None


def named(operation: str, layer: Any) -> Backend | None:
    """The backend that a layer's `kernel` names, or the environment; None for `auto`. Raises ValueError when it is unknown or cannot."""
    known, name = _backends[operation], layer.kernel
    if name == "auto":
        name = asked_for()
        if name == "auto" or any(
            name in others for others in _backends.values() if others is not known and name not in known
        ):
            return None
    if name not in known:
        raise ValueError(f"kernel {name!r} is not known for {operation}; known: {', '.join(known)}")
    if not known[name].can_run(layer):
        raise ValueError(f"kernel {name!r} cannot run {layer}")
    return known[name]


def candidates(operation: str, layer: Any) -> list[Backend]:
    """What `auto` may take for a layer."""
    return [b for b in _backends[operation].values() if b.automatic and b.can_run(layer)]


def kernel_for(operation: str, layer: Any, x: torch.Tensor) -> Kernel:
    """What computes a layer on inputs like `x` [..., inputs]. Raises ValueError as `named`.

    The last answer is kept in the layer, until it is released: small products take no longer than finding it.
    """
    if type(x) is not torch.Tensor or torch.is_grad_enabled() or torch.jit.is_tracing():
        return _kernel_for(operation, layer, x)
    asked = (layer.kernel, x.shape, x.dtype, x.device, torch.get_num_threads())
    last = layer.__dict__.get(LAST)
    if last is None or last[0] != asked:
        last = layer.__dict__[LAST] = (asked, _kernel_for(operation, layer, x))
    kernel: Kernel = last[1]
    return kernel


def _kernel_for(operation: str, layer: Any, x: torch.Tensor) -> Kernel:
    return (named(operation, layer) or _fastest(operation, layer, x)).run


def _fastest(operation: str, layer: Any, x: torch.Tensor) -> Backend:
    size = x.numel()
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and size > 0 and x.device.type != "meta"
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if traced or not plain or (torch.is_grad_enabled() and _learns(layer, x)):
        return _backends[operation][getattr(layer, "trained_by", "reference")]
    batch = measured.batch_of(size // x.shape[-1])
    call = (batch, x.dtype, x.device, torch.get_num_threads())
    taken: dict[Any, str] = layer.__dict__.setdefault("taken", {})
    if call not in taken:
        several = candidates(operation, layer)
        if len(several) == 1:
            taken[call] = several[0].name
        else:
            key = f"{operation} {layer.kernel_key()}, {str(x.dtype).removeprefix('torch.')}, rows to {batch}"
            taken[call] = measured.fastest(key, several, layer, x).name
            layer.release(taken.values())  # what backends keep that were only measured
    return _backends[operation][taken[call]]


def _learns(layer: nn.Module, x: torch.Tensor) -> bool:
    return x.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())


def names_in_use(model: nn.Module) -> dict[str, int]:
    """How many layers of `model` each kernel computes: {"quantized_linear:reference": 56, "dense:torch": 1}.

    Layers on `auto` are counted by what they have taken so far, several names with `+`; by `auto` if they did not run yet.
    Raises ValueError as `named`.
    """
    counts: dict[str, int] = {}
    for module in model.modules():
        operation = operation_of(module)
        if operation is None:
            continue
        name = f"{operation}:{_name(operation, module) if operation in _backends else 'torch'}"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _name(operation: str, layer: Any) -> str:
    backend = named(operation, layer)
    if backend is not None:
        return backend.name
    several = candidates(operation, layer)
    taken = [several[0].name] if len(several) == 1 else layer.__dict__.get("taken", {}).values()
    return "+".join(sorted(set(taken))) or "auto"


def in_use(operation: str, layer: Any, rows: int) -> str:
    """The backend that computed so many rows last; the one that would be measured first where none did. Raises ValueError as `named`."""
    backend = named(operation, layer)
    if backend is not None:
        return backend.name
    batch = measured.batch_of(rows)
    taken = [name for call, name in layer.__dict__.get("taken", {}).items() if call[0] == batch]
    return taken[-1] if taken else candidates(operation, layer)[0].name


def operation_of(module: nn.Module) -> str | None:
    """The operation that a layer is, `dense` for one that nothing replaced; None for a module that is no linear layer."""
    kinds = {"Linear": "dense", "Conv1D": "dense"}
    named = getattr(module, "operation", None)
    return named if isinstance(named, str) and named in _backends else kinds.get(type(module).__name__)
