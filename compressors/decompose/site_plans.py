"""How a matrix can be split into sites, what each split costs in bytes, and which of them gives the smallest error of the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from tensorpress.compressors.decompose.alternating import refine
from tensorpress.compressors.decompose.tensor_train import (
    canonical,
    capped_bonds,
    factors,
    full_bonds,
    least_numbers,
    parameters,
)
from tensorpress.compressors.decompose.weighted_low_rank import low_rank_layer, weighted_error, weighted_svd
from tensorpress.compressors.decompose.weighted_tt_svd import weighted_tt_svd
from tensorpress.errors import InputError
from tensorpress.kernels.low_rank_linear import low_rank_numbers
from tensorpress.kernels.mpo_linear import MPOLinear, mpo_to_matrix
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear

Kind = Literal["low_rank", "balanced", "folded"]
WORD = 2
"""Bytes of a number as it is stored."""
HOPELESS = 4.0
"""A plan that begins with so many times the loss of the best one so far is not refined: sweeps gain two or three times."""


@dataclass(frozen=True)
class SitePlan:
    """Factor lists of the outputs and the inputs, and what they are called.

    `low_rank`: rows (m, 1), columns (1, n), a product of two matrices. `balanced`: factors as even as the primes allow. `folded`: two
    sites that split the outputs alone, rows (m / f, f), columns (1, n): a low rank of the matrix folded to m / f rows.
    """

    kind: Kind
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def name(self) -> str:
        return "low rank" if self.kind == "low_rank" else f"{self.kind} {len(self.rows)} sites"

    @property
    def full_bond(self) -> int:
        return max(full_bonds(self.rows, self.columns), default=1)

    def bytes(self, bond: int, pivoted: bool) -> int:
        """Bytes of the cores with bonds of at most `bond`; the bits that mark pivots included."""
        if self.kind == "low_rank":
            outputs, inputs = self.rows[0], self.columns[1]
            rank = min(bond, outputs, inputs)
            return WORD * low_rank_numbers(outputs, inputs, rank, pivoted) + (-(-outputs // 8) if pivoted else 0)
        bonds = capped_bonds(self.rows, self.columns, bond)
        if not pivoted:
            return WORD * parameters(self.rows, self.columns, bonds)
        sites = zip((1, *bonds), self.rows, self.columns, strict=True)
        bits = [left * i * j for left, i, j in sites][:-1]
        return WORD * least_numbers(self.rows, self.columns, bonds) + sum(-(-count // 8) for count in bits)

    def largest(self, allowance: float, pivoted: bool, multiple: int = 1) -> int:
        """The largest bond of at most so many bytes; 0 where there is none.

        The rank of a low rank is a multiple of `multiple`, where there is one and where plain factors of the same bytes have no larger rank.
        A step of so many would be a large share of the bytes of other plans, whose bonds are exact.
        """
        low, bond = 0, self.full_bond if self.kind != "low_rank" else min(self.rows[0] - 1, self.columns[1])
        while low < bond:
            middle = (low + bond + 1) // 2
            low, bond = (middle, bond) if self.bytes(middle, pivoted) <= allowance else (low, middle - 1)
        if self.kind != "low_rank":
            return bond
        rounded = bond // multiple * multiple
        plain = allowance // (WORD * (self.rows[0] + self.columns[1]))
        return rounded if rounded and rounded >= plain else bond


def most_sites(outputs: int, inputs: int) -> int:
    """Sites that a shape can carry without one that is 1 x 1: the prime factors of the larger supply."""
    return max(1, *(sum(f > 1 for f in factors(size, 40)) for size in (outputs, inputs)))


def check_sites(sites: int, what: str, outputs: int, inputs: int, field: str = "sites") -> None:
    """Refuse more sites than a shape can carry. Raises InputError."""
    most = most_sites(outputs, inputs)
    if sites > most:
        raise InputError(
            f"{field}: {sites} sites; {what} of {outputs} x {inputs} carries {most} at most, each with a factor above 1"
        )


def plans(outputs: int, inputs: int, sites: int, which: Literal["auto", "balanced", "low_rank"]) -> list[SitePlan]:
    """The plans of a family for a shape, `low_rank` first. `auto` has all kinds that the shape can carry, the balanced of up to so many sites."""
    low_rank = SitePlan("low_rank", (outputs, 1), (1, inputs))
    if which == "low_rank":
        return [low_rank]
    counts = [sites] if which == "balanced" else range(2, min(sites, most_sites(outputs, inputs)) + 1)
    balanced = [SitePlan("balanced", factors(outputs, count), factors(inputs, count)) for count in counts]
    if which == "balanced":
        return balanced
    found = [low_rank, *balanced]
    if outputs % 2 == 0 and outputs > 2:
        found.append(SitePlan("folded", (outputs // 2, 2), (1, inputs)))
    return found


@dataclass
class Fitted:
    """A layer that a plan was fitted to, and how well: tr(G D H D^T), before the weight is rounded to its precision."""

    plan: SitePlan
    bond: int
    bytes: int
    loss: float
    layer: nn.Module
    cores: list[torch.Tensor]


def fit(
    plan: SitePlan,
    bond: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    inputs: torch.Tensor | None,
    outputs: torch.Tensor | None,
    *,
    pivoted: bool,
    sweeps: int,
    damping: float,
    limit: float = math.inf,
) -> Fitted:
    """Fit a plan to a weight [m, n] at a bond; `inputs` and `outputs` as in `weighted_svd`.

    `low_rank` is solved exactly; the others start from a weighted TT-SVD and are refined by so many sweeps, unless their loss is then above
    `limit`, from where it would not come down far enough.
    """
    if plan.kind == "low_rank":
        svd = weighted_svd(weight, inputs, outputs, damping)
        left, right = svd.left[:, :bond], svd.right[:bond]
        layer: nn.Module = low_rank_layer(left, right, bias, weight.dtype, pivoted=pivoted)
        cores = [left.reshape(1, len(left), 1, bond), right.reshape(bond, 1, -1, 1)]
        loss = weighted_error(weight.double() - left @ right, inputs, outputs)
    else:
        bonds = capped_bonds(plan.rows, plan.columns, bond)
        if not bool(weight.any()):  # has nothing to refine, in any metric
            inputs = outputs = None
        cores = weighted_tt_svd(weight, plan.rows, plan.columns, bonds, inputs, outputs)
        loss = weighted_error(weight.double() - mpo_to_matrix(cores), inputs, outputs)
        if sweeps and loss <= limit and (inputs is not None or outputs is not None):
            refined, _ = refine(cores, weight, inputs, outputs, sweeps=sweeps)
            after = weighted_error(weight.double() - mpo_to_matrix(refined).double(), inputs, outputs)
            if after < loss:  # float32 may take the last digits of an error for more than they are
                cores, loss = refined, after
        layer = mpo_layer(cores, bias, weight.dtype, pivoted=pivoted)
    return Fitted(plan, bond, plan.bytes(bond, pivoted), loss, layer.to(weight.device), cores)


def mpo_layer(
    cores: Sequence[torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype, *, pivoted: bool
) -> MPOLinear | PivotedMPOLinear:
    """The layer of cores in a precision; with pivots in the fewest numbers."""
    if pivoted:  # in a gauge whose cores before the last have all their rank, whatever the matrix has
        return PivotedMPOLinear.from_cores(canonical(cores, len(cores) - 1), bias, dtype)
    return MPOLinear.from_cores([core.to(dtype) for core in cores], bias)


def best_fit(
    candidates: Sequence[SitePlan],
    allowance: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    inputs: torch.Tensor | None,
    outputs: torch.Tensor | None,
    *,
    pivoted: bool,
    sweeps: int,
    damping: float,
    multiple: int = 1,
    most: int | None = None,
) -> tuple[Fitted | None, dict[str, float]]:
    """The plan with the smallest loss within an allowance of bytes, and the loss of each that fits by its name.

    None where none fits, or where the weight itself is no larger. No bond is above `most`.
    """
    if allowance >= WORD * weight.numel():
        return None, {}
    best: Fitted | None = None
    losses = {}
    for plan in candidates:
        bond = plan.largest(allowance, pivoted, multiple)
        bond = bond if most is None else min(bond, most)
        if bond == 0 or plan.bytes(bond, pivoted) >= WORD * weight.numel():
            continue
        limit = math.inf if best is None else HOPELESS * best.loss
        found = fit(
            plan, bond, weight, bias, inputs, outputs, pivoted=pivoted, sweeps=sweeps, damping=damping, limit=limit
        )
        losses[plan.name] = found.loss
        if best is None or found.loss < best.loss or not math.isfinite(best.loss):
            best = found
    return best, losses
