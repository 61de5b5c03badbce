"""The report of a run: one HTML page that needs nothing else, no script and no network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from tensorpress.pictures import graph
from tensorpress.pictures.front import beaten, draw_front, points_of, quality_of
from tensorpress.pictures.graph import draw_graph, leaves_of
from tensorpress.pictures.layers import draw_layer_map
from tensorpress.pictures.sensitivity import draw_sensitivity, profile_of
from tensorpress.pictures.spectra import bonds_of, draw_spectra
from tensorpress.pictures.tables import (
    NOTHING,
    ROOT,
    best,
    choices,
    clean,
    finite,
    human_bytes,
    human_count,
    human_seconds,
    is_number,
    label,
    metric,
    present,
    ratio,
    significant,
    write,
)

VARIABLES = {
    graph.PAPER: "paper", graph.PANEL: "panel", graph.LINE: "line", graph.INK: "ink", graph.MUTED: "muted",
    graph.FAINT: "faint", graph.ACCENT: "accent", graph.GOOD: "good", graph.BAD: "bad", graph.BAD_PANEL: "bad-panel",
}  # fmt: skip
"""The CSS variables of the page that take the place of the pictures' colours."""
MEANING = {
    "ACCEPT": "Every step ran and every gate held.",
    "REJECT": "Every step ran, and a gate did not hold.",
    "FAILED": "A step failed.",
}
GROUPS = ("quality", "size", "speed", "other")
LAYERS_SHOWN = 2000


def render(run: Mapping[str, Any]) -> str:
    """The page for a run document (docs/architecture.md), with `samples` (node -> text) and `versions` if any."""
    artifacts = list(run.get("artifacts") or [])
    return _environment().get_template("report.html").render(
        name=clean(run.get("name") or "run"),
        verdict=clean(run.get("verdict") or "unknown", 24),
        meaning=MEANING.get(str(run.get("verdict")), ""),
        lead=_lead(run),
        facts=_facts(run),
        gates=_gates(run),
        metrics=_metrics(run),
        graph=_picture(draw_graph(run), "graph", "The graph of steps from the model to its branches"),
        front=_front(run),
        steps=[_step(artifact, f"step{i}") for i, artifact in enumerate(artifacts)],
        samples=_samples(run, artifacts),
        conditions=_pairs(_without(run.get("conditions"), "versions")),
        versions=_pairs(run.get("versions") or (run.get("conditions") or {}).get("versions")),
        recipe=_yaml(run.get("recipe")),
        ids=_pairs({key: run.get(key) for key in ("flow_run_id", "mlflow_run_id") if run.get(key)}),
    )  # fmt: skip


def step_pictures(report: Mapping[str, Any], title: str) -> dict[str, tuple[Figure, str]]:
    """The pictures of a step's report by the name of their file, each with what it shows; those that have something to show."""
    found: dict[str, tuple[Figure, str]] = {}
    if report.get("layers"):
        found["layers"] = draw_layer_map(report, title), "Map of the layers"
    if profile_of(report):
        found["sensitivity"] = draw_sensitivity(report, f"{title}: sensitivity of each layer"), "Measured sensitivity"
    if bonds_of(report):
        found["spectra"] = draw_spectra(report, f"{title}: bond spectra"), "Bond spectra and entanglement entropies"
    return found


@cache
def _environment() -> Environment:
    folder = Path(__file__).parent
    return Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _picture(figure: Figure, prefix: str, meaning: str) -> Markup:
    """Inline SVG: ids made unique on the page, colours made variables, everything that names an address taken out."""
    text = graph.svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\sid="|\bhref="#|url\(#)', lambda m: f"{m[1]}{prefix}-", text)
    for color, variable in VARIABLES.items():
        text = re.sub(f"(fill|stroke): {color}", rf"\1: var(--{variable})", text)
    width = round(figure.get_figwidth() * 96)
    text = re.sub(
        r'^<svg width="[^"]*" height="[^"]*"',
        f'<svg role="img" style="width: {width}px; min-width: {min(width, 720)}px"',
        text,
    )
    page = '<div class="picture"><span class="unseen">{}</span>{}</div>'
    return Markup(page).format(meaning, Markup(text))


def _front(run: Mapping[str, Any]) -> Markup:
    """The front, if any branch has a place on it."""
    if all(point.node == ROOT for point in points_of(run, quality_of(run))[0]):
        return Markup("")
    return _picture(draw_front(run), "front", "Size against quality of every branch")


def _holds(metrics: Mapping[str, Any], gates: Mapping[str, Any]) -> bool:
    for key, gate in gates.items():
        value = metrics.get(key)
        if not finite(value) or not isinstance(gate, Mapping):
            return False
        low, high = gate.get("min"), gate.get("max")
        if (finite(low) and value < low) or (finite(high) and value > high):  # type: ignore[operator]
            return False
    return True


def _lead(run: Mapping[str, Any]) -> str:
    """One or two sentences: how many branches hold the gates, and what the smallest of them weighs and costs."""
    gates, leaves = run.get("gates") or {}, leaves_of(run)
    failed = [label(a) for a in run.get("artifacts") or [] if a.get("error")]
    good = [leaf for leaf in leaves if not leaf.get("error") and leaf.get("metrics") and _holds(leaf["metrics"], gates)]
    words = []
    if failed:
        words.append(f"{failed[0]} failed" + (f", and {len(failed) - 1} more did not finish." if failed[1:] else "."))
    if gates and leaves:
        words.append(
            f"{len(good)} of {len(leaves)} branch{'es' * (len(leaves) > 1)} hold{'s' * (len(leaves) == 1)} every gate."
        )
    sized = [leaf for leaf in good if finite(leaf["metrics"].get("size_ratio"))]
    if sized:
        least = min(sized, key=lambda leaf: leaf["metrics"]["size_ratio"])
        m = least["metrics"]
        weight = f" ({human_bytes(m['bytes'])})" if finite(m.get("bytes")) else ""
        cost = f", at {ratio(m['perplexity_ratio'])} times its perplexity" if finite(m.get("perplexity_ratio")) else ""
        words.append(
            f"The smallest{' of them' if gates else ''}, {label(least)}, "
            f"has {ratio(m['size_ratio'])} of the original’s size{weight}{cost}."
        )
    return " ".join(words)


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    artifacts = run.get("artifacts") or []
    cached = sum(bool(a.get("cached")) for a in artifacts)
    facts = [("steps", f"{len(artifacts)}" + (f", {cached} cached" if cached else ""))]
    if finite(run.get("seconds")):
        facts.append(("time", human_seconds(run["seconds"])))
    if finite(run.get("overhead_seconds")):
        facts.append(("outside steps", human_seconds(run["overhead_seconds"])))
    return facts


def _gates(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, gate in (run.get("gates") or {}).items():
        gate = gate if isinstance(gate, Mapping) else {}
        bounds = [f"≥ {write(key, gate['min'])}"] if gate.get("min") is not None else []
        bounds += [f"≤ {write(key, gate['max'])}"] if gate.get("max") is not None else []
        row = {"name": metric(key).label, "bounds": " and ".join(bounds) or NOTHING, "holds": gate.get("holds")}
        rows.append({**row, "worst": write(key, gate.get("worst")), "branch": clean(gate.get("branch") or NOTHING, 80)})
    return rows


def _metrics(run: Mapping[str, Any]) -> dict[str, Any]:
    """The table of figures: column groups, columns and rows; the original first and out of the contest for the best."""
    measured = [a for a in run.get("artifacts") or [] if a.get("metrics")]
    figures = [a["metrics"] for a in measured]
    columns = sorted(present([run.get("original") or {}, *figures]), key=lambda m: GROUPS.index(m.group))
    groups = [(g, n) for g in GROUPS if (n := sum(m.group == g for m in columns))]
    edges = {i for i, m in enumerate(columns) if i == 0 or m.group != columns[i - 1].group}
    winners = {m.key: best(m, [f.get(m.key) for f in figures]) for m in columns}
    worse = beaten(run)
    rows = [
        {
            "name": "original",
            "choices": "",
            "original": True,
            "cells": _row(columns, run.get("original") or {}, edges, {}, -1),
        }
    ]
    for i, a in enumerate(measured):
        step = clean(a.get("step") or a.get("node") or "?", 60)
        cells = _row(columns, a["metrics"], edges, winners, i)
        more = {"choices": ", ".join(choices(step, a.get("branch") or "")), "behind": worse.get(str(a.get("node")), "")}
        rows.append({"name": step, **more, "cells": cells})
    heads = [{"label": m.label, "edge": i in edges} for i, m in enumerate(columns)]
    return {"groups": groups, "heads": heads, "rows": rows} if columns else {}


def _row(
    columns: Sequence[Any], figures: Mapping[str, Any], edges: set[int], winners: Mapping[str, set[int]], row: int
) -> list[dict[str, Any]]:
    return [
        {"text": write(m.key, figures.get(m.key)), "edge": i in edges, "best": row in winners.get(m.key, ())}
        for i, m in enumerate(columns)
    ]


def _step(artifact: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    report = artifact.get("report") or {}
    layers = list(report.get("layers") or [])
    step = clean(artifact.get("step") or artifact.get("node") or "?", 80)
    metrics = artifact.get("metrics") or {}
    figures = [human_bytes(metrics["bytes"])] if finite(metrics.get("bytes")) else []
    figures += [human_seconds(artifact["seconds"])] if finite(artifact.get("seconds")) else []
    drawn = step_pictures(report, f"{step} · {clean(artifact.get('use') or '')}")
    return {
        "name": step, "use": clean(artifact.get("use") or "", 60),
        "choices": ", ".join(choices(step, artifact.get("branch") or "")),
        "figures": figures, "cached": bool(artifact.get("cached")), "error": _block(artifact.get("error") or ""),
        "pictures": [
            _picture(figure, f"{prefix}-{name}", f"{meaning} of {step}")
            for name, (figure, meaning) in drawn.items()
        ],
        "layers": [_layer(layer) for layer in layers[:LAYERS_SHOWN]], "more": max(0, len(layers) - LAYERS_SHOWN),
        "summary": _pairs(_without(report.get("summary"), "profile" if "sensitivity" in drawn else "")),
        "conditions": _pairs(artifact.get("conditions")),
        "digest": clean(artifact.get("digest") or "", 64),
    }  # fmt: skip


def _layer(layer: Mapping[str, Any]) -> dict[str, str]:
    def number(key: str, form: Any) -> str:
        return form(layer[key]) if finite(layer.get(key)) else NOTHING

    return {
        "layer": clean(layer.get("layer")), "action": clean(layer.get("action")),
        "parameters_before": number("parameters_before", human_count),
        "parameters_after": number("parameters_after", human_count),
        "bytes_before": number("bytes_before", human_bytes), "bytes_after": number("bytes_after", human_bytes),
        "error_before": number("error_before", lambda v: significant(v, 3)),
        "error_after": number("error_after", lambda v: significant(v, 3)),
        "seconds": number("seconds", human_seconds),
    }  # fmt: skip


def _samples(run: Mapping[str, Any], artifacts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    names = {str(a.get("node")): label(a) for a in artifacts} | {ROOT: "original"}
    samples = run.get("samples") or {}
    return [(names.get(str(node), clean(node)), _block(text)) for node, text in samples.items()]


def _block(text: Any) -> str:
    """Text of several lines without control characters."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text))
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


def _without(mapping: Any, key: str) -> dict[str, Any]:
    return {k: v for k, v in (mapping or {}).items() if k != key}


def _pairs(mapping: Any) -> list[tuple[str, str]]:
    """Names and values as text; lists and mappings on one line."""
    return [(clean(key).replace("_", " "), _text(value)) for key, value in (mapping or {}).items() if value is not None]


def _text(value: Any) -> str:
    if isinstance(value, float) and is_number(value):
        return significant(value) if finite(value) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(k)} {_text(v)}" for k, v in value.items())[:400]
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v) for v in value)[:400]
    return clean(value, 400)


def _yaml(recipe: Any) -> str:
    if not recipe:
        return ""
    if isinstance(recipe, str):
        return recipe
    try:
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    except yaml.YAMLError:
        return str(recipe)
