"""What the benchmarks share: rows against bars, the table that is printed, the file that is written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def row(name: str, value: float, unit: str, bar: float | None, least: bool = False) -> dict[str, Any]:
    """A figure that must not be above its bar, or not below it where that says the `least`; one without a bar holds."""
    return {
        "name": name, "value": round(value, 3), "unit": unit, "peer": "the bar", "peer_value": bar,
        "ratio": value / bar if bar else None, "bar": bar, "least": least,
        "holds": bar is None or (value >= bar if least else value <= bar),
    }  # fmt: skip


def commit() -> str:
    """The commit that is checked out, with `+` where files differ from it; `unknown` outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def finish(rows: list[dict[str, Any]], conditions: dict[str, Any], target: Path | None) -> None:
    """Print the table, write the file, and exit with 0 when every bar holds, else with 1."""
    import torch

    from tensorpress.kernels.measured import device_name
    from tensorpress.versions import versions

    table = Table("figure", "value", "bar", "holds", box=None)
    for line in rows:
        bar = "" if line["bar"] is None else f"{line['bar']:g}"
        table.add_row(line["name"], f"{line['value']:g} {line['unit']}", bar, "yes" if line["holds"] else "NO")
    Console().print(table)
    machine = {
        "commit": commit(),
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    if target:
        target.write_text(json.dumps({"conditions": {**machine, **conditions}, "rows": rows}, indent=1) + "\n")
    raise SystemExit(0 if all(line["holds"] for line in rows) else 1)
