"""Where experts are to be found in a model, or can be made: fused weights of mixtures, and dense gated feed-forwards."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.integrations import moe

from tensorpress.errors import InputError
from tensorpress.kernels.mpoe import ACTIVATIONS
from tensorpress.structure import Structure, Sublayer, is_whole, linear_shape, linear_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = ("gate_up_proj", "down_proj")
"""Parameters of transformers' fused experts: [E, 2 f, h] and [E, h, f]."""
LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False}  # fmt: skip
"""The layout of fused experts that is understood."""
NEAR = 1e-3
"""Relative error of outputs in fp32 by which a feed-forward counts as a gated one."""


@dataclass(frozen=True)
class FeedForward:
    """A dense feed-forward y = W_down (act(W_gate x) * W_up x) that is a module of its block, without biases."""

    path: str
    gate_up: tuple[str, ...]
    """Paths of W_gate and W_up, or of one layer with W_gate over W_up."""
    down: str

    def shapes(self, model: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
        """(2 f, h) and (h, f)."""
        width, inner = linear_shape(model.get_submodule(self.down))
        return (2 * inner, width), (width, inner)

    def weights(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """W_gate over W_up [2 f, h] and W_down [h, f]."""
        first = [linear_weight(model.get_submodule(path)).detach() for path in self.gate_up]
        return torch.cat(first), linear_weight(model.get_submodule(self.down)).detach()


def mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the fused weights of all experts of a block, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if all(getattr(module._parameters.get(name), "ndim", 0) == 3 for name in WEIGHTS)
    }


def check_mixture(path: str, experts: nn.Module) -> None:
    """Refuse fused experts that compute something else than W_down (act(W_gate x) * W_up x). Raises InputError."""
    for name, expected in LAYOUT.items():
        if getattr(experts, name, expected) != expected:
            raise InputError(f"mpoe: {path}: experts with {name} = {not expected} are not handled")
    plain = getattr(moe, "_default_apply_gate", None)
    if plain is None or getattr(type(experts), "_apply_gate", None) is not plain:
        raise InputError(
            f"mpoe: {path}: {type(experts).__name__} computes something else than down(act(gate x) * up x)"
        )


def activation_of(model: PreTrainedModel) -> str:
    """The name of a model's activation. Raises InputError for one that experts do not have."""
    config = model.config.get_text_config()
    name = str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None))
    if name not in ACTIVATIONS:
        raise InputError(f"mpoe: activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return name


def dense_feed_forwards(model: PreTrainedModel, structure: Structure, patterns: Sequence[str]) -> list[FeedForward]:
    """The feed-forwards whose paths match one of the patterns. Raises InputError for none, and for one that is not dense and gated."""
    found, paths = [], []
    for block in structure.blocks:
        if block.feed_forward is not None:
            path = block.feed_forward.stubs[0][0]
            paths.append(path)
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
                found.append(_gated(model, path, block.feed_forward))
    if not found:
        there = f"the first is {paths[0]}" if paths else "the model has none"
        raise InputError(f"layers: {', '.join(patterns)} matches no dense feed-forward; {there}")
    return found


@torch.no_grad()
def mean_inputs(model: PreTrainedModel, paths: Sequence[str], windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What reaches each module on the average over all tokens of windows [samples, length], as float64 [features]."""
    sums: dict[str, torch.Tensor] = {}

    def seen(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs: torch.Tensor = (*args, *kwargs.values())[0]
            sums[path] = sums.get(path, 0.0) + inputs.flatten(0, -2).double().sum(0)

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(seen(path), with_kwargs=True) for path in paths]
    try:
        for window in windows:
            model(input_ids=window[None].to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / windows.numel() for path, total in sums.items()}


def _gated(model: PreTrainedModel, path: str, sublayer: Sublayer) -> FeedForward:
    """A feed-forward with its layers in their order. Raises InputError for one that is not gated, not dense, or has biases."""
    for name in sublayer.paths:
        if not is_whole(model, name):
            raise InputError(f"mpoe: {name} is no dense layer; experts grow out of dense feed-forwards")
    shapes = [[linear_shape(model.get_submodule(name)) for name in group] for group in sublayer.linears]
    if len(sublayer.stubs) > 1 or path in sublayer.paths or not _has_gate(shapes):
        raise InputError(f"mpoe: {path} is no gated feed-forward of gate, up and down; experts cannot grow out of it")
    if any(getattr(model.get_submodule(name), "bias", None) is not None for name in sublayer.paths):
        raise InputError(f"mpoe: {path} has biases, which experts with a shared core do not have")
    (gate_up, (down,)) = sublayer.linears
    orders = [FeedForward(path, gate_up, down), FeedForward(path, gate_up[::-1], down)]
    if model.get_submodule(down).get_parameter("weight").is_meta:  # an outline, whose numbers are not known
        return orders[0]
    computed = next((one for one in orders if _computes(model, one)), None)
    if computed is None:
        raise InputError(f"mpoe: {path} computes something else than down(act(gate x) * up x)")
    return computed


def _has_gate(shapes: Sequence[Sequence[tuple[int, int]]]) -> bool:
    """Whether groups of layers of one input are gate and up, or both in one, and down: (f, h) twice or (2 f, h), then (h, f)."""
    if len(shapes) != 2 or len(shapes[1]) != 1:
        return False
    ((width, inner),) = shapes[1]
    return list(shapes[0]) in ([(inner, width)] * 2, [(2 * inner, width)])


@torch.no_grad()
def _computes(model: PreTrainedModel, one: FeedForward) -> bool:
    """Whether a feed-forward, asked with random inputs, gives what its layers in this order do."""
    module = copy.deepcopy(model.get_submodule(one.path)).eval().float()
    gate_up, down = (weight.float() for weight in one.weights(model))
    x = torch.randn(4, gate_up.shape[1], generator=torch.Generator().manual_seed(0)).to(down)
    gate, up = nn.functional.linear(x, gate_up).chunk(2, dim=-1)
    expected = nn.functional.linear(ACTIVATIONS[activation_of(model)](gate) * up, down)
    return bool((module(x) - expected).norm() <= NEAR * expected.norm())
