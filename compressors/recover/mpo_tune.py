"""Tuning of matrix product operators by parts: the auxiliary cores, which hold few numbers, or the central one, which holds most.

Source: MPOP, Liu et al. 2021, arXiv 2106.02205. The central core carries most of a matrix's information, the others adapt it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import nn

from tensorpress.compressors.base import Calibration, Report
from tensorpress.compressors.recover.distill import Distill
from tensorpress.errors import InputError
from tensorpress.kernels.factorized_embedding import untied_modules
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear
from tensorpress.structure import Structure, find_structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def central_core(layer: MPOLinear | PivotedMPOLinear) -> int:
    """The place of the core in the middle; of the two in the middle of an even number, that with more numbers."""
    sites = len(layer.cores)
    if sites % 2:
        return sites // 2
    left, right = sites // 2 - 1, sites // 2
    return left if layer.cores[left].numel() > layer.cores[right].numel() else right


class MPOTune(Distill):
    """Distillation that trains the cores of MPO layers alone: the auxiliary ones, the central one, or all of them.

    What is not trained is bit for bit as it was. Layers of fewer than three cores have no auxiliary ones; they are left out, and
    low ranks with them. All else is that of `distill`. Summary: `trainable_parameters`, and `trainable_share` of the cores' numbers.
    """

    action: ClassVar[str] = "tuned"
    use: Literal["mpo_tune"] = "mpo_tune"  # type: ignore[assignment]
    train: Literal["auxiliary", "central", "all"] = Field("auxiliary", description="which cores are trained")

    works_on: ClassVar[tuple[str, ...]] = ("mpo",)

    def check_layers(self, model: PreTrainedModel, structure: Structure) -> None:
        if not _layers(model):
            raise InputError(
                "mpo_tune: no layer is a matrix product operator of three or more cores; put it behind mpo with plans: balanced and sites: 3, or 5"
            )

    def trained(self, model: PreTrainedModel) -> list[nn.Parameter]:
        found = []
        for layer in _layers(model):
            central = central_core(layer)
            chosen = {
                "all": range(len(layer.cores)),
                "central": [central],
                "auxiliary": [k for k in range(len(layer.cores)) if k != central],
            }
            found += [layer.cores[k] for k in chosen[self.train]]
        return found

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        self.check_layers(model, find_structure(model))
        model, report = super().compress(model, calibration)
        cores = sum(core.numel() for layer in _layers(model) for core in layer.cores)
        report.summary["trainable_share"] = report.summary["trainable_parameters"] / cores
        return model, report


def _layers(model: nn.Module) -> list[MPOLinear | PivotedMPOLinear]:
    kinds = (MPOLinear, PivotedMPOLinear)
    layers = [module for _, module in untied_modules(model) if isinstance(module, kinds)]
    return [layer for layer in layers if len(layer.cores) > 2]
