"""Second moments of what goes into linear layers and of the gradients that come to their outputs: the metrics of the methods that see data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensorpress.compressors.base import Progress, no_progress
from tensorpress.errors import StepError
from tensorpress.loading import free_bytes
from tensorpress.structure import Structure, linear_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 2048
"""Tokens of one forward and backward pass."""
STRAY_DAMPING = 1e-2
"""Share of the mean diagonal of the inputs' second moment that is added where it is inverted."""


class SecondMoment:
    """scale / N sum x x^T over all vectors x [K] seen, in float32; a running mean. `diagonal`: only its diagonal, [K]."""

    def __init__(
        self, features: int, device: torch.device | str = "cpu", scale: float = 1.0, *, diagonal: bool = False
    ):
        self.matrix = torch.zeros(features if diagonal else (features, features), device=device)
        self.scale, self.diagonal, self.vectors = scale, diagonal, 0

    def add(self, x: torch.Tensor) -> None:
        """Add vectors [count, K]."""
        self.vectors += len(x)
        x = x.float()
        seen = x.square().sum(0) if self.diagonal else x.T @ x
        self.matrix += (self.scale * seen - len(x) * self.matrix) / self.vectors


class PairedMoments:
    """The second moment H of a layer's inputs x, and how they stray from those of the original model: E[(x0 - x) x^T]."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.own = SecondMoment(features, device)
        self.strayed = torch.zeros((), device=device)  # a matrix once there is an original

    def add(self, x: torch.Tensor, original: torch.Tensor) -> None:
        """Add inputs and the original's inputs [tokens, K]."""
        self.own.add(x)
        x = x.float()
        if not self.strayed.ndim:
            self.strayed = torch.zeros_like(self.own.matrix)
        self.strayed += ((original.float() - x).T @ x - len(x) * self.strayed) / self.own.vectors

    def compensated(self, weight: torch.Tensor, strength: float) -> torch.Tensor:
        """The weight [m, K] whose output on the inputs as they are is nearest to the original's on its own: W + W E[(x0 - x) x^T] H^-1.

        The change is taken times `strength` (GPTAQ, Li et al. 2025, arXiv 2504.02692, for quantization). H is damped by `STRAY_DAMPING`.
        """
        h = self.own.matrix.double()
        h.diagonal().add_(STRAY_DAMPING * h.diagonal().mean().clamp(min=1e-30))
        change = torch.linalg.solve(h, (weight.double() @ self.strayed.double()).T).T
        return (weight.double() + strength * change).to(weight.dtype)


def output_moments(
    model: PreTrainedModel,
    structure: Structure,
    paths: Sequence[str],
    windows: torch.Tensor,
    seed: int,
    progress: Progress = no_progress,
) -> dict[str, torch.Tensor]:
    """G [m, m] of each layer: the second moment of the gradient of a token's negative log-likelihood by the layer's outputs.

    The labels are drawn from the model's own distribution, so that together with the inputs' second moment H this is the
    Fisher information of the weights (K-FAC, Martens and Grosse 2015, arXiv 1503.05671): a small change D of the weight costs
    0.5 tr(G D H D^T) nats a token. Encoders: the same for unit Gaussian noise on the last hidden states, so that the change costs half of
    their squared change. Diagonals [m] where all matrices together would fill more than a quarter of the free memory.

    Raises StepError where outputs or gradients are not finite.
    """
    layers = {path: model.get_submodule(path) for path in paths}
    widths = {path: linear_shape(layer)[0] for path, layer in layers.items()}
    diagonal = 4 * sum(width * width for width in widths.values()) > free_bytes(model.device) / 4
    found = {path: SecondMoment(width, model.device, diagonal=diagonal) for path, width in widths.items()}
    generator = torch.Generator(model.device).manual_seed(seed)
    batches = windows.to(model.device).split(max(1, BATCH_TOKENS // windows.shape[1]))
    with _gradients_of_outputs(model, structure, {layers[path]: found[path] for path in paths}):
        for done, batch in enumerate(batches):
            progress("gradients", done, len(batches))
            drawn_loss(model, structure, batch, generator)[0].backward()
    progress("gradients", len(batches), len(batches))
    if not all(bool(torch.isfinite(moment.matrix).all()) for moment in found.values()):
        raise StepError("the gradients of the model's loss are not finite; try metric: inputs")
    return {path: moment.matrix for path, moment in found.items()}


def drawn_loss(
    model: PreTrainedModel, structure: Structure, batch: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum over the tokens of the negative log-likelihood of labels drawn from the model, its probabilities [tokens, V], and the labels [tokens].

    Encoders: the same for unit Gaussian noise on the last hidden states, up to a constant; no probabilities, no labels. Raises StepError for
    outputs that are not finite.
    """
    if structure.kind != "causal":
        states = model(input_ids=batch)[0].float()
        noise = torch.randn(states.shape, generator=generator, device=states.device)
        return (states * noise).sum(), states.new_zeros(0), states.new_zeros(0)
    logits = model(input_ids=batch, use_cache=False)[0].flatten(0, 1).float()
    shares = logits.detach().softmax(-1)
    if not bool(torch.isfinite(shares).all()):
        raise StepError("the model's outputs are not finite; nothing can be drawn from them")
    drawn = shares.multinomial(1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(logits, drawn, reduction="sum"), shares, drawn


@contextmanager
def _gradients_of_outputs(
    model: PreTrainedModel, structure: Structure, moments: dict[nn.Module, SecondMoment]
) -> Iterator[None]:
    """Let every backward pass add the gradients that reach the outputs of these layers; no parameter gets one."""
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        moment = moments[module]
        output.register_hook(lambda gradient: moment.add(gradient.reshape(-1, gradient.shape[-1])))

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    first = model.get_submodule(structure.blocks[0].path)
    handles: Iterable[Any] = [
        first.register_forward_pre_hook(start, with_kwargs=True),
        *(layer.register_forward_hook(watch) for layer in moments),
    ]
    for parameter, _ in parameters:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in parameters:
            parameter.requires_grad_(flag)
