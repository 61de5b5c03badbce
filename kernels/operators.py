"""The quantized layer as an operator of torch's library: `torch.compile` puts it into a graph whole, where ctypes would break it.

`tensorpress::quantized_linear` takes the layer's tensors and the name of a kernel, and does at run time what the layer itself does: `auto` is
measured and remembered, what compiled kernels keep is shared with the layer. MPO layers are plain products and need no operator.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tensorpress.kernels import registry

_layers = WeakTensorKeyDictionary()
"""Integers to a layer of the same memory. It holds other tensors than its key, so that it goes when they go."""


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
    layer = _layers.get(qweight)
    if layer is None:
        layer = _layers[qweight] = _layer(qweight, bits, group_size, zero_offset, g_idx.shape[0], scales.shape[1])
    layer.qzeros, layer.scales, layer.g_idx = qzeros, scales, g_idx
    layer.bias, layer.kernel = bias, kernel
    y: torch.Tensor = registry.kernel_for("quantized_linear", layer, x)(layer, x)
    return y


@quantized_linear.register_fake
def _shape(
    x: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *_: object
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[1])


def _layer(
    qweight: torch.Tensor, bits: int, group_size: int, zero_offset: int, inputs: int, outputs: int
) -> torch.nn.Module:
    from tensorpress.kernels.quantized_linear import QuantizedLinear

    with torch.device("meta"):
        layer = QuantizedLinear(inputs, outputs, bits, group_size, bias=False, zero_offset=zero_offset)
    layer.qweight = qweight.detach()
    return layer
