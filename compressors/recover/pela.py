"""Low-rank layers that learn the features of the model that they came from.

Source: PELA, Guo et al., CVPR 2024, arXiv 2310.10700 ("Learning parameter-efficient models with low-rank approximation").
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import nn

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.compressors.decompose.mpo_rows import dense_row
from tensorpress.compressors.decompose.site_plans import WORD
from tensorpress.compressors.decompose.targets import matching, refuse_quantized
from tensorpress.compressors.decompose.weighted_low_rank import low_rank_layer, weighted_svd
from tensorpress.compressors.recover.distill import NOTHING, Distill, Training, round_to
from tensorpress.errors import InputError
from tensorpress.kernels.low_rank_linear import LowRankLinear, low_rank_numbers
from tensorpress.structure import Structure, find_structure, is_whole, linear_shape, linear_weight, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pela_rank(outputs: int, inputs: int, c: float) -> int:
    """The rank at which two factors hold 1 / c of a matrix's numbers: the whole part of m n / (c (m + n))."""
    return int(outputs * inputs / (c * (outputs + inputs)))


class PELA(Compressor):
    """Replace linear layers by their truncated SVD, the root of the singular values on both sides, and train the model.

    The loss is that of `Distill` plus `feature_weight` times the mean squared error of what the blocks give, over the variance of what they give in
    the original; mean over blocks. With `bound`, no number of a factor moves farther than that from where the SVD put it: after every step it is
    brought back. That holds in the precision of training; storing rounds each number as it does any other.

    Report: a row for each layer, `error_before` the relative Frobenius error of the truncated SVD, `error_after` that after training, which may
    well be larger; `detail` has the rank and the largest change of a factor. `summary` has the validation loss before and after.
    """

    use: Literal["pela"] = "pela"
    c: float = Field(2.0, gt=1, description="one part in c of the numbers of a layer is kept")
    layers: tuple[str, ...] = Field(("*",), description="which layers: patterns on their paths, such as *mlp*")
    tokens: int = Field(20_000, ge=0, description="training tokens; 0 for the decomposition alone")
    learning_rate: float = Field(1e-3, gt=0, description="peak")
    batch_tokens: int = Field(4096, ge=1, description="tokens of one step")
    feature_weight: float = Field(1.0, ge=0, description="of the blocks' outputs, against the model's")
    bound: float | None = Field(None, gt=0, description="largest change of any number of the factors")
    validate_every: float = Field(0.1, gt=0, le=1, description="share of the budget between two measurements")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the arithmetic of training")

    may_not_follow: ClassVar[Mapping[str, str]] = {
        "gptq": "its layers are quantized; decompose first, then quantize the factors",
    }

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        refuse_quantized(self.use, model, matching(structure, self.layers))
        targets = self._targets(model, structure)
        if not targets:
            known = ", ".join(structure.blocks[0].linear_paths[:3])
            raise InputError(f"layers: {', '.join(self.layers)} matches no dense layer; the blocks have {known}, ...")
        for path in targets:
            outputs, inputs = linear_shape(model.get_submodule(path))
            if pela_rank(outputs, inputs, self.c) < 1:
                raise InputError(f"c: {self.c:g} leaves no rank for {path} of {outputs} x {inputs}")
        if self.tokens:
            self._training().check(model, structure)

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        structure = find_structure(model)
        self.check(model, structure)
        targets = self._targets(model, structure)
        kept = targets if self.tokens else ()  # what the trained factors are compared with
        weights = {path: linear_weight(model.get_submodule(path)).detach() for path in kept}
        rows = []
        for done, path in enumerate(targets):
            calibration.progress("pela", done, len(targets))
            rows.append(self._factorize(model, path, calibration.stored))
        factors = [cast("LowRankLinear", model.get_submodule(path)) for path in targets]
        entered = [[p.detach().clone() for p in (layer.inner.weight, layer.outer.weight)] for layer in factors]
        summary: dict[str, Any] = {
            "kept": sum(row.parameters_after for row in rows) / sum(row.parameters_before for row in rows),
            "layers": len(rows),
        }
        if self.tokens:
            summary |= self._train(model, structure, calibration, factors)
        for row, layer, before in zip(rows, factors, entered, strict=True):
            weight = weights.pop(row.layer, None)
            row.error_after = row.error_before
            if weight is not None:
                row.error_after = _relative_error(layer.dense_weight().detach(), weight)
            moved = zip((layer.inner.weight, layer.outer.weight), before, strict=True)
            row.detail["largest_change"] = max(float((now.detach() - then).abs().max()) for now, then in moved)
        return model, Report(rows, summary)

    def _targets(self, model: PreTrainedModel, structure: Structure) -> list[str]:
        return [path for path in matching(structure, self.layers) if is_whole(model, path)]

    def _factorize(self, model: PreTrainedModel, path: str, stored: torch.dtype | None) -> LayerReport:
        start = time.monotonic()
        layer = model.get_submodule(path)
        weight = linear_weight(layer).detach()
        outputs, inputs = weight.shape
        rank = pela_rank(outputs, inputs, self.c)
        svd = weighted_svd(weight)
        bias = cast("torch.Tensor | None", getattr(layer, "bias", None))
        found = low_rank_layer(svd.left[:, :rank], svd.right[:rank], bias, weight.dtype, pivoted=False)
        round_to(found.parameters(), stored)
        set_module(model, path, found)
        row = dense_row(path, outputs, inputs)
        row.action, row.parameters_after = "low rank", low_rank_numbers(outputs, inputs, rank, pivoted=False)
        row.bytes_after = WORD * row.parameters_after
        row.error_before = _relative_error(found.dense_weight().detach(), weight)
        row.detail["rank"] = rank
        row.seconds = round(time.monotonic() - start, 3)
        return row

    def _training(self) -> Distill:
        return Distill(
            tokens=self.tokens,
            learning_rate=self.learning_rate,
            batch_tokens=self.batch_tokens,
            validate_every=self.validate_every,
            precision=self.precision,
        )

    def _train(
        self, model: PreTrainedModel, structure: Structure, calibration: Calibration, factors: list[LowRankLinear]
    ) -> dict[str, Any]:
        config = self._training()
        training = _FeatureTraining(
            config, model, structure, calibration, feature_weight=self.feature_weight, bound=self.bound, factors=factors
        )
        before, after = training.run_stored(config.trained(model))
        found: dict[str, Any] = {
            "improved": training.best_step > 0,
            "loss_before": before,
            "loss_after": after,
            "tokens": training.tokens,
            "steps": training.steps,
            "best_step": training.best_step,
            "curve": training.curve,
            "skipped": training.skipped,
            "precision": training.precision,
        }
        if not training.best_step:
            found["note"] = NOTHING.replace("the model that came in", "the truncated SVD")
        return found


@dataclass
class _FeatureTraining(Training):
    """Distillation with the outputs of the blocks besides those of the model, and factors that stay near where they were."""

    feature_weight: float = 1.0
    bound: float | None = None
    factors: list[LowRankLinear] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.paths = [block.path for block in self.structure.blocks]
        known = dict(self.teacher.named_modules())
        if not all(path in known for path in self.paths):
            raise InputError("pela: the model has other blocks than the original, so their outputs cannot be compared")
        self.limits: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.variances = self._variances()

    @torch.no_grad()
    def _variances(self) -> list[float]:
        """Of each block's outputs in the original model, on the validation windows, one after the other."""
        moments = torch.zeros(len(self.paths), 3, dtype=torch.float64)  # numbers, their sum, their squares'
        for window in self.validation:
            with _outputs_of(self.teacher, self.paths) as taught:
                self.teacher(input_ids=window[None], **self.arguments)
            for row, states in zip(moments, taught, strict=True):
                values = states.double()
                row += torch.tensor([values.numel(), float(values.sum()), float(values.square().sum())])
        count, total, squares = moments.unbind(1)
        return [max(value, 1e-12) for value in (squares / count - (total / count).square()).tolist()]

    def run(self, parameters: list[nn.Parameter]) -> None:
        if self.bound is not None:
            held = [p for layer in self.factors for p in (layer.inner.weight, layer.outer.weight)]
            self.limits = [(p, p.detach() - self.bound, p.detach() + self.bound) for p in held]
        super().run(parameters)

    def _step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], windows: torch.Tensor) -> bool:
        stepped = super()._step(optimizer, parameters, windows)
        with torch.no_grad():
            for parameter, low, high in self.limits:
                parameter.clamp_(low, high)
        return stepped

    def _loss(self, windows: torch.Tensor) -> torch.Tensor:
        with _outputs_of(self.teacher, self.paths) as taught, _outputs_of(self.model, self.paths) as shown:
            total = super()._loss(windows)
        for own, original, variance in zip(shown, taught, self.variances, strict=True):
            error = (own.float() - original.float()).square().mean(-1).sum() / variance
            total = total + self.feature_weight / len(shown) * error
        return total


@contextmanager
def _outputs_of(model: nn.Module, paths: list[str]) -> Iterator[list[torch.Tensor]]:
    """What the blocks at these paths give in a forward pass [batch, length, width], in their order."""
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.get_submodule(path).register_forward_hook(hook) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _relative_error(found: torch.Tensor, weight: torch.Tensor) -> float:
    w = weight.double()
    return float((found.double() - w).norm() / w.norm().clamp(min=1e-300))
