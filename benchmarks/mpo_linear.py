"""Matrix product operators, block-diagonal and 2:4 layers: whichever way `auto` measures to be fastest, beside the dense layer of the same precision in the same turns.

    python benchmarks/mpo_linear.py --json benchmarks/results/mpo_linear.json    # about three minutes on two cores
    python benchmarks/mpo_linear.py --quick --json out.json                       # one shape, no bars

Layers keep half or a quarter of the matrix's numbers, as square sites and as a low rank (rows m, 1; columns 1, n). Copies of each take turns, so
that none comes from a cache. The model of costs is held against the measured times of every plan.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rows import finish, row

sys.path.pop(0)  # transformers would take benchmarks/kernels.py for the package `kernels`

import torch

from tensorpress.kernels import cpu_linear, measured, mpo_contraction, mpo_linear, registry
from tensorpress.kernels.block_diagonal_linear import BlockDiagonalLinear
from tensorpress.kernels.mpo_contraction import TORCH, Contraction, Kind, Plan
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.semi_structured_linear import SemiStructuredLinear

SIZES = ((1024, 1024), (4096, 4096), (2048, 5632))
ROWS = (1, 128)
ROOM = 256e6
TOLERANCE = 1.05
"""The share by which medians of the same work differ between turns: `never slower` is within it."""


def factors(size: int, sites: int) -> list[int]:
    """`sites` factors of a size, as even as can be."""
    found = []
    for left in range(sites, 0, -1):
        wanted = round(size ** (1 / left))
        one = min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - wanted))
        found.append(one)
        size //= one
    return found


def bond_for(rows: Sequence[int], columns: Sequence[int], keep: float) -> int:
    """The bond, the same everywhere, at which the cores have at most `keep` of the matrix's numbers."""
    whole = 1
    for i, j in zip(rows, columns, strict=True):
        whole *= i * j

    def numbers(bond: int) -> int:
        edges = [1, *[bond] * (len(rows) - 1), 1]
        return sum(edges[k] * i * j * edges[k + 1] for k, (i, j) in enumerate(zip(rows, columns, strict=True)))

    bond = 1
    while numbers(bond + 1) <= keep * whole:
        bond += 1
    return bond


def forms(outputs: int, inputs: int) -> dict[str, tuple[list[int], list[int]]]:
    """Factor lists by name."""
    return {
        "low rank": ([outputs, 1], [1, inputs]),
        "2 sites": (factors(outputs, 2), factors(inputs, 2)),
        "3 sites": (factors(outputs, 3), factors(inputs, 3)),
    }


def timed(runs: dict[str, list[Callable[[torch.Tensor], Any]]], x: torch.Tensor, turns: int) -> dict[str, float]:
    """Median seconds of each, in turns; what takes half a second, once more after the first."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, copies in runs.items():
            if seconds[name] and seconds[name][-1] > 0.5:
                continue
            for run in copies:
                began = time.perf_counter()
                run(x)
                if turn:
                    seconds[name].append(time.perf_counter() - began)
    return {name: median(times) for name, times in seconds.items()}


def against(name: str, layers: list[Any], dense: list[torch.Tensor], quick: bool) -> list[dict[str, Any]]:
    """Copies of a layer on `auto` beside the dense weights [N, K], in turns."""
    outputs, inputs = dense[0].shape
    rows = []
    for tokens in ROWS:
        x = torch.randn(tokens, inputs).bfloat16()
        runs: dict[str, list[Callable[[torch.Tensor], Any]]] = {"ours": list(layers)}
        runs["dense"] = [_dense(w) for w in dense]  # modules, too
        for layer in layers:
            layer(x)  # measures, or takes what was measured, and keeps it
        found = timed(runs, x, 2 if tokens > 1 else 9)
        taken = list(layers[0].__dict__["taken"].values())[-1]
        shape = f"{inputs}x{outputs}, {name}, {tokens} rows: {taken}"
        rows.append(row(shape, 1e6 * found["ours"], "us", None))
        rows.append(
            row(
                f"{shape}, speed against dense bf16",
                found["dense"] / found["ours"],
                "x",
                None if quick else 1 / TOLERANCE,
                True,
            )
        )
    return rows


def _dense(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(*weight.T.shape, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def block_diagonal(outputs: int, inputs: int) -> BlockDiagonalLinear:
    """Four random blocks."""
    layer = BlockDiagonalLinear.from_blocks(torch.randn(4, outputs // 4, inputs // 4).bfloat16(), None)
    layer.kernel = "auto"
    return layer.requires_grad_(False)


def semi_structured(outputs: int, inputs: int) -> SemiStructuredLinear:
    """Random weights, the first two of each four inputs."""
    weight = torch.randn(outputs, inputs // 4, 4).bfloat16()
    weight[..., 2:] = 0
    layer = SemiStructuredLinear.from_dense(weight.flatten(1), None)
    layer.kernel = "auto"
    return layer


KINDS = (TORCH, mpo_linear.COMPILED)
OTHERS = {"4 blocks": block_diagonal, "2:4 sparsity": semi_structured}


def measure(quick: bool) -> list[dict[str, Any]]:
    """All rows."""
    rows: list[dict[str, Any]] = []
    regrets: dict[str, list[float]] = {kind.name: [] for kind in KINDS}
    for inputs, outputs in SIZES[:1] if quick else SIZES:
        copies = max(2, min(64, round(ROOM / (2 * inputs * outputs))))
        dense = [torch.randn(outputs, inputs).bfloat16() for _ in range(copies)]
        for form, (i, j) in forms(outputs, inputs).items():
            for keep in (0.5,) if quick else (0.5, 0.25):
                bond = bond_for(i, j, keep)
                layers = [_layer(i, j, bond) for _ in range(copies)]
                rows += against(f"{form}, keep {keep}, bond {bond}", list(layers), dense, quick)
                if inputs <= 1024:
                    for kind in KINDS:
                        regrets[kind.name] += [_regret(layers[0], tokens, kind) for tokens in ROWS]
        for name, make in OTHERS.items():
            rows += against(name, [make(outputs, inputs) for _ in range(copies)], dense, quick)
    for name, found in regrets.items():
        what = f"products by {name}: the predicted plan's time over that of the fastest plan"
        rows.append(row(f"{what}, median", median(found), "x", None if quick else 1.3))
        rows.append(row(f"{what}, worst", max(found), "x", None))
    return rows


def _layer(i: Sequence[int], j: Sequence[int], bond: int) -> MPOLinear:
    layer = MPOLinear(i, j, [bond] * (len(i) - 1), bias=False).to(torch.bfloat16).requires_grad_(False)
    for core in layer.cores:
        core.normal_(std=0.1)
    layer.kernel = "auto"
    return layer


def _regret(layer: MPOLinear, tokens: int, kind: Kind) -> float:
    """How much slower the plan that is predicted to be best is than the one that was best, the matrix among them.

    Plans that are predicted to take ten times the best's time are not run: some fill the memory.
    """
    x = torch.randn(tokens, layer.in_features).bfloat16()
    shapes, cores = layer.shapes(), list(layer.cores)
    machine = mpo_contraction.machine_of("cpu", x.dtype, torch.get_num_threads(), kind)
    every = list(mpo_contraction.plans(len(shapes)))

    def guess(plan: Plan) -> float:
        return mpo_contraction.predicted(shapes, plan, tokens, 2, machine)

    several = [plan for plan in every if guess(plan) <= 10 * min(map(guess, every))]
    runs: dict[str, list[Callable[[torch.Tensor], Any]]] = {
        str(plan): [Contraction(cores, plan, kind)] for plan in several
    }
    found = timed(runs, x, 7)
    return found[str(min(several, key=guess))] / min(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, no bars")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    assert registry.backends("mpo_linear")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        os.environ["TENSORPRESS_CACHE"] = folder  # what other sessions of this machine measured is not taken
        measured._notes.cache_clear()
        rows = measure(args.quick)
    finish(rows, {"dtype": "bfloat16", "instructions": cpu_linear.instructions(), "quick": args.quick}, args.json)


if __name__ == "__main__":
    main()
