"""What can be chosen freely in a block: the order of neurons and of heads, and the scale of neurons. No output changes, but what plans of several sites make of it.

Rows of the layers that lead in and columns of the layer that leads out are permuted together; and where a neuron's output is proportional to one of its
rows (the half of a gated neuron that is not activated, ReLU), that row can be divided by what the column is multiplied with. A low rank depends on neither.
Plans that split a matrix into sites do, since neighbours share the cores of the other sites. Heads are moved whole, those that share keys and values together.
Where the product of all row (or column) factors but the first divides the size of a head, that only permutes rows of the unfoldings that are cut, and changes no error.
"""

from __future__ import annotations

import copy
import posixpath
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensorpress.compressors.base import LayerReport
from tensorpress.compressors.calibration import BlockInputs, walk
from tensorpress.structure import DENSE, LINEAR, Block, Structure, Sublayer, linear_shape, linear_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4
"""Largest relative change of an output, in float32, that counts as rounding."""
LARGEST = 4
"""Scales are from 2^-4 to 2^4: numbers of float16 should not vanish."""
CHUNK = 2048
"""So many vectors at a time are compared with all others."""


def arrange_blocks(model: PreTrainedModel, structure: Structure) -> dict[str, int]:
    """Order the heads and the neurons of all blocks and scale the neurons, in place, from the weights alone.

    Returns in how many blocks `heads` were moved, and in how many neurons were `ordered` and `scaled`.
    """
    found = {"heads": 0, "ordered": 0, "scaled": 0}
    heads = _heads(model, structure)

    def visit(block: Block, inputs: BlockInputs) -> list[LayerReport]:
        found["heads"] += permute_heads(block, inputs, heads) is not None
        found["ordered"] += permute_neurons(block, inputs) is not None
        found["scaled"] += scale_neurons(block, inputs) is not None
        return []

    walk(model, structure, torch.tensor([[1, 2, 3, 2]]), visit)
    return found


def permute_neurons(block: Block, inputs: BlockInputs) -> torch.Tensor | None:
    """Put neurons of a feed-forward side by side, in place, whose columns in the layer that leads out are alike (`alike`).

    Returns the order, int64 [neurons]: neuron k is what order[k] was. None where the block is left alone: without a feed-forward of dense layers that lead
    in and one that leads out, or where the output for noise would change (mixtures of experts, activations that tell neurons apart).
    """
    found = _feed_forward(block, inputs.module)
    if found is None:
        return None
    order = alike(linear_weight(inputs.module.get_submodule(found.out)).detach().T)
    return order if _changed(inputs, found.out, lambda module: found.reorder(module, order), TOLERANCE) else None


def permute_heads(block: Block, inputs: BlockInputs, heads: int) -> torch.Tensor | None:
    """Put heads side by side, in place, whose columns in the layer that leads out are alike (`alike`); `heads` is the number of those that have keys of their own.

    Queries that share keys and values stay together. Returns the order, int64 [heads]; None where the block is left alone: where nothing would move, where
    the layers are not those of queries, keys and values (one by one or joined) and of the output, all dense and no others, where the output for noise
    would change (heads that are told apart), or does not tell how queries, keys and values are joined.
    """
    found = _attention(block, inputs.module, heads)
    if found is None:
        return None
    columns = linear_weight(inputs.module.get_submodule(found.out)).detach().T
    order = alike(columns.reshape(heads, -1))
    if bool((order.diff() == 1).all()):
        return None

    def by(parts: tuple[tuple[int, ...], ...]) -> Callable[[nn.Module], None]:
        return lambda module: found.reorder(module, order, parts)

    right = [parts for parts in found.layouts if _same(inputs, found.out, by(parts), TOLERANCE)]
    if len(right) != 1:
        return None
    by(right[0])(inputs.module)
    return order


def scale_neurons(block: Block, inputs: BlockInputs) -> torch.Tensor | None:
    """Bring columns of the layer that leads out to norms between their geometric mean and twice that, in place.

    By powers of two, so that outputs stay the same to the last bit. Returns the exponents, int64 [neurons]; None where the block is left alone, as by
    `permute_neurons`, or where no row of a neuron is one that its output is proportional to.
    """
    found = _feed_forward(block, inputs.module)
    if found is None:
        return None
    sizes = linear_weight(inputs.module.get_submodule(found.out)).detach().float().norm(dim=0).log2()
    usual = sizes[sizes.isfinite()].mean()
    powers = (usual - sizes).ceil().clamp(-LARGEST, LARGEST).where(sizes.isfinite(), 0.0).long()
    for path, rows in found.halves():

        def scale(module: nn.Module, path: str = path, rows: slice = rows) -> None:
            found.scale(module, path, rows, powers)

        if _changed(inputs, found.out, scale, 0.0):
            return powers
    return None


@torch.no_grad()
def alike(vectors: torch.Tensor) -> torch.Tensor:
    """An order, int64 [m], of vectors [m, n] in which neighbours point in similar directions.

    Pairs are found by greedy matching with the largest cosine, then pairs of pairs by that of their sums, as long as their number is even.
    Takes some m^2 n multiply-adds and the memory of m `CHUNK` numbers.
    """
    sums = nn.functional.normalize(vectors.float(), dim=1)
    groups = torch.arange(len(vectors), device=vectors.device)[:, None]
    while len(groups) and len(groups) % 2 == 0:
        first, second = _matched(nn.functional.normalize(sums, dim=1))
        groups = torch.cat((groups[first], groups[second]), 1)
        sums = sums[first] + sums[second]
    return groups.flatten()


def _matched(unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Partners among an even number of unit vectors, greedily: those that are nearest to each other, then the same for the others."""
    left = torch.arange(len(unit), device=unit.device)
    pairs = []
    while len(left):
        nearest = _nearest(unit[left])
        places = torch.arange(len(left), device=unit.device)
        chosen = places[(nearest[nearest] == places) & (places < nearest)]
        if not len(chosen):  # rounding, or vectors that are not finite
            chosen = places[:1]
        pairs.append((left[chosen], left[nearest[chosen]]))
        free = torch.ones(len(left), dtype=torch.bool, device=unit.device)
        free[chosen] = free[nearest[chosen]] = False
        left = left[free]
    first, second = zip(*pairs, strict=True)
    return torch.cat(first), torch.cat(second)


def _nearest(unit: torch.Tensor) -> torch.Tensor:
    """For each unit vector the place of another with the largest cosine."""
    found = []
    for start in range(0, len(unit), CHUNK):
        cosines = unit[start : start + CHUNK] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)
        found.append(cosines.argmax(1))
    return torch.cat(found)


@dataclass(frozen=True)
class _FeedForward:
    """Paths in a block of the layers that lead in, whose outputs are the neurons, once or as two halves (`joined`), and of the one that leads out."""

    into: tuple[str, ...]
    out: str
    neurons: int
    joined: bool

    def halves(self) -> Iterator[tuple[str, slice]]:
        """Which rows the output may be proportional to; those of the last layer, or half, as a rule."""
        for path in reversed(self.into):
            if self.joined:
                yield path, slice(self.neurons, None)
            yield path, slice(self.neurons)

    @torch.no_grad()
    def reorder(self, module: nn.Module, order: torch.Tensor) -> None:
        rows = torch.cat((order, order + self.neurons)) if self.joined else order
        for path in self.into:
            for tensor in _rows_of(module.get_submodule(path)):
                tensor.copy_(tensor[rows])
        weight = linear_weight(module.get_submodule(self.out))
        weight.copy_(weight[:, order])

    @torch.no_grad()
    def scale(self, module: nn.Module, path: str, rows: slice, powers: torch.Tensor) -> None:
        weight = linear_weight(module.get_submodule(self.out))
        factors = torch.tensor([2.0**power for power in powers.tolist()]).to(weight)
        weight.mul_(factors)
        for tensor in _rows_of(module.get_submodule(path)):
            tensor[rows].div_(factors if tensor.ndim == 1 else factors[:, None])


@dataclass(frozen=True)
class _Attention:
    """Paths in a block of the layers that lead into its heads and of the one that leads out."""

    into: tuple[str, ...]
    out: str
    layouts: tuple[tuple[tuple[int, ...], ...], ...]
    """Ways to read the outputs of each of `into`: sizes of parts that stand behind each other and hold all heads each."""

    @torch.no_grad()
    def reorder(self, module: nn.Module, order: torch.Tensor, parts: tuple[tuple[int, ...], ...]) -> None:
        """`parts`: one of `layouts`."""
        for path, sizes in zip(self.into, parts, strict=True):
            rows = torch.cat([_moved(size, order) + sum(sizes[:place]) for place, size in enumerate(sizes)])
            for tensor in _rows_of(module.get_submodule(path)):
                tensor.copy_(tensor[rows])
        weight = linear_weight(module.get_submodule(self.out))
        weight.copy_(weight[:, _moved(weight.shape[1], order)])


def _moved(size: int, order: torch.Tensor) -> torch.Tensor:
    """Places [size] of what stood in len(order) equal pieces, in that order of the pieces."""
    return torch.arange(size, device=order.device).reshape(len(order), -1)[order].flatten()


def _heads(model: PreTrainedModel, structure: Structure) -> int:
    """How many heads have keys of their own; 1, so that none is moved, where that is not known: a block whose layers do not show its keys may use those of others."""
    for block in structure.blocks:
        if block.attention is None:
            continue
        groups = block.attention.linears
        if len(groups) != 2 or len(groups[1]) != 1:
            return 1
        into, (out,) = ([linear_shape(model.get_submodule(path)) for path in group] for group in groups)
        if not (len(into) == 3 or (len(into) == 1 and into[0][0] > out[1])):
            return 1
    config = model.config.get_text_config()
    found = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    return found if isinstance(found, int) else 1


def _attention(block: Block, module: nn.Module, heads: int) -> _Attention | None:
    found = _in_and_out(block, block.attention, module)
    if found is None or heads < 2 or _others(module, (*found[0], found[1])):
        return None
    into, out = found
    queries = linear_shape(module.get_submodule(out))[1]
    outputs = [linear_shape(module.get_submodule(path))[0] for path in into]
    layouts: list[tuple[tuple[int, ...], ...]] = [tuple((size,) for size in outputs)]
    if len(into) == 1:  # queries, keys and values behind each other, or each head's side by side
        others = (outputs[0] - queries) // 2
        layouts.append(((queries, others, outputs[0] - queries - others),))
    fit = [layout for layout in layouts if all(size > 0 and size % heads == 0 for sizes in layout for size in sizes)]
    return _Attention(into, out, tuple(fit)) if fit and queries % heads == 0 else None


def _others(module: nn.Module, paths: tuple[str, ...]) -> bool:
    """Whether the smallest module that holds some layers has other linear ones, which may be of heads and in use for some inputs alone."""
    holder = posixpath.commonpath([path.replace(".", "/") for path in paths]).replace("/", ".")
    held = {
        f"{holder}.{name}".lstrip(".")
        for name, layer in module.get_submodule(holder).named_modules()
        if isinstance(layer, LINEAR)
    }
    return held != set(paths)


def _rows_of(layer: nn.Module) -> list[torch.Tensor]:
    """What a dense layer has for each output: its weight [m, n] and its bias [m]."""
    bias: torch.Tensor | None = getattr(layer, "bias", None)
    return [linear_weight(layer)] if bias is None else [linear_weight(layer), bias]


def _in_and_out(block: Block, sublayer: Sublayer | None, module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """Paths in the block of a sublayer's layers, where these are dense and some lead in and one leads out."""
    groups = sublayer.linears if sublayer is not None else ()
    if len(groups) != 2 or len(groups[1]) != 1:
        return None
    into, (out,) = (tuple(path.removeprefix(block.path + ".") for path in group) for group in groups)
    return (into, out) if all(isinstance(module.get_submodule(path), DENSE) for path in (*into, out)) else None


def _feed_forward(block: Block, module: nn.Module) -> _FeedForward | None:
    found = _in_and_out(block, block.feed_forward, module)
    if found is None:
        return None
    into, out = found
    neurons = linear_shape(module.get_submodule(out))[1]
    outputs = {linear_shape(module.get_submodule(path))[0] for path in into}
    joined = len(into) == 1 and outputs == {2 * neurons}
    return _FeedForward(into, out, neurons, joined) if joined or outputs == {neurons} else None


def _changed(inputs: BlockInputs, out: str, change: Callable[[nn.Module], None], tolerance: float) -> bool:
    """Change the block where its outputs stay the `_same`."""
    same = _same(inputs, out, change, tolerance)
    if same:
        change(inputs.module)
    return same


def _same(inputs: BlockInputs, out: str, change: Callable[[nn.Module], None], tolerance: float) -> bool:
    """Whether in a copy of the block that is changed what it, or the layer `out` in it, gives for noise stays what it is."""
    trial = copy.deepcopy(inputs.module).float().eval()
    before = _outputs(trial, inputs, out)
    change(trial)
    after = _outputs(trial, inputs, out)
    return all(float((a - b).norm()) <= tolerance * float(b.norm()) for a, b in zip(after, before, strict=True))


@torch.no_grad()
def _outputs(module: nn.Module, inputs: BlockInputs, path: str) -> list[torch.Tensor]:
    """What a block in float32 and a layer in it give for noise of the size of the block's inputs."""
    states, seen = inputs.hidden[0].float(), list[torch.Tensor]()
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states) * states.std()
    handle = module.get_submodule(path).register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        output = module(noise, **_float(inputs.arguments[len(states)]))
    finally:
        handle.remove()
    return [output[0] if isinstance(output, tuple) else output, *seen]


def _float(value: Any) -> Any:
    """The floating tensors in arguments in float32, in dictionaries of their own, which a block may write into."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, dict | UserDict):
        items = {key: _float(item) for key, item in value.items()}
        return items if isinstance(value, dict) else UserDict(items)
    return type(value)(_float(item) for item in value) if type(value) in (tuple, list) else value
