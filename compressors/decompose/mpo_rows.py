"""What the report says of a layer that is decomposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tensorpress.compressors.base import LayerReport
from tensorpress.compressors.decompose.site_plans import WORD, SitePlan
from tensorpress.compressors.decompose.tensor_train import bond_spectra, entropy, matrix_spectra

SHOWN = 32
"""Values of a spectrum that are kept in a report."""


def dense_row(path: str, outputs: int, inputs: int) -> LayerReport:
    """The row of a layer that stays as it is."""
    count = outputs * inputs
    row = LayerReport(path, "dense", count, count, WORD * count, WORD * count, error_before=0.0, error_after=0.0)
    row.detail = {"shape": (outputs, inputs)}
    return row


def spectra_of(cores: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Entanglement entropy and bond spectrum (shares of the norm's square, the first ones) of an MPO, for the report."""
    return _told(bond_spectra(cores))


def dense_spectra(weight: torch.Tensor, plan: SitePlan) -> dict[str, Any]:
    """The same of a weight [m, n] that stays dense, at the bonds of a site plan."""
    return _told(matrix_spectra(weight, plan.rows, plan.columns))


def _told(spectra: Sequence[torch.Tensor]) -> dict[str, Any]:
    shares = [(s.square() / s.square().sum().clamp(min=1e-300))[:SHOWN] for s in spectra]
    return {
        "entropies": [round(entropy(s), 4) for s in spectra],
        "spectra": [[float(f"{v:.3g}") for v in share.tolist()] for share in shares],
    }
