"""Matrix product operators as numbers: how a matrix is split, what that costs, and the decomposition and its canonical form in float64.

Cores T_k [d_{k-1}, i_k, j_k, d_k] with d_0 = d_n = 1 stand for the matrix W [prod i_k, prod j_k]. Sources: Oseledets 2011 (TT-SVD, rounding);
MPOP, Liu et al. 2021, arXiv 2106.02205 (entropies, fast estimate of the error); Holtz, Rohwedder and Schneider 2012 (the gauge of each bond).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch


def factors(size: int, sites: int) -> tuple[int, ...]:
    """Split `size` into `sites` factors, as even as its primes allow, the largest in the middle.

    Prime factors are dealt out from the largest, each to the smallest product so far.
    """
    primes, rest, divisor = [], size, 2
    while rest > 1:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1 if divisor * divisor <= rest else max(rest - divisor, 1)
    parts = [1] * sites
    for prime in sorted(primes, reverse=True):
        parts[parts.index(min(parts))] *= prime
    parts.sort()
    return tuple(parts[::2] + parts[1::2][::-1])


def full_bonds(rows: Sequence[int], columns: Sequence[int]) -> tuple[int, ...]:
    """Bond dimensions at which the decomposition is exact: d_k = min(prod_{l<=k} i_l j_l, prod_{l>k} i_l j_l)."""
    sizes = [i * j for i, j in zip(rows, columns, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def full_bond(sites: int, outputs: int, inputs: int) -> int:
    """The largest of them for a matrix [outputs, inputs] that is split evenly into sites."""
    return max(full_bonds(factors(outputs, sites), factors(inputs, sites)))


def parameters(rows: Sequence[int], columns: Sequence[int], bonds: Sequence[int]) -> int:
    """Numbers stored by the cores: sum of d_{k-1} i_k j_k d_k."""
    edges = (1, *bonds, 1)
    return sum(edges[k] * i * j * edges[k + 1] for k, (i, j) in enumerate(zip(rows, columns, strict=True)))


def capped_bonds(rows: Sequence[int], columns: Sequence[int], bond_dimension: int) -> tuple[int, ...]:
    """Bonds min(bond_dimension, full bond)."""
    return tuple(min(bond_dimension, full) for full in full_bonds(rows, columns))


def largest_bond(rows: Sequence[int], columns: Sequence[int], budget: float) -> int:
    """The largest bond dimension whose cores hold at most `budget` numbers; 0 when not even 1 does."""
    low, high = 0, max(full_bonds(rows, columns), default=1)
    while low < high:
        middle = (low + high + 1) // 2
        if parameters(rows, columns, capped_bonds(rows, columns, middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def decompose(
    weight: torch.Tensor, rows: Sequence[int], columns: Sequence[int], bonds: Sequence[int]
) -> list[torch.Tensor]:
    """TT-SVD of weight [prod rows, prod columns] into cores [d_{k-1}, i_k, j_k, d_k], in float64.

    At full bonds the product of the cores is the weight; below, its Frobenius error is the root of the sum of squares of
    the singular values that each cut drops. Of a zero matrix the first core is zero, the others have orthonormal rows, as those of a TT-SVD
    have from the right: they can be trained.
    """
    if len(rows) == 1:
        return [weight.double().reshape(1, rows[0], columns[0], 1)]
    if not bool(weight.any()):  # the library divides by their norm
        shapes = zip((1, *bonds), rows, columns, (*bonds, 1), strict=True)
        cores = [torch.eye(s[0], math.prod(s[1:]), dtype=torch.float64).reshape(s) for s in shapes]
        return [torch.zeros_like(cores[0]), *cores[1:]]
    from tensorly.decomposition import tensor_train_matrix  # half a second, only where a step decomposes

    tensor = np.asarray(weight.detach().double().cpu().numpy()).reshape(*rows, *columns)
    cores = tensor_train_matrix(tensor, [1, *bonds, 1])
    return [torch.from_numpy(np.array(core)) for core in cores]


def canonical(cores: Sequence[torch.Tensor], center: int) -> list[torch.Tensor]:
    """The same matrix with all cores left of `center` left-orthonormal and all right of it right-orthonormal, in float64.

    Bonds that are larger than what the sides can carry shrink. The norm of the matrix is that of the core at the center.
    """
    result = [core.double() for core in cores]
    for k in range(center):
        left, i, j, right = result[k].shape
        q, r = torch.linalg.qr(result[k].reshape(left * i * j, right))
        result[k] = q.reshape(left, i, j, -1)
        result[k + 1] = torch.tensordot(r, result[k + 1], 1)
    for k in range(len(result) - 1, center, -1):
        left, i, j, right = result[k].shape
        q, r = torch.linalg.qr(result[k].reshape(left, i * j * right).T)
        result[k] = q.T.reshape(-1, i, j, right)
        result[k - 1] = torch.tensordot(result[k - 1], r.T, 1)
    return result


def bond_spectra(cores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The singular values of the matrix at each of the n - 1 bonds, in float64: those of the unfolding (sites 1..k) x (sites k+1..n)."""
    spectra = []
    moving = canonical(cores, 0)
    for k in range(len(moving) - 1):
        left, i, j, right = moving[k].shape
        u, s, vt = torch.linalg.svd(moving[k].reshape(left * i * j, right), full_matrices=False)
        spectra.append(s)
        moving[k] = u.reshape(left, i, j, -1)
        moving[k + 1] = torch.tensordot(s[:, None] * vt, moving[k + 1], 1)
    return spectra


def matrix_spectra(weight: torch.Tensor, rows: Sequence[int], columns: Sequence[int]) -> list[torch.Tensor]:
    """What `bond_spectra` gives for the MPO of full bonds of a matrix [prod(rows), prod(columns)], without its cores: from the Gram matrix of each unfolding.

    Squares of singular values are exact to about 1e-15 of the largest.
    """
    sites, found = len(rows), []
    axes = [axis for k in range(sites) for axis in (k, sites + k)]
    tensor = weight.double().reshape(*rows, *columns).permute(axes)
    for k in range(1, sites):
        unfolding = tensor.reshape(math.prod(rows[:k]) * math.prod(columns[:k]), -1)
        gram = unfolding @ unfolding.T if unfolding.shape[0] <= unfolding.shape[1] else unfolding.T @ unfolding
        found.append(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0))
    return found


def entropy(spectrum: torch.Tensor) -> float:
    """Entanglement entropy S = - sum v ln v in nats, v = s^2 / sum s^2 (MPOP); 0 for one value or none, at most ln(number of values)."""
    shares = spectrum.double().square()
    total = float(shares.sum())
    if total == 0:
        return 0.0
    shares = shares / total
    return float(-torch.special.xlogy(shares, shares).sum()) + 0.0


def rounded(cores: Sequence[torch.Tensor], bonds: Sequence[int]) -> list[torch.Tensor]:
    """The cores with bonds lowered to at most `bonds` (TT rounding): one pass of singular value decompositions from the left.

    Its squared error is the sum of the squares of the singular values that each cut drops, on what the cuts before left.
    """
    moving = canonical(cores, 0)
    for k, bond in enumerate(bonds):
        left, i, j, right = moving[k].shape
        u, s, vt = torch.linalg.svd(moving[k].reshape(left * i * j, right), full_matrices=False)
        moving[k] = u[:, :bond].reshape(left, i, j, -1)
        moving[k + 1] = torch.tensordot(s[:bond, None] * vt[:bond], moving[k + 1], 1)
    return moving


def least_numbers(rows: Sequence[int], columns: Sequence[int], bonds: Sequence[int]) -> int:
    """Numbers that determine an MPO of these bonds: those of its cores less d_k^2 for the gauge of each bond; mn at full bonds of two sites."""
    return parameters(rows, columns, bonds) - sum(bond * bond for bond in bonds)
