"""Experts of a mixture as MPOs with one central core for all experts of a block and auxiliary cores of their own.

Source: MPOE, Gao et al. 2022, arXiv 2203.01104. There the experts grow out of one dense feed-forward and are trained; here the core is fitted to
experts that are there, all together, as `share` does with layers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.compressors.decompose.share import fit_shared
from tensorpress.compressors.decompose.site_plans import WORD, most_sites
from tensorpress.compressors.decompose.tensor_train import capped_bonds, decompose, factors, parameters
from tensorpress.errors import InputError
from tensorpress.kernels.mpo_linear import mpo_to_matrix
from tensorpress.kernels.mpoe import ACTIVATIONS, SharedExperts, SharedMatrices
from tensorpress.structure import Structure, find_structure, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = ("gate_up_proj", "down_proj")
"""Parameters of transformers' fused experts: [E, 2 f, h] and [E, h, f]."""
LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False}  # fmt: skip
"""The layout of fused experts that is understood."""


class MPOE(Compressor):
    """Let the experts of each mixture share the central cores of the MPOs of their matrices; routers and shared experts stay as they are.

    A mixture whose cores would take more bytes than its experts stays as it is. Follow it with `distill`: the shared core then gets the
    gradients of all experts that are called (MPOE masks some of them at random, which is not done here).

    Report: two rows for each mixture, its joined gates and ups, and its downs; errors are relative Frobenius errors over all its experts, `error_before`
    that of MPOs of the same bonds with central cores of their own.
    """

    use: Literal["mpoe"] = "mpoe"
    sites: int = Field(3, ge=3, le=7, description="number of cores, odd")
    bond_dimension: int | None = Field(None, ge=1, description="largest bond dimension; the full bonds if not given")
    sweeps: int = Field(4, ge=0, le=50, description="of alternating least squares over all cores of a mixture")

    needs_calibration: ClassVar[bool] = False
    may_not_follow: ClassVar[Mapping[str, str]] = {"mpoe": "its experts share already"}

    @field_validator("sites")
    @classmethod
    def _has_a_middle(cls, sites: int) -> int:
        if sites % 2 == 0:
            raise ValueError("an odd number: the core in the middle is what is shared")
        return sites

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        found = mixtures(model)
        if not found:
            raise InputError("mpoe: the model has no mixture of experts with fused weights gate_up_proj and down_proj")
        for path, experts in found.items():
            for name, expected in LAYOUT.items():
                if getattr(experts, name, expected) != expected:
                    raise InputError(f"mpoe: {path}: experts with {name} = {not expected} are not handled")
            if _activation(model) not in ACTIVATIONS:
                raise InputError(f"mpoe: activation {_activation(model)!r}; known: {', '.join(ACTIVATIONS)}")
            for name in WEIGHTS:
                _, outputs, inputs = getattr(experts, name).shape
                most = most_sites(outputs, inputs)
                if self.sites > most:
                    raise InputError(
                        f"sites: {self.sites} sites; {path}.{name} of {outputs} x {inputs} carries {most} at most, "
                        "each with a factor above 1"
                    )

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        self.check(model, find_structure(model))
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
        }
        return model, Report(rows, summary)

    def _share(self, model: PreTrainedModel, path: str, experts: nn.Module) -> list[LayerReport]:
        rows, matrices = [], []
        for name in WEIGHTS:
            start = time.monotonic()
            made, row = self._fit(f"{path}.{name}", getattr(experts, name).detach())
            row.seconds = round(time.monotonic() - start, 3)
            matrices.append(made)
            rows.append(row)
        if sum(row.parameters_after for row in rows) >= sum(row.parameters_before for row in rows):
            for row in rows:
                row.action, row.parameters_after, row.bytes_after = "dense", row.parameters_before, row.bytes_before
                row.error_before = row.error_after = 0.0
            return rows
        set_module(model, path, SharedExperts(matrices[0], matrices[1], _activation(model)))
        return rows

    def _fit(self, path: str, stack: torch.Tensor) -> tuple[SharedMatrices, LayerReport]:
        """MPOs of the matrices [E, m, n] with one central core."""
        count, outputs, inputs = stack.shape
        rows, columns = factors(outputs, self.sites), factors(inputs, self.sites)
        bonds = capped_bonds(rows, columns, self.bond_dimension or outputs * inputs)
        separate = [decompose(weight, rows, columns, bonds) for weight in stack]
        fitted = fit_shared(list(stack), separate, self.sweeps)
        made = SharedMatrices.from_cores([[core.to(stack) for core in cores] for cores in fitted])
        center = made.center.numel()
        after = center + count * (parameters(rows, columns, bonds) - center)
        before = stack.numel()
        report = LayerReport(path, "shared", before, after, WORD * before, WORD * after)
        report.error_before, report.error_after = _error(separate, stack), _error(fitted, stack)
        report.detail = {"shape": (count, outputs, inputs), "out_factors": rows, "in_factors": columns, "bonds": bonds}
        return made, report


def mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the fused weights of all experts of a block, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if all(getattr(module._parameters.get(name), "ndim", 0) == 3 for name in WEIGHTS)
    }


def _activation(model: PreTrainedModel) -> str:
    config = model.config.get_text_config()
    return str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None))


def _error(experts: list[list[torch.Tensor]], stack: torch.Tensor) -> float:
    found = torch.stack([mpo_to_matrix([core.to(stack.device, torch.float64) for core in cores]) for cores in experts])
    return float((found - stack.double()).norm() / stack.double().norm().clamp(min=1e-300))
