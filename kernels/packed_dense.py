"""Weights that are no integers in the layout of the compiled code (`kernels/cpu`), as bf16: dense ones, and those of 2:4 sparsity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tensorpress.kernels import cpu_linear, registry
from tensorpress.kernels.cpu_linear import LANES, STEP, Weights
from tensorpress.kernels.origin import Origin

if TYPE_CHECKING:
    from tensorpress.kernels.semi_structured_linear import SemiStructuredLinear

SPARSE = 9
"""`TP_SPARSE` of kernels/cpu/linear.h."""


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """As bf16. Raises ValueError where that would round."""
    rounded = weight.detach().to(torch.bfloat16)
    if weight.dtype != torch.bfloat16 and not torch.equal(rounded.to(weight.dtype), weight):
        raise ValueError("its dense weights are finer than bfloat16")
    return rounded


class _Packed:
    """Arrays that the compiled code reads."""

    data: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    weights: Weights

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(tensor.nbytes for tensor in (self.data, self.scale, self.bias) if tensor is not None)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of a layer makes its own."""
        return type(None), ()


class PackedDense(_Packed):
    """The weight [m, n] of a dense layer. Raises ValueError where bf16 would round it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        outputs, inputs = weight.shape
        of, order = cpu_linear.places(torch.zeros(inputs, dtype=torch.int32), 1)
        padded = nn.functional.pad(_rounded(weight), (0, len(order) - inputs, 0, -outputs % LANES))
        blocks, groups = len(padded) // LANES, len(of)
        slices = padded.view(blocks, LANES, -1, 2, 2).permute(0, 2, 4, 1, 3)  # [blocks, slices, planes, lanes, pair]
        self.data = slices.contiguous()
        self.scale = torch.ones(blocks, groups, LANES, dtype=torch.float16)
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.weights = Weights(
            outputs, inputs, blocks, groups, len(order) // groups, 16, self.data.data_ptr(), self.scale.data_ptr(), None, None,
            None if self.bias is None else self.bias.data_ptr(),
        )  # fmt: skip


def multiply_columns(kept: PackedDense, x: torch.Tensor, batch: int, columns: int) -> torch.Tensor:
    """A matrix [p, q] times each of x, numbers [batch, q, columns] in this order: [batch, p, columns]. Raises MemoryError."""
    return cpu_linear.multiply_columns(kept.weights, x, batch, columns)


class PackedSparse(_Packed):
    """The weights of a layer with 2:4 sparsity, in bf16, as kernels/cpu/sparse.inc has them: 9 bits for each of the matrix's numbers."""

    scale = None

    def __init__(self, layer: SemiStructuredLinear):
        self.made_of = Origin(_made_of(layer))
        outputs, inputs, fours = layer.out_features, layer.in_features, layer.fours
        more, padding = -fours % (STEP // 4), -outputs % LANES
        values = nn.functional.pad(_rounded(layer.values), (0, 2 * more, 0, padding))
        blocks = len(values) // LANES
        values = (
            values.view(blocks, LANES, -1, STEP // 4, 2).permute(0, 2, 3, 1, 4).contiguous()
        )  # [blocks, units, fours, lanes, 2]
        places = torch.stack((layer.indices & 15, layer.indices >> 4), 2).flatten(1)[:, :fours].int()
        places = nn.functional.pad(places, (0, more, 0, padding)).view(blocks, LANES, -1, STEP // 4)
        words = sum(places[..., f].long() << (4 * f) for f in range(STEP // 4))
        assert isinstance(words, torch.Tensor)
        words = (
            torch.where(words >= 1 << 31, words - (1 << 32), words).int().transpose(1, 2).contiguous()
        )  # [blocks, units, lanes]
        units = values.shape[1]
        self.data = torch.cat((_bytes(values, blocks, units), _bytes(words, blocks, units)), 2).contiguous()
        self.bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
        self.weights = Weights(
            outputs, inputs, blocks, 1, units * STEP, SPARSE, self.data.data_ptr(), None, None, None,
            None if self.bias is None else self.bias.data_ptr(),
        )  # fmt: skip


def _bytes(tensor: torch.Tensor, blocks: int, units: int) -> torch.Tensor:
    return tensor.view(torch.uint8).view(blocks, units, -1)


def _made_of(layer: SemiStructuredLinear) -> tuple[torch.Tensor | None, ...]:
    return layer.values, layer.indices, layer.bias


def run_sparse(layer: SemiStructuredLinear, x: torch.Tensor) -> torch.Tensor:
    """The product of a 2:4 layer, by the reference where gradients or another precision are asked for. Raises MemoryError."""
    stored = _made_of(layer)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *stored))
    if learns or x.dtype not in cpu_linear.TYPES or x.device.type != "cpu":
        return registry.backends(layer.operation)["reference"].run(layer, x)
    kept = layer.packed  # held until the product is done: another thread may release it
    if kept is None or not kept.made_of.holds(stored):
        kept = layer.packed = PackedSparse(layer)
    return cpu_linear.multiply(kept.weights, x, cpu_linear.MODES["cpu"])


def can_run_sparse(layer: SemiStructuredLinear) -> bool:
    """Whether the code was built, and the weights are in bf16 on the CPU."""
    on_cpu = layer.values.device.type == "cpu"
    return cpu_linear.compiled() is not None and on_cpu and layer.values.dtype == torch.bfloat16
