"""Quantized linear layers on this machine's CPU, beside torch's int4pack and dense bf16 in the same run.

python benchmarks/kernels.py --json benchmarks/results/kernels.json       # about a minute on two cores
python benchmarks/kernels.py --quick --json out.json                      # one shape

Weights are taken in turn from as many copies as fill 256 MB, so that none comes from a cache; a figure is the median of turns in which
every backend had its go. Shapes are inputs x outputs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import finish, row

sys.path.pop(0)  # transformers would take this file for the package `kernels`

import torch

from tensorpress.kernels import cpu_linear
from tensorpress.kernels.quantized_linear import QuantizedLinear

SHAPES = ((4096, 12288), (4096, 4096), (2048, 5632), (11008, 4096))
ROWS = (1, 4, 16, 128)
GROUP = 128
ROOM = 256e6
Run = Callable[[torch.Tensor], torch.Tensor]


def layer(inputs: int, outputs: int, bits: int) -> QuantizedLinear:
    groups = inputs // GROUP
    return QuantizedLinear.from_integers(
        torch.randint(0, 1 << bits, (inputs, outputs)),
        torch.full((groups, outputs), 1 << (bits - 1)),
        torch.rand(groups, outputs) * 0.01 + 0.001,
        torch.arange(inputs) // GROUP,
        bits,
        GROUP,
        None,
    )


def ours(inputs: int, outputs: int, bits: int, mode: str, copies: int) -> list[Run]:
    one = layer(inputs, outputs, bits)
    made = [cpu_linear.Packed(one) for _ in range(copies)]
    return [lambda x, packed=packed: packed(x, cpu_linear.MODES[mode]) for packed in made]


def int4pack(inputs: int, outputs: int, copies: int) -> list[Run]:
    integers = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 2)
    scales = torch.rand(inputs // GROUP, outputs, 2).bfloat16()
    made = [packed.clone() for _ in range(copies)]
    return [lambda x, one=one: torch.ops.aten._weight_int4pack_mm_for_cpu(x, one, GROUP, scales) for one in made]


def dense(inputs: int, outputs: int, copies: int) -> list[Run]:
    made = [torch.randn(outputs, inputs, dtype=torch.bfloat16) for _ in range(copies)]
    return [lambda x, one=one: torch.nn.functional.linear(x, one) for one in made]


def reading(size: int, copies: int) -> list[Run]:
    """Nothing but reading as many bytes, on the same threads."""
    code, room = cpu_linear.compiled(), torch.ones(copies, size, dtype=torch.uint8)
    assert code is not None
    return [lambda x, one=one: code.tp_read(one.data_ptr(), size, torch.get_num_threads()) for one in room]


def backends(inputs: int, outputs: int) -> dict[str, list[Run]]:
    def count(bits: float) -> int:
        return max(2, round(ROOM / (inputs * outputs * bits / 8)))

    made = {"dense bf16": dense(inputs, outputs, count(16)), "torch int4pack": int4pack(inputs, outputs, count(4))}
    made["reading 4 bits"] = reading(inputs * outputs // 2, count(4))
    for bits in (4, 3, 2):
        for mode in ("cpu", "cpu_int8"):
            made[f"{mode} {bits} bits"] = ours(inputs, outputs, bits, mode, count(bits))
    return made


def times(made: dict[str, list[Run]], rows: int, inputs: int, turns: int) -> dict[str, float]:
    """Median seconds of one product of each backend."""
    x = torch.randn(rows, inputs).bfloat16()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(turns + 1):
        for name, runs in made.items():
            for run in runs if rows < 64 else runs[:2]:
                began = time.perf_counter()
                run(x)
                if turn:
                    seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


def measure(quick: bool) -> list[dict[str, Any]]:
    """All rows."""
    lines = [row("read bandwidth", cpu_linear.read_bandwidth() / 1e9, "GB/s", None)]
    for inputs, outputs in SHAPES[:1] if quick else SHAPES:
        made = backends(inputs, outputs)
        shape, main = f"{inputs}x{outputs}", (inputs, outputs) == SHAPES[0]
        for rows in ROWS:
            found = times(made, rows, inputs, 3 if rows == 128 else 7)
            if rows > 1:
                found.pop("reading 4 bits")
            for name, seconds in found.items():
                lines.append(row(f"{shape}, {rows} rows: {name}", seconds * 1e6, "us", None))
            rate = 2 * rows * inputs * outputs / found["cpu_int8 4 bits"] / 1e9
            lines.append(row(f"{shape}, {rows} rows: cpu_int8 4 bits", rate, "GOP/s", None))
            best = min(found["dense bf16"], found["torch int4pack"])
            mine = {mode: found[f"{mode} 4 bits"] for mode in ("cpu", "cpu_int8")}
            for mode, seconds in mine.items():
                wanted = mode == "cpu_int8" and main
                if rows == 1:
                    share = found["reading 4 bits"] / seconds
                    lines.append(
                        row(f"{shape}: {mode}, share of the read bandwidth", share, "", 0.8 if wanted else None, True)
                    )
                peer = found["dense bf16"] if rows == 128 else best
                named = "dense bf16" if rows == 128 else "the better of dense bf16 and int4pack"
                bar = {1: None, 4: 1.5, 16: 1.5, 128: 1.2}[rows] if wanted else None
                lines.append(
                    row(f"{shape}, {rows} rows: {mode}, speed against {named}", peer / seconds, "x", bar, True)
                )
            if rows == 1:
                for bits, bar in ((3, 1.15), (2, 1.4)):
                    faster = mine["cpu_int8"] / found[f"cpu_int8 {bits} bits"]
                    lines.append(
                        row(f"{shape}: {bits} bits against 4, cpu_int8", faster, "x", bar if main else None, True)
                    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if cpu_linear.compiled() is None:
        raise SystemExit("the compiled kernels were not built: is there a C++ compiler?")
    with torch.inference_mode():
        lines = measure(args.quick)
    finish(lines, {"instructions": cpu_linear.instructions(), "group": GROUP, "quick": args.quick}, args.json)


if __name__ == "__main__":
    main()
