"""The size-quality front: what each branch weighs against what it costs in quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, ScalarFormatter

from tensorpress.pictures.graph import (
    ACCENT,
    BAD,
    BAD_PANEL,
    FAINT,
    INK,
    LINE,
    MUTED,
    PAPER,
    leaves_of,
    put,
    shorten,
    text_width,
)
from tensorpress.pictures.tables import ROOT, choices, clean, finite, metric, significant

NUMBERS_ABOVE = 12
LISTED = 60
"""Points; above, labels are numbers, and their meaning stands in a list beside the picture."""


@dataclass(frozen=True)
class Point:
    """A branch in the picture; less is better on both axes."""

    name: str
    path: str
    x: float
    y: float
    node: str


@dataclass(frozen=True)
class Quality:
    """What the vertical axis shows: a metric, possibly as its distance from 1."""

    metric: str
    label: str
    original: float | None
    """Where the original lies; None where its own measured value says it."""
    from_one: bool = False

    def of(self, metrics: Mapping[str, Any]) -> float | None:
        value = metrics.get(self.metric)
        if not finite(value):
            return None
        return 1.0 - float(value) if self.from_one else float(value)  # type: ignore[arg-type]


QUALITIES = (
    Quality("perplexity_ratio", "perplexity ratio to the original", 1.0),
    Quality("sts_spearman", "1 − STS Spearman correlation", None, True),
    Quality("embedding_cosine", "1 − cosine to the original's embeddings", 0.0, True),
    Quality("kl_divergence", "KL divergence from the original", 0.0),
)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats on one axis without losing on the other, by ascending x."""
    front: list[int] = []
    lowest = np.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < lowest:
            front.append(i)
            lowest = points[i][1]
    return front


def quality_of(run: Mapping[str, Any]) -> Quality:
    """The first measure of quality that any leaf has."""
    leaves = [leaf.get("metrics") or {} for leaf in leaves_of(run)]
    return next((q for q in QUALITIES if any(q.of(m) is not None for m in leaves)), QUALITIES[0])


def points_of(run: Mapping[str, Any], quality: Quality) -> tuple[list[Point], list[str]]:
    """The original (first, where it can be placed) and the measured leaves; and the names of those without a place."""
    original = run.get("original") or {}
    points, missing = [], []
    if (y := quality.original if quality.original is not None else quality.of(original)) is not None:
        points.append(Point("original", "", 1.0, y, ROOT))
    parents = {str(a.get("node")): a for a in run.get("artifacts") or []}
    for leaf in leaves_of(run):
        metrics, step = leaf.get("metrics") or {}, clean(leaf.get("step") or leaf.get("node") or "?")
        name = " ".join([step, *choices(step, leaf.get("branch") or "")])
        x, y = _size_ratio(metrics, original), quality.of(metrics)
        if x is None or y is None:
            missing.append(name)
            continue
        points.append(Point(name, _path(leaf, parents), x, y, str(leaf.get("node"))))
    return points, missing


def beaten(run: Mapping[str, Any]) -> dict[str, str]:
    """Node -> name of a branch that is no larger and no worse. A method that loses is said to lose."""
    points = [p for p in points_of(run, quality_of(run))[0] if p.node != ROOT]
    front = [points[i] for i in pareto([(p.x, p.y) for p in points])]
    return {
        p.node: next(q.name for q in reversed(front) if q.x <= p.x and q.y <= p.y)
        for p in points
        if p not in front and any(q.x <= p.x and q.y <= p.y and (q.x, q.y) != (p.x, p.y) for q in front)
    }


def draw_front(run: Mapping[str, Any]) -> Figure:
    """Size ratio against quality, for all leaves and the original; gates shaded where they refuse."""
    quality = quality_of(run)
    points, missing = points_of(run, quality)
    many = len(points) > NUMBERS_ABOVE
    height = max(4.6, 0.7 + 0.16 * min(len(points), LISTED + 1)) if many else 4.6
    width = 11.4 if many else 8.2
    figure = Figure(figsize=(width, height), dpi=72, facecolor=PAPER)
    axes = figure.add_axes((0.7 / width, 0.57 / height, 7.35 / width, 1 - 0.66 / height))
    if all(point.node == ROOT for point in points):
        axes.set_axis_off()
        put(axes, 0.5, 0.5, "no branch has both a size and a quality", 10, MUTED, ha="center", transform=axes.transAxes)
        return figure
    _frame(axes, quality)
    gates = run.get("gates") or {}
    _scales(axes, points, gates, quality)
    _gates(axes, gates, quality)
    front = [points[i] for i in pareto([(p.x, p.y) for p in points])]
    if len(front) > 1:
        axes.step([p.x for p in front], [p.y for p in front], where="post", color=ACCENT, lw=1.4, alpha=0.55, zorder=2)
    for point in points:
        on_front = point in front
        color = INK if point.node == ROOT else ACCENT
        axes.plot(
            point.x, point.y, "o", ms=7, zorder=4, mew=1.5, mec=color, mfc=color if on_front else PAPER, clip_on=False
        )
    if many:
        points = sorted(points, key=lambda p: (p.x, p.y))
        _labels(axes, front, [(str(1 + i), "") for i, _ in enumerate(points)], points)
        _list(figure, points, front, 8.3 / width, height)
    else:
        _labels(axes, front, [(p.name, p.path) for p in points], points)
    if missing:
        text = f"not shown, not measured: {', '.join(missing)}"
        figure.text(0.7 / width, 0.012, shorten(text, 500, 7), fontsize=7, color=MUTED, va="bottom", parse_math=False)
    return figure


def _size_ratio(metrics: Mapping[str, Any], original: Mapping[str, Any]) -> float | None:
    if finite(metrics.get("size_ratio")):
        return float(metrics["size_ratio"])
    if finite(metrics.get("bytes")) and finite(original.get("bytes")) and original["bytes"]:
        return float(metrics["bytes"]) / float(original["bytes"])
    return None


def _path(leaf: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]]) -> str:
    """The steps before a leaf, as `prune → heal`."""
    steps: list[str] = []
    parent, seen = str(leaf.get("parent")), {str(leaf.get("node"))}
    while parent in nodes and parent not in seen:
        seen.add(parent)
        steps.append(clean(nodes[parent].get("step") or parent, 24))
        parent = str(nodes[parent].get("parent"))
    return " → ".join(reversed(steps))


def _frame(axes: Axes, quality: Quality) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=MUTED, labelsize=8, length=3, color=LINE)
    axes.set_xlabel("size ratio (16-bit original = 1)", fontsize=8.5, color=MUTED, labelpad=5)
    axes.set_ylabel(quality.label, fontsize=8.5, color=MUTED, labelpad=6)
    axes.set_facecolor(PAPER)


def _limit(gates: Mapping[str, Any], name: str, side: str) -> float | None:
    gate = gates.get(name)
    value: Any = gate.get(side) if isinstance(gate, Mapping) else None
    return float(value) if finite(value) else None


def _gate_of(gates: Mapping[str, Any], quality: Quality) -> float | None:
    """The largest value of the vertical axis that the gates let through."""
    limit = _limit(gates, quality.metric, "min" if quality.from_one else "max")
    return 1.0 - limit if limit is not None and quality.from_one else limit


def _scales(axes: Axes, points: Sequence[Point], gates: Mapping[str, Any], quality: Quality) -> None:
    """Limits that hold the points and the gates; a gate far outside does not squeeze the points together."""
    xs, ys = [p.x for p in points] or [0.0, 1.0], [p.y for p in points] or [0.0, 1.0]
    gate_x, gate_y = _limit(gates, "size_ratio", "max"), _gate_of(gates, quality)
    if gate_x is not None and gate_x < 2 * max(xs):
        xs.append(gate_x)
    if gate_y is not None and gate_y - min(ys) < 4 * max(max(ys) - min(ys), 0.02):
        ys.append(gate_y)
    span = max(max(xs) - min(xs), 0.05)
    axes.set_xlim(max(0.0, min(xs) - 0.08 * span), max(xs) + 0.06 * span)
    axes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    low, high = min(ys), max(ys)
    positive = [y for y in ys if y > 0]
    if positive and high / min(positive) > 3:
        _logarithmic(axes, low, high, min(positive))
        return
    span = max(high - low, 0.01)
    axes.set_ylim(low - 0.1 * span, high + 0.12 * span)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))


def _logarithmic(axes: Axes, low: float, high: float, least: float) -> None:
    """A logarithmic axis; where the original lies at 0, it is linear below the least value."""
    if low > 0:
        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.07, high * (high / low) ** 0.09)
    else:
        axes.set_yscale("symlog", linthresh=least, linscale=0.5)
        axes.set_ylim(-0.2 * least + min(low, 0), high * (high / least) ** 0.09)
    decades = range(int(np.floor(np.log10(least))), int(np.ceil(np.log10(high))) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    bottom, top = axes.get_ylim()
    ticks = [m * 10.0**d for d in decades for m in steps if bottom <= m * 10.0**d <= top]
    axes.yaxis.set_major_locator(FixedLocator(([0.0] if low <= 0 else []) + ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: significant(v, 1) if v < 1 else f"{v:,.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


def _gates(axes: Axes, gates: Mapping[str, Any], quality: Quality) -> None:
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    gate_x, gate_y = _limit(gates, "size_ratio", "max"), _gate_of(gates, quality)
    if gate_x is not None and gate_x < right:
        axes.axvspan(max(gate_x, left), right, color=BAD_PANEL, lw=0, zorder=0)
        axes.axvline(gate_x, color=BAD, lw=0.9, ls=(0, (4, 3)), zorder=1)
        _note(axes, gate_x, top, f"gate: size ≤ {gate_x:g}", (4, -3), "left", "top")
    if gate_y is not None and gate_y < top:
        axes.axhspan(max(gate_y, bottom), top, color=BAD_PANEL, lw=0, zorder=0)
        axes.axhline(gate_y, color=BAD, lw=0.9, ls=(0, (4, 3)), zorder=1)
        name = metric(quality.metric).label
        bound = f"{name} ≥ {1 - gate_y:g}" if quality.from_one else f"{name} ≤ {gate_y:g}"
        _note(axes, right, gate_y, f"gate: {bound}", (-3, 3), "right", "bottom")


def _note(axes: Axes, x: float, y: float, text: str, offset: tuple[int, int], ha: str, va: str) -> None:
    axes.annotate(
        text, (x, y), xytext=offset, textcoords="offset points", fontsize=7.5, color=BAD, ha=ha, va=va, parse_math=False
    )  # fmt: skip


Box = tuple[float, float, float, float]


def _list(figure: Figure, points: Sequence[Point], front: Sequence[Point], left: float, height: float) -> None:
    """What the numbers stand for; the names on the front are bold."""
    lines = [(str(1 + i), p.name, p in front) for i, p in enumerate(points[:LISTED])]
    if len(points) > LISTED:
        lines.append(("", f"… and {len(points) - LISTED} more", False))
    for i, (number, name, on_front) in enumerate(lines):
        y, weight = 1 - (0.2 + 0.16 * i) / height, "bold" if on_front else "normal"
        figure.text(left + 0.018, y, number, fontsize=7.5, color=MUTED, ha="right", va="center")
        text = shorten(name, 195, 7.5, weight)
        figure.text(left + 0.026, y, text, fontsize=7.5, color=INK, va="center", weight=weight, parse_math=False)


def _labels(axes: Axes, front: Sequence[Point], texts: Sequence[tuple[str, str]], points: Sequence[Point]) -> None:
    """Label each point beside it, moved up or down (with a thin leader) until it covers no label, point or line."""
    frame = axes.get_window_extent()  # the figure has 72 dots an inch: pixels are points
    spots = [axes.transData.transform((p.x, p.y)) for p in points]
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    ends = [axes.transData.transform((p.x, p.y)) for p in front]
    lines: list[Box] = []
    for (x0, y0), (x1, y1) in pairwise(ends):
        lines += [(x0, y0 - 0.5, x1, y0 + 0.5), (x1 - 0.5, min(y0, y1), x1 + 0.5, max(y0, y1))]
    for i in sorted(range(len(points)), key=lambda i: (-spots[i][1], spots[i][0])):
        x, y = spots[i]
        name, path = shorten(texts[i][0], 210, 8, "bold"), shorten(texts[i][1], 210, 7) if texts[i][1] else ""
        width = max(text_width(name, 8, "bold"), text_width(path, 7) if path else 0.0) + 2
        box = place_names(x, y, width, 20.0 if path else 11.0, taken, lines, (frame.x0, frame.y0, frame.x1, frame.y1))
        taken.append(box)
        _write(axes, (x, y), box, name, path)


def place_names(
    x: float, y: float, width: float, tall: float, taken: Sequence[Box], lines: Sequence[Box], frame: Box
) -> Box:
    """The nearest free place: right of the point or left of it, then further up and down; avoids lines if cheap."""
    options: list[tuple[float, Box]] = []
    steps = int((frame[3] - frame[1]) / 2)
    for k in range(steps):
        shift = (k + 1) // 2 * 4.0 * (1 if k % 2 else -1)
        for side, penalty in ((9.0, 0.0), (-9.0 - width, 3.0)):
            far = 8.0 if abs(shift) > 12 else 0.0  # room for the leader
            x0 = x + side + (far if side > 0 else -far)
            y0 = y - tall / 2 + shift
            box = (x0, y0, x0 + width, y0 + tall)
            outside = max(0.0, frame[0] - box[0], box[2] - frame[2]) + max(0.0, frame[1] - box[1], box[3] - frame[3])
            covered = sum(_overlap(box, other) for other in taken)
            crossed = sum(_overlap(box, line) > 0 for line in lines)
            options.append((abs(shift) + penalty + far + 100 * outside + 20 * covered + 10 * crossed, box))
    return min(options, key=lambda option: option[0])[1]


def _overlap(a: Box, b: Box) -> float:
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0


def _write(axes: Axes, spot: tuple[float, float], box: Box, name: str, second: str) -> None:
    (x, y), (x0, y0, x1, y1) = spot, box
    on_right = x0 > x
    edge, middle = (x0 if on_right else x1), (y0 + y1) / 2
    inverse = axes.transData.inverted()
    if abs(middle - y) > 12:
        ends = [inverse.transform((x, y)), inverse.transform((edge + (-2 if on_right else 2), middle))]
        axes.plot([e[0] for e in ends], [e[1] for e in ends], color=FAINT, lw=0.7, zorder=3)
    rows = [(name, middle + (5 if second else 0), 8.0, INK, "bold")]
    if second:
        rows.append((second, middle - 5.5, 7.0, MUTED, "normal"))
    for text, height, size, color, weight in rows:
        at = inverse.transform((edge, height))
        ground = {"fc": PAPER, "ec": "none", "alpha": 0.6, "pad": 0.6}  # where a gate's line runs through
        put(
            axes,
            at[0],
            at[1],
            text,
            size,
            color,
            ha="left" if on_right else "right",
            zorder=5,
            weight=weight,
            bbox=ground,
        )
