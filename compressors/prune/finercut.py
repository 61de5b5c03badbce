"""FinerCut: remove whole attention and feed-forward sublayers, the least missed one first.

Source: Zhang et al. 2024, arXiv 2405.18218. In each round every sublayer that is left is masked in turn, and the one
whose absence changes the input model's outputs least is removed; so later choices know of the earlier ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.compressors.distances import total_distance
from tensorpress.errors import InputError, StepError
from tensorpress.kernels.kernel_layer import kernel_layers
from tensorpress.structure import (
    Structure,
    Sublayer,
    find_structure,
    remove_sublayer,
    set_module,
    stub_from_spec,
    without_cache,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 2**24
"""Numbers in one batch of outputs, where a single window does not have more already."""


class FinerCut(Compressor):
    """Remove `remove` of the sublayers greedily, by the distance of the outputs to those of the model that comes in.

    The number removed is `remove` times the sublayers of the kind `candidates` that the model still has (protected ones
    counted), rounded half up; a share that rounds to nothing is refused. One attention always stays: cached decoding asks
    its entry for the length of the past. Distances are means over all tokens of the windows: `js` and `kl` in nats,
    `angular` as a share of a half turn, `norm` relative to the norm of the token's output. (The code published with the
    paper averages its divergence over the vocabulary too and swaps its arguments; here it is the true one.)

    Report: a row for each removed sublayer in the order of removal, `error_before` and `error_after` the distance without
    and with this removal. Nothing but one batch of outputs is kept: each round runs the input model again beside the
    candidates. A tie goes to the later sublayer.
    """

    use: Literal["finercut"] = "finercut"
    remove: float = Field(gt=0, lt=1, description="share of the sublayers that is removed")
    distance: Literal["js", "kl", "angular", "norm"] | None = Field(
        None, description="what is kept small; js for causal models and angular for encoders if not given"
    )
    candidates: Literal["mixed", "attention", "feed_forward"] = Field("mixed", description="which sublayers may go")
    samples: int = Field(10, ge=1, description="calibration windows that the distance is measured on")
    protect: float = Field(
        0.0, ge=0, lt=1, description="share of the blocks, from the first, that nothing is taken from"
    )

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        if structure.kind == "encoder" and self.distance in ("js", "kl"):
            raise InputError(
                f"finercut: distance {self.distance} needs a causal model; for an encoder use angular or norm"
            )
        self._plan(model, structure)

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        structure = find_structure(model)
        self.check(model, structure)
        count, candidates = self._plan(model, structure)
        was_training = model.training
        model.eval()
        rounds = self._search(model, structure, calibration, count, candidates)
        rows, before = [], 0.0
        for sublayer, after, seconds in rounds:
            rows.append(_remove(model, sublayer, before, after, seconds))
            before = after
        model.train(was_training)
        summary = {
            "order": [row.layer for row in rows],
            "divergence": before,
            "distance": self._distance(structure),
            "candidates": len(candidates),
            "removed": count,
            "evaluations": sum(len(candidates) - done for done in range(count)),
            "windows": len(calibration.windows[: self.samples]),
        }
        return model, Report(rows, summary)

    def _distance(self, structure: Structure) -> str:
        return self.distance or ("js" if structure.kind == "causal" else "angular")

    def _plan(self, model: PreTrainedModel, structure: Structure) -> tuple[int, list[Sublayer]]:
        """How many sublayers go, and those that may. Raises InputError when the number is 0 or too large."""
        known = [s for s in structure.sublayers if self.candidates in ("mixed", s.kind)]
        count = math.floor(self.remove * len(known) + 0.5)
        kind = "" if self.candidates == "mixed" else f"{self.candidates} "
        if not known:
            raise InputError(f"finercut: the model has no {kind}sublayers left")
        if count == 0:
            smallest = math.ceil(500 / len(known)) / 1000
            raise InputError(
                f"finercut: remove {self.remove:g} of {len(known)} {kind}sublayers removes nothing; "
                f"the smallest share that removes one is {smallest:g}"
            )
        barred = math.ceil(self.protect * len(structure.blocks) - 1e-9)
        free = [s for s in known if s.block >= barred]
        keepers = _cache_attentions(model, structure)
        limit = max(0, len(free) - bool(keepers and set(keepers) <= set(free)))
        if count > limit:
            raise InputError(
                f"finercut: remove {self.remove:g} takes {count} of {len(known)} {kind}sublayers, but only {limit} can go "
                f"(one attention always stays; protect {self.protect:g} bars {len(known) - len(free)})"
            )
        return count, free

    def _search(
        self,
        model: PreTrainedModel,
        structure: Structure,
        calibration: Calibration,
        count: int,
        candidates: Sequence[Sublayer],
    ) -> list[tuple[Sublayer, float, float]]:
        """The sublayers to remove in order, each with the distance after it and the seconds its round took."""
        windows = calibration.windows[: self.samples].to(model.device)
        width = structure.hidden_size if structure.kind == "encoder" else model.config.get_text_config().vocab_size
        batches = windows.split(max(1, BATCH // (windows.shape[1] * width)))
        keepers = _cache_attentions(model, structure)
        rounds: list[tuple[Sublayer, float, float]] = []
        evaluations = sum(len(candidates) - done for done in range(count)) * len(batches)
        done = 0
        for _ in range(count):
            start = time.monotonic()
            gone = [sublayer for sublayer, _, _ in rounds]
            last = [s for s in keepers if s not in gone]
            left = [s for s in candidates if s not in gone and last != [s]]
            totals = dict.fromkeys(left, 0.0)
            for batch in batches:
                reference = outputs(model, batch, structure)
                for sublayer in left:
                    calibration.progress("finercut", done, evaluations)
                    with masked(model, [*gone, sublayer]):
                        other = outputs(model, batch, structure)
                    totals[sublayer] += total_distance(self._distance(structure), reference, other)
                    done += 1
            # A candidate that breaks the arithmetic is infinitely far.
            scores = {s: total / windows.numel() if math.isfinite(total) else math.inf for s, total in totals.items()}
            best = min(reversed(left), key=lambda s: scores[s])
            if scores[best] == math.inf:
                raise StepError("finercut: the outputs are not finite, whichever sublayer is masked")
            rounds.append((best, scores[best], round(time.monotonic() - start, 3)))
        calibration.progress("finercut", evaluations, evaluations)
        return rounds


@torch.no_grad()
def outputs(model: PreTrainedModel, batch: torch.Tensor, structure: Structure) -> torch.Tensor:
    """Logits, or the last hidden states of an encoder, as [tokens, width] for ids [samples, length]."""
    result = model(input_ids=batch, **without_cache(model))
    return result[0].flatten(0, 1)


@contextmanager
def masked(model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> Iterator[None]:
    """Inside, the model computes without these sublayers; afterwards it is as it was."""
    stubs = [stub for sublayer in sublayers for stub in sublayer.stubs]
    kept = [(path, model.get_submodule(path)) for path, _ in stubs]
    try:
        for path, spec in stubs:
            set_module(model, path, stub_from_spec(dict(spec)))
        yield
    finally:
        for path, module in kept:
            set_module(model, path, module)


def _cache_attentions(model: PreTrainedModel, structure: Structure) -> list[Sublayer]:
    """The attentions that can hold entry 0 of the key-value cache, of which one has to stay."""
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    attentions = [s for s in structure.sublayers if s.kind == "attention"]
    return [s for s in attentions if not types or types[s.block] == types[0]]


def _remove(model: PreTrainedModel, sublayer: Sublayer, before: float, after: float, seconds: float) -> LayerReport:
    # Looked up anew: a norm that two parallel sublayers read feeds only one of them once the other is gone.
    current = next(s for s in find_structure(model).sublayers if (s.block, s.kind) == (sublayer.block, sublayer.kind))
    old = _sizes(model)
    remove_sublayer(model, current)
    new = _sizes(model)
    return LayerReport(
        layer=sublayer.name,
        action="removed",
        parameters_before=old[0] - new[0],
        parameters_after=0,
        bytes_before=old[1] - new[1],
        bytes_after=0,
        error_before=before,
        error_after=after,
        seconds=seconds,
    )


def _sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters that the model stands for, and bytes as stored: 16 bits for each number that is not packed."""
    dense = sum(p.numel() for p in model.parameters())
    packed = [layer for layer in kernel_layers(model) if list(layer.buffers())]
    buffers = [b for layer in packed for b in layer.buffers()]
    return (
        dense + sum(layer.parameter_count() for layer in packed),
        2 * dense + sum(b.numel() * (2 if b.is_floating_point() else b.element_size()) for b in buffers),
    )
