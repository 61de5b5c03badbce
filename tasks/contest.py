"""Which artifact of a run stands for it, and how it compares with the champion so far. Knows no database."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.markup import escape

from tensorpress.pictures.front import quality_of
from tensorpress.pictures.markdown import table
from tensorpress.pictures.tables import METRICS, Metric, metric, percent, write

TOLERANCE, SPEED_TOLERANCE = 0.01, 0.2
"""Relative changes that count as none: of quality and size, and of what is timed."""
SAME_MACHINE = ("device", "threads", "batch", "prompt_tokens", "decode_tokens")
"""Conditions that figures of speed must share to be compared."""

Verdict = Literal["better", "worse", "same", "not comparable"]


@dataclass(frozen=True)
class Change:
    """A metric of the champion, and what the candidate has in its place."""

    metric: str
    before: float
    now: float | None
    """None: not measured this time."""
    relative: float | None
    """(now - before) / |before|; None where there is no such number."""
    verdict: Verdict

    @property
    def says(self) -> str:
        """One line."""
        shown = metric(self.metric)
        now = "not measured now" if self.now is None else write(self.metric, self.now)
        return f"{shown.label}: {write(self.metric, self.before)} before, {now}{self._by}: {self.verdict}"

    @property
    def _by(self) -> str:
        return "" if self.relative is None else f" ({'+' if self.relative > 0 else ''}{percent(self.relative)})"


def candidate(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The artifact that stands for a run: the smallest of the leaves that hold every gate, each by itself.

    Of several with as few bytes, that of the best quality. None where no leaf holds all gates, and for a recipe without gates:
    it promotes nothing.
    """
    gates = document["gates"]
    quality = quality_of(document)

    def rank(leaf: Mapping[str, Any]) -> tuple[float, float, str]:
        worth = quality.of(leaf["metrics"])
        return leaf["metrics"].get("bytes", math.inf), math.inf if worth is None else worth, leaf["node"]

    able = [leaf for leaf in _leaves(document) if not leaf["error"] and not failing(leaf, gates)]
    return min(able, key=rank) if gates and able else None


def why_none(document: Mapping[str, Any]) -> str:
    """Why a run has no candidate; one line."""
    if not document["gates"]:
        return "a recipe without gates promotes nothing"
    reasons = [
        f"{leaf['node']}: {leaf['error'] or ', '.join(failing(leaf, document['gates']))}"
        for leaf in _leaves(document)
        if leaf["error"] or failing(leaf, document["gates"])
    ]
    return f"no branch holds every gate ({'; '.join(reasons)})"


def failing(leaf: Mapping[str, Any], gates: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The gates that a leaf does not hold; one that it has no number for is among them."""
    failed = []
    for name, gate in gates.items():
        value = leaf["metrics"].get(name)
        low, high = gate.get("min"), gate.get("max")
        inside = value is not None and (low is None or value >= low) and (high is None or value <= high)
        if not inside or math.isnan(value):
            failed.append(name)
    return failed


def compare(
    candidate: Mapping[str, Any],
    champion: Mapping[str, Any],
    tolerance: float = TOLERANCE,
    speed_tolerance: float = SPEED_TOLERANCE,
) -> list[Change]:
    """What became of each metric of the champion whose direction is known, in the order of the contract.

    A metric that is NaN or missing now is worse. What is timed is compared only between runs on the same machine with the same
    settings. Where a line's `best` is better than the champion's own figure, that is what counts: small losses, each within the
    tolerance, cannot add up over many nights.
    """
    before = {**champion["metrics"], **champion.get("best", {})}
    old, new = champion.get("conditions", {}), candidate["conditions"]
    comparable = all(old.get(key) == new.get(key) for key in SAME_MACHINE)
    changes = []
    for shown in METRICS:
        if shown.better and before.get(shown.key) is not None:
            now = candidate["metrics"].get(shown.key)
            if is_timed(shown) and now is not None and not comparable:
                changes.append(Change(shown.key, before[shown.key], now, None, "not comparable"))
            else:
                bound = speed_tolerance if is_timed(shown) else tolerance
                changes.append(_change(shown, before[shown.key], now, bound))
    return changes


def best_of(best: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """For each metric that is not timed, the better of two figures: a line's best so far and a new champion's."""
    result = {}
    for shown in METRICS:
        values = [values[shown.key] for values in (best, metrics) if values.get(shown.key) is not None]
        numbers = [value for value in values if not math.isnan(value)]
        if shown.better and numbers and not is_timed(shown):
            result[shown.key] = max(numbers) if shown.better > 0 else min(numbers)
    return result


def is_timed(shown: Metric) -> bool:
    """Whether a metric depends on the machine that measured it."""
    return shown.group == "speed"


def _change(shown: Metric, before: float, now: float | None, tolerance: float) -> Change:
    if now is None:
        return Change(shown.key, before, now, None, "worse")
    if math.isnan(now) or math.isnan(before):
        verdict: Verdict = "better" if not math.isnan(now) else "worse" if not math.isnan(before) else "same"
        return Change(shown.key, before, now, None, verdict)
    if now == before:
        return Change(shown.key, before, now, 0.0, "same")
    relative = (now - before) / abs(before) if before and math.isfinite(before) and math.isfinite(now) else None
    if relative is not None and abs(relative) <= tolerance:
        return Change(shown.key, before, now, relative, "same")
    return Change(shown.key, before, now, relative, "better" if (now > before) == (shown.better > 0) else "worse")


def _leaves(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [artifact for artifact in document["artifacts"] if artifact["leaf"]]


@dataclass(frozen=True)
class Decision:
    """What came of a run for its line."""

    verdict: Literal["first", "unchanged", "promoted", "worse", "none"]
    line: str
    champion: dict[str, Any] | None
    """The champion from now on."""
    candidate: dict[str, Any] | None
    changes: list[Change]
    """The candidate against the champion before."""
    says: list[str]

    @property
    def markdown(self) -> str:
        """The decision for a page that renders Markdown."""
        rows = [
            [
                metric(change.metric).label,
                write(change.metric, change.before),
                "not measured" if change.now is None else write(change.metric, change.now),
                "" if change.relative is None else percent(change.relative),
                change.verdict,
            ]
            for change in self.changes
        ]
        says = table([self.line, self.verdict], [["", line] for line in self.says])
        return f"{says}\n\n{table(['metric', 'champion before', 'now', 'change', ''], rows)}" if rows else says

    @property
    def lines(self) -> list[str]:
        """The decision for the terminal, as rich markup: what it says, and every change that is not within the tolerance."""
        colour = {"worse": "bold red", "none": "yellow"}.get(self.verdict, "green")
        first, *rest = (escape(line) for line in self.says)
        return [f"[{colour}]{self.verdict}[/] {escape(self.line)}: {first}", *(f"  {line}" for line in rest)]
