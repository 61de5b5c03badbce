"""Linear layer with 2:4 sparsity, with its plain PyTorch reference.

Of each four neighbouring inputs of an output at most two weights are not zero (Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks").
Layout (in = K, out = N, fours F = ceil(K/4), inputs behind K count as zeros): `values` floating point [N, 2F], the two kept weights of each
four; `indices` uint8 [N, ceil(F/2)], four bits for each four inputs, an even one's low: bits 0 and 1 are the place of the first kept weight,
bits 2 and 3 of the second, which lies behind it. Where fewer than two are not zero, zeros at free places are kept too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tensorpress.kernels import packed_dense, registry
from tensorpress.kernels.kernel_layer import Kept, KernelLayer
from tensorpress.kernels.matrix import Matrix, matrix_linear, room_for

NOTHING = 0 | 1 << 2
"""The places 0 and 1: of four inputs without weights."""


def pack_places(places: torch.Tensor) -> torch.Tensor:
    """Places [N, F, 2] from 0 to 3, first before second, as `indices` [N, ceil(F/2)]; behind an odd F stand the places 0 and 1."""
    fours = nn.functional.pad(places[..., 0] | places[..., 1] << 2, (0, places.shape[1] % 2), value=NOTHING)
    return (fours[:, 0::2] | fours[:, 1::2] << 4).to(torch.uint8)


def unpack_places(indices: torch.Tensor, fours: int) -> torch.Tensor:
    """Places int64 [N, F, 2] of the kept weights from `indices` [N, ceil(F/2)]: the inverse of `pack_places`."""
    both = torch.stack((indices & 15, indices >> 4), 2).flatten(1)[:, :fours]
    return torch.stack((both & 3, both >> 2), 2).long()


class SemiStructuredLinear(KernelLayer):
    """y = x W^T + b with two of four weights stored; inputs [..., K], outputs [..., N].

    An input that is not finite reaches the outputs that keep its weight; by the dense product of `reference` and `matrix`, which multiplies
    it with zeros, all outputs.
    """

    values: torch.Tensor
    indices: torch.Tensor
    bias: torch.Tensor | None
    operation = "semi_structured_linear"
    fields = ("in_features", "out_features", "bias")
    judged_by = "matrix"

    def __init__(self, in_features: int, out_features: int, *, bias: bool):
        super().__init__()
        self.in_features, self.out_features, self.fours = in_features, out_features, -(-in_features // 4)
        indices = torch.full((out_features, -(-self.fours // 2)), NOTHING | NOTHING << 4, dtype=torch.uint8)
        self.register_buffer("values", torch.zeros(out_features, 2 * self.fours))
        self.register_buffer("indices", indices)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.kernel = "reference"
        """What computes it; `auto` in a model that was opened from a folder."""
        self.matrix: Matrix | None = None
        """What the kernel `matrix` keeps."""
        self.packed: Any = None
        """What the compiled kernel keeps: the weights in its own layout."""

    @classmethod
    def from_dense(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> SemiStructuredLinear:
        """Keep the weights of a matrix [N, K] that are not zero, in its precision. Raises ValueError where four have more than two."""
        outputs, inputs = weight.shape
        layer = cls(inputs, outputs, bias=bias is not None)
        padded = nn.functional.pad(weight.detach(), (0, 4 * layer.fours - inputs)).view(outputs, layer.fours, 4)
        counts = (padded != 0).sum(2)
        wrong = (counts > 2).nonzero()
        if len(wrong):
            row, four = wrong[0].tolist()
            last = min(4 * four + 3, inputs - 1)
            raise ValueError(
                f"row {row}, inputs {4 * four} to {last}: {counts[row, four]} weights are not zero, 2:4 sparsity has two of four"
            )
        order = (padded == 0).to(torch.uint8).argsort(dim=2, stable=True)  # places of what is not zero, then free ones
        places = order[..., :2].sort(2).values
        layer.values = padded.gather(2, places).view(outputs, 2 * layer.fours)
        layer.indices = pack_places(places)
        layer.bias = None if bias is None else bias.detach().clone()
        return layer

    def dense_weight(self) -> torch.Tensor:
        """The weight [N, K] with its zeros."""
        dense = self.values.new_zeros(self.out_features, self.fours, 4)
        kept = self.values.view(self.out_features, self.fours, 2)
        dense.scatter_(2, unpack_places(self.indices, self.fours), kept)
        return dense.view(self.out_features, 4 * self.fours)[:, : self.in_features].contiguous()

    def parameter_count(self) -> int:
        """Weights and biases that the layer stores: two for each four inputs."""
        return self.values.numel() + (0 if self.bias is None else self.bias.numel())

    def check(self) -> None:
        """Refuse four inputs whose two places are one, or in the wrong order. Raises ValueError."""
        places = unpack_places(self.indices, self.fours)
        wrong = (places[..., 0] >= places[..., 1]).nonzero()
        if len(wrong):
            row, four = wrong[0].tolist()
            first, second = places[row, four].tolist()
            raise ValueError(f"indices: row {row}, inputs from {4 * four}: the place {first} is not before {second}")

    def stored(self) -> list[torch.Tensor]:
        return [self.values, self.indices] if self.bias is None else [self.values, self.indices, self.bias]

    def place(self, tensors: Sequence[torch.Tensor]) -> None:
        self.values, self.indices, *bias = tensors
        self.bias = bias[0] if bias else None

    def kept(self, names: Collection[str] | None = None) -> Iterator[Kept]:
        for name, made in (("cpu", self.packed), ("matrix", self.matrix)):
            if made is not None and (names is None or name in names):
                yield made

    def release_own(self, names: Collection[str]) -> None:
        if "cpu" not in names:
            self.packed = None
        if "matrix" not in names:
            self.matrix = None

    def kernel_key(self) -> str:
        """What the speed of its kernels depends on."""
        return f"{self.in_features}x{self.out_features}"

    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form: the entry of the loading plug-in."""
        return {
            "form": "semi_structured",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> SemiStructuredLinear:
        layer = cls(spec["in_features"], spec["out_features"], bias=spec["bias"])
        layer.kernel = "auto"
        return layer

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def semi_structured_linear_reference(layer: SemiStructuredLinear, x: torch.Tensor) -> torch.Tensor:
    """Fill in the zeros, then multiply: the oracle, in the dtype of the input."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return nn.functional.linear(x, layer.dense_weight().to(x.dtype), bias)


def semi_structured_linear_matrix(layer: SemiStructuredLinear, x: torch.Tensor) -> torch.Tensor:
    """The weight with its zeros, filled in once and kept in memory."""
    return matrix_linear(layer, x, [layer.values, layer.indices])


def _dense_room(layer: SemiStructuredLinear) -> int:
    """The dense weight, and on the way to it the places of half its weights as integers of 8 bytes."""
    return 3 * room_for(layer)


def _packed_room(layer: SemiStructuredLinear) -> int:
    """Nine bits a weight, and on the way to them the places as integers of 8 bytes."""
    return room_for(layer)


registry.register(
    "semi_structured_linear", "cpu", packed_dense.run_sparse, packed_dense.can_run_sparse, room=_packed_room
)
registry.register("semi_structured_linear", "matrix", semi_structured_linear_matrix, room=_dense_room)
registry.register("semi_structured_linear", "reference", semi_structured_linear_reference, room=_dense_room)
