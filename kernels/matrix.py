"""The kernel `matrix` of layers that store less than a dense weight: the dense weight, made once and kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from tensorpress.kernels import registry
from tensorpress.kernels.origin import Origin

if TYPE_CHECKING:
    from tensorpress.kernels.block_diagonal_linear import BlockDiagonalLinear
    from tensorpress.kernels.semi_structured_linear import SemiStructuredLinear


class Matrix:
    """A layer's dense weight [N, K], and the tensors that it was made of."""

    def __init__(self, layer: BlockDiagonalLinear | SemiStructuredLinear, made_of: Origin):
        self.made_of = made_of
        with torch.no_grad():
            self.data = layer.dense_weight().contiguous()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of a layer makes its own."""
        return type(None), ()

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def matrix_linear(
    layer: BlockDiagonalLinear | SemiStructuredLinear, x: torch.Tensor, stored: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The product of a layer with x [..., K] by the dense weight, made anew when one of the `stored` tensors that it is made of changed.

    What is kept has neither gradients nor another precision: where they are asked for, the layer's other kernel computes.
    """
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *stored, layer.bias))
    if learns or x.dtype != stored[0].dtype:
        return registry.backends(layer.operation)[layer.trained_by].run(layer, x)
    kept = layer.matrix
    if kept is None or not kept.made_of.holds(stored):
        kept = layer.matrix = Matrix(layer, Origin(stored))
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return nn.functional.linear(x, kept.data, bias)


def room_for(layer: BlockDiagonalLinear | SemiStructuredLinear) -> int:
    """Bytes of the dense weight, about: as many numbers of 4 bytes as it has."""
    return 4 * layer.in_features * layer.out_features
