"""Distillation: train a compressed model to give again what the original gives.

Source: Hinton et al. 2015, arXiv 1503.02531. Recovery can end worse than it began (PASER reports a collapse on the full
data), so the weights are taken from the best of several measurements on text that is not trained on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.compressors.distances import KLDivergence
from tensorpress.errors import InputError, StepError
from tensorpress.kernels.kernel_layer import kernel_layers
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.kernels.semi_structured_linear import SemiStructuredLinear
from tensorpress.structure import Structure, find_structure, without_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP, FLOOR = 0.05, 0.1
"""The learning rate rises over this share of the budget, and falls to this share of its peak."""
VALIDATION_TOKENS = 8192
"""At most so many tokens of the validation windows are measured each time (at least one window)."""
MICRO_BATCH = 2**25
"""Numbers in the outputs of one backward pass, where a single window does not have more already."""
PATIENCE = 10
"""So many steps in a row without a finite loss end the training."""
NOTHING = "nothing was better than the model that came in, which stays; try more tokens or another rate"


class Distill(Compressor):
    """Train all weights, those of MPO cores and embeddings included, towards the original model's outputs.

    Causal models: KL(teacher || student) at every position, times the square of the temperature. Encoders: mean squared
    error of the last hidden states over the teacher's variance. AdamW without weight decay (the teacher is what holds
    the weights), gradients clipped to norm 1, a short warm-up and a cosine down to a tenth.

    Trains on random windows of `calibration.stream`, which does not contain the validation windows. The loss on those is
    measured at the start, at intervals and at the end, in full precision; the weights of the best measurement are
    returned, so the model never comes back worse than it was on them, and unchanged if nothing helped.

    With `tokens` the result is the same for the same seed on the same kind of machine (which decides the precision) with
    the same number of threads; with `minutes` it is not reproducible. Weights are float32 while they train, whatever
    precision they are stored in; beside them the two moments of Adam, the first and the best weights are in memory.

    Report: one row, `error_before` and `error_after` the validation loss before and after.
    """

    action: ClassVar[str] = "distilled"
    use: Literal["distill"] = "distill"
    tokens: int | None = Field(None, ge=1, description="training tokens")
    minutes: float | None = Field(None, gt=0, description="training time, instead of `tokens`; not reproducible")
    learning_rate: float = Field(
        1e-3, gt=0, description="peak; 1e-3 suits some millions of parameters, 2e-4 those decomposed, 1e-4 a billion"
    )
    batch_tokens: int = Field(4096, ge=1, description="tokens of one step")
    length: int | None = Field(
        None, ge=2, description="tokens of a window; that of the calibration windows if not given"
    )
    temperature: float = Field(1.0, gt=0, description="of both distributions; causal models only")
    validate_every: float = Field(0.1, gt=0, le=1, description="share of the budget between two measurements")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the arithmetic of training; auto is bfloat16 where the machine has instructions for it"
    )

    may_not_follow: ClassVar[Mapping[str, str]] = {
        "gptq": "quantized weights cannot be trained; put it before the quantization"
    }

    @model_validator(mode="after")
    def _one_budget(self) -> Distill:
        if (self.tokens is None) == (self.minutes is None):
            raise ValueError("one of tokens and minutes")
        return self

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            raise InputError(f"{self.use}: quantized weights cannot be trained; put it before the quantization")
        if any(isinstance(module, SemiStructuredLinear) for module in model.modules()):
            raise InputError(f"{self.use}: packed 2:4 weights cannot be trained")
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if self.length is not None and limit is not None and self.length > limit:
            raise InputError(f"{self.use}: length {self.length} is more than the model's {limit} positions")

    def trained(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """What is trained: every floating parameter, a tied one once."""
        return [p for p in model.parameters() if p.is_floating_point()]

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        start = time.monotonic()
        structure = find_structure(model)
        self.check(model, structure)
        training = Training(self, model, structure, calibration)
        parameters = self.trained(model)
        before, after = training.run_stored(parameters)
        size = sum(p.numel() for p in model.parameters())
        row = LayerReport(
            layer="model",
            action=self.action if training.best_step else "unchanged",
            parameters_before=size,
            parameters_after=size,
            bytes_before=2 * size,
            bytes_after=2 * size,
            error_before=before,
            error_after=after,
            seconds=round(time.monotonic() - start, 3),
        )
        summary: dict[str, Any] = {
            "improved": training.best_step > 0,
            "tokens": training.tokens,
            "steps": training.steps,
            "best_step": training.best_step,
            "curve": training.curve,
            "trainable_parameters": sum(p.numel() for p in parameters),
            "skipped": training.skipped,
            "precision": training.precision,
        }
        if not training.best_step:
            summary["note"] = NOTHING
        return model, Report([row], summary)


def schedule(progress: float) -> float:
    """Share of the peak learning rate at a point of the budget, 0 to 1: linear warm-up, then a cosine to `FLOOR`."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.02)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


@dataclass
class Training:
    """One training: what it works on, and what has come of it so far."""

    config: Distill
    model: PreTrainedModel
    structure: Structure
    calibration: Calibration
    steps: int = 0
    tokens: int = 0
    skipped: int = 0
    best: float = math.inf
    best_step: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        calibration, device = self.calibration, self.model.device
        self.length = self.config.length or calibration.windows.shape[1]
        self.text = self.length - calibration.marks.count
        if self.text < 1:
            raise InputError(
                f"distill: length {self.length}; the tokenizer's marks alone are {calibration.marks.count} tokens"
            )
        if len(calibration.stream) < self.text:
            raise InputError(
                f"distill: the calibration text has {len(calibration.stream)} tokens, fewer than one window of {self.length}"
            )
        if len(calibration.validation) == 0:
            raise InputError("distill: the calibration text leaves no window for validation; it needs a longer one")
        self.teacher = calibration.original()
        self.teacher.eval()
        self.batch = max(1, self.config.batch_tokens // self.length)
        causal = self.structure.kind == "causal"
        self.arguments: dict[str, Any] = without_cache(self.model)
        self.width = self.model.config.get_text_config().vocab_size if causal else self.structure.hidden_size
        count = max(1, VALIDATION_TOKENS // calibration.validation.shape[1])
        self.validation = calibration.validation[:count].to(device)
        self.precision = self.config.precision
        if self.precision == "auto":
            self.precision = "bfloat16" if _has_bfloat16(device) else "float32"
        self.variance = 1.0 if causal else self._teacher_variance()

    def run_stored(self, parameters: list[nn.Parameter]) -> tuple[float, float]:
        """Train in float32; the validation losses before and after of the model in its stored precision, which is what counts.

        Where rounding eats the gain, the weights that came in are put back. Raises what `run` does.
        """
        stored = self.calibration.stored
        round_to(self.model.parameters(), stored)
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()} | {stored or torch.float32}
        rounded = dtypes != {torch.float32}
        before = self.validation_loss() if rounded else math.nan
        with masters(self.model, parameters):
            initial = [p.detach().clone() for p in parameters] if rounded else []
            self.run(parameters)
        if not rounded:
            return self.curve[0][1], self.best
        round_to(parameters, stored)
        after = self.validation_loss()
        if not after < before:
            _load(parameters, initial)
            self.best_step, after = 0, before
        return before, after

    def run(self, parameters: list[nn.Parameter]) -> None:
        """Train, and leave the best weights in the model. Raises StepError when the loss stays without a finite value."""
        optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        generator = torch.Generator().manual_seed(self.calibration.seed)
        best_weights = [p.detach().clone() for p in parameters]
        self.best = self.validation_loss()
        self.curve.append((0, self.best))
        clock, next_check, unfinished = time.monotonic(), self.config.validate_every, 0
        while (progress := self._progress(clock)) < 1:
            windows = self._draw(generator)
            middle = progress + (0.5 * windows.numel() / self._budget() if self.config.tokens else 0.0)
            optimizer.param_groups[0]["lr"] = self.config.learning_rate * schedule(middle)
            finite = self._step(optimizer, parameters, windows)
            self.steps += 1
            self.tokens += windows.numel()
            self.skipped += not finite
            unfinished = 0 if finite else unfinished + 1
            if unfinished == PATIENCE:
                _load(parameters, best_weights)
                raise StepError(
                    f"distill: no finite loss in {PATIENCE} steps in a row; try a learning_rate below "
                    f"{self.config.learning_rate:g}"
                )
            progress = self._progress(clock)
            if progress >= min(1.0, next_check - 1e-9):
                every = self.config.validate_every
                next_check = (math.floor(progress / every + 1e-9) + 1) * every
                loss = self.validation_loss()
                self.curve.append((self.tokens, loss))
                if loss < self.best:
                    self.best, self.best_step = loss, self.steps
                    best_weights = [p.detach().clone() for p in parameters]
        _load(parameters, best_weights)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss per token on the validation windows, in the model's own precision."""
        parts = self.validation.split(self._micro(self.validation.shape[1]))
        return sum(self._loss(part).item() for part in parts) / self.validation.numel()

    def _budget(self) -> float:
        """Tokens of whole windows, or seconds."""
        if self.config.tokens is not None:
            return max(1, self.config.tokens // self.length) * self.length
        return 60 * (self.config.minutes or 0)

    def _progress(self, clock: float) -> float:
        spent = self.tokens if self.config.tokens is not None else time.monotonic() - clock
        self.calibration.progress("distill", int(min(spent, self._budget())), max(1, int(self._budget())))
        return spent / self._budget()

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        """Ids of one step's windows [samples, length], from anywhere in the stream; the last step has what is left."""
        count = self.batch
        if self.config.tokens is not None:
            count = min(count, (int(self._budget()) - self.tokens) // self.length)
        stream = self.calibration.stream
        starts = torch.randint(len(stream) - self.text + 1, (count,), generator=generator)
        rows = torch.stack([stream[s : s + self.text] for s in starts.tolist()])
        return self.calibration.marks.around(rows).to(self.model.device)

    def _step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], windows: torch.Tensor) -> bool:
        """One update; False, and none, when the loss or a gradient is not finite."""
        optimizer.zero_grad(set_to_none=True)
        for part in windows.split(self._micro(self.length)):
            with torch.autocast(windows.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                loss = self._loss(part) / windows.numel()
            if not math.isfinite(loss.item()):
                return False
            loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not math.isfinite(norm.item()):
            return False
        optimizer.step()
        return True

    def _micro(self, length: int) -> int:
        return max(1, MICRO_BATCH // (length * self.width))

    def _loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens of the windows."""
        with torch.no_grad():
            teacher = self.teacher(input_ids=windows, **self.arguments)[0].flatten(0, 1)
        student = self.model(input_ids=windows, **self.arguments)[0].flatten(0, 1)
        if self.structure.kind == "causal":
            return KLDivergence.apply(student, teacher, self.config.temperature)
        return (student.float() - teacher.float()).square().mean(-1).sum() / self.variance

    @torch.no_grad()
    def _teacher_variance(self) -> float:
        states = self.teacher(input_ids=self.validation)[0]
        return max(states.double().var(unbiased=False).item(), 1e-12)


@contextmanager
def masters(model: PreTrainedModel, trained: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """All floating parameters in float32, those to be trained with gradients; afterwards dtypes, flags and kernels are as they were.

    Compressed layers are computed by the kernel that has gradients meanwhile. A tied weight is one parameter.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    before = [(p.dtype, p.requires_grad) for p in parameters]
    chosen = {id(p) for p in trained}
    kernels = [(layer, layer.kernel) for layer in kernel_layers(model)]
    was_training = model.training
    model.eval()
    for layer, _ in kernels:
        layer.kernel = layer.trained_by
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield trained
    finally:
        for parameter, (dtype, flag) in zip(parameters, before, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)
            parameter.data = parameter.data.to(dtype)
        for layer, kernel in kernels:
            layer.kernel = kernel
        model.train(was_training)


@torch.no_grad()
def round_to(parameters: Iterable[nn.Parameter], stored: torch.dtype | None) -> None:
    """Round parameters, which keep their dtype, to the precision that they will be stored in; None leaves them."""
    if stored is not None:
        for parameter in parameters:
            if parameter.is_floating_point() and parameter.dtype != stored:
                parameter.copy_(parameter.to(stored))


@torch.no_grad()
def _load(parameters: list[nn.Parameter], weights: list[torch.Tensor]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the machine multiplies in bfloat16 with instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    known = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return device.type == "cpu" and any(supported() for supported in known if supported)
