"""Time and memory of decomposing one large matrix against its output: three sites, half of the bytes, alternating least squares.

    python benchmarks/mpo_matrix.py --json out.json
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


def large_matrix(size: int) -> None:
    """One matrix, three sites, against the output: prints seconds and the peak of memory in bytes. For a process of its own."""
    from tensorpress.compressors.decompose.site_plans import best_fit, plans

    torch.manual_seed(0)
    weight = torch.randn(size, size) / size**0.5
    mix = torch.randn(size, size // 4)
    inputs = mix @ mix.T / size + 0.1 * torch.eye(size)
    del mix
    start = time.monotonic()
    found, losses = best_fit(
        plans(size, size, 3, "balanced"), size * size, weight, None, inputs, None, pivoted=True, sweeps=1, damping=1e-3
    )
    assert found is not None and losses
    seconds = time.monotonic() - start
    status = Path("/proc/self/status").read_text(
        encoding="ascii"
    )  # what getrusage says begins with the parent's memory
    print(seconds, 1024 * int(status.partition("VmHWM:")[2].split()[0]))


def large(sizes: tuple[int, ...], barred: bool) -> list[dict[str, Any]]:
    """Seconds and peaks, and how time grows from each size to the next."""
    rows: list[dict[str, Any]] = []
    before = None
    for size in sizes:
        command = [sys.executable, __file__, "--matrix", str(size)]
        seconds, peak = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        Console().print(f"[dim]{size} x {size}: {seconds:.1f} s, {peak / 1e9:.2f} GB[/]")
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
    parser.add_argument("--matrix", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.matrix:
        large_matrix(args.matrix)
        return
    rows = large(SIZES[:1] if args.quick else SIZES, not args.quick)
    finish(rows, {"sites": 3, "keep": 0.5, "quick": args.quick}, args.json)


if __name__ == "__main__":
    main()
