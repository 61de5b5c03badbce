"""Dimension squeezing: bonds are lowered one by one, the cheapest first, with tuning between, until the model has lost too much.

Source: MPOP, Liu et al. 2021, arXiv 2106.02205, section 4.3 and its fast estimate of the reconstruction error.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.compressors.decompose.site_plans import WORD, mpo_layer
from tensorpress.compressors.decompose.tensor_train import bond_spectra, least_numbers, parameters, rounded
from tensorpress.compressors.decompose.weighted_low_rank import low_rank_layer
from tensorpress.compressors.recover.distill import Distill, Training, round_to
from tensorpress.errors import InputError
from tensorpress.kernels.factorized_embedding import untied_modules
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear
from tensorpress.structure import Structure, find_structure, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Squeezable = MPOLinear | PivotedMPOLinear | LowRankLinear


@dataclass(frozen=True)
class Cut:
    """A bond that could be lowered: of which layer, to what, and the share of the weight's norm that goes (root of the dropped squares)."""

    path: str
    bond: int
    to: int
    error: float


class Squeeze(Compressor):
    """Lower bonds of decomposed layers by `stride`, always that whose estimated error is smallest, and tune after every `between` cuts.

    The estimate reads the singular values of the bond: what a cut drops needs no decomposition to be known. Stops when the model is down to
    `keep` of the decomposed layers' numbers, or when tuning cannot bring the validation loss back to within `gap` of where it began: the model is
    then the last one that could. One pass without tuning (`tokens: 0`) is direct truncation.

    Report: a row for each decomposed layer, `error_after` the relative Frobenius error of the cuts as estimated, summed in squares.
    """

    use: Literal["squeeze"] = "squeeze"
    keep: float = Field(gt=0, lt=1, description="share of the decomposed layers' numbers to come down to")
    gap: float = Field(0.1, ge=0, description="nats of validation loss above the start at which it stops")
    stride: int = Field(1, ge=1, description="by how much a bond is lowered at once")
    between: int = Field(8, ge=1, description="cuts between two tunings")
    tokens: int = Field(20_000, ge=0, description="training tokens of one tuning")
    learning_rate: float = Field(2e-4, gt=0, description="peak of each tuning")
    batch_tokens: int = Field(4096, ge=1, description="tokens of one step of tuning")

    may_not_follow: ClassVar[Mapping[str, str]] = {
        "gptq": "its layers are quantized; squeeze first, then quantize",
    }
    works_on: ClassVar[tuple[str, ...]] = ("mpo", "factorize", "lpa", "pela")

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        if self.tokens:
            self._tuning().check(model, structure)

    def check_layers(self, model: PreTrainedModel, structure: Structure) -> None:
        layers = squeezable(model)
        if not layers:
            raise InputError("squeeze: no layer is decomposed; put it behind mpo")
        least = sum(_least(layer) for layer in layers.values())
        if self.keep * _numbers(layers) < least:
            share = math.ceil(1e4 * least / _numbers(layers)) / 1e4
            raise InputError(f"squeeze: keep {self.keep:g} cannot be met; the smallest is {share:g}")

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        structure = find_structure(model)
        self.check(model, structure)
        self.check_layers(model, structure)
        work = _Squeezing(self, model, structure, calibration)
        rows = work.run()
        return model, Report(rows, work.summary)

    def _tuning(self) -> Distill:
        return Distill(
            tokens=max(1, self.tokens),
            learning_rate=self.learning_rate,
            batch_tokens=self.batch_tokens,
            validate_every=0.5,
        )


class _Squeezing:
    """One squeezing: the model, its spectra, and what has been cut."""

    def __init__(self, config: Squeeze, model: PreTrainedModel, structure: Structure, calibration: Calibration):
        self.config, self.model, self.structure, self.calibration = config, model, structure, calibration
        self.layers = squeezable(model)
        self.start = _numbers(self.layers)
        self.before = {path: _count(layer) for path, layer in self.layers.items()}
        self.dropped = dict.fromkeys(self.layers, 0.0)
        self.spectra = {path: bond_spectra(cores_of(layer)) for path, layer in self.layers.items()}
        self.lowered: set[str] = set()
        """Layers whose bonds the last cuts changed."""
        self.summary: dict[str, Any] = {"rounds": []}

    def run(self) -> list[LayerReport]:
        begun = time.monotonic()
        reference = self._loss()
        kept, number = self._snapshot(), 0
        stopped = "keep was reached"
        while _numbers(self.layers) > self.config.keep * self.start:
            cuts = self._cut()
            if not cuts:
                if _numbers(self.layers) > self.config.keep * self.start:
                    stopped = "no bond can be lowered further"
                break
            number += 1
            loss = self._tuned(number)
            share = _numbers(self.layers) / self.start
            self.summary["rounds"].append({"cuts": cuts, "kept": share, "loss": loss})
            done = (1 - share) / max(1e-9, 1 - self.config.keep)
            self.calibration.progress("squeeze", min(100, int(100 * done)), 100)
            if not loss - reference <= self.config.gap:
                self._restore(kept)
                stopped = f"the loss rose by {loss - reference:.4f}, above the gap of {self.config.gap:g}"
                break
            del kept  # before there are two
            kept = self._snapshot()
        after = _numbers(self.layers)
        self.summary |= {
            "kept": after / self.start,
            "stopped": stopped,
            "loss_before": reference,
            "loss_after": self._loss(),
        }
        if after > self.config.keep * self.start:
            self.summary["note"] = f"keep {self.config.keep:g} was not reached: {stopped}"
        return self._rows(time.monotonic() - begun)

    def _cut(self) -> int:
        """Lower up to `between` bonds, each time the one whose cut costs least; how many were lowered."""
        bonds = {path: [len(s) for s in spectra] for path, spectra in self.spectra.items()}
        stored = {path: [core.shape[3] for core in cores_of(layer)[:-1]] for path, layer in self.layers.items()}
        # A cut beside them leaves bonds above their full size: these come down as well.
        lowered = {path for path in bonds if bonds[path] != stored[path]}
        count = 0
        while count < self.config.between and self._numbers_at(bonds) > self.config.keep * self.start:
            cut = min(self._cuts(bonds), key=lambda found: (found.error, found.path, found.bond), default=None)
            if cut is None:
                break
            bonds[cut.path][cut.bond] = cut.to
            self.dropped[cut.path] += cut.error**2
            lowered.add(cut.path)
            count += 1
        for path in lowered:
            cores = rounded(cores_of(self.layers[path]), bonds[path])
            self._put(path, layer_of(self.layers[path], cores))
        self.lowered = lowered
        return count

    def _cuts(self, bonds: Mapping[str, list[int]]) -> list[Cut]:
        found = []
        for path, spectra in self.spectra.items():
            for place, spectrum in enumerate(spectra):
                now = bonds[path][place]
                to = max(1, now - self.config.stride)
                if to < now:
                    lost = spectrum[to:now].square().sum() / spectrum.square().sum().clamp(min=1e-300)
                    found.append(Cut(path, place, to, float(lost.sqrt())))
        return found

    def _numbers_at(self, bonds: Mapping[str, list[int]]) -> int:
        return sum(_count_at(layer, bonds[path]) for path, layer in self.layers.items())

    def _tuned(self, number: int) -> float:
        """Tune, if that is asked for, and return the loss on the validation windows."""
        if not self.config.tokens:
            round_to(self.model.parameters(), self.calibration.stored)
            self.spectra |= {path: bond_spectra(cores_of(self.layers[path])) for path in self.lowered}
            return self._loss()
        calibration = replace(self.calibration, seed=self.calibration.seed + number)
        _, report = self.config._tuning().compress(self.model, calibration)
        self.spectra = {path: bond_spectra(cores_of(layer)) for path, layer in self.layers.items()}
        (row,) = report.layers
        assert row.error_after is not None
        return row.error_after

    def _loss(self) -> float:
        return Training(self.config._tuning(), self.model, self.structure, self.calibration).validation_loss()

    def _snapshot(self) -> tuple[dict[str, Squeezable], dict[str, torch.Tensor], dict[str, float]]:
        inside = tuple(f"{path}." for path in self.layers)
        state = {
            name: tensor.detach().clone()
            for name, tensor in self.model.state_dict().items()
            if self.config.tokens and not name.startswith(inside)  # without tuning nothing else changes
        }
        return copy.deepcopy(self.layers), state, dict(self.dropped)

    def _restore(self, kept: tuple[dict[str, Squeezable], dict[str, torch.Tensor], dict[str, float]]) -> None:
        layers, state, self.dropped = kept
        for path, layer in layers.items():
            self._put(path, layer)
        if not state:
            return
        found = self.model.load_state_dict(state, strict=False)
        assert not found.unexpected_keys
        assert all(name.startswith(tuple(f"{path}." for path in layers)) for name in found.missing_keys)

    def _put(self, path: str, layer: Squeezable) -> None:
        set_module(self.model, path, layer)
        self.layers[path] = layer

    def _rows(self, seconds: float) -> list[LayerReport]:
        rows = []
        for path, layer in self.layers.items():
            before, after = self.before[path], _count(layer)
            row = LayerReport(
                path, "squeezed" if after < before else "unchanged", before, after, WORD * before, WORD * after
            )
            row.error_before, row.error_after = 0.0, self.dropped[path] ** 0.5
            row.seconds = round(seconds / len(self.layers), 3)
            row.detail = {"bonds": [core.shape[3] for core in cores_of(layer)[:-1]]}
            rows.append(row)
        return rows


def squeezable(model: nn.Module) -> dict[str, Squeezable]:
    """The decomposed layers of a model whose factors are plain numbers, by path; the table of a head is its embedding's."""
    found: dict[str, Squeezable] = {}
    for path, module in untied_modules(model):
        plain = isinstance(module, LowRankLinear) and all(
            isinstance(f, nn.Linear) for f in (module.inner, module.outer)
        )
        if plain or (isinstance(module, (MPOLinear, PivotedMPOLinear)) and len(module.cores) > 1):
            found[path] = module  # type: ignore[assignment]
    return found


def cores_of(layer: Squeezable) -> list[torch.Tensor]:
    """The cores [d_{k-1}, i_k, j_k, d_k] of a decomposed layer; of a low rank, those of the plan (m, 1) x (1, n)."""
    if isinstance(layer, MPOLinear):
        return [core.detach() for core in layer.cores]
    if isinstance(layer, PivotedMPOLinear):
        return [core.detach() for core in layer.full_cores()]
    inner, outer, rank = layer.inner.weight.detach(), layer.whole_outer().detach(), layer.rank
    return [outer.reshape(1, -1, 1, rank), inner.reshape(rank, 1, -1, 1)]


def layer_of(like: Squeezable, cores: list[torch.Tensor]) -> Squeezable:
    """A layer of the same kind with other cores, in the same precision and with the same bias."""
    if not isinstance(like, LowRankLinear):
        layer = mpo_layer(cores, like.bias, like.cores[0].dtype, pivoted=isinstance(like, PivotedMPOLinear))
        layer.kernel = like.kernel
        return layer
    left, right = cores[0].reshape(like.out_features, -1), cores[1].reshape(-1, like.in_features)
    return low_rank_layer(left, right, like.bias, like.inner.weight.dtype, pivoted=like.pivots is not None)


def _count(layer: Squeezable) -> int:
    return sum(p.numel() for name, p in layer.named_parameters() if name != "bias")


def _count_at(layer: Squeezable, bonds: list[int]) -> int:
    if isinstance(layer, LowRankLinear):
        (rank,) = bonds
        return rank * (layer.in_features + layer.out_features - (rank if layer.pivots is not None else 0))
    count = least_numbers if isinstance(layer, PivotedMPOLinear) else parameters
    return count(layer.out_factors, layer.in_factors, bonds)


def _least(layer: Squeezable) -> int:
    return _count_at(layer, [1] * (1 if isinstance(layer, LowRankLinear) else len(layer.bonds)))


def _numbers(layers: Mapping[str, Squeezable]) -> int:
    return sum(_count(layer) for layer in layers.values())
