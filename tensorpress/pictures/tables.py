"""Metrics as people read them: names, units and number formats, and the tables and trees of the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

ROOT = "model"
NOTHING = "–"


def clean(text: Any, limit: int = 0) -> str:
    """One line of printable text: no control characters or lone surrogates, white space collapsed; cut at `limit`."""
    line = re.sub(r"[^\S ]+", " ", str(text))
    line = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)  # colours of a terminal
    line = "".join(c for c in line if c.isprintable())
    line = re.sub(r" {2,}", " ", line).strip()
    return line if not limit or len(line) <= limit else line[: limit - 1].rstrip() + "…"


def significant(value: float, digits: int = 4) -> str:
    """`value` with `digits` significant digits and no exponent where one can be avoided."""
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if exponent < -4 or exponent > 8:
        return f"{value:.{digits - 1}g}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def ratio(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else significant(value)


def human_bytes(value: float) -> str:
    """Decimal units, as disks and model hubs count: 14.7 MB, 3.12 GB."""
    if abs(value) < 1000:
        return f"{value:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if abs(value) < 999.5 or unit == "TB":
            break
    return f"{significant(value, 3)} {unit}"


def human_count(value: float) -> str:
    """Counts with a suffix: 7.34 M, 1.10 B."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{significant(value / size, 3)} {suffix}"
    return f"{value:.0f}"


def human_seconds(value: float) -> str:
    if value < 0.0995:
        return f"{value * 1000:.0f} ms"
    if value < 99.5:
        return f"{significant(value, 2 if value < 9.95 else 3 if value < 10 else 2)} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def rate(value: float) -> str:
    return significant(value, 3) if value < 100 else f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


@dataclass(frozen=True)
class Metric:
    """How a metric is written, and which way is better (-1 less, 1 more, 0 neither)."""

    key: str
    label: str
    group: str
    write: Callable[[float], str] = significant
    better: int = -1
    headline: bool = True
    """Whether the terminal shows it; the report shows all."""


METRICS = (
    Metric("perplexity", "perplexity", "quality"),
    Metric("perplexity_ratio", "perplexity ratio", "quality", ratio),
    Metric("bits_per_byte", "bits per byte", "quality", ratio, headline=False),
    Metric("perplexity_other", "perplexity, other text", "quality", headline=False),
    Metric("perplexity_ratio_other", "ratio, other text", "quality", ratio),
    Metric("bits_per_byte_other", "bits per byte, other text", "quality", ratio, headline=False),
    Metric("kl_divergence", "KL", "quality", lambda v: significant(v, 3)),
    Metric("top1_agreement", "top-1 agreement", "quality", percent, 1, headline=False),
    Metric("sts_spearman", "STS Spearman", "quality", ratio, 1),
    Metric("embedding_cosine", "embedding cosine", "quality", ratio, 1),
    Metric("parsable_functions", "parses", "quality", percent, 1),
    Metric("bytes", "size", "size", human_bytes),
    Metric("size_ratio", "size ratio", "size", ratio),
    Metric("bits_per_parameter", "bits/param", "size", lambda v: significant(v, 3)),
    Metric("weight_bytes", "weights", "size", human_bytes, headline=False),
    Metric("parameters", "parameters", "size", human_count, 0, headline=False),
    Metric("prefill_tokens_per_second", "prefill tokens/s", "speed", rate, 1, headline=False),
    Metric("decode_tokens_per_second", "decode tok/s", "speed", rate, 1),
    Metric("prefill_speedup", "prefill speedup", "speed", ratio, 1, headline=False),
    Metric("decode_speedup", "speedup", "speed", ratio, 1),
    Metric("original_prefill_tokens_per_second", "original prefill tokens/s", "speed", rate, 0, headline=False),
    Metric("original_decode_tokens_per_second", "original decode tokens/s", "speed", rate, 0, headline=False),
    Metric("peak_memory_bytes", "peak memory", "speed", human_bytes, -1, headline=False),
    Metric("step_seconds", "step time", "speed", human_seconds, 0, headline=False),
)
BY_KEY = {metric.key: metric for metric in METRICS}


def metric(key: str) -> Metric:
    """How `key` is written; a metric that is not of the contract is shown under its own name."""
    return BY_KEY.get(key) or Metric(key, clean(key.replace("_", " "), 40), "other", better=0)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def write(key: str, value: Any) -> str:
    """The value of a metric as text."""
    if not is_number(value):
        return NOTHING if value is None else clean(value, 40)
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "∞" if value > 0 else "-∞"
    return metric(key).write(value)


def present(rows: Iterable[Mapping[str, Any]], headline: bool = False) -> list[Metric]:
    """The metrics that any of the rows has, those of the contract first and in its order."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    known = [m for m in METRICS if m.key in keys and (m.headline or not headline)]
    return known + [metric(key) for key in keys if key not in BY_KEY]


def best(shown: Metric, values: Sequence[Any]) -> set[int]:
    """Which of the values are the best of the metric; none where all are equal or better has no meaning."""
    numbers = [value for value in values if finite(value)]
    if not shown.better or len(numbers) < 2 or min(numbers) == max(numbers):
        return set()
    top = max(numbers) if shown.better > 0 else min(numbers)
    return {i for i, value in enumerate(values) if finite(value) and value == top}


def choices(step: str, branch: str) -> list[str]:
    """The choices of a branch, those of the step itself without the step's name: ["bits=4", "prune.remove=0.1"]."""
    parts = [clean(part) for part in (branch or "").split(", ") if part]
    own = [part.removeprefix(f"{step}.") for part in parts if part.startswith(f"{step}.")]
    return own + [part for part in parts if not part.startswith(f"{step}.")]


def own_choices(step: str, branch: str) -> list[str]:
    return [clean(part).removeprefix(f"{step}.") for part in (branch or "").split(", ") if part.startswith(f"{step}.")]


def label(artifact: Mapping[str, Any]) -> str:
    """A node's name for people: `quantize · bits=4`."""
    step = clean(artifact.get("step") or artifact.get("node") or "?")
    return " · ".join([step, *choices(step, artifact.get("branch") or "")])


def metrics_table(run: Mapping[str, Any], every: bool = False) -> Table:
    """The original and every measured artifact, a row each; `every` shows the minor metrics as well."""
    measured = [a for a in run.get("artifacts") or [] if set(a.get("metrics") or {}) - {"step_seconds"}]
    original = run.get("original") or {}
    rows = [original, *(a["metrics"] for a in measured)]
    names = [escape("original"), *(escape(label(a)) for a in measured)]
    return _table(clean(run.get("name") or ""), [("", names)], rows, present(rows, headline=not every), skip_first=True)


def compare_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Runs (`name`, `branch`, `params`, `metrics`) side by side; of the parameters, those that differ."""
    params = [run.get("params") or {} for run in runs]
    keys = dict.fromkeys(key for p in params for key in p)
    differing = [key for key in keys if len({repr(p.get(key)) for p in params}) > 1]
    columns = [("run", [escape(clean(run.get("name") or NOTHING)) for run in runs])]
    if any(run.get("branch") for run in runs):
        columns.append(("branch", [escape(clean(run.get("branch") or NOTHING)) for run in runs]))
    for key in differing:
        columns.append((escape(clean(key)), [escape(clean(p.get(key, NOTHING), 40)) for p in params]))
    rows = [run.get("metrics") or {} for run in runs]
    return _table("", columns, rows, present(rows), skip_first=False)


def plan_tree(nodes: Sequence[Mapping[str, Any]], root: str = ROOT) -> Tree:
    """The graph of a plan drawn for the terminal; nodes as `estimate` gives them, `root` is what the model is called."""
    tree = Tree(f"[bold]{escape(clean(root))}[/]", guide_style="dim")
    places: dict[Any, Tree] = {}
    ids = {node.get("node") for node in nodes}
    waiting = list(nodes)
    while waiting:
        ready = [n for n in waiting if n.get("parent") in places or n.get("parent") not in ids] or waiting[:1]
        for node in ready:
            places[node.get("node")] = places.get(node.get("parent"), tree).add(_plan_line(node))
        waiting = [node for node in waiting if not any(node is done for done in ready)]
    return tree


def _plan_line(node: Mapping[str, Any]) -> str:
    step = clean(node.get("step") or node.get("node") or "?")
    parts = [f"[bold]{escape(step)}[/]"]
    if node.get("use"):
        parts.append(f"[cyan]{escape(clean(node['use']))}[/]")
    parts += [escape(choice) for choice in own_choices(step, node.get("branch") or "")]
    if node.get("cached"):
        parts.append("[green]cached[/]")
    if node.get("note"):
        parts.append(f"[dim]{escape(clean(node['note']))}[/]")
    return "  ".join(parts)


def _table(
    title: str,
    columns: Sequence[tuple[str, Sequence[str]]],
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[Metric],
    skip_first: bool,
) -> Table:
    """Texts on the left, metrics on the right; `skip_first` keeps the first row (the original) out of the contest."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title=escape(title) or None, title_justify="left")
    for heading, _ in columns:
        table.add_column(heading, overflow="fold")
    for shown in metrics:
        table.add_column(escape(shown.label), justify="right")
    start = 1 if skip_first else 0
    winners = {m.key: {i + start for i in best(m, [row.get(m.key) for row in rows[start:]])} for m in metrics}
    for i, row in enumerate(rows):
        cells = [texts[i] for _, texts in columns]
        for shown in metrics:
            text = escape(write(shown.key, row.get(shown.key)))
            cells.append(f"[bold green]{text}[/]" if i in winners[shown.key] else text)
        table.add_row(*cells, style="dim" if skip_first and i == 0 else None)
    return table
