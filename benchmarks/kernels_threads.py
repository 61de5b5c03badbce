"""Whether our threads and torch's stand in each other's way: products of both, alone and call by call in turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernels_peers import ROOM, Run
from rows import row

SIDE = 256
"""Of torch's matrices: about as long a product as one of ours."""
SHAPE = (2048, 5632)
CALLS, TURNS = 40, 25


def one_pool(ours: list[Run], bar: float | None) -> list[dict[str, Any]]:
    """Rows of `torch.mm` and of one row of our layers of `SHAPE`: all matrices from memory, so that caches do not differ."""
    mine, theirs = _next_of_ours(ours), _next_of_torch()
    found: dict[str, list[float]] = {"torch": [], "ours": [], "both": []}
    for turn in range(TURNS + 1):
        taken = {"torch": _seconds(theirs), "ours": _seconds(mine), "both": _seconds(theirs, mine)}
        if turn:
            for name, seconds in taken.items():
                found[name].append(seconds)
    alone = [one + other for one, other in zip(found["torch"], found["ours"], strict=True)]
    ratio = statistics.median(both / apart for both, apart in zip(found["both"], alone, strict=True))
    medians = {name: statistics.median(each) / CALLS * 1e6 for name, each in found.items()}
    shape = "x".join(map(str, SHAPE))
    return [
        row(f"one thread pool: torch.mm of {SIDE}x{SIDE} alone", medians["torch"], "us", None),
        row(f"one thread pool: ours, {shape}, 1 row, alone", medians["ours"], "us", None),
        row("one thread pool: both, call by call in turns", medians["both"], "us", None),
        row("one thread pool: in turns against the sum of both alone", ratio, "x", bar),
    ]


def _next_of_ours(runs: list[Run]) -> Callable[[], object]:
    x, turn = torch.randn(1, SHAPE[0]).bfloat16(), itertools.cycle(runs)
    return lambda: next(turn)(x)


def _next_of_torch() -> Callable[[], object]:
    count = round(ROOM / (3 * 4 * SIDE**2))
    left, right, out = (torch.randn(count, SIDE, SIDE) for _ in range(3))
    turn: Iterator[tuple[torch.Tensor, ...]] = itertools.cycle(zip(left, right, out, strict=True))

    def run() -> object:
        one, other, product = next(turn)
        return torch.mm(one, other, out=product)

    return run


def _seconds(*runs: Callable[[], object]) -> float:
    """Of as many calls of each, in turns."""
    began = time.perf_counter()
    for _ in range(CALLS):
        for run in runs:
            run()
    return time.perf_counter() - began
