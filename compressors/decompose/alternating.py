"""Refinement of a matrix product operator against the output of a layer: alternating least squares over its cores.

With all cores but one fixed, the weight is linear in that one, and tr(G D H D^T) of the error D is a least-squares problem (Holtz, Rohwedder and
Schneider 2012, "The alternating linear scheme"). The other cores are orthonormal around it, so its own metric is that of the data alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from tensorpress.compressors.decompose.tensor_train import canonical
from tensorpress.compressors.decompose.weighted_low_rank import LARGE, TINY, root_of, weighted_by

DIRECT_UNKNOWNS, DIRECT_NUMBERS = 2048, 1 << 25
"""Largest system that is solved in closed form, and most numbers of its design matrix; above, conjugate gradients."""
PRECISE = 1 << 14
"""Numbers of a weight up to which all is done in float64; above in float32, where the last digits of an error do not matter."""
ITERATIONS, FEW = 12, 3
"""Of conjugate gradients for one core, each of which lowers the error; and for weights that are `LARGE`, where each takes a second."""


def refine(
    cores: Sequence[torch.Tensor],
    weight: torch.Tensor,
    inputs: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
    *,
    sweeps: int = 2,
    iterations: int | None = None,
    direct: bool = True,
) -> tuple[list[torch.Tensor], list[float]]:
    """Cores [d_{k-1}, i_k, j_k, d_k] that approximate `weight` [m, n] better; and tr(G D H D^T) before, and after each core.

    `inputs` H and `outputs` G as in `weighted_svd`. A sweep goes over the cores from the first to the last and back. Where G is the
    unit matrix and the system is small, a core is solved in closed form (with a trace of damping, for inputs that are linearly dependent); else
    by conjugate gradients from where it is. The error, in the precision of the refinement, never rises.
    """
    precise = torch.float64 if weight.numel() <= PRECISE else torch.float32
    w = weight.to(precise)
    h = None if inputs is None else inputs.to(precise)
    g = None if outputs is None else outputs.to(precise)
    moving = [core.to(precise) for core in canonical(cores, 0)]
    iterations = iterations or (ITERATIONS if weight.numel() < LARGE else FEW)
    problem = _Problem(w, h, g)
    left = problem.left(moving)
    errors = [left.error]
    places = [k for _ in range(sweeps) for k in (*range(len(moving)), *range(len(moving) - 2, -1, -1))]
    at = 0
    for k in places:
        if k != at:
            moving, at = [core.to(precise) for core in _moved(moving, at, k)], k
        closed = direct and g is None and problem.is_small(moving, k)
        if closed:
            core = problem.solved(moving, k)
            after = problem.left([*moving[:k], core, *moving[k + 1 :]])
        else:
            core, after = problem.descended(moving, k, iterations, left)
        if after.error <= errors[-1]:  # not where rounding leaves nothing to gain
            moving[k], left = core, after
        errors.append(left.error)
    return moving, errors


def _moved(cores: list[torch.Tensor], at: int, to: int) -> list[torch.Tensor]:
    """The same matrix with the center one further; all others stay as they are."""
    result = list(cores)
    left, i, j, right = result[at].shape
    if to > at:
        q, r = torch.linalg.qr(result[at].reshape(left * i * j, right))
        result[at], result[to] = q.reshape(left, i, j, -1), torch.tensordot(r, result[to], 1)
    else:
        q, r = torch.linalg.qr(result[at].reshape(left, i * j * right).T)
        result[at], result[to] = q.T.reshape(-1, i, j, right), torch.tensordot(result[to], r.T, 1)
    return result


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    """tr(A^T B) of two matrices, summed over rows in their precision and in float64 from there."""
    return float(torch.einsum("mn,mn->m", a, b).sum(dtype=torch.float64))


@dataclass(frozen=True)
class _Left:
    """What a matrix M leaves of a weight W: D = W - M [m, n], G D H [m, n], and tr(G D H D^T)."""

    difference: torch.Tensor
    pull: torch.Tensor

    @cached_property
    def error(self) -> float:
        return max(_inner(self.difference, self.pull), 0.0)


class _Problem:
    """A weight with the metrics of its inputs and outputs."""

    def __init__(self, weight: torch.Tensor, inputs: torch.Tensor | None, outputs: torch.Tensor | None):
        self.weight, self.inputs, self.outputs = weight, inputs, outputs
        self.root: torch.Tensor | None = None

    def weighted(self, matrix: torch.Tensor) -> torch.Tensor:
        """G M H."""
        right = weighted_by(matrix, self.inputs)
        if self.outputs is None or self.outputs.ndim == 1:
            return right if self.outputs is None else self.outputs[:, None] * right
        return self.outputs @ right  # not a transposed view, which would make all that follows slow

    def left(self, cores: Sequence[torch.Tensor]) -> _Left:
        difference = self.weight - _View(cores, 0).matrix(cores[0])
        return _Left(difference, self.weighted(difference))

    def is_small(self, cores: Sequence[torch.Tensor], k: int) -> bool:
        left, i, j, right = cores[k].shape
        unknowns = left * j * right
        return unknowns <= DIRECT_UNKNOWNS and unknowns * self.weight.numel() // i <= DIRECT_NUMBERS

    def solved(self, cores: Sequence[torch.Tensor], k: int) -> torch.Tensor:
        """The core that minimises the error for outputs of equal weight: one system for all of its i_k, in (d_{k-1}, j_k, d_k)."""
        left, i, j, right = cores[k].shape
        view = _View(cores, k)
        if self.root is None:
            n = self.weight.shape[1]
            eye = torch.eye(n, dtype=self.weight.dtype, device=self.weight.device)
            self.root = eye if self.inputs is None else root_of(self.inputs, TINY)
            self.root = torch.diag(self.root) if self.root.ndim == 1 else self.root
        design = view.design(self.root, j)  # [left * j * right, outputs but i_k, n]
        target = (self.weight @ self.root).reshape(view.rows[0], i, view.rows[1], -1).transpose(0, 1)
        gram = design.flatten(1) @ design.flatten(1).T
        change = target.flatten(1) @ design.flatten(1).T  # [i, unknowns]
        now = cores[k].permute(1, 0, 2, 3).reshape(i, -1)
        found = now + torch.cholesky_solve((change - now @ gram).T, root_of(gram, TINY)).T
        return found.reshape(i, left, j, right).transpose(0, 1)

    def descended(
        self, cores: Sequence[torch.Tensor], k: int, iterations: int, left: _Left
    ) -> tuple[torch.Tensor, _Left]:
        """Conjugate gradients on the normal equations, from the core as it is, of which `left` is left; the core, and what it leaves.

        Each iteration weights one matrix, which takes most of the time; what is left follows the steps.
        """
        view, core = _View(cores, k), cores[k]
        difference, pull = left.difference.clone(), left.pull.clone()
        direction = residual = view.adjoint(pull)
        size = first = residual.square().sum()
        for _ in range(iterations):
            moved = view.matrix(direction)
            weighted = self.weighted(moved)
            curvature = _inner(moved, weighted)
            if not curvature > 0:
                break
            step = float(size) / curvature
            core = core + step * direction
            difference.sub_(moved, alpha=step)
            pull.sub_(weighted, alpha=step)
            residual = residual - step * view.adjoint(weighted)  # which comes to nothing, as view.adjoint(pull) may not
            before, size = size, residual.square().sum()
            if not float(size) > torch.finfo(core.dtype).eps ** 2 * float(first):
                break
            direction = residual + size / before * direction
        return core, _Left(difference, pull)


def conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor], target: torch.Tensor, start: torch.Tensor, iterations: int
) -> torch.Tensor:
    """An approximate solution of apply(x) = target for a symmetric positive semidefinite `apply`."""
    x, residual = start.clone(), target - apply(start)
    direction, size = residual, residual.square().sum()
    limit = torch.finfo(x.dtype).eps ** 2 * target.square().sum()
    for _ in range(iterations):
        if float(size) <= float(limit):
            break
        applied = apply(direction)
        curvature = (direction * applied).sum()
        if not float(curvature) > 0:
            break
        step = size / curvature
        x = x + step * direction
        residual = residual - step * applied
        before, size = size, residual.square().sum()
        direction = residual + size / before * direction
    return x


class _View:
    """A weight as a function of one core, all others fixed."""

    def __init__(self, cores: Sequence[torch.Tensor], k: int):
        self.k = k
        self.left = _joined(cores[:k], cores[k])  # [rows, columns, bond]
        self.right = _joined([*(core.permute(3, 1, 2, 0) for core in reversed(cores[k + 1 :]))], cores[k], reverse=True)
        self.rows = self.left.shape[0], self.right.shape[0]
        self.columns = self.left.shape[1], self.right.shape[1]

    def matrix(self, core: torch.Tensor) -> torch.Tensor:
        """[m, n] of a core [a, i, j, b] in this place."""
        a, i, j, b = core.shape
        (r1, r2), (c1, c2) = self.rows, self.columns
        state = self.left.reshape(r1 * c1, a) @ core.reshape(a, i * j * b)
        state = state.reshape(r1 * c1 * i * j, b) @ self.right.reshape(r2 * c2, b).T
        return state.reshape(r1, c1, i, j, r2, c2).permute(0, 2, 4, 1, 3, 5).reshape(r1 * i * r2, c1 * j * c2)

    def adjoint(self, matrix: torch.Tensor) -> torch.Tensor:
        """The core [a, i, j, b] of inner products with a matrix [m, n]."""
        (r1, r2), (c1, c2) = self.rows, self.columns
        i, j = len(matrix) // (r1 * r2), matrix.shape[1] // (c1 * c2)
        state = matrix.reshape(r1, i, r2, c1, j, c2).permute(0, 3, 1, 4, 2, 5).reshape(r1 * c1 * i * j, r2 * c2)
        state = (state @ self.right.reshape(r2 * c2, -1)).reshape(r1 * c1, -1)
        return (self.left.reshape(r1 * c1, -1).T @ state).reshape(self.left.shape[2], i, j, self.right.shape[2])

    def design(self, root: torch.Tensor, j: int) -> torch.Tensor:
        """What each number of (a, j, b) adds to W S for an output i_k: [a * j * b, r1 * r2, n]."""
        (r1, r2), (c1, c2) = self.rows, self.columns
        parts = root.reshape(c1, j, c2, -1)
        found = torch.einsum("pca,cjds,qdb->ajbpqs", self.left, parts, self.right)
        return found.reshape(-1, r1 * r2, root.shape[1])


def _joined(cores: Sequence[torch.Tensor], like: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """Cores from one end contracted to [rows, columns, bond]; of no cores, [1, 1, 1]."""
    state = like.new_ones(1, 1, 1)
    for core in cores:
        rows, columns, _ = state.shape
        state = torch.einsum("rca,aijb->ricjb" if not reverse else "rca,aijb->irjcb", state, core)
        state = state.reshape(rows * core.shape[1], columns * core.shape[2], core.shape[3])
    return state
