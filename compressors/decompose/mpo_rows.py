"""What the report says of a layer that is decomposed."""

from __future__ import annotations

import math
from typing import Any

import torch

from tensorpress.compressors.base import LayerReport
from tensorpress.compressors.decompose.site_plans import WORD, SitePlan
from tensorpress.compressors.decompose.tensor_train import entropy, matrix_spectra

SHOWN = 32
"""Values of a spectrum that are kept in a report."""


def dense_row(path: str, outputs: int, inputs: int) -> LayerReport:
    """The row of a layer that stays as it is."""
    count = outputs * inputs
    row = LayerReport(path, "dense", count, count, WORD * count, WORD * count, error_before=0.0, error_after=0.0)
    row.detail = {"shape": (outputs, inputs)}
    return row


def spectra_of(weight: torch.Tensor, plan: SitePlan) -> dict[str, Any]:
    """Entanglement entropy and bond spectrum (shares of the norm's square, the first ones) at the bonds of a site plan, for the report.

    Of the whole weight [m, n] as it came, cut or not: what one bond carries can be compared over layers, and with what it was cut to.
    Fewer rows than the plan has are filled up with zeros.
    """
    more = math.prod(plan.rows) - len(weight)
    whole = torch.nn.functional.pad(weight, (0, 0, 0, more)) if more else weight
    spectra = matrix_spectra(whole, plan.rows, plan.columns)
    shares = [(s.square() / s.square().sum().clamp(min=1e-300))[:SHOWN] for s in spectra]
    return {
        "entropies": [round(entropy(s), 4) for s in spectra],
        "spectra": [[float(f"{v:.3g}") for v in share.tolist()] for share in shares],
    }
