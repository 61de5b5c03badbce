"""Quantized linear layers on this machine's CPU, beside dense bf16, torch's int4pack and torchao in the same run.

python benchmarks/kernels.py --json benchmarks/results/kernels_avx2.json  # about three minutes on two cores
python benchmarks/kernels.py --quick --json out.json --picture out.svg    # one shape

Weights are taken in turn from as many copies as fill 256 MB, so that none comes from a cache; a figure is the median of turns in which
every backend had its go. Shapes are inputs x outputs. torchao is the extra `bench`; without it there are fewer peers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from kernels_peers import ABOUT_TORCHAO, DENSE, GROUP, INT4PACK, PEERS, Run, copies, peers, torchao_version
from kernels_picture import READING, draw
from kernels_threads import SHAPE, one_pool
from rows import finish, row

sys.path.pop(0)  # transformers would take this file for the package `kernels`

import torch

from tensorpress.kernels import cpu_linear
from tensorpress.kernels.measured import device_name
from tensorpress.kernels.quantized_linear import QuantizedLinear

SHAPES = ((4096, 12288), (4096, 4096), (2048, 5632), (11008, 4096))
ROWS = (1, 4, 16, 128)
MANY = 128
"""Rows from which two copies are enough: there a product takes long."""
MODES = ("cpu", "cpu_int8")


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


def ours(inputs: int, outputs: int, bits: int, mode: str) -> list[Run]:
    one = layer(inputs, outputs, bits)
    made = [cpu_linear.Packed(one) for _ in range(copies(inputs, outputs, bits))]
    return [lambda x, packed=packed: packed(x, cpu_linear.MODES[mode]) for packed in made]  # type: ignore[misc]


def reading(inputs: int, outputs: int) -> list[Run]:
    """Nothing but reading as many bytes, on the same threads."""
    code, size = cpu_linear.compiled(), inputs * outputs // 2
    assert code is not None
    room = torch.ones(copies(inputs, outputs, 4), size, dtype=torch.uint8)
    return [lambda x, one=one: code.tp_read(one.data_ptr(), size, torch.get_num_threads()) for one in room]  # type: ignore[misc]


def backends(inputs: int, outputs: int) -> dict[str, list[Run]]:
    made = peers(inputs, outputs, (inputs, outputs) == SHAPES[0])
    made[READING] = reading(inputs, outputs)
    for bits in (4, 3, 2):
        for mode in MODES:
            made[f"{mode} {bits} bits"] = ours(inputs, outputs, bits, mode)
    return made


def times(made: dict[str, list[Run]], rows: int, inputs: int, turns: int) -> dict[str, float]:
    """Median seconds of one product of each backend."""
    x = torch.randn(rows, inputs).bfloat16()
    seconds: dict[str, list[float]] = {name: [] for name in made if rows == 1 or name != READING}
    for turn in range(turns + 1):
        for name, each in seconds.items():
            for run in made[name] if rows < MANY else made[name][:2]:
                began = time.perf_counter()
                run(x)
                if turn:
                    each.append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


def compare(found: dict[str, float], start: str, rows: int, main: bool) -> list[dict[str, Any]]:
    """Rows of the speed of 4 bits against the fastest peer, and against those that the bars are about."""
    others = {"the fastest peer": min(found[name] for name in PEERS if name in found)}
    if rows >= MANY:
        others[DENSE] = found[DENSE]
    else:
        others["the better of dense bf16 and int4pack"] = min(found[DENSE], found[INT4PACK])
    lines = []
    for mode in MODES:
        for named, peer in others.items():
            barred = main and mode == "cpu_int8" and named != "the fastest peer"
            bar = {1: None, 4: 1.5, 16: 1.5, 128: 1.2}[rows] if barred else None
            lines.append(row(f"{start}: {mode}, speed against {named}", peer / found[f"{mode} 4 bits"], "x", bar, True))
    return lines


def limits(found: dict[str, float], shape: str, main: bool) -> list[dict[str, Any]]:
    """Rows of one input: how near to the read bandwidth, and what fewer bits bring."""
    lines = []
    for mode in MODES:
        bar = 0.8 if main and mode == "cpu_int8" else None
        share = found[READING] / found[f"{mode} 4 bits"]
        lines.append(row(f"{shape}: {mode}, share of the read bandwidth", share, "", bar, True))
    for bits, faster in ((3, 1.15), (2, 1.4)):
        for mode in MODES:
            bar = faster if main and mode == "cpu_int8" else None
            ratio = found[f"{mode} 4 bits"] / found[f"{mode} {bits} bits"]
            lines.append(row(f"{shape}: {bits} bits against 4, {mode}", ratio, "x", bar, True))
    return lines


def measure(quick: bool) -> list[dict[str, Any]]:
    """All rows."""
    lines = [row("read bandwidth", cpu_linear.read_bandwidth() / 1e9, "GB/s", None)]
    lines += one_pool(ours(*SHAPE, 4, "cpu_int8"), None if quick else 1.15)
    for inputs, outputs in SHAPES[:1] if quick else SHAPES:
        made = backends(inputs, outputs)
        shape, main = f"{inputs}x{outputs}", (inputs, outputs) == SHAPES[0]
        for rows in ROWS:
            found, start = times(made, rows, inputs, 3 if rows >= MANY else 7), f"{shape}, {rows} rows"
            lines += [row(f"{start}: {name}", seconds * 1e6, "us", None) for name, seconds in found.items()]
            rate = 2 * rows * inputs * outputs / found["cpu_int8 4 bits"] / 1e9
            lines.append(row(f"{start}: cpu_int8 4 bits", rate, "GOP/s", None))
            lines += limits(found, shape, main) if rows == 1 else []
            lines += compare(found, start, rows, main)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="a file .svg or .png")
    args = parser.parse_args()
    if cpu_linear.compiled() is None:
        raise SystemExit("the compiled kernels were not built: is there a C++ compiler?")
    with torch.inference_mode():
        lines = measure(args.quick)
    version = torchao_version()
    conditions = {
        "instructions": cpu_linear.instructions(),
        "group": GROUP,
        "quick": args.quick,
        "torchao": "not installed: no peer here" if version is None else f"{version}; {ABOUT_TORCHAO}",
    }
    if args.picture:
        threads, kind = torch.get_num_threads(), cpu_linear.instructions()
        about = f"{device_name(torch.device('cpu'))}, {threads} threads, {kind}; groups of {GROUP}, weights from memory"
        draw(lines, "x".join(map(str, SHAPES[0])), ROWS, about, args.picture)
    finish(lines, conditions, args.json)


if __name__ == "__main__":
    main()
