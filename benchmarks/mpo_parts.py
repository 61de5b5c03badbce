"""Which cores of matrix product operators have to be trained: the auxiliary ones, which hold few numbers, against all of them, on the demo model.

    python benchmarks/mpo_parts.py --json out.json
    python benchmarks/mpo_parts.py --quick --json out.json      # a little training; no bars

MPOs of five sites, healed by the same tokens: the gain in validation loss by the auxiliary cores over that by all cores, and the
share of the numbers that is trained (MPOP, Liu et al. 2021). Each at several learning rates, of which the best counts. Cores as they are stored by default,
where rows of an identity are left out ("pivoted"), which fixes the gauge, and whole, where the auxiliary cores can undo what the central one has in it.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from mpo_heal import Bench
from rich.console import Console
from rows import finish, row

FIVE: dict[str, Any] = {"use": "mpo", "plans": "balanced", "sites": 5, "multiple": 1}
STARTS: dict[str, dict[str, Any]] = {
    "pivoted, keep 0.5": FIVE | {"keep": 0.5},
    "whole, keep 0.65 of every layer": FIVE | {"keep": 0.65, "pivots": False, "allocation": "uniform"},
}
BARRED = "whole, keep 0.65 of every layer"
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "pivoted, keep 0.5": {"auxiliary": (1e-3, 5e-4), "all": (5e-4, 3e-4)},
    "whole, keep 0.65 of every layer": {"auxiliary": (1e-3, 5e-4, 2.5e-4), "all": (2.5e-4, 1.2e-4, 6e-5)},
}
"""Learning rates, of which the best counts for each. All whole cores together want lower ones than a few of them."""


def parts(bench: Bench, name: str, tokens: int) -> dict[str, Any]:
    """Gain and share trained of one start, and what every run came to."""
    start, _ = bench.step(bench.demo.model(), STARTS[name])
    runs, trained = list[dict[str, Any]](), dict[str, int]()
    for train, rates in RATES[name].items():
        for rate in rates:
            tune = {"use": "mpo_tune", "train": train, "tokens": tokens, "learning_rate": rate, "validate_every": 0.2}
            _, report = bench.step(copy.deepcopy(start), tune)
            (line,) = report.layers
            runs.append({"train": train, "rate": rate, "before": line.error_before, "after": line.error_after})
            trained[train] = report.summary["trainable_parameters"]
            Console().print(f"[dim]{train} cores at {rate:g}: {line.error_before:.4f} to {line.error_after:.4f}[/]")
    gains = {train: max(r["before"] - r["after"] for r in runs if r["train"] == train) for train in trained}
    return {
        "gain": gains["auxiliary"] / gains["all"],
        "trained": trained["auxiliary"] / trained["all"],
        "gains": gains,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="of tuning, for every run")
    parser.add_argument("--quick", action="store_true", help="a little training; no bars")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokens = 2000 if args.quick else args.tokens
    bench, rows, found = Bench(args.quick), [], {}
    for name in STARTS:
        found[name] = result = parts(bench, name, tokens)
        barred = name == BARRED and not args.quick
        rows += [
            row(f"{name}: gain by auxiliary cores alone, of all cores' gain", result["gain"], "ratio", 0.9 if barred else None, least=True),
            row(f"{name}: numbers trained, of all cores'", result["trained"], "ratio", 0.15 if barred else None),
        ]  # fmt: skip
    finish(rows, {"model": "demo", "tokens": tokens, "starts": found, "quick": args.quick}, args.json)


if __name__ == "__main__":
    main()
