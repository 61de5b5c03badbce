"""TT-SVD with weights: where the metrics of inputs and outputs are taken apart into one for each site, the decomposition is as before."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tensorpress.compressors.decompose.tensor_train import decompose
from tensorpress.compressors.decompose.weighted_low_rank import root_of

DAMPING = 1e-6
"""Share of the mean diagonal that is added to the metric of a site."""


def weighted_tt_svd(
    weight: torch.Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    bonds: Sequence[int],
    inputs: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Cores [d_{k-1}, i_k, j_k, d_k] that nearly minimise tr(G D H D^T), in float64; the plain TT-SVD where neither metric is given.

    H [n, n] (or its diagonal) is replaced by the Kronecker product of its partial traces, one for each site, and so is G; with those TT-SVD
    is quasi-optimal, as it is for the plain norm. Exact for metrics that are such products, lossless at full bonds for any.
    """
    if inputs is None and outputs is None:
        return [core.to(weight.device) for core in decompose(weight, rows, columns, bonds)]
    in_roots = site_roots(inputs, columns, weight)
    out_roots = site_roots(outputs, rows, weight)
    scaled = weight.double()
    for k, root in enumerate(in_roots):
        scaled = _along(scaled, columns, k, root.T, 1)
    for k, root in enumerate(out_roots):
        scaled = _along(scaled, rows, k, root.T, 0)
    if not bool(scaled.any()):  # the metrics see nothing of the weight, whose plain norm then counts
        return weighted_tt_svd(weight, rows, columns, bonds)
    cores = []
    for core, of_rows, of_columns in zip(decompose(scaled, rows, columns, bonds), out_roots, in_roots, strict=True):
        a, i, j, b = core.shape
        moved = core.to(weight.device).permute(1, 2, 0, 3)
        moved = torch.linalg.solve_triangular(of_rows.T, moved.reshape(i, -1), upper=True).reshape(i, j, a, b)
        moved = moved.transpose(0, 1)
        moved = torch.linalg.solve_triangular(of_columns.T, moved.reshape(j, -1), upper=True).reshape(j, i, a, b)
        cores.append(moved.permute(2, 1, 0, 3).contiguous())
    return cores


def site_roots(moment: torch.Tensor | None, sizes: Sequence[int], like: torch.Tensor) -> list[torch.Tensor]:
    """Lower triangular L_k [size_k, size_k] with L_k L_k^T the mean over all other sites of a moment's blocks, damped."""
    if moment is None:
        return [torch.eye(size, dtype=torch.float64, device=like.device) for size in sizes]
    roots = []
    for k, size in enumerate(sizes):
        before, after = math.prod(sizes[:k]), math.prod(sizes[k + 1 :])
        if moment.ndim == 1:
            part = torch.diag(moment.double().reshape(before, size, after).mean((0, 2)))
        else:
            blocks = moment.double().reshape(before, size, after, before, size, after)
            part = torch.einsum("apbaqb->pq", blocks) / (before * after)
        roots.append(root_of(part, DAMPING))
    return roots


def _along(matrix: torch.Tensor, sizes: Sequence[int], k: int, factor: torch.Tensor, side: int) -> torch.Tensor:
    """Multiply the k-th site of the rows (side 0) or columns (side 1) of a matrix [m, n] by `factor`."""
    turned = matrix if side == 0 else matrix.T
    before, after = math.prod(sizes[:k]), math.prod(sizes[k + 1 :])
    found = torch.einsum("pq,aqx->apx", factor, turned.reshape(before, sizes[k], after * turned.shape[1]))
    found = found.reshape(turned.shape)
    return found if side == 0 else found.T
