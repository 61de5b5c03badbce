"""A linear layer of low rank, as the two linear layers that it is made of; with pivots, in the fewest numbers that a rank can have.

A matrix W [m, n] of rank r is determined by r (m + n - r) numbers, not by the r (m + n) of two factors: r of its rows, the pivots, span
the others, so W is those rows and the coefficients C [m - r, r] that give the rest (Zhao et al. 2025, "Pivoting Factorization",
arXiv 2501.19090). In terms of matrix product operators: the gauge of the bond is fixed such that r rows of the left core are the unit matrix.
At r = min(m, n) it is the matrix itself, without a number more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tensorpress.kernels.origin import Origin


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask [m] as uint8 [ceil(m / 8)], the first in the lowest bit."""
    padded = nn.functional.pad(mask.to(torch.int32), (0, -len(mask) % 8)).view(-1, 8)
    return (padded << torch.arange(8, device=mask.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `pack_bits`: a bool mask [count]."""
    bits = packed[:, None].to(torch.int32) >> torch.arange(8, device=packed.device) & 1
    return bits.flatten()[:count].bool()


def low_rank_numbers(outputs: int, inputs: int, rank: int, pivoted: bool) -> int:
    """Numbers that a layer of a rank stores: r (m + n), or with pivots r (m + n - r)."""
    return rank * (outputs + inputs - (rank if pivoted else 0))


class LowRankLinear(nn.Module):
    """y = A B x + b; inputs [..., n], outputs [..., m]. `inner` is B [r, n]; `outer` is A [m, r], or with pivots C [m - r, r].

    The factors are linear layers by themselves, so whatever works on those (quantization, training) works on them.
    `pivots` uint8 [ceil(m / 8)]: a bit for each output, set where the output is the next of the inner layer's.
    """

    pivots: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, rank: int, *, pivoted: bool, bias: bool):
        super().__init__()
        if not 1 <= rank < out_features:
            raise ValueError(f"a rank from 1 to {out_features - 1}, below the outputs")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.inner = nn.Linear(in_features, rank, bias=False)
        self.outer = nn.Linear(rank, out_features - rank if pivoted else out_features, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        first = torch.arange(out_features) < rank
        self.register_buffer("pivots", pack_bits(first) if pivoted else None)
        self._order: tuple[Origin, torch.Tensor] | None = None

    @classmethod
    def from_factors(
        cls, inner: torch.Tensor, outer: torch.Tensor, pivots: torch.Tensor | None, bias: torch.Tensor | None
    ) -> LowRankLinear:
        """Wrap B [r, n], A [m, r] or C [m - r, r] and, for the latter, the mask [m] of the pivots; they are copied."""
        rank, inputs = inner.shape
        outputs = len(outer) if pivots is None else len(pivots)
        with torch.device("meta"):
            layer = cls(inputs, outputs, rank, pivoted=pivots is not None, bias=bias is not None)
        layer.inner.weight = nn.Parameter(inner.detach().clone())
        layer.outer.weight = nn.Parameter(outer.detach().clone())
        if pivots is not None:
            layer.pivots = pack_bits(pivots)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.inner(x)
        y: torch.Tensor = self.outer(inner)
        if self.pivots is not None:
            y = torch.cat((inner, y), -1).index_select(-1, self.order())
        return y if self.bias is None else y + self.bias

    def order(self) -> torch.Tensor:
        """Where each output stands in (inner outputs, outer outputs): int64 [m]. Kept until the pivots change."""
        assert self.pivots is not None
        if torch.compiler.is_compiling():
            return self._made_order()
        if self._order is None or not self._order[0].holds([self.pivots]):
            self._order = Origin([self.pivots]), self._made_order()
        return self._order[1]

    def _made_order(self) -> torch.Tensor:
        assert self.pivots is not None
        mask = unpack_bits(self.pivots, self.out_features)
        return torch.where(mask, mask.cumsum(0) - 1, self.rank + (~mask).cumsum(0) - 1)

    def whole_outer(self) -> torch.Tensor:
        """A [m, r], the rows that the pivots leave out put in."""
        outer = _weight(self.outer)
        if self.pivots is None:
            return outer
        return torch.cat((torch.eye(self.rank, dtype=outer.dtype, device=outer.device), outer))[self.order()]

    def dense_weight(self) -> torch.Tensor:
        """The weight W [m, n] that the factors stand for, quantized ones included."""
        inner, outer = (_weight(layer) for layer in (self.inner, self.outer))
        rest = outer @ inner
        return rest if self.pivots is None else torch.cat((inner, rest))[self.order()]

    def check(self) -> None:
        """Refuse pivots, read from a file, that are not as many as the rank. Raises ValueError."""
        if self.pivots is not None and int(unpack_bits(self.pivots, self.out_features).sum()) != self.rank:
            raise ValueError(f"pivots: not {self.rank} of the {self.out_features} bits are set")

    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form, its factors dense: the entry of the loading plug-in."""
        return {
            "form": "low_rank",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "pivoted": self.pivots is not None,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> LowRankLinear:
        fields = {key: spec[key] for key in ("in_features", "out_features", "rank", "pivoted", "bias")}
        return cls(**fields)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order": None}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, pivoted={self.pivots is not None}"


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = layer.dense_weight() if hasattr(layer, "dense_weight") else layer.weight  # type: ignore[operator]
    assert isinstance(weight, torch.Tensor)
    return weight
