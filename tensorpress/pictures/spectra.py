"""Bond spectra and entanglement entropies of matrix product operators: how much each layer's cores have to share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from tensorpress.pictures.curve import panel, series, spread
from tensorpress.pictures.graph import FAINT, INK, MUTED, canvas, put, shorten, text_width
from tensorpress.pictures.layers import OUTSIDE, place, short_names
from tensorpress.pictures.tables import finite, significant

BLOCK_COLORS = LinearSegmentedColormap.from_list("blocks", ["#2f7fc9", "#8f6fc4", "#c75a96", "#d9642f"])
"""From the first block to the last: of middling lightness throughout, for light paper and dark."""
KINDS_SHOWN, LINES_SHOWN = 24, 40
"""Panels of a picture, and lines of a panel: blocks spread evenly, with the first and the last."""
LOWEST = 1e-8
"""Shares of the squared norm below this are cut off."""
ACROSS, WIDE, TALL, GUTTER, TOP = 4, 2.0, 1.35, 0.2, 0.62
"""Panels in a row; inches of a panel, between panels, above them."""
LEFT, BETWEEN = 0.72, 0.46
ENTROPY_TALL, NAMES = 1.7, 1.5


@dataclass(frozen=True)
class Bond:
    """The middle bond of a layer."""

    shares: tuple[float, ...]
    """Of the squared norm, falling; those that are finite and above 0."""
    entropy: float | None
    """Nats."""
    index: int
    bonds: int


Bonds = dict[str, dict[int, Bond]]
"""Kind of layer -> block -> its middle bond."""


def bonds_of(report: Mapping[str, Any]) -> Bonds:
    """The middle bonds of the layers that have spectra, by kind and block."""
    found: Bonds = {}
    layers = report.get("layers")
    for layer in layers if isinstance(layers, (list, tuple)) else ():
        if isinstance(layer, Mapping):
            block, kind = place(str(layer.get("layer")))
            row = found.setdefault(kind, {})  # those that are dense in the first block keep their place
            if (bond := _middle(layer.get("detail"))) is not None:
                row[block] = bond
    return {kind: row for kind, row in found.items() if row}


def draw_spectra(report: Mapping[str, Any], title: str) -> Figure:
    """A panel for each kind of layer, a line for each block; below, the entanglement entropy by block, a line for each kind."""
    bonds = bonds_of(report)
    shown = dict(list(bonds.items())[:KINDS_SHOWN])
    blocks = sorted({block for row in shown.values() for block in row}, key=lambda block: (block == OUTSIDE, block))
    rows, across = -(-len(shown) // ACROSS), max(1, min(ACROSS, len(shown)))
    width = max(LEFT + across * WIDE + (across - 1) * GUTTER + 0.16, 5.6)
    below = TOP + rows * (TALL + BETWEEN) + 0.72
    tall = max(ENTROPY_TALL, 0.15 * len(shown))
    figure, page = canvas(width, below + tall + 0.5 if shown else 1.0)
    put(page, 0.12, 0.2, shorten(title, (width - 0.24) * 72, 9.5, "bold"), 9.5, weight="bold")
    if not shown:
        put(page, 0.12, TOP + 0.1, "no layer has a bond spectrum", 9, MUTED)
        return figure
    names = dict(zip(shown, short_names(list(shown)), strict=True))
    _panels(figure, shown, names, blocks)
    legend(page, blocks, TOP + rows * (TALL + BETWEEN) + 0.06, width, len(bonds) - len(shown))
    if any(bond.entropy is not None for row in shown.values() for bond in row.values()):
        _entropies(figure, shown, names, blocks, (LEFT, below, width - LEFT - NAMES, tall))
    else:
        put(page, LEFT, below, "no entanglement entropy reported", 8, MUTED)
    return figure


def _middle(detail: Any) -> Bond | None:
    spectra = detail.get("spectra") if isinstance(detail, Mapping) else None
    if not isinstance(spectra, (list, tuple)) or not spectra:
        return None
    index = (len(spectra) - 1) // 2
    values = spectra[index] if isinstance(spectra[index], (list, tuple)) else ()
    shares = tuple(float(value) for value in values if finite(value) and value > 0)
    entropies = detail.get("entropies")
    entropy = entropies[index] if isinstance(entropies, (list, tuple)) and len(entropies) > index else None
    return Bond(shares, entropy if finite(entropy) else None, index, len(spectra)) if shares else None


def _chosen(blocks: Sequence[int]) -> list[int]:
    """The blocks that have a line: all, or so many spread evenly."""
    if len(blocks) <= LINES_SHOWN:
        return list(blocks)
    return [blocks[i] for i in np.linspace(0, len(blocks) - 1, LINES_SHOWN).round().astype(int)]


def _color(blocks: Sequence[int], block: int) -> str:
    return to_hex(BLOCK_COLORS(blocks.index(block) / max(1, len(blocks) - 1)))


def _panels(figure: Figure, shown: Bonds, names: Mapping[str, str], blocks: Sequence[int]) -> None:
    shares = [share for row in shown.values() for bond in row.values() for share in bond.shares]
    low = min(max(LOWEST, min(shares)), 0.1) / 1.5
    longest = max(len(bond.shares) for row in shown.values() for bond in row.values())
    for i, (kind, row) in enumerate(shown.items()):
        down, across = divmod(i, ACROSS)
        left, top = LEFT + across * (WIDE + GUTTER), TOP + down * (TALL + BETWEEN)
        axes = panel(figure, (left, top, WIDE, TALL))
        for block in _chosen([block for block in blocks if block in row]):
            values, color = row[block].shares, _color(blocks, block)
            dot = "o" if len(values) == 1 else None
            axes.plot(range(1, len(values) + 1), values, color=color, lw=1.1, alpha=0.85, marker=dot, ms=3)
        _scales(axes, low, longest, labels=across == 0)
        _head(figure.axes[0], left, top - 0.1, names[kind], row)
    put(figure.axes[0], 0.16, TOP + TALL / 2, "share of the squared norm", 7.5, MUTED, rotation=90, ha="center")


def _scales(axes: Axes, low: float, longest: int, *, labels: bool) -> None:
    axes.set_yscale("log")
    axes.set_ylim(low, 1.5)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value, 1) if labels else ""))
    axes.set_xlim(0.5, max(longest, 2) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _head(page: Axes, left: float, y: float, name: str, row: Mapping[int, Bond]) -> None:
    """A panel's name, and which bond it shows where there are several."""
    name = shorten(name, WIDE * 72 - 2, 8, "bold")
    put(page, left + 0.03, y, name, 8, INK, weight="bold")
    several = {(bond.index + 1, bond.bonds) for bond in row.values() if bond.bonds > 1}
    offset = text_width(name, 8, "bold") + 8
    if several and WIDE * 72 - offset > 20:
        text = "bond {} of {}".format(*several.pop()) if len(several) == 1 else "middle bonds"
        put(page, left + 0.03 + offset / 72, y, shorten(text, WIDE * 72 - offset, 7.5), 7.5, MUTED)


def legend(page: Axes, blocks: Sequence[int], y: float, width: float, more: int) -> None:
    """The colours of the blocks, and what is not shown."""
    chosen = _chosen(blocks)
    wide = min(1.5, 0.3 * len(chosen)) / len(chosen)
    for i, block in enumerate(chosen):
        page.add_artist(Rectangle((LEFT + i * wide, y), wide * 1.02, 0.09, fc=_color(blocks, block), lw=0))
    ends = ["outside" if block == OUTSIDE else str(block) for block in (blocks[0], blocks[-1])]
    text = f"block {ends[0]}" + (f" to {ends[1]}" if len(blocks) > 1 else "")
    text += f", {len(chosen)} of them drawn" if len(chosen) < len(blocks) else ""
    text += f" · {more} more kinds not shown" if more > 0 else ""
    put(page, LEFT + wide * len(chosen) + 0.1, y + 0.045, shorten(text, (width - LEFT - 1.72) * 72, 7.5), 7.5, MUTED)
    put(page, LEFT, y + 0.22, "across: the singular values of the middle bond, in falling order", 7.5, MUTED)


def _entropies(
    figure: Figure,
    shown: Bonds,
    names: Mapping[str, str],
    blocks: Sequence[int],
    box: tuple[float, float, float, float],
) -> None:
    """The entropy of each kind by block, with gaps where there is none; its name at the end of its line."""
    axes = panel(figure, box)
    page, height = figure.axes[0], figure.get_figheight() * 72
    put(page, LEFT + 0.03, box[1] - 0.13, "entanglement entropy by block", 8, INK, weight="bold")
    put(page, 0.16, box[1] + box[3] / 2, "nats", 7.5, MUTED, rotation=90, ha="center")
    ends = []
    for i, (kind, row) in enumerate(shown.items()):
        values = [np.nan if (e := row[b].entropy if b in row else None) is None else e for b in blocks]
        if known := [j for j, value in enumerate(values) if finite(value)]:
            color, dash = series(i)
            axes.plot(values, color=color, ls=dash, lw=1.4, marker="o", ms=3 if len(blocks) <= 40 else 1.5)
            ends.append((names[kind], color, known[-1], values[known[-1]]))
    _entropy_scales(axes, blocks)
    spots = [axes.transData.transform((x, y)) for *_, x, y in ends]
    frame = axes.get_window_extent()
    places = spread([float(y) for _, y in spots], 10.0, frame.y0 + 4, frame.y1 - 4)
    for (name, color, *_), (x, y), at in zip(ends, spots, places, strict=True):
        xs, ys = (x + 4, frame.x1 + 4, frame.x1 + 14), (y, y, at)
        page.plot([v / 72 for v in xs], [(height - v) / 72 for v in ys], color=FAINT, lw=0.6)
        room = NAMES * 72 - 20
        put(page, (frame.x1 + 17) / 72, (height - at) / 72, shorten(name, room, 8), 8, color, weight="bold")


def _entropy_scales(axes: Axes, blocks: Sequence[int]) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    rim = max(0.08 * (high - low), 0.05)
    axes.set_ylim(max(low - rim, -0.05), high + rim)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.set_xlim(-0.4, len(blocks) - 0.6)
    shown = range(0, len(blocks), max(1, -(-len(blocks) // 20)))
    axes.xaxis.set_major_locator(FixedLocator(list(shown)))
    axes.set_xticklabels(["–" if blocks[i] == OUTSIDE else str(blocks[i]) for i in shown])
