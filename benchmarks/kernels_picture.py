"""The picture of `benchmarks/kernels.py`: how much faster than dense bf16 each backend is, for each number of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kernels_peers import DENSE, PEERS
from matplotlib.figure import Figure

from tensorpress.pictures.graph import ACCENT, FAINT, GOOD, INK, MUTED, save

READING = "reading 4 bits"
"""The limit: what it takes to read the weights."""


def draw(rows: list[dict[str, Any]], shape: str, counts: tuple[int, ...], conditions: str, path: Path) -> None:
    """A panel for each number of rows, a bar for each backend."""
    figure = Figure(figsize=(8.4, 6.2), dpi=100, layout="constrained")
    found = {count: _microseconds(rows, f"{shape}, {count} rows: ") for count in counts}
    for place, (count, times) in enumerate(found.items()):
        beside = counts[place - place % 2 : place - place % 2 + 2]  # panels side by side have the same bars
        names = sorted({name for one in beside for name in found[one]}, key=_order)
        axes = figure.add_subplot(-(-len(counts) // 2), 2, place + 1)
        _panel(axes, names, times)
        axes.set_title(f"{count} row{'s' if count > 1 else ''}", fontsize=9, loc="left", color=INK)
        if place % 2:
            axes.set_yticklabels([])
    figure.suptitle(f"Layer of {shape}: times as fast as dense bf16", fontsize=10, x=0.01, ha="left", color=INK)
    figure.supxlabel(conditions, fontsize=7, x=0.01, ha="left", color=MUTED)
    save(figure, path)


def _microseconds(rows: list[dict[str, Any]], start: str) -> dict[str, float]:
    return {
        r["name"].removeprefix(start): r["value"] for r in rows if r["name"].startswith(start) and r["unit"] == "us"
    }


def _order(name: str) -> tuple[int, str]:
    """Peers, ours with the most bits first, then the limit."""
    if name in PEERS:
        return PEERS.index(name), ""
    return (99, "") if name == READING else (20 - int(name.split()[1]), name)


def _color(name: str) -> str:
    if name == READING:
        return FAINT
    return MUTED if name in PEERS else GOOD if "int8" in name else ACCENT


def _panel(axes: Any, names: list[str], times: dict[str, float]) -> None:
    """Bars of one number of rows; a backend that was not measured there keeps its place."""
    speeds = [times[DENSE] / times[name] if name in times else 0.0 for name in names]
    bars = axes.barh(names, speeds, color=[_color(name) for name in names], height=0.72)
    for name, bar in zip(names, bars, strict=True):
        bar.set_alpha(0.45 if name == READING or name.endswith(("3 bits", "2 bits")) else 1)
    labels = [
        f"{s:.{1 if s >= 1 else 2}f}x   {_time(times[n])}" if n in times else ""
        for n, s in zip(names, speeds, strict=True)
    ]
    axes.bar_label(bars, labels=labels, padding=3, fontsize=7, color=INK)
    axes.axvline(1, color=FAINT, linewidth=0.7, linestyle=":", zorder=0)
    axes.set_xlim(0, 1.42 * max(speeds))
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.tick_params(left=False, labelsize=7.5)


def _time(microseconds: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:#.3g} {unit}".replace(". ", " ")
    return f"{microseconds:.0f} µs"
