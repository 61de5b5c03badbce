"""Linear layer whose weight is block diagonal, with its plain PyTorch reference.

W [N, K] = block_diag(W_1, ..., W_g): outputs of a block depend on its own K/g inputs alone, which takes 1/g of a dense layer's weights and
multiply-adds (Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate Training"; Wei et al. 2024, "Building on
Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers").
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from tensorpress.kernels import registry
from tensorpress.kernels.kernel_layer import Kept, KernelLayer
from tensorpress.kernels.matrix import Matrix, matrix_linear, room_for


class BlockDiagonalLinear(KernelLayer):
    """y = x W^T + b with W block diagonal, stored as `blocks` [g, N/g, K/g]; inputs [..., K], outputs [..., N].

    An input that is not finite reaches the outputs of its own block; by the dense product of `reference` and `matrix`, which multiplies it
    with zeros, all outputs.
    """

    operation = "block_diagonal_linear"
    fields = ("in_features", "out_features", "block_count", "bias")
    trained_by = "blocks"
    judged_by = "matrix"

    def __init__(self, in_features: int, out_features: int, block_count: int, *, bias: bool):
        super().__init__()
        if block_count < 1 or in_features % block_count or out_features % block_count:
            raise ValueError(
                f"{in_features} inputs and {out_features} outputs are not {block_count} blocks of one shape"
            )
        self.in_features, self.out_features, self.block_count = in_features, out_features, block_count
        self.blocks = nn.Parameter(torch.zeros(block_count, out_features // block_count, in_features // block_count))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.kernel = "reference"
        """What computes it; `auto` in a model that was opened from a folder."""
        self.matrix: Matrix | None = None
        """What the kernel `matrix` keeps."""

    @classmethod
    def from_blocks(cls, blocks: torch.Tensor, bias: torch.Tensor | None) -> BlockDiagonalLinear:
        """Wrap blocks [g, N/g, K/g] and a bias [N]; they are copied."""
        count, outputs, inputs = blocks.shape
        layer = cls(count * inputs, count * outputs, count, bias=bias is not None)
        layer.blocks = nn.Parameter(blocks.detach().clone())
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer

    def dense_weight(self) -> torch.Tensor:
        """The weight [N, K], zero outside its blocks."""
        return torch.block_diag(*self.blocks)

    def stored(self) -> list[torch.Tensor]:
        return [self.blocks] if self.bias is None else [self.blocks, self.bias]

    def place(self, tensors: Sequence[torch.Tensor]) -> None:
        self.blocks, *bias = (nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
        self.bias = bias[0] if bias else None

    def kept(self, names: Collection[str] | None = None) -> Iterator[Kept]:
        if self.matrix is not None and (names is None or "matrix" in names):
            yield self.matrix

    def release_own(self, names: Collection[str]) -> None:
        if "matrix" not in names:
            self.matrix = None

    def kernel_key(self) -> str:
        """What the speed of its kernels depends on."""
        return f"{self.in_features}x{self.out_features}, {self.block_count} blocks"

    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form: the entry of the loading plug-in."""
        return {
            "form": "block_diagonal",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "block_count": self.block_count,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> BlockDiagonalLinear:
        layer = cls(spec["in_features"], spec["out_features"], spec["block_count"], bias=spec["bias"])
        layer.kernel = "auto"
        return layer

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, block_count={self.block_count}"


def block_diagonal_linear_reference(layer: BlockDiagonalLinear, x: torch.Tensor) -> torch.Tensor:
    """Fill the dense matrix, then multiply: the oracle."""
    return nn.functional.linear(x, layer.dense_weight(), layer.bias)


def block_diagonal_linear_blocks(layer: BlockDiagonalLinear, x: torch.Tensor) -> torch.Tensor:
    """One product of all blocks with their inputs, both read where they lie; it has gradients."""
    count, _, inputs = layer.blocks.shape
    parts = x.reshape(math.prod(x.shape[:-1]), count, inputs)
    y = torch.bmm(parts.transpose(0, 1), layer.blocks.transpose(1, 2))  # [g, rows, N/g]
    y = y.transpose(0, 1).reshape(*x.shape[:-1], layer.out_features)
    return y if layer.bias is None else y + layer.bias


def block_diagonal_linear_matrix(layer: BlockDiagonalLinear, x: torch.Tensor) -> torch.Tensor:
    """The dense matrix, filled once and kept in memory; by `blocks` where gradients are asked for."""
    return matrix_linear(layer, x, [layer.blocks])


registry.register("block_diagonal_linear", "blocks", block_diagonal_linear_blocks)
registry.register("block_diagonal_linear", "matrix", block_diagonal_linear_matrix, room=room_for)
registry.register("block_diagonal_linear", "reference", block_diagonal_linear_reference, room=room_for)
