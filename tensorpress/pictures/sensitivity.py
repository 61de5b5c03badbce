"""The layer sensitivity profile (CompactifAI) as a heat map: what the model loses when one layer alone is compressed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tensorpress.pictures.graph import INK, LINE, MUTED, canvas, put, shorten, text_width
from tensorpress.pictures.layers import (
    DARK_TEXT,
    ERROR_COLORS,
    LIGHT_TEXT,
    OUTSIDE,
    legend,
    luminance,
    place,
    short_names,
)
from tensorpress.pictures.tables import clean, finite, significant

KINDS_SHOWN = 48
"""Kinds of layers that have rows; a mixture of experts may have more."""
TALL, BETWEEN, TOP = 0.21, 0.09, 0.62
"""Inches: height of a row, room between two kinds, room above the rows."""
DECADES = 4
"""Below this many powers of ten under the largest loss all cells are equally pale."""
LABEL = "loss with this layer alone compressed, {} (logarithmic)"

Profile = dict[str, dict[float, dict[int, float | None]]]
"""Kind of layer -> share kept -> block -> loss, None where it is no finite number."""


def profile_of(report: Mapping[str, Any]) -> Profile:
    """The measured profile by kind, shares from small to large. What is no share of a layer is left out."""
    summary = report.get("summary")
    profile = summary.get("profile") if isinstance(summary, Mapping) else None
    found: Profile = {}
    for layer, losses in (profile if isinstance(profile, Mapping) else {}).items():
        block, kind = place(str(layer))
        for key, loss in (losses if isinstance(losses, Mapping) else {}).items():
            if (share := _share(key)) is not None:
                value = max(0.0, float(loss)) if finite(loss) else None
                found.setdefault(kind, {}).setdefault(share, {})[block] = value
    return {kind: dict(sorted(rows.items())) for kind, rows in found.items()}


def draw_sensitivity(report: Mapping[str, Any], title: str) -> Figure:
    """Rows are kinds of layers, each at the shares kept that were tried; columns are blocks; colour is the measured loss."""
    profile = profile_of(report)
    summary = report.get("summary")
    unit = summary.get("profile_unit") if isinstance(summary, Mapping) else None
    label = LABEL.format(clean(unit, 80) if isinstance(unit, str) else "nats a token")
    shown = dict(list(profile.items())[:KINDS_SHOWN])
    columns = sorted({block for rows in shown.values() for row in rows.values() for block in row}, key=_order)
    names = [shorten(name, 150, 8) for name in short_names(list(shown))]
    left = 0.12 + max([text_width(name, 8) for name in names] or [0.0]) / 72 + 0.66
    wide = float(np.clip(9.0 / max(1, len(columns)), 0.05, 0.66))
    width = max(left + wide * len(columns) + 0.12, left + 1.62 + text_width(label, 7.5) / 72 + 0.12, 5.2)
    rows = sum(map(len, shown.values()))
    bottom = TOP + rows * TALL + max(0, len(shown) - 1) * BETWEEN
    figure, axes = canvas(width, bottom + 0.62)
    put(axes, 0.12, 0.2, shorten(title, (width - 0.24) * 72, 9.5, "bold"), 9.5, weight="bold")
    if not shown:
        put(axes, 0.12, TOP + 0.1, "no sensitivity was measured", 9, MUTED)
        return figure
    norm = _norm([loss for rows in shown.values() for row in rows.values() for loss in row.values()])
    y = TOP
    for name, (_, shares) in zip(names, shown.items(), strict=True):
        put(axes, left - 0.6, y + len(shares) * TALL / 2, name, 8, INK, ha="right")
        for share, losses in shares.items():
            put(axes, left - 0.08, y + TALL / 2, f"{100 * share:.3g} %", 7, MUTED, ha="right")
            for column, block in enumerate(columns):
                if block in losses:
                    _cell(axes, (left + column * wide, y, wide, TALL), losses[block], norm)
            y += TALL
        y += BETWEEN
    _blocks(axes, columns, left, wide)
    legend(axes, left, bottom + 0.2, norm, ERROR_COLORS, label, ())
    put(axes, left + 1.62, bottom + 0.4, _counts(profile), 7.5, MUTED)
    return figure


def _share(key: Any) -> float | None:
    """The share kept that a key says (JSON makes texts of them)."""
    try:
        share = float(str(key))
    except ValueError:
        return None
    return share if 0 < share <= 1 else None


def _order(block: int) -> tuple[bool, int]:
    return block == OUTSIDE, block


def _norm(losses: Sequence[float | None]) -> LogNorm:
    positive = [loss for loss in losses if loss]
    high = max(positive, default=1e-3)
    low = max(min(positive, default=0.0), high / 10**DECADES)
    return LogNorm(low if low < high else high / 10, high, clip=True)


def _height(loss: float, norm: LogNorm) -> float:
    """The place of a loss on the scale, from 0 to 1: what `norm` says, which is slow for thousands of single numbers."""
    assert norm.vmin is not None and norm.vmax is not None
    low, high = math.log(norm.vmin), math.log(norm.vmax)
    return (math.log(min(max(loss, norm.vmin), norm.vmax)) - low) / (high - low)


def _cell(axes: Axes, box: tuple[float, float, float, float], loss: float | None, norm: LogNorm) -> None:
    x, y, wide, tall = box
    rim = min(0.012, wide * 0.06)
    at, size = (x + rim, y + rim), (wide - 2 * rim, tall - 2 * rim)
    if loss is None:
        axes.add_artist(Rectangle(at, *size, fc="none", ec=LINE, lw=0.6, hatch="////", hatch_linewidth=0.4))
        return
    color = ERROR_COLORS(_height(loss, norm))
    axes.add_artist(Rectangle(at, *size, fc=color, ec="none"))
    room = size[0] * 72 - 4
    text = significant(loss, 2) if room > 8 else ""
    if text and text_width(text, 6.5) <= room:
        ink = DARK_TEXT if luminance(color) > 0.5 else LIGHT_TEXT
        put(axes, x + wide / 2, y + tall / 2, text, 6.5, ink, ha="center")


def _blocks(axes: Axes, columns: Sequence[int], left: float, wide: float) -> None:
    """The numbers of the blocks above their columns, as many as fit."""
    every = max(1, int(np.ceil(text_width(str(max(columns)), 7.5) * 1.5 / (wide * 72))))
    for column, block in enumerate(columns):
        if column % every == 0 or block == OUTSIDE:
            text = "–" if block == OUTSIDE else str(block)
            put(axes, left + (column + 0.5) * wide, TOP - 0.1, text, 7.5, MUTED, ha="center")
    put(axes, left - 0.08, TOP - 0.1, "kept · block", 7.5, MUTED, ha="right")


def _counts(profile: Profile) -> str:
    layers = sum(len({block for row in rows.values() for block in row}) for rows in profile.values())
    shares = len({share for rows in profile.values() for share in rows})
    text = f"{layers} layer{'s' * (layers != 1)} at {shares} share{'s' * (shares != 1)} of their bytes"
    lost = any(loss is None for rows in profile.values() for row in rows.values() for loss in row.values())
    more = len(profile) - KINDS_SHOWN
    text += " · hatched: no number" if lost else ""
    return f"{text} · {more} more kinds not shown" if more > 0 else text
