"""Experts as MPOs with one central core for all experts of a block and auxiliary cores of their own: grown out of dense feed-forwards, or fitted.

Source: MPOE, Gao et al. 2022, arXiv 2203.01104. There the experts grow out of one dense feed-forward and are trained. Experts that are there
already, in a mixture, get a core that is fitted to all of them together, as `share` does with layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.compressors.decompose.experts import (
    WEIGHTS,
    activation_of,
    check_mixture,
    dense_feed_forwards,
    mean_inputs,
    mixtures,
)
from tensorpress.compressors.decompose.share import fit_shared
from tensorpress.compressors.decompose.site_plans import WORD, check_sites
from tensorpress.compressors.decompose.targets import clamped
from tensorpress.compressors.decompose.tensor_train import (
    capped_bonds,
    decompose,
    factors,
    full_bond,
    full_bonds,
    parameters,
)
from tensorpress.errors import InputError
from tensorpress.kernels.mpo_linear import mpo_to_matrix
from tensorpress.kernels.mpoe import SharedExperts, SharedMatrices, SharedMixture
from tensorpress.structure import Structure, find_structure, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OF_GROWTH = ("layers", "active", "core_updates")
"""Fields that only mixtures have which grow out of dense feed-forwards."""


class MPOE(Compressor):
    """Let the experts of each mixture share the central cores of the MPOs of their matrices; routers and shared experts stay as they are.

    With `experts`, dense gated feed-forwards become mixtures first. All experts are copies of the feed-forward, and a router sends each token to
    `active` of them, whose weights sum to one: whatever the router, the model computes what MPOs of its feed-forwards do, at full bonds what it did.
    The router is random, without favour for what the calibration's tokens have in common. It alone tells the experts apart: they learn from different
    tokens and part in training, without noise. All of them train the central cores, which with `core_updates` below one learn in that share of
    the passes, drawn at random, while in the others only what is an expert's own does, and the router.

    Without `experts`, the cores are fitted to the experts that are there, which needs no data; a mixture whose cores would take more bytes than its
    experts stays as it is. Follow both with `distill`; after full bonds it has nothing to learn from the original.

    Report: two rows for each mixture, its joined gates and ups, and its downs, and one for a router that was made. Errors are relative Frobenius
    errors over all experts, `error_before` that of MPOs of the same bonds with central cores of their own, not yet swept. With `experts`, the
    numbers before are the dense feed-forward's; summary: `kept_of_dense`, and `kept_of_plain_mixture`, of a router and experts that share nothing.
    """

    use: Literal["mpoe"] = "mpoe"
    experts: int | None = Field(None, ge=2, le=4096, description="of each mixture that is made of a dense feed-forward")
    active: int = Field(2, ge=1, description="experts that work on a token; with `experts`")
    layers: tuple[str, ...] = Field(
        ("*",), description="which feed-forwards become mixtures: patterns on their paths; with `experts`"
    )
    core_updates: float = Field(
        1.0, gt=0, le=1, description="share of the training passes in which the central cores learn; with `experts`"
    )
    sites: int = Field(3, ge=3, le=7, description="number of cores, odd")
    bond_dimension: int | None = Field(None, ge=1, description="largest bond dimension; the full bonds if not given")
    sweeps: int = Field(4, ge=0, le=50, description="of alternating least squares over all cores of a mixture")

    needs_calibration: ClassVar[bool] = True
    may_not_follow: ClassVar[Mapping[str, str]] = {
        "gptq": "its layers are quantized; make the experts first, then quantize",
        "mpoe": "its experts share already",
    }

    @field_validator("sites")
    @classmethod
    def _has_a_middle(cls, sites: int) -> int:
        if sites % 2 == 0:
            raise ValueError("an odd number: the core in the middle is what is shared")
        return sites

    @model_validator(mode="after")
    def _fits(self) -> MPOE:
        if self.experts is None:
            for name in OF_GROWTH:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is for mixtures that are made of dense feed-forwards; it needs experts")
        elif self.active > self.experts:
            raise ValueError(f"active: at most the {self.experts} experts; found {self.active}")
        return self

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        if self.experts is not None:
            self._check_growth(model, structure)
            return
        found = mixtures(model)
        if not found:
            raise InputError(
                "mpoe: the model has no mixture of experts with fused weights gate_up_proj and down_proj; "
                "with experts: 4, mixtures are made of its dense feed-forwards"
            )
        activation_of(model)
        for path, experts in found.items():
            check_mixture(path, experts)
            for name in WEIGHTS:
                _, outputs, inputs = getattr(experts, name).shape
                check_sites(self.sites, f"{path}.{name}", outputs, inputs)

    def _check_growth(self, model: PreTrainedModel, structure: Structure) -> None:
        if mixtures(model):
            raise InputError(
                "experts: the model has mixtures already; leave experts out, and the experts that are there get shared cores"
            )
        found = dense_feed_forwards(model, structure, self.layers)
        activation_of(model)
        for one in found:
            for name, shape in zip(("gate_up", "down"), one.shapes(model), strict=True):
                check_sites(self.sites, f"{name} of {one.path}", *shape)

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        structure = find_structure(model)
        self.check(model, structure)
        if self.experts is not None:
            return model, self._grow(model, structure, calibration, self.experts)
        found = mixtures(model)
        rows: list[LayerReport] = []
        for done, (path, experts) in enumerate(found.items()):
            calibration.progress("mpoe", done, len(found))
            rows += self._share(model, path, experts)
        calibration.progress("mpoe", len(found), len(found))
        summary: dict[str, Any] = {
            "kept": sum(row.parameters_after for row in rows) / sum(row.parameters_before for row in rows),
            "mixtures": len(found),
            "left_dense": sum(row.action == "dense" for row in rows) // len(WEIGHTS),
            **self._notes(rows),
        }
        return model, Report(rows, summary)

    def _share(self, model: PreTrainedModel, path: str, experts: nn.Module) -> list[LayerReport]:
        rows, matrices = [], []
        for name in WEIGHTS:
            made, row = self._fit(f"{path}.{name}", getattr(experts, name).detach())
            matrices.append(made)
            rows.append(row)
        if sum(row.parameters_after for row in rows) >= sum(row.parameters_before for row in rows):
            for row in rows:
                row.action, row.parameters_after, row.bytes_after = "dense", row.parameters_before, row.bytes_before
                row.error_before = row.error_after = 0.0
            return rows
        set_module(model, path, SharedExperts(matrices[0], matrices[1], activation_of(model)))
        return rows

    def _grow(self, model: PreTrainedModel, structure: Structure, calibration: Calibration, experts: int) -> Report:
        found = dense_feed_forwards(model, structure, self.layers)
        generator = torch.Generator().manual_seed(calibration.seed)
        means = mean_inputs(model, [one.path for one in found], calibration.windows)
        rows: list[LayerReport] = []
        for done, one in enumerate(found):
            calibration.progress("mpoe", done, len(found))
            gate_up, down = one.weights(model)
            first, first_row = self._fit(f"{one.path}.gate_up", gate_up[None], experts)
            second, second_row = self._fit(f"{one.path}.down", down[None], experts)
            router = _router(experts, means[one.path], generator).to(gate_up)
            own: dict[str, Any] = {
                "active": self.active,
                "core_updates": self.core_updates,
                "seed": calibration.seed + done,
            }
            set_module(model, one.path, SharedMixture(first, second, activation_of(model), router, **own))
            count = router.numel()
            rows += [first_row, second_row, LayerReport(f"{one.path}.router", "added", 0, count, 0, WORD * count)]
        calibration.progress("mpoe", len(found), len(found))
        dense, after = sum(row.parameters_before for row in rows), sum(row.parameters_after for row in rows)
        routers = sum(row.parameters_after for row in rows if row.action == "added")
        summary: dict[str, Any] = {
            "kept_of_dense": after / dense,
            "kept_of_plain_mixture": after / (experts * dense + routers),
            "mixtures": len(found),
            "experts": experts,
            "active": self.active,
            **self._notes(rows),
        }
        return Report(rows, summary)

    def _notes(self, rows: list[LayerReport]) -> dict[str, str]:
        shapes = [row.detail["shape"][1:] for row in rows if row.action != "added"]
        notes = clamped(self.bond_dimension, (full_bond(self.sites, *shape) for shape in shapes))
        return {"note": "; ".join(notes)} if notes else {}

    def _fit(self, path: str, stack: torch.Tensor, copies: int = 1) -> tuple[SharedMatrices, LayerReport]:
        """MPOs of the matrices [E, m, n], each so many times, with one central core."""
        start = time.monotonic()
        _, outputs, inputs = stack.shape
        count = copies * len(stack)
        rows, columns = factors(outputs, self.sites), factors(inputs, self.sites)
        bonds = capped_bonds(rows, columns, self.bond_dimension or outputs * inputs)
        separate = [[core.to(stack.device) for core in decompose(weight, rows, columns, bonds)] for weight in stack]
        exact = len(stack) == 1 and bonds == full_bonds(rows, columns)
        fitted = fit_shared(list(stack), separate, 0 if exact else self.sweeps)
        fitted = [[core.to(stack) for core in cores] for cores in fitted]
        made = SharedMatrices.from_cores(copies * fitted)
        center = made.center.numel()
        after = center + count * (parameters(rows, columns, bonds) - center)
        before = stack.numel()
        report = LayerReport(path, "shared", before, after, WORD * before, WORD * after)
        report.error_before, report.error_after = _error(separate, stack), _error(fitted, stack)
        report.detail = {"shape": (count, outputs, inputs), "out_factors": rows, "in_factors": columns, "bonds": bonds}
        report.seconds = round(time.monotonic() - start, 3)
        return made, report


def _router(experts: int, mean: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Logits [experts, h] of unit size for inputs of unit size, whose rows are orthogonal to the mean input [h]: no expert is in favour."""
    rows = torch.randn(experts, len(mean), generator=generator, dtype=torch.float64) / len(mean) ** 0.5
    direction = mean.cpu() / mean.norm().cpu().clamp(min=1e-300)
    return rows - torch.outer(rows @ direction, direction)


def _error(experts: list[list[torch.Tensor]], stack: torch.Tensor) -> float:
    wrong = whole = 0.0
    for cores, weight in zip(experts, stack, strict=True):
        found = mpo_to_matrix([core.to(stack.device, torch.float64) for core in cores])
        wrong, whole = wrong + float((found - weight).square().sum()), whole + float(weight.double().square().sum())
    return math.sqrt(wrong / max(whole, 1e-300))
