"""What a structured weight is a sum of, part by part: how many bytes each takes, the best it can do for what is left of a weight, and its layer.

All solve the same problem, tr(D H D^T) of the error D [m, n] as small as the form can make it, for the inputs' second moment H [n, n], its
diagonal [n], or None for the unit matrix; in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tensorpress.compressors.decompose.alternating import conjugate_gradients, refine
from tensorpress.compressors.decompose.site_plans import WORD, SitePlan, mpo_layer
from tensorpress.compressors.decompose.tensor_train import capped_bonds
from tensorpress.compressors.decompose.weighted_low_rank import (
    TINY,
    low_rank_layer,
    root_of,
    weighted_by,
    weighted_error,
    weighted_svd,
)
from tensorpress.compressors.decompose.weighted_tt_svd import weighted_tt_svd
from tensorpress.kernels import sum_linear
from tensorpress.kernels.block_diagonal_linear import BlockDiagonalLinear
from tensorpress.kernels.mpo_linear import mpo_to_matrix
from tensorpress.kernels.sparse_linear import ChannelLinear, SparseLinear, sparse_bytes

Metric = torch.Tensor | None


@dataclass(frozen=True)
class Solved:
    """A part that was fitted: its matrix [m, n] in float64, and the tensors that it is made of."""

    matrix: torch.Tensor
    made_of: Sequence[torch.Tensor]


class Part(Protocol):
    """One term of a sum that a weight is approximated by."""

    @property
    def bytes(self) -> int:
        """As it is stored at 16 bits, with what says where its numbers stand."""
        ...

    @property
    def detail(self) -> dict[str, Any]:
        """What the report says of it."""
        ...

    def solve(self, target: torch.Tensor, metric: Metric, now: Solved | None) -> Solved:
        """Fit it to a matrix [m, n]; where it was fitted before, from there, to no larger error."""
        ...

    def layer(self, solved: Solved, dtype: torch.dtype, bias: torch.Tensor | None) -> sum_linear.Part:
        """The layer of what was fitted, in a precision."""
        ...


@dataclass(frozen=True)
class LowRankPart:
    """The best low rank, of a plan of that kind; with pivots in the fewest numbers."""

    plan: SitePlan
    rank: int
    pivoted: bool

    @property
    def bytes(self) -> int:
        return self.plan.bytes(self.rank, self.pivoted)

    @property
    def detail(self) -> dict[str, Any]:
        return {"part": "low rank", "rank": self.rank, "pivoted": self.pivoted}

    def solve(self, target: torch.Tensor, metric: Metric, now: Solved | None) -> Solved:
        svd = weighted_svd(target, metric)
        left, right = svd.left[:, : self.rank], svd.right[: self.rank]
        return Solved(left @ right, (left, right))

    def layer(self, solved: Solved, dtype: torch.dtype, bias: torch.Tensor | None) -> sum_linear.Part:
        left, right = solved.made_of
        return low_rank_layer(left, right, bias, dtype, pivoted=self.pivoted)


@dataclass(frozen=True)
class MPOPart:
    """A matrix product operator, with pivots in the fewest numbers; at two balanced sites a sum of Kronecker products (Van Loan and Pitsianis 1993)."""

    plan: SitePlan
    bond: int
    pivoted: bool
    sweeps: int
    """Of alternating least squares at each visit."""

    @property
    def bytes(self) -> int:
        return self.plan.bytes(self.bond, self.pivoted)

    @property
    def bonds(self) -> tuple[int, ...]:
        return capped_bonds(self.plan.rows, self.plan.columns, self.bond)

    @property
    def detail(self) -> dict[str, Any]:
        factors = {"out_factors": list(self.plan.rows), "in_factors": list(self.plan.columns)}
        return {"part": "mpo", **factors, "bonds": list(self.bonds), "pivoted": self.pivoted}

    def solve(self, target: torch.Tensor, metric: Metric, now: Solved | None) -> Solved:
        plan = self.plan
        cores = list(now.made_of) if now else weighted_tt_svd(target, plan.rows, plan.columns, self.bonds, metric)
        if self.sweeps and (now or metric is not None):
            cores, _ = refine(cores, target, metric, sweeps=self.sweeps)
        return Solved(mpo_to_matrix([core.double() for core in cores]), cores)

    def layer(self, solved: Solved, dtype: torch.dtype, bias: torch.Tensor | None) -> sum_linear.Part:
        return mpo_layer(list(solved.made_of), bias, dtype, pivoted=self.pivoted)


@dataclass(frozen=True)
class BlockPart:
    """Blocks on the diagonal, each by weighted least squares from its own inputs."""

    outputs: int
    inputs: int
    count: int

    @property
    def bytes(self) -> int:
        return WORD * self.outputs * self.inputs // self.count

    @property
    def detail(self) -> dict[str, Any]:
        return {"part": "blocks", "count": self.count}

    def solve(self, target: torch.Tensor, metric: Metric, now: Solved | None) -> Solved:
        blocks = self._blocks(target if now is None else now.matrix)
        if metric is not None and metric.ndim == 2:
            wide = weighted_by(target - torch.block_diag(*blocks), metric)
            blocks = blocks + _divided(self._blocks(wide), self._blocks(metric, square=True))
        else:  # what the inputs of a block can do does not depend on others
            blocks = self._blocks(target)
        return Solved(torch.block_diag(*blocks), (blocks,))

    def _blocks(self, matrix: torch.Tensor, square: bool = False) -> torch.Tensor:
        """The blocks on the diagonal [g, m/g, n/g]."""
        height, width = (self.inputs if square else self.outputs) // self.count, self.inputs // self.count
        parts = matrix.reshape(self.count, height, self.count, width)
        return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def layer(self, solved: Solved, dtype: torch.dtype, bias: torch.Tensor | None) -> sum_linear.Part:
        return BlockDiagonalLinear.from_blocks(solved.made_of[0].to(dtype), bias)


@dataclass(frozen=True)
class SparsePart:
    """Single weights: those that are largest times the root of their inputs' second moment; their values by conjugate gradients."""

    outputs: int
    inputs: int
    count: int

    @property
    def bytes(self) -> int:
        return sparse_bytes(self.outputs, self.inputs, self.count)

    @property
    def detail(self) -> dict[str, Any]:
        return {"part": "sparse", "count": self.count}

    def solve(self, target: torch.Tensor, metric: Metric, now: Solved | None) -> Solved:
        chosen = (target.abs() * _sizes(metric, target)).flatten().topk(self.count).indices
        mask = torch.zeros(target.numel(), dtype=torch.bool, device=target.device)
        mask[chosen] = True
        mask = mask.view(target.shape)
        start = torch.zeros_like(target) if now is None else now.matrix
        found = [self._values(target, metric, mask, start)]
        if now is not None:  # where they were, too
            found.append(self._values(target, metric, now.made_of[0], start))
        return min(found, key=lambda solved: weighted_error(target - solved.matrix, metric))

    def _values(self, target: torch.Tensor, metric: Metric, mask: torch.Tensor, start: torch.Tensor) -> Solved:
        """The values at these places, from the target's own or from what was there, whichever is nearer."""
        own = target * mask
        if metric is None or metric.ndim == 1:
            return Solved(own, (mask,))
        first = min((own, start * mask), key=lambda values: weighted_error(target - values, metric))
        wanted = weighted_by(target, metric) * mask
        found = conjugate_gradients(lambda values: weighted_by(values, metric) * mask, wanted, first, ITERATIONS)
        return Solved(found, (mask,))

    def layer(self, solved: Solved, dtype: torch.dtype, bias: torch.Tensor | None) -> sum_linear.Part:
        return SparseLinear.from_dense(solved.matrix.to(dtype), bias, solved.made_of[0])


ITERATIONS = 8
"""Of conjugate gradients for the values of a sparse part; each lowers the error."""


@dataclass(frozen=True)
class ChannelPart:
    """All weights of some inputs: of those whose columns are largest times the root of their second moment, by weighted least squares."""

    outputs: int
    inputs: int
    count: int

    @property
    def bytes(self) -> int:
        return WORD * self.outputs * self.count + 4 * self.count

    @property
    def detail(self) -> dict[str, Any]:
        return {"part": "channels", "count": self.count}

    def solve(self, target: torch.Tensor, metric: Metric, now: Solved | None) -> Solved:
        chosen = (target.norm(dim=0) * _sizes(metric, target)).topk(self.count).indices.sort().values
        found = [self._columns(target, metric, places) for places in (chosen, *(now.made_of[:1] if now else ()))]
        return min(found, key=lambda solved: weighted_error(target - solved.matrix, metric))

    def _columns(self, target: torch.Tensor, metric: Metric, channels: torch.Tensor) -> Solved:
        matrix = torch.zeros_like(target)
        matrix[:, channels] = target[:, channels]
        if metric is not None and metric.ndim == 2:
            wide = weighted_by(target - matrix, metric)[:, channels]
            matrix[:, channels] += _divided(wide[None], metric[channels][:, channels][None])[0]
        return Solved(matrix, (channels,))

    def layer(self, solved: Solved, dtype: torch.dtype, bias: torch.Tensor | None) -> sum_linear.Part:
        (channels,) = solved.made_of
        return ChannelLinear.from_columns(solved.matrix[:, channels].to(dtype), channels, self.inputs, bias)


def _sizes(metric: Metric, target: torch.Tensor) -> torch.Tensor:
    """The root of the inputs' second moments [n]."""
    if metric is None:
        return target.new_ones(target.shape[1])
    return (metric if metric.ndim == 1 else metric.diagonal()).clamp(min=0).sqrt().to(target.dtype)


def _divided(wide: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """X H^-1 for each X [g, m, k] and H [g, k, k], which is damped against rounding: a step that cannot raise the error."""
    found = [torch.cholesky_solve(x.T, root_of(h, TINY)).T for x, h in zip(wide, moments, strict=True)]
    return torch.stack(found)
