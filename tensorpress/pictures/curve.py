"""The size-quality curve of a benchmark: each form of a method as a line, GPTQ at its bits as the points to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from tensorpress.pictures.front import Box, place_names
from tensorpress.pictures.graph import FAINT, INK, LINE, MUTED, PAPER, canvas, put, shorten, text_width
from tensorpress.pictures.tables import clean, finite, significant

SERIES = ("#2f7fc9", "#cf5d2c", "#35965f", "#a262b8", "#a87d12", "#cf4f7a", "#22929a", "#857562")
"""Colours of lines: of middling lightness, so that they stand on light paper and on dark."""
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
"""Styles of lines; the next one is taken when the colours are used up."""
WIDTH, HEIGHT = 9.4, 5.2
LEFT, RIGHT, TOP, BOTTOM = 0.78, 1.5, 0.5, 0.95
LONGEST = 170
"""Points: room for a name."""
SAME, RUIN = 1e-6, 1e4
"""Growth of the perplexity below and above which points have no height of their own, to leave room for the others."""

Edges = tuple[float, float]
"""The lower and the upper edge of the axes, where the points lie that have no place between them."""


@dataclass(frozen=True)
class Form:
    """A line: points in order of bytes, (share of bytes, perplexity ratio - 1)."""

    name: str
    points: tuple[tuple[float, float], ...]


def series(index: int) -> tuple[str, Any]:
    """Colour and style of the line at `index`; the first 24 are all different."""
    return SERIES[index % len(SERIES)], DASHES[index // len(SERIES) % len(DASHES)]


def forms_of(rows: Any) -> tuple[list[Form], list[str]]:
    """The lines of some rows, by name; and the names of rows without finite, positive bytes and a finite ratio."""
    found: dict[str, list[tuple[float, float]]] = {}
    missing: dict[str, None] = {}
    for row in rows if isinstance(rows, (list, tuple)) else ():
        values = row if isinstance(row, Mapping) else {}
        name, x, y = clean(values.get("name") or "?", 80), values.get("bytes"), values.get("ratio")
        if finite(x) and finite(y) and float(x) > 0:  # type: ignore[arg-type]
            found.setdefault(name, []).append((float(x), float(y) - 1))  # type: ignore[arg-type]
        else:
            missing[name] = None
    return [Form(name, tuple(sorted(points))) for name, points in found.items()], list(missing)


def draw_curve(rows: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Share of the 16-bit blocks' bytes against what the perplexity grew by, on a logarithmic axis.

    `rows`: {"name": form, "bytes": share, "ratio": perplexity ratio}, several points a form. `lines`: reference points
    of the same keys, each with a dashed line at its quality. What is no worse than the original has no logarithm: it
    lies on the lower edge as a hollow triangle; what is ruined on the upper one.
    """
    (forms, missing), (references, unmeasured) = forms_of(rows), forms_of(lines)
    figure, page = canvas(WIDTH, HEIGHT)
    put(page, 0.12, 0.24, shorten(title, (WIDTH - 0.24) * 72, 9.5, "bold"), 9.5, weight="bold")
    if not forms and not references:
        put(page, 0.12, 0.72, "no form has both a size and a quality", 9, MUTED)
        return figure
    axes = panel(figure, (LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM))
    room = max([min(LONGEST, text_width(form.name, 8, "bold")) for form in forms] or [0.0]) + 16
    edges = _scales(axes, [point for form in (*forms, *references) for point in form.points], room)
    axes.set_xlabel("share of the blocks' bytes (16-bit original = 1)", fontsize=8.5, color=MUTED, labelpad=5)
    axes.set_ylabel("perplexity ratio to the original − 1", fontsize=8.5, color=MUTED, labelpad=6)
    _references(figure, axes, references, edges)
    for index, form in enumerate(forms):
        _line(axes, form, series(index), edges)
    _names(axes, forms, references, edges)
    better = [form.name for form in (*forms, *references) if any(y < SAME for _, y in form.points)]
    ruined = [form.name for form in (*forms, *references) if any(y > RUIN for _, y in form.points)]
    _notes(page, better, ruined, [*missing, *unmeasured])
    return figure


def panel(figure: Figure, box: Box) -> Axes:
    """Axes at (left, top, width, height) in inches from the upper left corner of the figure, in the pictures' style."""
    left, top, wide, tall = box
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=MUTED, labelsize=7.5, length=3, color=LINE)
    axes.set_facecolor("none")
    return axes


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to those wanted that are `gap` apart (less where there is no room) and from `low` to `high`."""
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[list[float]] = []
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    bases = [float(np.mean(pool)) for pool in pools for _ in pool]
    top = high - (len(wanted) - 1) * gap
    places = {i: min(max(bases[rank], low), top) + rank * gap for rank, i in enumerate(order)}
    return [places[i] for i in range(len(wanted))]


def log_ticks(axes: Axes, most: int = 8) -> None:
    """Ticks of a logarithmic vertical axis, written plainly."""
    axes.yaxis.set_major_locator(LogLocator(subs=_subs(axes), numticks=most))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value, 1)))
    axes.yaxis.set_minor_locator(NullLocator())


def _subs(axes: Axes) -> tuple[float, ...]:
    low, high = np.log10(axes.get_ylim())
    return (1, 2, 5) if high - low < 2.5 else (1, 3) if high - low < 4.5 else (1,)


def within(y: float, edges: Edges) -> float:
    """The height at which a point is drawn."""
    return edges[0] if y < SAME else edges[1] if y > RUIN else y


def _scales(axes: Axes, points: Sequence[tuple[float, float]], room: float) -> Edges:
    """Set the limits of the axes, with `room` in points for names on the right; the lower and the upper edge."""
    most, placed = max(x for x, _ in points), [y for _, y in points if SAME <= y <= RUIN]
    wide = axes.get_window_extent().width
    axes.set_xlim(0, most * wide / (wide - room))
    axes.spines["bottom"].set_bounds(0, most)
    ticks = MaxNLocator(9, steps=[1, 2, 5, 10]).tick_values(0, most)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if 0 <= tick <= most * 1.001]))
    axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    low, high = (min(placed), max(placed)) if placed else (1e-3, 1e-1)
    rim = max(high / low, 2.0) ** 0.07
    floor = low / (rim**2 if any(y < SAME for _, y in points) else rim)
    top = high * (rim**2 if any(y > RUIN for _, y in points) else rim)
    axes.set_yscale("log")
    axes.set_ylim(floor, top)
    log_ticks(axes)
    return floor, top


def _line(axes: Axes, form: Form, look: tuple[str, Any], edges: Edges) -> None:
    color, dash = look
    xs, ys = [x for x, _ in form.points], [within(y, edges) for _, y in form.points]
    axes.plot(xs, ys, color=color, ls=dash, lw=1.6, zorder=3, solid_capstyle="round", label=form.name)
    for x, y in form.points:
        _mark(axes, x, y, edges, "o", color, 5.0)


def _mark(axes: Axes, x: float, y: float, edges: Edges, marker: str, color: str, size: float) -> None:
    """A point; one without a place of its own as a hollow triangle on an edge."""
    how: dict[str, Any] = {"ms": size, "mec": color, "zorder": 4, "clip_on": False}
    if SAME <= y <= RUIN:
        axes.plot(x, y, marker, mfc=color, **how)
    else:
        axes.plot(x, within(y, edges), "v" if y < SAME else "^", mfc=PAPER, mew=1.3, **how)


def _references(figure: Figure, axes: Axes, references: Sequence[Form], edges: Edges) -> None:
    """Diamonds with a dashed line across, whose name stands right of the axes, at its height where there is room."""
    marks = [(form.name, x, y) for form in references for x, y in form.points]
    for _, x, y in marks:
        if SAME <= y <= RUIN:
            axes.axhline(y, color=FAINT, lw=0.8, ls=(0, (4, 3)), zorder=1)
        _mark(axes, x, y, edges, "D", INK, 5.5)
    frame = axes.get_window_extent()  # the figure has 72 dots an inch: pixels are points
    heights = [axes.transData.transform((x, within(y, edges)))[1] for _, x, y in marks]
    places = spread(heights, 10.5, frame.y0, frame.y1)
    wide, tall = figure.get_size_inches() * 72
    page = figure.axes[0]
    for (name, _, _), y0, y1 in zip(marks, heights, places, strict=True):
        ends = [frame.x1 + 1, frame.x1 + 11], [tall - y0, tall - y1]
        page.plot([e / 72 for e in ends[0]], [e / 72 for e in ends[1]], color=FAINT, lw=0.7)
        put(page, (frame.x1 + 14) / 72, (tall - y1) / 72, shorten(name, wide - frame.x1 - 20, 7.5), 7.5, INK)


def _names(axes: Axes, forms: Sequence[Form], references: Sequence[Form], edges: Edges) -> None:
    """Each form's name beside the end of its line, moved (with a thin leader) until it covers no name, point or line."""
    frame = axes.get_window_extent()

    def spot(point: tuple[float, float]) -> tuple[float, float]:
        x, y = axes.transData.transform((point[0], within(point[1], edges)))
        return float(x), float(y)

    paths = [[spot(point) for point in form.points] for form in (*forms, *references)]
    taken = [(x - 5, y - 5, x + 5, y + 5) for path in paths for x, y in path]
    lines = [box for path in paths[: len(forms)] for box in _pieces(path)]
    lines += [(frame.x0, y - 0.5, frame.x1, y + 0.5) for path in paths[len(forms) :] for _, y in path]
    for index, (form, path) in enumerate(zip(forms, paths, strict=False)):
        x, y = path[-1]
        name = shorten(form.name, LONGEST, 8, "bold")
        box = place_names(
            x, y, text_width(name, 8, "bold") + 2, 11.0, taken, lines, (frame.x0, frame.y0, frame.x1, frame.y1)
        )
        taken.append(box)
        _write(axes, (x, y), box, name, series(index)[0])


def _pieces(path: Sequence[tuple[float, float]], long: float = 4.0) -> list[Box]:
    """Small boxes that hold a line."""
    boxes: list[Box] = []
    for (x0, y0), (x1, y1) in pairwise(path):
        steps = max(1, int(np.hypot(x1 - x0, y1 - y0) / long))
        ends = zip(np.linspace(x0, x1, steps + 1), np.linspace(y0, y1, steps + 1), strict=True)
        for (a, b), (c, d) in pairwise((float(x), float(y)) for x, y in ends):
            boxes.append((min(a, c), min(b, d) - 0.5, max(a, c) + 0.5, max(b, d) + 0.5))
    return boxes


def _write(axes: Axes, spot: tuple[float, float], box: Box, name: str, color: str) -> None:
    (x, y), (x0, y0, x1, y1) = spot, box
    edge, middle, on_right = (x0 if x0 > x else x1), (y0 + y1) / 2, x0 > x
    inverse = axes.transData.inverted()
    if abs(middle - y) > 12:
        ends = [inverse.transform((x, y)), inverse.transform((edge + (-2 if on_right else 2), middle))]
        axes.plot([e[0] for e in ends], [e[1] for e in ends], color=color, lw=0.7, alpha=0.6, zorder=2)
    at = inverse.transform((edge, middle))
    ground = {"fc": PAPER, "ec": "none", "alpha": 0.6, "pad": 0.6}  # where a dashed line runs through
    side = "left" if on_right else "right"
    put(axes, at[0], at[1], name, 8, color, ha=side, zorder=5, weight="bold", bbox=ground)


def _notes(page: Axes, better: Sequence[str], ruined: Sequence[str], missing: Sequence[str]) -> None:
    """What the picture cannot place, below it."""
    texts = [f"▽ no worse than the original: {', '.join(dict.fromkeys(better))}"] if better else []
    texts += [f"△ perplexity grew more than {RUIN:,.0f} times: {', '.join(dict.fromkeys(ruined))}"] if ruined else []
    texts += [f"points not shown, not measured: {', '.join(dict.fromkeys(missing))}"] if missing else []
    for i, text in enumerate(reversed(texts)):
        put(page, 0.12, HEIGHT - 0.12 - 0.15 * i, shorten(text, (WIDTH - 0.24) * 72, 7), 7, MUTED)
