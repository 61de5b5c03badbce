"""A linear layer whose weight is a matrix product operator in the fewest numbers that its bonds can have.

At each bond any invertible matrix X and its inverse can be put between the cores without changing the weight. X is chosen such that d_k rows
of the unfolding [d_{k-1} i_k j_k, d_k] of core k, the pivots, are the unit matrix: those d_k^2 numbers need not be stored (the dimension of
the manifold of tensor trains, Holtz, Rohwedder and Schneider 2012). With two sites (m, 1), (1, n) it is the pivoted low rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tensorpress.kernels import registry
from tensorpress.kernels.kernel_layer import Kept, KernelLayer
from tensorpress.kernels.low_rank_linear import pack_bits, unpack_bits
from tensorpress.kernels.mpo_linear import MPOLinear, apply_cost, matrix_cost, mpo_apply, mpo_to_matrix
from tensorpress.kernels.origin import Origin


class PivotedMPOLinear(KernelLayer):
    """y = x W^T + b; inputs [..., prod(in_factors)], outputs [..., prod(out_factors)].

    `cores`: for each core but the last its rows that are no pivots, [d_{k-1} i_k j_k - d_k, d_k]; the last is [d_{n-1}, i_n, j_n, 1]. `pivots_k`
    uint8 [ceil(d_{k-1} i_k j_k / 8)]: a bit for each row, set for pivots, of which the next is the next row of the unit matrix.
    """

    operation = "pivoted_mpo_linear"
    fields = ("out_factors", "in_factors", "bonds", "bias")
    lists = ("out_factors", "in_factors", "bonds")

    def __init__(self, out_factors: Sequence[int], in_factors: Sequence[int], bonds: Sequence[int], *, bias: bool):
        super().__init__()
        if not len(out_factors) == len(in_factors) == len(bonds) + 1 > 1:
            raise ValueError("an MPO of n > 1 sites has n output factors, n input factors and n - 1 bonds")
        self.out_factors, self.in_factors, self.bonds = tuple(out_factors), tuple(in_factors), tuple(bonds)
        self.in_features, self.out_features = math.prod(in_factors), math.prod(out_factors)
        for k, (rows, bond) in enumerate(zip(self.rows(), bonds, strict=True)):
            if bond > rows:
                raise ValueError(f"bond {k + 1} of {bond} is above the {rows} rows of its core")
            self.register_buffer(f"pivots_{k}", pack_bits(torch.arange(rows) < bond))
        free = [torch.zeros(rows - bond, bond) for rows, bond in zip(self.rows(), bonds, strict=True)]
        self.cores = nn.ParameterList([*free, torch.zeros(bonds[-1], out_factors[-1], in_factors[-1], 1)])
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None
        self.kernel = "reference"
        """What computes it; `auto` in a model that was opened from a folder."""
        self.made: tuple[Origin, MPOLinear] | None = None
        """What the kernel `expanded` keeps: the layer with all numbers of its cores."""

    def rows(self) -> list[int]:
        """d_{k-1} i_k j_k of each core but the last."""
        edges = (1, *self.bonds)
        return [edges[k] * self.out_factors[k] * self.in_factors[k] for k in range(len(self.bonds))]

    @classmethod
    def from_cores(
        cls, cores: Sequence[torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> PivotedMPOLinear:
        """Fix the gauge of cores [d_{k-1}, i_k, j_k, d_k], in float64, and store them in a precision. Raises ValueError as `pivot_rows`."""
        shapes = [core.shape for core in cores]
        with torch.device("meta"):
            layer = cls(
                [s[1] for s in shapes], [s[2] for s in shapes], [s[3] for s in shapes[:-1]], bias=bias is not None
            )
        moving, kept = cores[0].double(), []
        for k, following in enumerate(cores[1:]):
            unfolded = moving.reshape(-1, moving.shape[3])
            mask, coefficients = pivot_rows(unfolded)
            setattr(layer, f"pivots_{k}", pack_bits(mask))
            kept.append(coefficients)
            moving = torch.tensordot(unfolded[mask], following.double(), 1)
        layer.cores = nn.ParameterList(core.to(dtype) for core in (*kept, moving))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    def full_cores(self) -> list[torch.Tensor]:
        """The cores [d_{k-1}, i_k, j_k, d_k] with all their numbers; gradients reach what is stored."""
        edges, found = (1, *self.bonds), []
        for k, (rows, bond) in enumerate(zip(self.rows(), self.bonds, strict=True)):
            free = self.cores[k]
            mask = unpack_bits(getattr(self, f"pivots_{k}"), rows)
            order = torch.where(mask, mask.cumsum(0) - 1, bond + (~mask).cumsum(0) - 1)
            unit = torch.eye(bond, dtype=free.dtype, device=free.device)
            core = torch.cat((unit, free))[order]
            found.append(core.reshape(edges[k], self.out_factors[k], self.in_factors[k], bond))
        return [*found, self.cores[len(self.bonds)]]

    def dense_weight(self) -> torch.Tensor:
        return mpo_to_matrix(self.full_cores())

    def _pivots(self) -> list[torch.Tensor]:
        return [getattr(self, f"pivots_{k}") for k in range(len(self.bonds))]

    def stored(self) -> list[torch.Tensor]:
        return [*self.cores, *self._pivots(), *([] if self.bias is None else [self.bias])]

    def place(self, tensors: Sequence[torch.Tensor]) -> None:
        sites = len(self.in_factors)
        self.cores = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors[:sites])
        for k in range(sites - 1):
            setattr(self, f"pivots_{k}", tensors[sites + k])
        rest = tensors[2 * sites - 1 :]
        self.bias = nn.Parameter(rest[0], requires_grad=False) if rest else None

    def check(self) -> None:
        for k, (rows, bond) in enumerate(zip(self.rows(), self.bonds, strict=True)):
            if int(unpack_bits(getattr(self, f"pivots_{k}"), rows).sum()) != bond:
                raise ValueError(f"pivots_{k}: not {bond} of the {rows} bits are set")

    def expanded(self) -> MPOLinear:
        """The same layer with all numbers of its cores, which every kernel for those can compute; made anew when the cores change."""
        if self.made is None or not self.made[0].holds(self.stored()):
            origin = Origin(self.stored())
            with torch.no_grad():
                layer = MPOLinear.from_cores(self.full_cores(), self.bias).requires_grad_(False)
            layer.kernel = "auto"
            self.made = origin, layer
        return self.made[1]

    def kept(self, names: Collection[str] | None = None) -> Iterator[Kept]:
        if self.made is not None and (names is None or "expanded" in names):
            yield from (core.data for core in self.made[1].cores)
            yield from self.made[1].kept()

    def release_own(self, names: Collection[str]) -> None:
        if "expanded" not in names:
            self.made = None

    def kernel_key(self) -> str:
        return f"{self.in_factors} to {self.out_factors}, bonds {self.bonds}"

    def spec(self) -> dict[str, object]:
        return {
            "form": "pivoted_mpo",
            "out_factors": list(self.out_factors),
            "in_factors": list(self.in_factors),
            "bonds": list(self.bonds),
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> PivotedMPOLinear:
        layer = cls(spec["out_factors"], spec["in_factors"], spec["bonds"], bias=spec["bias"])
        layer.kernel = "auto"
        return layer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made": None}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bonds={self.bonds}"


def pivot_rows(left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of left [m, r] that span the others: a mask [m] of r pivots, and C [m - r, r] with left[~mask] = C left[mask].

    By Gaussian elimination with pivots, in float64. Raises ValueError where the rank of `left` is below r.
    """
    outputs, rank = left.shape
    packed, swaps, _ = torch.linalg.lu_factor_ex(left.double())
    _, lower, upper = torch.lu_unpack(packed, swaps, unpack_pivots=False)  # as a matrix the permutation has m^2 numbers
    if not bool((upper.diagonal().abs() > 1e-300).all()):
        raise ValueError(f"the left factor has a rank below {rank}")
    rows = list(range(outputs))
    for here, there in enumerate(swaps.tolist()):
        rows[here], rows[there - 1] = rows[there - 1], rows[here]
    order = torch.tensor(rows, device=left.device)
    mask = torch.zeros(outputs, dtype=torch.bool, device=left.device)
    mask[order[:rank]] = True
    below = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
    ranks = mask.cumsum(0) - 1  # the pivots in the order of the outputs
    coefficients = below.new_zeros(outputs - rank, rank)
    others = (~mask).cumsum(0) - 1
    coefficients[others[order[rank:], None], ranks[order[:rank]][None]] = below
    return mask, coefficients


def pivoted_mpo_linear_reference(layer: PivotedMPOLinear, x: torch.Tensor) -> torch.Tensor:
    """Whichever of the chain from the left and the contracted matrix takes fewer multiply-adds for so many inputs."""
    cores, tokens = layer.full_cores(), x.numel() // x.shape[-1]
    if matrix_cost(cores, tokens) < apply_cost(cores, tokens):
        return nn.functional.linear(x, mpo_to_matrix(cores), layer.bias)
    y = mpo_apply(cores, x)
    return y if layer.bias is None else y + layer.bias


def pivoted_mpo_linear_expanded(layer: PivotedMPOLinear, x: torch.Tensor) -> torch.Tensor:
    """By the fastest kernel for the cores with all their numbers, which are kept."""
    learns = torch.is_grad_enabled() and (x.requires_grad or any(core.requires_grad for core in layer.cores))
    return pivoted_mpo_linear_reference(layer, x) if learns else layer.expanded()(x)


registry.register(
    "pivoted_mpo_linear",
    "expanded",
    pivoted_mpo_linear_expanded,
    room=lambda layer: layer.in_features * layer.out_features * layer.cores[0].element_size(),
)
registry.register("pivoted_mpo_linear", "reference", pivoted_mpo_linear_reference)
