"""The measures by name, and what sets a model's metrics beside its original's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tensorpress.evaluators.base import Evaluator
from tensorpress.evaluators.fidelity import Fidelity
from tensorpress.evaluators.generation import Generation
from tensorpress.evaluators.perplexity import Perplexity
from tensorpress.evaluators.size import Size
from tensorpress.evaluators.speed import Speed
from tensorpress.evaluators.sts import STS
from tensorpress.structure import Kind

MEASURES: dict[str, type[Evaluator]] = {
    "perplexity": Perplexity,
    "fidelity": Fidelity,
    "size": Size,
    "speed": Speed,
    "generation": Generation,
    "sts": STS,
}


def applicable(name: str, kind: Kind) -> bool:
    """Whether the measure `name` can measure models of this kind. Raises KeyError for a name that is not known."""
    return kind in MEASURES[name].kinds


def given_metrics(names: Iterable[str], kind: Kind, *, other: bool, demo: bool) -> set[str]:
    """Metrics that measures give for models of a kind: with a text of another domain or without, of the demo model or not."""
    found = {metric for name in names for metric in MEASURES[name].gives}
    causal_only = {"kl_divergence", "top1_agreement"} | {metric for metric in found if "decode" in metric}
    found -= causal_only if kind == "encoder" else {"embedding_cosine"}
    found -= set() if demo else {"parsable_functions"}
    return {metric for metric in found if other or not metric.endswith("_other")}


def relative_metrics(metrics: Mapping[str, float], original: Mapping[str, float]) -> dict[str, float]:
    """Ratios of a model's metrics to its original's, as far as both have what they need.

    `perplexity_ratio` (and `_other`): measured by the same code on the same windows. `size_ratio`: `weight_bytes` over
    two bytes for each of the original's parameters, whatever type the original is stored in.
    """
    ratios: dict[str, float] = {}
    for suffix in ("", "_other"):
        name = f"perplexity{suffix}"
        if name in metrics and name in original:
            ratios[f"perplexity_ratio{suffix}"] = metrics[name] / original[name]
    if "weight_bytes" in metrics and "parameters" in original:
        ratios["size_ratio"] = metrics["weight_bytes"] / (2 * original["parameters"])
    return ratios
