"""Layers whose kernel is chosen as one operator of torch's library: `torch.compile` puts it into a graph whole, where ctypes would break it.

`tensorpress::linear` takes a layer's tensors, what rebuilds its empty form, and the name of a kernel, and does at run time what the layer itself
does: `auto` is measured and remembered. What kernels keep for graphs is counted and dropped with what the layer keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tensorpress.kernels import registry

if TYPE_CHECKING:
    from tensorpress.kernels.kernel_layer import KernelLayer

_layers = WeakTensorKeyDictionary()
"""The first tensor of a layer to the layers that graphs made of it: {(form, kernel): (where all tensors lie and how often they were
written to, layer)}. They go when the tensor goes."""


@torch.library.custom_op("tensorpress::linear", mutates_args=())
def linear(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], operation: str, numbers: Sequence[int], outputs: int, kernel: str
) -> torch.Tensor:
    """The product x W^T + b [..., outputs] for x [..., K]; the tensors are `stored()`, the numbers `numbers()` of a `KernelLayer`.

    Raises ValueError for a kernel that cannot run here.
    """
    layer = _layer(tensors, operation, tuple(numbers), kernel)
    return registry.kernel_for(operation, layer, x)(layer, x)


@linear.register_fake
def _shape(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], operation: str, numbers: Sequence[int], outputs: int, kernel: str
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _layer(tensors: Sequence[torch.Tensor], operation: str, numbers: tuple[int, ...], kernel: str) -> KernelLayer:
    """The layer of these tensors as they are now: one never gets others, so that threads and graphs do not change each other's."""
    from tensorpress.kernels.kernel_layer import KernelLayer

    known = _layers.setdefault(tensors[0], {})
    form = (operation, numbers, kernel)
    place = [(t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.shape, t.stride()) for t in tensors]
    found = known.get(form)
    if found is None or found[0] != place:
        with torch.device("meta"):
            layer = KernelLayer.kinds[operation].from_numbers(numbers)
        layer.place([tensor.detach() for tensor in tensors])
        layer.kernel = kernel
        found = known[form] = (place, layer)
    return found[1]


def layers_of(tensor: torch.Tensor) -> list[KernelLayer]:
    """What graphs made of the layer whose first tensor this is."""
    return [layer for _, layer in _layers.get(tensor, {}).values()]


def forget(tensor: torch.Tensor) -> None:
    """Drop what is kept for graphs of the layer whose first tensor this is."""
    _layers.pop(tensor, None)
