"""The recipe's graph as a picture, and what all pictures share: the palette, text that fits, SVG and files.

Colours are named here once; the report replaces them by CSS variables, so that pictures follow light and dark.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.textpath import text_to_path

from tensorpress.pictures.tables import ROOT, clean, finite, human_bytes, human_seconds, own_choices, ratio

PAPER, PANEL, LINE = "#ffffff", "#f6f7f9", "#c4cad3"
INK, MUTED, FAINT = "#1b2028", "#69717e", "#9aa2ae"
ACCENT, GOOD, BAD, BAD_PANEL = "#2b5f94", "#2f7d5c", "#bd3a2f", "#fdf4f2"

BOX, GAP, MARGIN = 2.1, 0.36, 0.06
"""Inches: width of a node, room for the edges between two columns, rim of the picture."""
COMPACT_ABOVE = 14
"""Leaves; above, nodes are drawn with two lines in place of three."""

_lock = threading.Lock()  # rcParams are global, and flows draw from several threads


def svg(figure: Figure) -> str:
    """The figure as a standalone SVG document with selectable text; equal figures give equal documents."""
    buffer = io.StringIO()
    with _lock, warnings.catch_warnings(), mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tensorpress"}):
        warnings.simplefilter("ignore", UserWarning)  # glyphs that the measuring font lacks: the viewer has its own
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"<!DOCTYPE.*?>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text, count=1, flags=re.DOTALL)


def save(figure: Figure, path: str | FilePath) -> FilePath:
    """Write the figure in the format that the path's ending names (`.svg`, `.png`, `.pdf`)."""
    path = FilePath(path)
    if path.suffix == ".svg":
        path.write_text(svg(figure), encoding="utf-8")
        return path
    dates: dict[str, Any] = {"metadata": {"CreationDate": None}} if path.suffix == ".pdf" else {}
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(path, dpi=160, **dates)
    return path


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width in points, in matplotlib's own font, which is wider than what browsers put in its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return float(
            text_to_path.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), False)[0]
        )


def shorten(text: Any, points: float, size: float, weight: str = "normal") -> str:
    """The cleaned text, cut with an ellipsis so that it is at most `points` wide."""
    text = clean(text, 400)
    if text_width(text, size, weight) <= points:
        return text
    while text and text_width(text + "…", size, weight) > points:
        text = text[: -max(1, len(text) // 12)]
    return text.rstrip() + "…"


def put(axes: Axes, x: float, y: float, text: str, size: float = 8, color: str = INK, **how: Any) -> Text:
    """Text at data coordinates, taken literally: a `$` in a name is no formula."""
    how = {"va": "center", "ha": "left", **how}
    return axes.text(x, y, text, fontsize=size, color=color, parse_math=False, **how)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose one pair of axes measures inches from the upper left corner."""
    figure = Figure(figsize=(width, height), dpi=72, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return figure, axes


def tree_of(run: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Node id -> its children. A node whose parent is unknown, or that is its own ancestor, hangs on the root."""
    nodes = {str(a.get("node")): dict(a) for a in run.get("artifacts") or [] if a.get("node") != ROOT}
    children: dict[str, list[dict[str, Any]]] = {ROOT: [], **{node: [] for node in nodes}}
    for name, artifact in nodes.items():
        seen, parent = {name}, str(artifact.get("parent"))
        while parent in nodes and parent not in seen:
            seen.add(parent)
            parent = str(nodes[parent].get("parent"))
        known = str(artifact.get("parent")) in nodes and parent not in seen
        children[str(artifact["parent"]) if known else ROOT].append(artifact)
    return children


def leaves_of(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The artifacts that nothing follows."""
    children = tree_of(run)
    return [dict(a) for a in run.get("artifacts") or [] if not children.get(str(a.get("node")))]


def draw_graph(run: Mapping[str, Any]) -> Figure:
    """The graph of a run, from the model on the left to the leaves on the right.

    Each node says its step, method, choice, bytes, ratios and seconds; a failed one is red and says its error.
    """
    children = tree_of(run)
    places = _places(children)
    rows = 1 + max(row for _, row in places.values())
    columns = 1 + max(column for column, _ in places.values())
    compact = rows > COMPACT_ABOVE
    height, pitch = (0.5, 0.6) if compact else (0.74, 0.92)
    figure, axes = canvas(2 * MARGIN + columns * BOX + (columns - 1) * GAP, 2 * MARGIN + (rows - 1) * pitch + height)

    def corner(node: str) -> tuple[float, float]:
        column, row = places[node]
        return MARGIN + column * (BOX + GAP), MARGIN + row * pitch

    for parent, following in children.items():
        for child in following:
            x0, y0 = corner(parent)
            x1, y1 = corner(str(child["node"]))
            _edge(axes, x0 + BOX, y0 + height / 2, x1, y1 + height / 2, bool(child.get("error")))
    _node(axes, *corner(ROOT), height, _root(run), compact)
    for following in children.values():
        for child in following:
            node = {**child, "leaf": not children[str(child["node"])]}
            _node(axes, *corner(str(child["node"])), height, node, compact)
    return figure


def _root(run: Mapping[str, Any]) -> dict[str, Any]:
    recipe = run.get("recipe") or {}
    source = (recipe.get("model") or {}).get("source") if isinstance(recipe, Mapping) else None
    return {"step": ROOT, "use": source or "original", "metrics": run.get("original") or {}, "root": True}


def _places(children: Mapping[str, list[dict[str, Any]]]) -> dict[str, tuple[int, float]]:
    """Node -> (column, row): leaves stacked in order, a parent amid its children, so that no edges cross."""
    places: dict[str, tuple[int, float]] = {}
    row = 0.0
    stack = [(ROOT, 0, False)]
    while stack:
        node, depth, done = stack.pop()
        below = [str(child["node"]) for child in children[node]]
        if not below:
            places[node] = (depth, row)
            row += 1
        elif done:
            places[node] = (depth, (places[below[0]][1] + places[below[-1]][1]) / 2)
        else:
            stack.append((node, depth, True))
            stack += [(child, depth + 1, False) for child in reversed(below)]
    return places


def _edge(axes: Axes, x0: float, y0: float, x1: float, y1: float, failed: bool) -> None:
    middle = (x0 + x1) / 2
    curve = Path([(x0, y0), (middle, y0), (middle, y1), (x1, y1)], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    axes.add_artist(
        PathPatch(curve, fill=False, lw=1.1, ec=BAD if failed else LINE, ls="--" if failed else "-", zorder=1)
    )


def _node(axes: Axes, x: float, y: float, height: float, node: Mapping[str, Any], compact: bool) -> None:
    failed, root = bool(node.get("error")), bool(node.get("root"))
    outline = BAD if failed else ACCENT if root or node.get("leaf") else LINE
    axes.add_artist(
        FancyBboxPatch(
            (x, y), BOX, height, boxstyle="round,pad=0,rounding_size=0.07", zorder=2,
            fc=BAD_PANEL if failed else PANEL if root else PAPER, ec=outline, lw=1.4 if failed else 1.1,
        )
    )  # fmt: skip
    left, right, full = x + 0.1, x + BOX - 0.1, (BOX - 0.2) * 72
    lines = [y + height * part for part in _lines(node, compact)]
    mark, color = _mark(node)
    if mark:
        put(axes, right, lines[0], mark, 7, color, ha="right", zorder=3)
    room = full - (text_width(mark, 7) + 8 if mark else 0)
    step, method = clean(node.get("step") or node.get("node") or "?"), _method(node)
    title = shorten(step, room, 9, "bold")
    put(axes, left, lines[0], title, 9, zorder=3, weight="bold")
    if compact:
        offset = text_width(title, 9, "bold") + 7
        if method and room - offset > 20:
            put(axes, left + offset / 72, lines[0], shorten(method, room - offset, 7.5), 7.5, MUTED, zorder=3)
    else:
        put(axes, left, lines[1], shorten(method, full, 8), 8, MUTED, zorder=3)
    if len(lines) > (1 if compact else 2):
        _figures(axes, left, right, lines[-1], node)


def _lines(node: Mapping[str, Any], compact: bool) -> tuple[float, ...]:
    """Heights of a node's lines; one that has no figures to show does without their line."""
    metrics = node.get("metrics") or {}
    if node.get("error") or any(finite(metrics.get(key)) for key in ("bytes", "size_ratio", "perplexity_ratio")):
        return (0.3, 0.71) if compact else (0.24, 0.51, 0.79)
    return (0.5,) if compact else (0.35, 0.66)


def _method(node: Mapping[str, Any]) -> str:
    chosen = own_choices(clean(node.get("step") or ""), node.get("branch") or "")
    return " · ".join(([clean(node["use"])] if node.get("use") else []) + chosen)


def _mark(node: Mapping[str, Any]) -> tuple[str, str]:
    if node.get("error"):
        return "failed", BAD
    parts = [human_seconds(node["seconds"])] if finite(node.get("seconds")) else []
    return (" · ".join([*parts, "cached"]), GOOD) if node.get("cached") else ("".join(parts), MUTED)


def _figures(axes: Axes, left: float, right: float, y: float, node: Mapping[str, Any]) -> None:
    """The last line of a node: what it weighs and what it costs, or how it failed."""
    if node.get("error"):
        put(axes, left, y, shorten(node["error"], (right - left) * 72, 7.5), 7.5, BAD, zorder=3)
        return
    metrics = node.get("metrics") or {}
    if finite(metrics.get("bytes")):
        put(axes, left, y, human_bytes(metrics["bytes"]), 7.5, zorder=3)
    if node.get("root"):
        if finite(metrics.get("perplexity")):
            put(axes, right, y, f"perplexity {ratio(metrics['perplexity'])}", 7.5, ha="right", zorder=3)
        return
    if finite(metrics.get("size_ratio")):
        put(axes, left + 0.44 * (right - left), y, f"×{ratio(metrics['size_ratio'])}", 7.5, ha="center", zorder=3)
    if finite(metrics.get("perplexity_ratio")):
        put(axes, right, y, f"ppl ×{ratio(metrics['perplexity_ratio'])}", 7.5, ha="right", zorder=3)
