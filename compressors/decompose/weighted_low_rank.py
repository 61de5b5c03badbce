"""The best approximation of low rank for the output of a layer, not for its weight; and its form in the fewest numbers.

Sources: SVD-LLM, Wang et al. 2024, arXiv 2403.07378 (whitening with the inputs' second moment); Fisher-weighted low rank, Hsu et al. 2022,
arXiv 2207.00112, here with the full Kronecker-factored Fisher information; Zhao et al. 2025, arXiv 2501.19090 (pivots).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tensorpress.errors import StepError
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.pivoted_mpo_linear import pivot_rows

DAMPING = 1e-3
"""Share of the mean diagonal that is added to the second moment of the outputs' gradients, which is singular where few were seen."""
LARGE = 1 << 22
"""Numbers of a weight from which on products of n^3 multiply-adds are taken in float32."""
TINY = 1e-9
"""The same for the inputs', where a root of it has to be taken: only against rounding."""


@dataclass(frozen=True)
class WeightedSVD:
    """W = left @ right, ordered such that the first r columns and rows are the best approximation of each rank r.

    `left` [m, k], `right` [k, n], `losses` [k + 1]: tr(G D H D^T) of the error D at each rank from 0 to k = min(m, n); float64.
    """

    left: torch.Tensor
    right: torch.Tensor
    losses: torch.Tensor


def weighted_svd(
    weight: torch.Tensor,
    inputs: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
    damping: float = DAMPING,
) -> WeightedSVD:
    """Minimise tr(G D H D^T), D = W - W_r, over W_r of each rank r, in float64.

    `weight` W [m, n]; `inputs` H [n, n], or its diagonal [n], or None for the unit matrix; `outputs` G, likewise [m, m], [m] or None.
    With G = L L^T and the eigenvectors U of L^T W H W^T L the solution is L^-T U_r U_r^T L^T W: H is never inverted, so inputs that are
    linearly dependent or never seen need no damping, and at full rank the result is W. G is damped.
    """
    check_finite(inputs)
    w = weight.double()
    factor = None if outputs is None else root_of(outputs.double(), damping)
    scaled = w if factor is None else _times(factor, w, transposed=True)  # L^T W
    basis = _basis(scaled, None if inputs is None else inputs.double())
    losses = _losses(basis, scaled, inputs)
    right = basis.T @ scaled
    left = basis if factor is None else _solve(factor, basis)
    return WeightedSVD(left, right, losses)


def _basis(scaled: torch.Tensor, inputs: torch.Tensor | None) -> torch.Tensor:
    """Orthonormal columns U [m, min(m, n)]: eigenvectors of A H A^T for A [m, n], the largest first."""
    outputs, width = scaled.shape
    if outputs <= width:
        gram = scaled @ weighted_by(scaled, inputs).T
        return torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)
    # Fewer inputs than outputs: the same from the other side, A S = U s V^T for H = S S^T.
    root = scaled if inputs is None else _times(root_of(inputs, TINY), scaled.T, transposed=True).T
    vectors = torch.linalg.eigh(root.T @ root).eigenvectors.flip(1)
    return torch.linalg.qr(root @ vectors).Q


def _losses(basis: torch.Tensor, scaled: torch.Tensor, inputs: torch.Tensor | None) -> torch.Tensor:
    """[k + 1]: sum of u^T A H A^T u over the columns from each on."""
    rows = basis.T @ scaled
    shares = (rows * weighted_by(rows, None if inputs is None else inputs.double())).sum(1).clamp(min=0)
    return torch.cat((shares.flip(0).cumsum(0).flip(0), shares.new_zeros(1)))


def weighted_by(rows: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """Rows @ metric, which may be a diagonal or None for the unit matrix."""
    if metric is None:
        return rows
    return rows * metric if metric.ndim == 1 else rows @ metric


def check_finite(moment: torch.Tensor | None) -> None:
    """Refuse a second moment that is not finite, before a factorization of it fails or never ends. Raises StepError."""
    if moment is not None and not bool(torch.isfinite(moment).all()):
        raise StepError("the second moments of a layer are not finite; give the model dtype: float32")


def root_of(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """L [k, k] lower triangular, or [k] for a diagonal, with L L^T the damped moment; damping is raised until there is one. Raises StepError."""
    check_finite(moment)
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(moment.dtype).tiny)
    if moment.ndim == 1:
        return (moment.clamp(min=0) + max(damping, TINY) * mean).sqrt()
    damped = moment.clone()
    while True:
        damped.diagonal().copy_(diagonal + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return factor
        damping = max(10 * damping, TINY)


def _times(factor: torch.Tensor, matrix: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    if factor.ndim == 1:
        return factor[:, None] * matrix
    return (factor.T if transposed else factor) @ matrix


def _solve(factor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """L^-T M."""
    if factor.ndim == 1:
        return matrix / factor[:, None]
    return torch.linalg.solve_triangular(factor.T, matrix, upper=True)


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """A second moment [k, k] with a share of its mean diagonal added to the diagonal."""
    result = moment.clone()
    result.diagonal().add_(damping * moment.diagonal().mean())
    return result


def weighted_error(
    difference: torch.Tensor, inputs: torch.Tensor | None = None, outputs: torch.Tensor | None = None
) -> float:
    """tr(G D H D^T) of a difference D [m, n] of weights, in float64, above `LARGE` numbers in float32; both moments as in `weighted_svd`, undamped."""
    precise = torch.float64 if difference.numel() < LARGE else torch.float32
    d = difference.to(precise)
    right = weighted_by(d, None if inputs is None else inputs.to(precise))
    left = d.T if outputs is None else weighted_by(d.T, outputs.to(precise))
    return float((left * right.T).sum(dtype=torch.float64).clamp(min=0))


def low_rank_layer(
    left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, *, pivoted: bool
) -> LowRankLinear:
    """The layer of W = left [m, r] @ right [r, n] in a precision; with pivots, rows of W are its inner weight.

    Without, both factors have the same norm for each rank; where W is zero the right one is, and can still be trained.
    """
    if pivoted:
        mask, coefficients = pivot_rows(left)
        return LowRankLinear.from_factors((left[mask] @ right).to(dtype), coefficients.to(dtype), mask, bias)
    # Where the metric of the outputs sees nothing, the square of a number overflows.
    size = left.abs().amax(0).clamp(min=1e-300)
    left, right = left / size, right * size[:, None]
    before, behind = left.norm(dim=0).clamp(min=1e-300), right.norm(dim=1)
    scale = torch.where(behind > 0, (behind / before).sqrt(), 1 / before)
    return LowRankLinear.from_factors((right / scale[:, None]).to(dtype), (left * scale).to(dtype), None, bias)
