"""A linear layer whose weight is a sum of parts, each in a form of its own: W = W_1 + W_2 + ...

So low rank beside a sparse matrix (SLTrain, Han et al. 2024, arXiv 2406.02214), beside blocks (Wei et al. 2024, arXiv 2406.16450), or a
matrix product operator beside a sparse matrix. The parts are modules by themselves: what works on one of their kind works on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tensorpress.kernels.block_diagonal_linear import BlockDiagonalLinear
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear
from tensorpress.kernels.sparse_linear import ChannelLinear, SparseLinear

Part = LowRankLinear | MPOLinear | PivotedMPOLinear | BlockDiagonalLinear | SparseLinear | ChannelLinear
PARTS: dict[str, type[Part]] = {
    "low_rank": LowRankLinear,
    "mpo": MPOLinear,
    "pivoted_mpo": PivotedMPOLinear,
    "block_diagonal": BlockDiagonalLinear,
    "sparse": SparseLinear,
    "channels": ChannelLinear,
}
"""What a part can be, by its form."""


class SumLinear(nn.Module):
    """y = sum of parts(x) + b; inputs [..., n], outputs [..., m]. The parts have one shape and no bias of their own."""

    def __init__(self, parts: Sequence[Part], bias: torch.Tensor | None):
        """Take parts as they are, and a copy of the bias [m]. Raises ValueError for none, for a bias in one, and for two shapes."""
        super().__init__()
        shapes = {(part.out_features, part.in_features) for part in parts}
        if len(shapes) != 1:
            raise ValueError(f"parts of one shape; found {sorted(shapes)}")
        if any(part.bias is not None for part in parts):
            raise ValueError("parts without a bias; the sum has one")
        ((self.out_features, self.in_features),) = shapes
        self.parts = nn.ModuleList(parts)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = self.parts
        y: torch.Tensor = first(x)
        for part in others:
            y = y + part(x)
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> torch.Tensor:
        """The weight W [m, n] that the parts add up to."""
        first, *others = (part.dense_weight() for part in self.parts)  # type: ignore[operator]
        weight: torch.Tensor = first
        for other in others:
            weight = weight + other
        return weight

    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form: the entry of the loading plug-in."""
        return {
            "form": "sum",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "parts": [part.spec() for part in self.parts],  # type: ignore[operator]
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> SumLinear:
        parts = [PARTS[part["form"]].from_spec(part) for part in spec["parts"]]
        return cls(parts, torch.zeros(spec["out_features"]) if spec["bias"] else None)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"
