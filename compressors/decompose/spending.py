"""What each layer of a model is allowed to cost: bytes for each, from one budget for all and from what its compression is expected to lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from tensorpress.compressors.base import Calibration, LayerReport
from tensorpress.compressors.calibration import BlockInputs, walk
from tensorpress.compressors.decompose.allocation import Menu, allocate
from tensorpress.compressors.decompose.site_plans import WORD, SitePlan
from tensorpress.compressors.decompose.weighted_low_rank import WeightedSVD, weighted_svd
from tensorpress.compressors.moments import SecondMoment
from tensorpress.structure import Block, Structure, linear_shape, linear_weight, without_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 2048
"""Tokens that a loss is measured on for each layer and share."""


@dataclass
class Curve:
    """What one layer loses at each bond of its low-rank plan, and what that costs in bytes; the last choice is the layer as it is.

    `losses` [k + 1] and `costs` [k + 1]: nats a token by the Fisher information (`metric: loss`), or the squared relative error of the
    output (`metric: inputs`).
    """

    bonds: list[int]
    costs: np.ndarray
    losses: np.ndarray
    measured: dict[float, float] = field(default_factory=dict)
    """Share kept -> loss that was measured with this layer alone compressed."""

    def at(self, allowance: float) -> float:
        """The expected loss within so many bytes."""
        fits = self.losses[self.costs <= allowance]
        return float(fits.min()) if len(fits) else float(self.losses.max())


def curve_of(svd: WeightedSVD, in_nats: bool, *, pivoted: bool, multiple: int) -> Curve:
    """The low-rank curve of a weight from its decomposition, at bonds that are multiples of `multiple`, and powers of two below it."""
    m, n = len(svd.left), svd.right.shape[1]
    losses = 0.5 * svd.losses if in_nats else svd.losses / svd.losses[0].clamp(min=1e-300)
    plan = SitePlan("low_rank", (m, 1), (1, n))
    steps = [*(2**k for k in range(31) if 2**k < multiple), *range(multiple, min(m, n + 1), multiple)]
    bonds = [bond for bond in steps if bond < min(m, n + 1) and plan.bytes(bond, pivoted) < WORD * m * n]
    bonds = bonds or [1]
    costs = [plan.bytes(bond, pivoted) for bond in bonds] + [WORD * m * n]
    return Curve(bonds, np.array(costs, float), np.array([*(float(losses[bond]) for bond in bonds), 0.0]))


def curves(
    model: PreTrainedModel,
    structure: Structure,
    targets: Sequence[str],
    calibration: Calibration,
    outputs: Mapping[str, torch.Tensor],
    *,
    pivoted: bool,
    multiple: int,
    damping: float,
    probes: Sequence[float] = (),
) -> dict[str, Curve]:
    """The curve of every layer, in one walk through the model as it is.

    `probes`: shares of the bytes at which the loss of the whole model is measured too, with this layer alone compressed (CompactifAI's
    sensitivity profile).
    """
    wanted, found = set(targets), {}
    probe = Probe(model, structure, calibration.validation) if probes else None

    def visit(block: Block, inputs: BlockInputs) -> list[LayerReport]:
        for group in block.linear_groups:
            paths = [path for path in group if path in wanted]
            if not paths:
                continue
            first = model.get_submodule(paths[0])
            moment = SecondMoment(linear_shape(first)[1], linear_weight(first).device)
            inputs.observe(first, moment.add)
            for path in paths:
                weight = linear_weight(model.get_submodule(path)).detach()
                svd = weighted_svd(weight, moment.matrix, outputs.get(path), damping)
                curve = found[path] = curve_of(svd, path in outputs, pivoted=pivoted, multiple=multiple)
                for share in probes:
                    assert probe is not None
                    fits = np.flatnonzero(curve.costs[:-1] <= share * WORD * weight.numel())
                    bond = curve.bonds[int(fits[-1]) if len(fits) else 0]
                    curve.measured[share] = probe.loss(path, svd.left[:, :bond] @ svd.right[:bond])
        return []

    walk(model, structure, calibration.windows, visit, what="sensitivity", progress=calibration.progress)
    return {path: found[path] for path in targets}


class Probe:
    """What the model loses when one weight is replaced by another: nats a token on windows that are not calibrated on.

    KL(model || changed model); for encoders half the squared change of the last hidden state of a token.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, windows: torch.Tensor):
        self.model, self.causal = model, structure.kind == "causal"
        self.windows = windows[: max(1, PROBE_TOKENS // windows.shape[1])].to(model.device)
        self.before = self._outputs()

    @torch.no_grad()
    def loss(self, path: str, weight: torch.Tensor) -> float:
        """The loss with `weight` [m, n] at `path`; the model is as it was afterwards."""
        layer = self.model.get_submodule(path)
        kept = linear_weight(layer).detach().clone()
        linear_weight(layer).copy_(weight)
        try:
            after = self._outputs()
        finally:
            linear_weight(layer).copy_(kept)
        if not self.causal:
            return float(0.5 * (after - self.before).double().square().sum(-1).mean())
        return float((self.before.exp() * (self.before - after)).sum(-1).double().mean().clamp(min=0))

    @torch.no_grad()
    def _outputs(self) -> torch.Tensor:
        found = self.model(input_ids=self.windows, **without_cache(self.model))[0].flatten(0, 1).float()
        return found.log_softmax(-1) if self.causal else found


def spend(found: Mapping[str, Curve], budget: float) -> dict[str, float]:
    """Bytes for each layer: of all ways to stay within the budget, one with the smallest expected loss. Raises ValueError as `allocate`."""
    menus = [Menu(curve.costs, curve.losses) for curve in found.values()]
    chosen = allocate(menus, budget)
    return {path: float(curve.costs[choice]) for (path, curve), choice in zip(found.items(), chosen, strict=True)}


def scaled_by(curve: Curve, dense_bytes: float) -> Curve:
    """The curve through what was measured: the expected one times (measured / expected), interpolated over the share kept.

    Outside of what was measured the nearest factor holds. A loss that was measured as nothing counts as a thousandth of what was expected.
    """
    if not curve.measured:
        return curve
    shares = np.array(sorted(curve.measured))
    expected = np.array([curve.at(share * dense_bytes) for share in shares])
    measured = np.array([curve.measured[share] for share in shares])
    floor = np.maximum(expected, 1e-12)
    factors = np.log(np.maximum(measured, 1e-3 * floor) / floor)
    losses = curve.losses * np.exp(np.interp(curve.costs / dense_bytes, shares, factors))
    return Curve(curve.bonds, curve.costs, np.maximum.accumulate(losses[::-1])[::-1], curve.measured)
