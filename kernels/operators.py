"""The quantized layer as an operator of torch's library: `torch.compile` puts it into a graph whole, where ctypes would break it.

`tensorpress::quantized_linear` takes the layer's tensors and the name of a kernel, and does at run time what the layer itself does: `auto` is
measured and remembered, what compiled kernels keep is shared with the layer. Other layers are plain operations in a graph: the backend that has gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tensorpress.kernels import registry

if TYPE_CHECKING:
    from tensorpress.kernels.quantized_linear import QuantizedLinear

_kept = WeakTensorKeyDictionary()
"""Integers to what kernels keep of them: {name: value} for each way to read them. It goes when the tensor goes."""


@torch.library.custom_op("tensorpress::quantized_linear", mutates_args=())
def quantized_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
    kernel: str,
) -> torch.Tensor:
    """The product x W^T + b for x [..., K]; the tensors are those of `QuantizedLinear`. Raises ValueError for a kernel that cannot run here."""
    layer = _layer(bits, group_size, zero_offset, g_idx.shape[0], scales.shape[1])
    layer.qweight, layer.qzeros, layer.scales, layer.g_idx = qweight.detach(), qzeros, scales, g_idx
    layer.bias, layer.kernel = bias, kernel
    key = (bits, group_size, zero_offset, kernel)
    layer.__dict__.update(_kept.get(qweight, {}).get(key, {}))
    y: torch.Tensor = registry.kernel_for("quantized_linear", layer, x)(layer, x)
    kept = {name: layer.__dict__[name] for name in ("packed", "unpacked", "taken") if name in layer.__dict__}
    _kept.setdefault(qweight, {})[key] = kept
    return y


@quantized_linear.register_fake
def _shape(
    x: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *_: object
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[1])


def _layer(bits: int, group_size: int, zero_offset: int, inputs: int, outputs: int) -> QuantizedLinear:
    """An empty layer: each call has its own, so that threads and graphs do not change each other's."""
    from tensorpress.kernels.quantized_linear import QuantizedLinear

    layer = QuantizedLinear.__new__(QuantizedLinear)
    torch.nn.Module.__init__(layer)
    layer.in_features, layer.out_features, layer.bits = inputs, outputs, bits
    layer.group_size, layer.zero_offset = group_size, zero_offset
    layer.packed = layer.unpacked = None
    return layer


def forget(qweight: torch.Tensor) -> None:
    """Drop what is kept of these integers."""
    _kept.pop(qweight, None)
