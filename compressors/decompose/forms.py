"""Structured forms of a weight at a number of bytes: what each is a sum of, and the fit of such a sum to the output of a layer.

Sources: SVD-LLM, Wang et al. 2024, arXiv 2403.07378; ASVD, Yuan et al. 2023, arXiv 2312.05821; Van Loan and Pitsianis 1993 (Kronecker products);
Wei et al. 2024, arXiv 2406.16450 (structured feed-forwards); SLTrain, Han et al. 2024, arXiv 2406.02214; LOST, Li et al. 2025, arXiv 2508.02668.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tensorpress.compressors.decompose.form_parts import (
    BlockPart,
    ChannelPart,
    LowRankPart,
    Metric,
    MPOPart,
    Part,
    Solved,
    SparsePart,
)
from tensorpress.compressors.decompose.site_plans import WORD, SitePlan
from tensorpress.compressors.decompose.tensor_train import factors
from tensorpress.compressors.decompose.weighted_low_rank import weighted_error
from tensorpress.kernels.sum_linear import SumLinear

Kind = Literal["svd", "whitened_svd", "asvd", "kronecker", "block_low_rank", "low_rank_sparse", "mpo_sparse"]
PUBLISHED: tuple[Kind, ...] = ("svd", "whitened_svd", "asvd")
"""Forms whose papers store two plain factors."""
CONVERGED = 1e-6
"""Share of the error below which what a sweep gains is nothing."""


@dataclass(frozen=True)
class Form:
    """A form with its choices; `sparse` is the share of the weights, or of the inputs with `channels`, that is kept apart."""

    kind: Kind
    pivoted: bool = True
    blocks: int = 8
    sparse: float = 0.03
    channels: bool = False
    sites: int = 2
    sweeps: int = 3

    def plan(self, outputs: int, inputs: int) -> SitePlan:
        """How its part of variable size is split into sites."""
        if self.kind in ("kronecker", "mpo_sparse"):
            return SitePlan("balanced", factors(outputs, self.sites), factors(inputs, self.sites))
        return SitePlan("low_rank", (outputs, 1), (1, inputs))

    def beside(self, outputs: int, inputs: int) -> list[Part]:
        """Its parts of a fixed size."""
        if self.kind == "block_low_rank":
            return [BlockPart(outputs, inputs, self.blocks)]
        if self.kind not in ("low_rank_sparse", "mpo_sparse"):
            return []
        if self.channels:
            count = int(self.sparse * inputs)
            return [ChannelPart(outputs, inputs, count)] if count else []
        count = int(self.sparse * outputs * inputs)
        return [SparsePart(outputs, inputs, count)] if count else []

    def smallest(self, outputs: int, inputs: int) -> int | None:
        """The fewest bytes of a shape; None where that is no less than the dense weight, or cannot be."""
        fixed = sum(part.bytes for part in self.beside(outputs, inputs))
        least = fixed + self.plan(outputs, inputs).bytes(1, self.pivoted)
        return least if outputs > 1 and least < WORD * outputs * inputs else None

    def parts(self, outputs: int, inputs: int, allowance: float) -> list[Part] | None:
        """The parts within so many bytes; None where not even the smallest fit."""
        beside, plan = self.beside(outputs, inputs), self.plan(outputs, inputs)
        bond = plan.largest(allowance - sum(part.bytes for part in beside), self.pivoted)
        if bond < 1:
            return None
        if plan.kind == "low_rank":
            return [LowRankPart(plan, bond, self.pivoted), *beside]
        return [MPOPart(plan, bond, self.pivoted, min(1, self.sweeps) if beside else self.sweeps), *beside]


@dataclass
class Fitted:
    """A layer in a form, its bytes at 16 bits, and tr(D H D^T) in float64 after each step of its fit, the last one's included."""

    layer: nn.Module
    bytes: int
    losses: list[float]
    detail: list[dict[str, Any]]

    @property
    def loss(self) -> float:
        return self.losses[-1]


def fit(
    form: Form, allowance: float, weight: torch.Tensor, bias: torch.Tensor | None = None, metric: Metric = None
) -> Fitted | None:
    """Fit a form of at most so many bytes to a weight [m, n]; None where it has none so small.

    `metric`: the inputs' second moment [n, n], its diagonal [n], or None for the unit matrix. One part is solved as such,
    two alternate.
    """
    outputs, inputs = weight.shape
    parts = form.parts(outputs, inputs, allowance)
    if parts is None:
        return None
    target = weight.detach().double()
    measure = None if metric is None else metric.double()
    if len(parts) == 1:
        solved = [parts[0].solve(target, measure, None)]
        losses = [weighted_error(target - solved[0].matrix, measure)]
    else:
        solved, losses = alternate(parts, target, measure, form.sweeps)
    layer: nn.Module
    if len(parts) == 1:
        layer = parts[0].layer(solved[0], weight.dtype, bias)
    else:
        layer = SumLinear([part.layer(one, weight.dtype, None) for part, one in zip(parts, solved, strict=True)], bias)
    return Fitted(layer.to(weight.device), stored_bytes(layer), losses, [part.detail for part in parts])


def alternate(
    parts: Sequence[Part], target: torch.Tensor, metric: Metric, sweeps: int
) -> tuple[list[Solved], list[float]]:
    """Fit two parts to a matrix [m, n], each in turn to what the other leaves; and the error when both are there, then after each step.

    Which goes first is tried both ways, and the better one goes on for so many sweeps, or until nothing is gained. The error never rises.
    """
    starts = [_started(parts, target, metric, first) for first in (0, 1)]
    solved, loss = min(starts, key=lambda start: start[1])
    losses, none = [loss], CONVERGED**2 * weighted_error(target, metric)
    for _ in range(sweeps):
        before = losses[-1]
        for place, part in enumerate(parts):
            left = target - solved[1 - place].matrix
            found = part.solve(left, metric, solved[place])
            error = weighted_error(left - found.matrix, metric)
            if error <= losses[-1]:
                solved[place] = found
            losses.append(min(error, losses[-1]))
        if before - losses[-1] <= CONVERGED * before or losses[-1] <= none:
            break
    return solved, losses


def _started(parts: Sequence[Part], target: torch.Tensor, metric: Metric, first: int) -> tuple[list[Solved], float]:
    """One part fitted to all, the other to the rest; and the error."""
    one = parts[first].solve(target, metric, None)
    other = parts[1 - first].solve(target - one.matrix, metric, None)
    error = weighted_error(target - one.matrix - other.matrix, metric)
    return ([one, other] if first == 0 else [other, one]), error


def stored_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's weight at 16 bits, without its bias, with all that says where its numbers stand."""
    numbers = sum(parameter.numel() for name, parameter in layer.named_parameters() if name != "bias")
    return WORD * numbers + sum(buffer.nbytes for buffer in layer.buffers())
