"""Over-parameterised fine-tuning: train a few matrices as matrix product operators of full bonds, then contract them back.

Source: OPF, Gao et al. 2023, "Small Pre-trained Language Models Can be Fine-tuned as Large Models via Over-Parameterization", ACL 2023. A
matrix in the form of an MPO with nothing cut off is the same matrix with more numbers to train; afterwards it is one matrix again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import nn
from transformers.pytorch_utils import Conv1D

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Progress, Report, no_progress
from tensorpress.compressors.decompose.site_plans import WORD, check_sites, most_sites
from tensorpress.compressors.decompose.tensor_train import canonical, decompose, factors, full_bonds, parameters
from tensorpress.compressors.moments import BATCH_TOKENS
from tensorpress.compressors.recover.distill import NOTHING, Distill, Training, round_to
from tensorpress.errors import InputError, StepError
from tensorpress.kernels.mpo_linear import MPOLinear, mpo_to_matrix
from tensorpress.structure import DENSE, Structure, find_structure, linear_shape, linear_weight, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPOSSIBLE = -1e4
"""Logit of a token that is not the next one: its probability is zero in every precision."""


class Overparameterize(Compressor):
    """Train the whole model, `matrices` of its layers over-parameterised; it comes back with the modules and parameters that it had.

    Those are taken whose weights have the largest mean squared gradient of the language-model loss on the calibration windows. Each becomes
    an MPO of full bonds, whose product is the weight up to rounding, and is trained as such (`Distill` has the schedule, and the choice of
    the best weights on the validation windows). Works in float32 whatever precision the model is stored in; the contraction is in float64.
    Where training made nothing better, the weights that came in are put back bit for bit.

    Report: a row for each of the matrices; `detail` has its mean squared gradient, its MPO, the numbers that were trained in its place
    and by how much it changed (relative Frobenius norm). `summary` has the validation loss before and after.
    """

    use: Literal["overparameterize"] = "overparameterize"
    matrices: int = Field(6, ge=1, description="how many layers are over-parameterised")
    sites: int = Field(5, ge=2, le=9, description="number of cores of each")
    objective: Literal["distill", "next_token"] = Field(
        "distill", description="what is learnt: the original model's outputs, or the next token of the calibration text"
    )
    tokens: int = Field(ge=1, description="training tokens")
    learning_rate: float = Field(
        2e-4, gt=0, description="peak; less than plain weights take, whose numbers move one by one"
    )
    batch_tokens: int = Field(4096, ge=1, description="tokens of one step")
    validate_every: float = Field(0.1, gt=0, le=1, description="share of the budget between two measurements")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the arithmetic of training")

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    may_not_follow: ClassVar[Mapping[str, str]] = {
        "gptq": "quantized weights cannot be trained; put it before the quantization"
    }

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        if structure.kind != "causal":
            raise InputError("overparameterize: the model predicts no tokens, so there is no loss to choose layers by")
        self._training().check(model, structure)
        dense = dense_layers(model, structure)
        if len(dense) < self.matrices:
            raise InputError(f"matrices: {self.matrices}; the model has {len(dense)} dense layers in its blocks")
        path = min(dense, key=lambda name: most_sites(*linear_shape(dense[name])))
        check_sites(self.sites, path, *linear_shape(dense[path]))

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        structure = find_structure(model)
        self.check(model, structure)
        training, lessons = self._training(), self._lessons(calibration)
        stored = Training(training, model, structure, lessons)  # what counts is the model in its stored precision
        before = stored.validation_loss()
        precisions = {name: parameter.dtype for name, parameter in model.named_parameters()}
        entered = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        gradients, expanded = dict[str, float](), []
        try:
            gradients = squared_gradients(model, structure, calibration.windows, calibration.progress)
            chosen = sorted(gradients, key=lambda path: (-gradients[path], path))[: self.matrices]
            for path in sorted(chosen, key=structure.linear_paths.index):
                expanded.append(expand(model, path, self.sites))
            model, trained = training.compress(model, lessons)
        finally:
            rows = [_contracted(model, one, gradients[one.path]) for one in expanded]
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(precisions[name])
        round_to(model.parameters(), calibration.stored)
        after = stored.validation_loss()
        learnt: dict[str, Any] = {"improved": trained.summary["improved"] and after < before}
        if not learnt["improved"]:
            _put_back(model, entered, rows)
            after, learnt = before, learnt | {"best_step": 0, "note": NOTHING}
        summary: dict[str, Any] = {
            "matrices": [row.layer for row in rows],
            "loss_before": before,
            "loss_after": after,
            **trained.summary,
            **learnt,
        }
        return model, Report(rows, summary)

    def _training(self) -> Distill:
        return Distill(
            tokens=self.tokens,
            learning_rate=self.learning_rate,
            batch_tokens=self.batch_tokens,
            validate_every=self.validate_every,
            precision=self.precision,
        )

    def _lessons(self, calibration: Calibration) -> Calibration:
        """The calibration with the teacher that the objective asks for; cores are not what is stored."""
        lessons = replace(calibration, stored=None)
        if self.objective == "distill":
            return lessons
        return replace(lessons, original=lambda: cast("PreTrainedModel", NextToken(calibration.original())))


class NextToken(nn.Module):
    """A teacher that gives the next token of the text all probability: the divergence from it is the language-model loss.

    The last position of a window, whose next token is not in it, keeps to the original model.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.original = original

    def forward(self, input_ids: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor]:
        """Logits [batch, length, vocabulary] for ids [batch, length]."""
        logits = self.original(input_ids=input_ids, **arguments)[0].clone()
        logits[:, :-1] = IMPOSSIBLE
        logits[:, :-1].scatter_(-1, input_ids[:, 1:, None], 0.0)
        return (logits,)


def dense_layers(model: nn.Module, structure: Structure) -> dict[str, nn.Module]:
    """The dense linear layers of the blocks by their paths."""
    found = {path: model.get_submodule(path) for path in structure.linear_paths}
    return {path: layer for path, layer in found.items() if isinstance(layer, DENSE)}


def squared_gradients(
    model: PreTrainedModel, structure: Structure, windows: torch.Tensor, progress: Progress = no_progress
) -> dict[str, float]:
    """Mean square of the gradient of the mean next-token loss, over the weights of each dense layer and over batches of the windows.

    `windows`: int64 [samples, length]. Raises StepError where it is not finite.
    """
    weights = {path: cast("nn.Parameter", layer.weight) for path, layer in dense_layers(model, structure).items()}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    sums = dict.fromkeys(weights, 0.0)
    batches = windows.to(model.device).split(max(1, BATCH_TOKENS // windows.shape[1]))
    try:
        for done, batch in enumerate(batches):
            progress("gradients", done, len(batches))
            logits = model(input_ids=batch, use_cache=False)[0][:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten())
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for path, gradient in zip(weights, found, strict=True):
                sums[path] += 0.0 if gradient is None else float(gradient.double().square().mean())
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    progress("gradients", len(batches), len(batches))
    if not all(value < float("inf") for value in sums.values()):
        raise StepError("overparameterize: the gradients of the model's loss are not finite")
    return {path: value / len(batches) for path, value in sums.items()}


@dataclass(frozen=True)
class Expanded:
    """A dense layer that an MPO stands for while it is trained."""

    path: str
    plain: nn.Module
    numbers: int
    """Numbers of the cores."""


def expand(model: nn.Module, path: str, sites: int) -> Expanded:
    """Put an MPO of full bonds for the dense layer at `path`; the norm of the weight lies in the middle core."""
    plain = model.get_submodule(path)
    weight = linear_weight(plain).detach()
    rows, columns = (factors(size, sites) for size in weight.shape)
    bonds = full_bonds(rows, columns)
    cores = canonical(decompose(weight, rows, columns, bonds), sites // 2)
    bias = cast("torch.Tensor | None", getattr(plain, "bias", None))
    layer = MPOLinear.from_cores([core.to(weight) for core in cores], bias)
    set_module(model, path, layer)
    return Expanded(path, plain, parameters(rows, columns, layer.bonds))


@torch.no_grad()
def contract(model: nn.Module, expanded: Expanded) -> None:
    """Put the dense layer back, with the weight and bias that its MPO has now."""
    layer, plain = model.get_submodule(expanded.path), expanded.plain
    assert isinstance(layer, MPOLinear) and isinstance(plain, DENSE)
    weight = mpo_to_matrix([core.double() for core in layer.cores])
    plain.weight.copy_(weight.T if isinstance(plain, Conv1D) else weight)
    if layer.bias is not None:
        plain.bias.copy_(layer.bias)
    set_module(model, expanded.path, plain)


def _contracted(model: nn.Module, expanded: Expanded, gradient: float) -> LayerReport:
    """Contract a layer, and its row of the report."""
    start = time.monotonic()
    layer = model.get_submodule(expanded.path)
    assert isinstance(layer, MPOLinear)
    before = linear_weight(expanded.plain).detach().double()
    contract(model, expanded)
    after = linear_weight(expanded.plain).detach().double()
    count = before.numel()
    row = LayerReport(expanded.path, "overparameterized", count, count, WORD * count, WORD * count)
    row.detail = {
        "shape": tuple(before.shape),
        "squared_gradient": gradient,
        "out_factors": layer.out_factors,
        "in_factors": layer.in_factors,
        "bonds": layer.bonds,
        "trained_numbers": expanded.numbers,
        "change": float((after - before).norm() / before.norm().clamp(min=1e-300)),
    }
    row.seconds = round(time.monotonic() - start, 3)
    return row


@torch.no_grad()
def _put_back(model: nn.Module, weights: Mapping[str, torch.Tensor], rows: list[LayerReport]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    for row in rows:
        row.action = "unchanged"
        row.detail["change"] = 0.0
