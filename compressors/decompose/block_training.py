"""Training of one block after its layers were decomposed, towards the output that the original block has.

Source: the reconstruction of blocks in BRECQ, Li et al. 2021, arXiv 2102.05426, there for quantization; here held-out windows decide what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tensorpress.compressors.calibration import BlockInputs
from tensorpress.kernels.kernel_layer import kernel_layers
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear

HELD_OUT = 8
"""One of so many windows is measured and not trained on, at least one."""
CHECKS = 10
"""Measurements on the way, the last at the end."""
WARM_UP = 0.05
"""The learning rate rises over this share of the steps."""


@dataclass(frozen=True)
class BlockTraining:
    """What a training did to a block. Losses on the held-out windows: mean squared error of the block's output over the mean square of the original's."""

    loss_before: float
    loss_after: float
    steps: int
    """After so many steps the weights that the block now has were found; 0 where it stays as it came."""


def train_block(inputs: BlockInputs, steps: int, learning_rate: float, seed: int) -> BlockTraining:
    """Train the factors of the decomposed layers of a block, so that its output on its own inputs comes nearest to the original's on the original's.

    `inputs` of a walk `with_original`; a step takes one of its batches. Adam on float32 copies, gradients clipped to norm 1, a short warm-up
    and a cosine to zero. The block computes in its stored precision, and what is kept is the best of several measurements on the last windows,
    which are not trained on; the start is the first of them, so the loss there never rises. A loss that is not finite ends the training. Where there is one window only, or no layer is decomposed, nothing is trained.
    """
    assert inputs.original is not None
    data = _Data(inputs, inputs.original)
    chosen = _factors(inputs.module)
    with _training_only(inputs.module, chosen):
        before = data.held_out_loss()
        if not chosen or not data.trained or steps == 0:
            return BlockTraining(before, before, 0)
        after, best = _train(data, chosen, steps, learning_rate, seed, before)
    return BlockTraining(before, after, best)


def _train(
    data: _Data, chosen: list[nn.Parameter], steps: int, learning_rate: float, seed: int, loss: float
) -> tuple[float, int]:
    """Leaves the best weights in place; their loss, and after which step they were found."""
    generator = torch.Generator().manual_seed(seed)
    masters = [parameter.detach().float().clone() for parameter in chosen]
    kept = [parameter.detach().clone() for parameter in chosen]
    optimizer = torch.optim.Adam(masters, betas=(0.9, 0.95))
    best, order = 0, list[int]()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = learning_rate * _schedule((step - 0.5) / steps)
        order = order or torch.randperm(len(data.trained), generator=generator).tolist()
        index = order.pop()
        scale = data.targets[index].numel()  # of the gradients on their way, which would vanish in float16
        with torch.enable_grad():
            gradients = torch.autograd.grad(scale * data.loss(index), chosen, allow_unused=True)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.float() / scale
        norm = nn.utils.clip_grad_norm_(masters, 1.0)
        if not math.isfinite(float(norm)):
            break
        optimizer.step()
        _load(chosen, masters)
        if step * CHECKS // steps > (step - 1) * CHECKS // steps:
            found = data.held_out_loss()
            if found < loss:
                loss, best, kept = found, step, [parameter.detach().clone() for parameter in chosen]
    _load(chosen, kept)
    return loss, best


def _schedule(progress: float) -> float:
    """Share of the peak learning rate at a point of the training, 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min(progress / WARM_UP, 1.0) * cosine


class _Data:
    """The batches of a block with the outputs that are wanted, and which of their windows are trained on: all but the last."""

    def __init__(self, inputs: BlockInputs, original: BlockInputs):
        self.inputs, self.targets = inputs, list(original.run())
        windows = sum(len(states) for states in inputs.hidden)
        left = windows - max(1, windows // HELD_OUT)
        self.counts: list[int] = []
        """Of each batch, how many windows are trained on."""
        for states in inputs.hidden:
            self.counts.append(min(left, len(states)))
            left -= self.counts[-1]
        self.trained = [index for index, count in enumerate(self.counts) if count]

    def loss(self, index: int) -> torch.Tensor:
        """Of the windows of a batch that are trained on."""
        error, size = self._error(index, slice(self.counts[index]))
        return error / size

    @torch.no_grad()
    def held_out_loss(self) -> float:
        held_out = [index for index, states in enumerate(self.inputs.hidden) if self.counts[index] < len(states)]
        found = [self._error(index, slice(self.counts[index], None)) for index in held_out]
        error, size = (float(sum(part)) for part in zip(*found, strict=True))
        return error / size

    def _error(self, index: int, windows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The squared error of some windows of a batch, and the square of the original's output."""
        states = self.inputs.hidden[index]
        output = self.inputs.module(states, **self.inputs.arguments[len(states)])
        output = output[0] if isinstance(output, tuple) else output
        target = self.targets[index][windows].float()
        error = (output[windows].float() - target).square().sum(dtype=torch.float64)
        return error, target.square().sum(dtype=torch.float64).clamp(min=1e-30)


def _factors(module: nn.Module) -> list[nn.Parameter]:
    """The factors of the layers of low rank and the cores of the others."""
    found: list[Any] = []
    for layer in module.modules():
        if isinstance(layer, (MPOLinear, PivotedMPOLinear)):
            found += layer.cores
        elif isinstance(layer, LowRankLinear):
            found += [part.weight for part in (layer.inner, layer.outer) if isinstance(part, nn.Linear)]
    return found


@contextmanager
def _training_only(module: nn.Module, chosen: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone, by kernels that have them, in evaluation mode; afterwards all is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    kernels = [(layer, layer.kernel) for layer in kernel_layers(module)]
    modes = [(part, part.training) for part in module.modules()]
    module.eval().requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    for layer, _ in kernels:
        layer.kernel = layer.trained_by
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for layer, kernel in kernels:
            layer.kernel = kernel
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def _load(parameters: list[nn.Parameter], weights: list[torch.Tensor]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
