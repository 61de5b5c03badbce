"""A step's work on the layers as a map: blocks across, kinds of layer down."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tensorpress.pictures.graph import FAINT, INK, LINE, MUTED, canvas, put, shorten, text_width
from tensorpress.pictures.tables import clean, finite, significant

ERROR_COLORS = LinearSegmentedColormap.from_list("error", ["#f3efe6", "#f2cf97", "#e08f4f", "#b9452f", "#6d1d24"])
KEPT_COLORS = LinearSegmentedColormap.from_list("kept", ["#173b63", "#34689c", "#6f9cc4", "#b3cbe0", "#e9eff4"])
DARK_TEXT, LIGHT_TEXT = "#14171c", "#fdfdfd"  # on coloured cells: the same in light and dark
SMALL = 0.1
"""An error up to which no map uses its darkest colours."""
OUTSIDE = -1
"""The column of layers that are in no block (an output head, embeddings)."""


def place(layer: str) -> tuple[int, str]:
    """(block, kind) of a layer: `model.layers.3.self_attn.q_proj` is (3, "self_attn.q_proj")."""
    name = clean(layer, 200)
    if found := re.match(r"(.*?)(?:^|(?<=[.\s_]))(\d+)(?=$|[.\s])[.\s]?(.*)", name):
        return int(found[2]), found[3] or found[1].rstrip(". ") or "block"
    return OUTSIDE, name or "?"


def draw_layer_map(report: Mapping[str, Any], title: str) -> Figure:
    """Colour says the error that a layer is left with (or, where none was measured, the share of bytes kept)."""
    cells = _cells(report.get("layers") or [])
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    blocks = sorted({block for block, _ in cells if block != OUTSIDE}) + [OUTSIDE] * any(b == OUTSIDE for b, _ in cells)
    names = short_names(kinds)
    names_width = max([text_width(shorten(n, 150, 8), 8) for n in names] or [40.0]) / 72
    wide, tall = _cell_size(len(blocks), len(kinds))
    left, top = 0.12 + names_width + 0.1, 0.62
    width = max(left + wide * len(blocks) + 0.12, 5.2)
    figure, axes = canvas(width, top + tall * max(1, len(kinds)) + 0.72)
    put(axes, 0.12, 0.2, shorten(title, (width - 0.24) * 72, 9.5, "bold"), 9.5, weight="bold")
    if not cells:
        put(axes, 0.12, top + 0.1, "no layers reported", 9, MUTED)
        return figure
    measure, norm, colors, label = _colours(list(cells.values()))
    for row, (kind, name) in enumerate(zip(kinds, names, strict=True)):
        y = top + row * tall
        put(axes, left - 0.1, y + tall / 2, shorten(name, 150, 8), 8, INK, ha="right")
        for column, block in enumerate(blocks):
            if layer := cells.get((block, kind)):
                value = measure(layer)
                color = None if value is None else colors(norm(value))
                _cell(axes, (left + column * wide, y, wide, tall), layer, value, color)
    every = max(1, int(np.ceil(text_width(str(max(blocks)), 7.5) * 1.5 / (wide * 72))))
    for column, block in enumerate(blocks):
        if column % every == 0 or block == OUTSIDE:
            text = "–" if block == OUTSIDE else str(block)
            put(axes, left + (column + 0.5) * wide, top - 0.1, text, 7.5, MUTED, ha="center")
    put(axes, left - 0.1, top - 0.1, "block", 7.5, MUTED, ha="right")
    legend(axes, left, top + tall * len(kinds) + 0.24, norm, colors, label, list(cells.values()))
    return figure


def _cells(layers: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], Mapping[str, Any]]:
    return {place(str(layer.get("layer"))): layer for layer in layers}


def short_names(kinds: Sequence[str]) -> list[str]:
    """The last part of each dotted kind, or the whole of it where the last parts are not unique."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return [kind if last.count(short) > 1 or not short else short for kind, short in zip(kinds, last, strict=True)]


def _cell_size(columns: int, rows: int) -> tuple[float, float]:
    wide = float(np.clip(9.0 / max(1, columns), 0.17, 0.66))
    return wide, 0.36 if rows <= 14 else 0.24


def _removed(layer: Mapping[str, Any]) -> bool:
    return str(layer.get("action") or "").startswith("remove")


def _kept(layer: Mapping[str, Any]) -> float | None:
    before: Any = layer.get("bytes_before")
    after: Any = layer.get("bytes_after")
    return float(after) / float(before) if finite(before) and finite(after) and before else None


def _error(layer: Mapping[str, Any]) -> float | None:
    value = layer.get("error_after")
    return float(value) if finite(value) and not _removed(layer) else None  # type: ignore[arg-type]


def _colours(layers: Sequence[Mapping[str, Any]]) -> tuple[Any, Normalize, LinearSegmentedColormap, str]:
    """What colours the cells: (measure of a layer, its scale, its colours, its name)."""
    errors = [value for layer in layers if (value := _error(layer)) is not None]
    if not errors:
        return _kept, Normalize(0, 1, clip=True), KEPT_COLORS, "share of bytes kept"
    positive = [value for value in errors if value > 0]
    if positive and max(positive) / min(positive) > 30:
        low = max(min(positive), max(positive) / 1e4)
        return _error, LogNorm(low, max(positive), clip=True), ERROR_COLORS, "relative error after (logarithmic)"
    return _error, Normalize(0, max(*errors, SMALL), clip=True), ERROR_COLORS, "relative error after"


def _abbreviated(action: str, room: float) -> str:
    """An action that fits in a cell: the whole, or what kind of MPO it is, or its bits, or its first letter."""
    kind = action.removeprefix("mpo ")
    bits = re.search(r"(\d+) bits", action)
    texts = (action, bits[1] if bits else kind, kind.partition(" ")[0], kind[:1])
    return next((text for text in texts if text and text_width(text, 6.5) <= room), action[:1])


def _cell(
    axes: Axes, box: tuple[float, float, float, float], layer: Mapping[str, Any], value: float | None, color: Any
) -> None:
    x, y, wide, tall = box
    rim = min(0.018, wide * 0.06)
    at, size = (x + rim, y + rim), (wide - 2 * rim, tall - 2 * rim)
    middle, room = x + wide / 2, (wide - 2 * rim) * 72 - 3
    if _removed(layer):
        axes.add_artist(Rectangle(at, *size, fc="none", ec=LINE, lw=0.8, hatch="////", hatch_linewidth=0.5))
        word = "removed" if room > text_width("removed", 6.5) else "×"
        put(axes, middle, y + tall / 2, word, 6.5, MUTED, ha="center")
        return
    axes.add_artist(
        Rectangle(at, *size, fc=color if color is not None else "none", ec=LINE if color is None else "none", lw=0.8)
    )
    ink = MUTED if color is None else DARK_TEXT if luminance(color) > 0.5 else LIGHT_TEXT
    action = clean(layer.get("action") or "")
    if room < 11 or not action:
        return
    figure = (
        ""
        if value is None or tall < 0.3 or room < 24
        else (f"{value:.0%}" if _error(layer) is None else significant(value, 2))
    )
    put(axes, middle, y + tall * (0.34 if figure else 0.5), _abbreviated(action, room), 6.5, ink, ha="center")
    if figure:
        put(axes, middle, y + tall * 0.7, figure, 6.5, ink, ha="center", alpha=0.8)


def luminance(color: Sequence[float]) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def legend(
    axes: Axes, x: float, y: float, norm: Normalize, colors: LinearSegmentedColormap, label: str, layers: Sequence[Any]
) -> None:
    """The scale, and how many layers had which treatment."""
    steps, wide = 48, 1.5
    assert norm.vmin is not None and norm.vmax is not None
    for i in range(steps):
        axes.add_artist(
            Rectangle((x + i * wide / steps, y), wide / steps * 1.05, 0.09, fc=colors((i + 0.5) / steps), lw=0)
        )
    ends = ("0 %", "100 %") if colors is KEPT_COLORS else (significant(norm.vmin, 2), significant(norm.vmax, 2))
    put(axes, x, y + 0.19, ends[0], 7, MUTED)
    put(axes, x + wide, y + 0.19, ends[1], 7, MUTED, ha="right")
    put(axes, x + wide + 0.12, y + 0.045, label, 7.5, MUTED)
    actions = [clean(layer.get("action") or "–", 24) for layer in layers]
    counts = " · ".join(f"{actions.count(a)} {a}" for a in dict.fromkeys(actions))
    room = axes.get_xlim()[1] - x - wide - 0.24
    put(axes, x + wide + 0.12, y + 0.2, shorten(counts, room * 72, 7.5), 7.5, FAINT)
