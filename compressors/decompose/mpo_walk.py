"""MPO decomposition against what layers give, not against what they are: the walk that measures, shares out, fits and replaces."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tensorpress.compressors.base import Calibration, LayerReport
from tensorpress.compressors.calibration import BlockInputs, walk
from tensorpress.compressors.decompose.block_training import train_block
from tensorpress.compressors.decompose.mpo_rows import dense_row, spectra_of
from tensorpress.compressors.decompose.site_plans import WORD, Fitted, best_fit
from tensorpress.compressors.decompose.spending import Curve, curves, scaled_by, spend
from tensorpress.compressors.decompose.weighted_low_rank import damped, weighted_error
from tensorpress.compressors.moments import PairedMoments, output_moments
from tensorpress.errors import InputError
from tensorpress.structure import Block, Structure, linear_shape, linear_weight, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tensorpress.compressors.decompose.mpo import MPO

TRIALS = 7
"""Models that are made and measured to find the size for a perplexity."""


class Walk:
    """The work of one `mpo` step with `metric: inputs` or `loss`."""

    def __init__(
        self, config: MPO, model: PreTrainedModel, structure: Structure, targets: list[str], calibration: Calibration
    ):
        self.config, self.model, self.structure, self.calibration = config, model, structure, calibration
        self.shapes = {path: linear_shape(model.get_submodule(path)) for path in targets}
        self.dense_bytes = sum(WORD * m * n for m, n in self.shapes.values())
        self.outputs: dict[str, torch.Tensor] = {}

    def run(self) -> tuple[list[LayerReport], dict[str, Any]]:
        """Compress the model in place; the rows of the report, and what its summary says besides."""
        config, summary = self.config, dict[str, Any]()
        if config.metric == "loss":
            self.outputs = output_moments(
                self.model,
                self.structure,
                list(self.shapes),
                self.calibration.windows,
                self.calibration.seed,
                self.calibration.progress,
            )
            diagonal = any(moment.ndim == 1 for moment in self.outputs.values())
            summary["gradients"] = "diagonals of second moments" if diagonal else "second moments"
        found = self._curves() if config.way != "uniform" else {}
        if config.perplexity_ratio is not None:
            budget, summary["validation_perplexity_ratio"] = self._budget_for(config.perplexity_ratio, found)
        else:
            budget = config.budget(self.dense_bytes)
        allowances = self._allowances(budget, found)
        rows = self._compress(self.model, allowances, self.calibration.scratch)
        if found:
            summary["expected_loss"] = sum(found[path].at(allowance) for path, allowance in allowances.items())
        if config.way == "measured":
            summary["profile"] = {path: curve.measured for path, curve in found.items()}
            causal = self.structure.kind == "causal"
            summary["profile_unit"] = (
                "nats a token" if causal else "half the squared change of a token's last hidden state"
            )
        names = [row.detail.get("plan", "dense") for row in rows]
        summary["plans"] = {name: names.count(name) for name in dict.fromkeys(names)}
        return rows, summary

    def _curves(self) -> dict[str, Curve]:
        config = self.config
        found = curves(
            self.model,
            self.structure,
            list(self.shapes),
            self.calibration,
            self.outputs,
            pivoted=config.pivots,
            multiple=config.multiple,
            damping=config.damping,
            probes=config.probes if config.way == "measured" else (),
        )
        for path, curve in found.items():  # a bond of 1 of the plans that are tried can cost more than a low rank's
            curve.costs = np.maximum(curve.costs, config.cheapest(*self.shapes[path]))
        return {path: scaled_by(curve, WORD * math.prod(self.shapes[path])) for path, curve in found.items()}

    def _allowances(self, budget: float, found: dict[str, Curve]) -> dict[str, float]:
        """Bytes for each layer."""
        bond = self.config.bond_dimension
        if bond is not None:
            first = {path: self.config.candidates(*shape)[0] for path, shape in self.shapes.items()}
            return {path: float(plan.bytes(bond, self.config.pivots)) for path, plan in first.items()}
        if self.config.way == "uniform":
            share = budget / self.dense_bytes
            return {path: share * WORD * math.prod(shape) for path, shape in self.shapes.items()}
        try:
            return spend(found, budget)
        except ValueError:
            least = sum(float(curve.costs.min()) for curve in found.values())
            share = math.ceil(1e4 * least / self.dense_bytes) / 1e4
            raise InputError(f"mpo: the budget cannot be met; the smallest is keep {share:g}") from None

    def _budget_for(self, ratio: float, found: dict[str, Curve]) -> tuple[float, float]:
        """The smallest budget, to a hundredth, whose model keeps the ratio on the validation windows; and that ratio.

        Raises InputError where none does.
        """
        original = self._perplexity(self.calibration.original())
        low, high, best = 0.0, 1.0, (math.inf, math.inf)
        share, closest = 0.6, math.inf
        for _ in range(TRIALS):
            try:
                allowances = self._allowances(share * self.dense_bytes, found)
            except InputError:  # below what can be met
                low, share = share, (share + high) / 2
                continue
            trial = copy.deepcopy(self.model)
            self._compress(trial, allowances, None, told=False)
            measured = self._perplexity(trial) / original
            del trial
            closest = min(closest, measured)
            if measured <= ratio:
                high, best = share, (share, measured)
            else:
                low = share
            if high - low <= 0.01:
                break
            share = (low + high) / 2
        if math.isinf(best[0]):
            raise InputError(
                f"perplexity_ratio: {ratio:g} was not reached; {closest:.4g} came nearest, at keep {low:.2g}"
            )
        return best[0] * self.dense_bytes, best[1]

    @torch.no_grad()
    def _perplexity(self, model: PreTrainedModel) -> float:
        losses = []
        for window in self.calibration.validation.to(model.device):
            logits = model(input_ids=window[None], use_cache=False)[0][0, :-1].float()
            losses.append(nn.functional.cross_entropy(logits, window[1:]).double())
        return math.exp(min(700.0, float(torch.stack(losses).mean())))

    def _compress(
        self, model: PreTrainedModel, allowances: dict[str, float], scratch: Any, *, told: bool = True
    ) -> list[LayerReport]:
        """Compress a model in place; the rows have spectra where that is `told`."""

        def visit(block: Block, inputs: BlockInputs) -> list[LayerReport]:
            rows = []
            for group in block.linear_groups:
                paths = [path for path in group if path in allowances]
                if not paths:
                    continue
                width = linear_shape(model.get_submodule(paths[0]))[1]
                moments = PairedMoments(width, model.device)
                if self.config.compensation:
                    inputs.observe_both(paths[0].removeprefix(block.path + "."), moments.add)
                else:
                    inputs.observe(model.get_submodule(paths[0]), moments.own.add)
                rows += [self._replace(model, path, allowances[path], moments, told) for path in paths]
            if self.config.train_steps and rows:
                seed = self.calibration.seed + block.index
                training = train_block(inputs, self.config.train_steps, self.config.learning_rate, seed)
                rows[0].detail["block_training"] = asdict(training)
            return rows

        return walk(
            model,
            self.structure,
            self.calibration.windows,
            visit,
            what="mpo",
            progress=self.calibration.progress,
            scratch=scratch,
            with_original=self.config.compensation > 0 or self.config.train_steps > 0,
            finished=self.config.embeddings is None,
        )

    def _replace(
        self, model: PreTrainedModel, path: str, allowance: float, moments: PairedMoments, told: bool
    ) -> LayerReport:
        start = time.monotonic()
        config, layer = self.config, model.get_submodule(path)
        inputs, outputs = damped(moments.own.matrix, config.damping), self.outputs.get(path)
        weight = linear_weight(layer).detach()
        if config.compensation:
            weight = moments.compensated(weight, config.compensation)
        found, losses = best_fit(
            config.candidates(*self.shapes[path]),
            allowance,
            weight,
            getattr(layer, "bias", None),
            inputs,
            outputs,
            pivoted=config.pivots,
            sweeps=config.sweeps,
            damping=config.damping,
            multiple=1 if config.bond_dimension is not None else config.multiple,
            most=config.bond_dimension,
        )
        row = dense_row(path, *self.shapes[path])
        if found is not None:
            set_module(model, path, found.layer)
            self._report(row, found, losses, weight, inputs)
        if told:
            plan = config.candidates(*self.shapes[path])[0] if found is None else found.plan
            row.detail |= spectra_of(linear_weight(layer).detach(), plan)
        row.seconds = round(time.monotonic() - start, 3)
        return row

    def _report(
        self, row: LayerReport, found: Fitted, losses: dict[str, float], weight: torch.Tensor, inputs: torch.Tensor
    ) -> None:
        row.action, row.bytes_after = f"mpo {found.plan.name}", found.bytes
        row.parameters_after = sum(p.numel() for name, p in found.layer.named_parameters() if name != "bias")
        stored = found.layer.dense_weight().detach()  # type: ignore[operator]
        row.error_after = math.sqrt(
            weighted_error(stored - weight, inputs) / max(weighted_error(weight, inputs), 1e-300)
        )
        row.detail |= {
            "plan": found.plan.name,
            "out_factors": found.plan.rows,
            "in_factors": found.plan.columns,
            "bonds": [core.shape[3] for core in found.cores[:-1]],
            "losses": losses,
        }
