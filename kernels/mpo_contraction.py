"""Contracting an MPO with its inputs: which sites are contracted beforehand, in which order, for how many inputs; no copies in between.

From the left, what is in hand is [batch * outputs so far, bond * input of the site, inputs to come]; from the right [batch * inputs to come,
input of the site * bond, outputs so far]. The two indices that a site contracts lie side by side in both, so that each site is one
matrix product whose result is the next one's operand as it lies (the order is free: Oseledets 2011, section 4; Pfeifer et al. 2014,
"Faster identification of optimal contraction sequences for tensor networks").
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import torch

Multiply = Callable[[Any, torch.Tensor, int, int], torch.Tensor]
"""[p, q], in the form that it wants, times each of the numbers [batch, q, columns], whatever their shape, for (batch, columns): [batch, p, columns],
or another shape of the same numbers."""
Shape = tuple[int, int, int, int]
"""(left bond, outputs, inputs, right bond) of a site."""


@dataclass(frozen=True)
class Plan:
    """`ends[k]` is the site behind the last of the k-th group, whose sites are contracted beforehand; one group is the matrix."""

    side: Literal["left", "right"]
    ends: tuple[int, ...]

    def is_matrix(self) -> bool:
        return len(self.ends) == 1


@dataclass(frozen=True)
class Machine:
    """What a prediction rests on, for one precision and number of threads."""

    rate: float
    """Multiply-adds a second of one large product."""
    batched: float
    """The same of many products with several columns each, for which some processors have no fast code."""
    bandwidth: float
    """Bytes a second."""
    call: float
    """Seconds of a call."""


def plans(sites: int) -> Iterator[Plan]:
    """Every way to group neighbours, from both sides; the matrix once."""
    for cuts in range(1 << (sites - 1)):
        ends = (*(k + 1 for k in range(sites - 1) if cuts >> k & 1), sites)
        yield Plan("left", ends)
        if len(ends) > 1:
            yield Plan("right", ends)


def merged(shapes: Sequence[Shape], plan: Plan) -> list[Shape]:
    """The shapes of the groups."""
    found, first = [], 0
    for end in plan.ends:
        group = shapes[first:end]
        found.append((group[0][0], math.prod([s[1] for s in group]), math.prod([s[2] for s in group]), group[-1][3]))
        first = end
    return found


def steps(shapes: Sequence[Shape], plan: Plan, rows: int) -> list[tuple[int, int, int, int]]:
    """(products, outputs of one, what is summed over, columns of one) of each step on `rows` inputs."""
    groups = merged(shapes, plan)
    inputs, outputs, found = math.prod([s[2] for s in groups]), 1, []
    for left, i, j, right in groups if plan.side == "left" else reversed(groups):
        inputs //= j
        if plan.side == "left":
            found.append((rows * outputs, i * right, left * j, inputs))
        else:
            found.append((rows * inputs, left * i, j * right, outputs))
        outputs *= i
    return found


def operations(shapes: Sequence[Shape], plan: Plan, rows: int) -> int:
    """Multiply-adds on `rows` inputs."""
    return sum(math.prod(step) for step in steps(shapes, plan, rows))


def kept_numbers(shapes: Sequence[Shape], plan: Plan) -> int:
    """Numbers of the groups' cores, which are kept beside the layer's own."""
    return sum(math.prod(shape) for shape in merged(shapes, plan))


def predicted(shapes: Sequence[Shape], plan: Plan, rows: int, size: int, machine: Machine) -> float:
    """Seconds on `rows` inputs of `size` bytes a number: of each step the longer of computing, and of reading and writing."""
    seconds = 0.0
    for products, outputs, summed, columns in steps(shapes, plan, rows):
        moved = size * (outputs * summed + products * columns * (summed + outputs))
        rate = machine.batched if products > 1 and columns > 1 else machine.rate
        computed = products * outputs * summed * columns / rate
        seconds += max(computed, moved / machine.bandwidth) + machine.call
    return seconds


@lru_cache(maxsize=4096)
def best_chain(shapes: tuple[Shape, ...], rows: int, size: int, machine: Machine, most: int) -> Plan | None:
    """The plan of several steps that is predicted to be fastest and keeps no more than `most` numbers; None if there is none."""
    several = [p for p in plans(len(shapes)) if not p.is_matrix() and kept_numbers(shapes, p) <= most]
    return min(several, key=lambda plan: predicted(shapes, plan, rows, size, machine), default=None)


def machine_of(device: str, dtype: torch.dtype, threads: int, kind: Kind | None = None) -> Machine:
    """What products of matrices reach here, torch's or another kind's; measured in some milliseconds, once."""
    return _measured(device, dtype, threads, kind if kind and kind.has_rates else TORCH)


@cache
def _measured(device: str, dtype: torch.dtype, _threads: int, kind: Kind) -> Machine:
    where = torch.device(device)

    def seconds(batch: int, outputs: int, inner: int, columns: int) -> float:
        matrix, state = (torch.ones(s, dtype=dtype, device=where) for s in ((outputs, inner), (batch, inner, columns)))
        form, best = kind.form(matrix), float("inf")
        for _ in range(4):
            began = time.perf_counter()
            kind.multiply(form, state, batch, columns)
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            best = min(best, time.perf_counter() - began)
        return best

    with torch.inference_mode():
        call = seconds(1, 8, 8, 1)
        rate = 512**3 / seconds(512, 512, 512, 1)
        few, many = (8, 64, 64, 16), (128, 128, 128, 32)
        slow = seconds(*few)
        batched = math.prod(many) / seconds(*many) if slow < 1e-3 else math.prod(few) / slow
        size = torch.empty((), dtype=dtype).element_size()
        bandwidth = 2048 * 4096 * size / seconds(1, 2048, 4096, 1)
    return Machine(rate, batched, bandwidth, call)


def merge(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Contract neighbours [d_{k-1}, i_k, j_k, d_k] to one core [d_0, prod i_k, prod j_k, d_n]; halves in fp32, rounded once."""
    dtype = cores[0].dtype
    if len(cores) > 1 and dtype in (torch.bfloat16, torch.float16):
        return merge([core.float() for core in cores]).to(dtype)
    result = cores[0]
    for core in cores[1:]:
        (left, i, j, bond), (_, k, m, right) = result.shape, core.shape
        product = (result.reshape(-1, bond) @ core.reshape(bond, -1)).reshape(left, i, j, k, m, right)
        result = product.transpose(2, 3).reshape(left, i * k, j * m, right)
    return result


class Contraction:
    """The groups' matrices of a plan, as products want them."""

    def __init__(self, cores: Sequence[torch.Tensor], plan: Plan, kind: Kind | None = None) -> None:
        self.plan, self.kind = plan, kind or TORCH
        self.shapes: list[Shape] = merged([tuple(core.shape) for core in cores], plan)  # type: ignore[misc]
        self.matrices: list[Any] = []
        first = 0
        for end, (left, i, j, right) in zip(plan.ends, self.shapes, strict=True):
            core = merge(cores[first:end])
            if plan.side == "left":  # [outputs * right, left * inputs]
                matrix = core.permute(1, 3, 0, 2).reshape(i * right, left * j)
            else:  # [left * outputs, inputs * right]
                matrix = core.reshape(left * i, j * right)
            self.matrices.append(self.kind.form(matrix.contiguous()))
            first = end

    def by(self, kind: Kind) -> Contraction:
        """The same matrices, multiplied by another kind that wants them in the same form."""
        same = copy.copy(self)
        same.kind = kind
        return same

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """W x for x [..., inputs]; the result is [..., outputs]."""
        rows = x.numel() // x.shape[-1] if x.numel() else 0
        inputs, outputs, state, left = x.shape[-1], 1, x, self.plan.side == "left"
        multiply = self.kind.multiply
        sites = range(len(self.shapes))
        for k in sites if left else reversed(sites):
            _, i, j, _ = self.shapes[k]
            inputs //= j
            batch, columns = (rows * outputs, inputs) if left else (rows * inputs, outputs)
            state = multiply(self.matrices[k], state, batch, columns)
            outputs *= i
        return state.reshape(*x.shape[:-1], outputs)


def _multiply(matrix: torch.Tensor, state: torch.Tensor, batch: int, columns: int) -> torch.Tensor:
    inner = matrix.shape[1]
    if columns == 1:
        return torch.nn.functional.linear(state.reshape(batch, inner), matrix)
    if batch == 1:
        return matrix @ state.reshape(inner, columns)
    return torch.bmm(matrix.expand(batch, *matrix.shape), state.reshape(batch, inner, columns))


@dataclass(frozen=True)
class Kind:
    """What does the steps' products."""

    name: str
    multiply: Multiply
    form: Callable[[torch.Tensor], Any] = lambda matrix: matrix
    """What it wants of a matrix [p, q]; has `nbytes`, and its memory in `data`."""
    has_rates: bool = True
    """Whether predictions rest on its own rates, or on those of torch's products."""


TORCH = Kind("torch", _multiply)
