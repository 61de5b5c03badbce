"""Time and memory of decomposing one large matrix against its output: three sites, half of the bytes, alternating least squares.

    python benchmarks/mpo_matrix.py --json out.json
    python benchmarks/mpo_matrix.py --defaults --json out.json  # the largest alone, also with two sweeps and a metric of the outputs, as `mpo` does; no bars
    python benchmarks/mpo_matrix.py --quick --json out.json      # the smallest size; no bars

Each size in a process of its own; memory is that process's peak, torch included. A singular value decomposition takes eight times as long at twice the size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rows import finish, row

SIZES = (1024, 2048, 4096)


def large_matrix(size: int, sweeps: int, of_loss: bool) -> None:
    """One matrix, three sites, against the output, or the loss: prints seconds and the peak of memory in bytes. For a process of its own."""
    from tensorpress.compressors.decompose.site_plans import best_fit, plans

    torch.manual_seed(0)
    weight = torch.randn(size, size) / size**0.5
    mix = torch.randn(size, size // 4)
    inputs = mix @ mix.T / size + 0.1 * torch.eye(size)
    outputs = None
    if of_loss:
        mix = torch.randn(size, size // 4)
        outputs = mix @ mix.T / size + 0.1 * torch.eye(size)
    del mix
    start = time.monotonic()
    found, losses = best_fit(
        plans(size, size, 3, "balanced"),
        size * size,
        weight,
        None,
        inputs,
        outputs,
        pivoted=True,
        sweeps=sweeps,
        damping=1e-3,
    )
    assert found is not None and losses
    seconds = time.monotonic() - start
    status = Path("/proc/self/status").read_text(
        encoding="ascii"
    )  # what getrusage says begins with the parent's memory
    print(seconds, 1024 * int(status.partition("VmHWM:")[2].split()[0]))


def measured(size: int, sweeps: int, of_loss: bool) -> tuple[float, float]:
    """Seconds and bytes of a process for one matrix."""
    command = [sys.executable, __file__, "--matrix", str(size), "--sweeps", str(sweeps)] + ["--of-loss"] * of_loss
    seconds, peak = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    Console().print(f"[dim]{size} x {size}, {sweeps} sweeps: {seconds:.1f} s, {peak / 1e9:.2f} GB[/]")
    return seconds, peak


def defaults(size: int) -> list[dict[str, Any]]:
    """One size with one sweep against the output, with two, and with two against the loss."""
    rows = []
    for name, sweeps, of_loss in (("output", 1, False), ("output", 2, False), ("loss", 2, True)):
        seconds, peak = measured(size, sweeps, of_loss)
        what = f"{size} x {size}, 3 sites, against the {name}, {sweeps} sweeps"
        rows += [row(what, seconds, "s", None), row(f"{what}, peak memory", peak / 1e9, "GB", None)]
    return rows


def large(sizes: tuple[int, ...], barred: bool) -> list[dict[str, Any]]:
    """Seconds and peaks, and how time grows from each size to the next."""
    rows: list[dict[str, Any]] = []
    before = None
    for size in sizes:
        seconds, peak = measured(size, 1, of_loss=False)
        last = barred and size == max(sizes)
        rows.append(row(f"{size} x {size}, 3 sites, against the output", seconds, "s", 60.0 if last else None))
        rows.append(row(f"{size} x {size}, peak memory of the process", peak / 1e9, "GB", 2.0 if last else None))
        if before is not None:
            rows.append(
                row(
                    f"{size} x {size}, time over that of half the size",
                    seconds / before,
                    "ratio",
                    8.0 if barred else None,
                )
            )
        before = seconds
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest size; no bars")
    parser.add_argument(
        "--defaults", action="store_true", help="what the metric of the outputs and sweeps cost; no bars"
    )
    parser.add_argument("--matrix", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sweeps", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--of-loss", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.matrix:
        large_matrix(args.matrix, args.sweeps, args.of_loss)
        return
    rows = defaults(SIZES[-1]) if args.defaults else large(SIZES[:1] if args.quick else SIZES, not args.quick)
    finish(rows, {"sites": 3, "keep": 0.5, "quick": args.quick}, args.json)


if __name__ == "__main__":
    main()
