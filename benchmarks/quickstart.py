"""The quickstart from an empty store and once more: its time, what it spends outside steps, and the quality of plain 4 bits.

    python benchmarks/quickstart.py --json out.json
    python benchmarks/quickstart.py --quick --json out.json      # a quarter of the healing, fewer windows; no bars

Runs the command line in processes of its own, as a user does; the seconds are those of the whole process, imports included.
The bars are for a machine of two cores that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tensorpress.kernels.measured import device_name
from tensorpress.versions import versions

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
QUICK = [
    f"--set=steps.{name}" for name in ("heal.tokens=4000", "recover.tokens=4000", "prune.samples=1", "thin.samples=1")
] + ["--set=data.calibration.samples=8", "--set=data.evaluation.samples=8", "--set=evaluate.use=[perplexity,size]"]


def run(store: Path, settings: list[str]) -> tuple[dict[str, Any], float, int]:
    """One run: (run document, seconds of the process, exit code)."""
    out = store / "run.json"
    command = [sys.executable, "-m", "tensorpress", "run", str(RECIPE), "--store", str(store), "--json", str(out)]
    start = time.monotonic()
    code = subprocess.run([*command, *settings], stdout=subprocess.DEVNULL).returncode
    return json.loads(out.read_text()), time.monotonic() - start, code


def figures(first: dict[str, Any], seconds: float, again: dict[str, Any], again_seconds: float) -> list[dict[str, Any]]:
    """Rows of the table; a bar of None is not held against anything."""
    leaves = {a["node"]: a["metrics"] for a in first["artifacts"] if a["leaf"]}
    four = leaves["baseline[baseline.bits=4]"]
    rows: list[tuple[str, float, str, float | None]] = [
        ("from an empty store", seconds, "s", 300.0),
        ("outside steps", first["overhead_seconds"] + seconds - first["seconds"], "s", 20.0),
        ("once more, all cached", again_seconds, "s", 20.0),
        ("steps made again", sum(not a["cached"] for a in again["artifacts"]), "steps", 0),
        ("branches missing of four", max(0, 4 - len(leaves)), "branches", 0),
        ("verdict is not ACCEPT", float(first["verdict"] != "ACCEPT"), "", 0),
        ("4 bits alone, perplexity ratio", four["perplexity_ratio"], "ratio", 1.03),
    ]
    rows += [(f"{name}, perplexity ratio", m["perplexity_ratio"], "ratio", None) for name, m in leaves.items()]
    rows += [(f"{name}, size ratio", m["size_ratio"], "ratio", None) for name, m in leaves.items()]
    return [
        {
            "name": name, "value": round(value, 4), "unit": unit, "peer": "the bar", "peer_value": bar,
            "ratio": value / bar if bar else None, "bar": bar, "holds": bar is None or value <= bar,
        }
        for name, value, unit, bar in rows
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything, no bars")
    parser.add_argument(
        "--store", type=Path, help="an empty folder for what the runs leave; a passing one if not given"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.store is not None and args.store.exists() and any(args.store.iterdir()):
        raise SystemExit(f"--store {args.store}: is not empty; the first run is to start from nothing")
    settings = QUICK if args.quick else []
    with tempfile.TemporaryDirectory() as passing:
        place = args.store or Path(passing)
        place.mkdir(parents=True, exist_ok=True)
        first, seconds, _ = run(place, settings)
        again, again_seconds, _ = run(place, settings)
    rows = figures(first, seconds, again, again_seconds)
    if args.quick:
        rows = [{**row, "bar": None, "holds": True} for row in rows]
    table = Table("figure", "value", "bar", "holds", box=None)
    for row in rows:
        bar = "" if row["bar"] is None else f"{row['bar']:g}"
        table.add_row(row["name"], f"{row['value']:g} {row['unit']}", bar, "yes" if row["holds"] else "NO")
    Console().print(table)
    conditions = {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "quick": args.quick,
        "versions": versions(),
    }
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    raise SystemExit(0 if all(row["holds"] for row in rows) else 1)


if __name__ == "__main__":
    main()
