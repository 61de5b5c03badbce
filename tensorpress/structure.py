"""What a model is made of: blocks, in each an attention and a feed-forward sublayer, in each linear layers.

Nothing is looked up by name: a forward pass of a few tokens is traced, and the modules tell what they are. Works for
pre- and post-normalised, sequential and parallel blocks, `nn.Linear` and GPT-2's `Conv1D`, decoders and encoders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tensorpress.errors import InputError
from tensorpress.kernels.kernel_layer import KernelLayer
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.removed import RemovedAttention, RemovedLinear, RemovedNorm
from tensorpress.kernels.sum_linear import SumLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = (nn.Linear, Conv1D)
LINEAR = (nn.Linear, Conv1D, KernelLayer)
Kind = Literal["causal", "encoder"]


@dataclass(frozen=True)
class Sublayer:
    """An attention or a feed-forward: what it adds to the residual stream and what it is made of."""

    kind: Literal["attention", "feed_forward"]
    block: int
    linears: tuple[tuple[str, ...], ...]
    """Paths of the linear layers in the order of execution; those that read the same input stand together."""
    stubs: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    """(path, spec) of the modules that stand in for it when it is removed."""
    norm: str | None
    """Path of the normalisation that feeds this sublayer and nothing else."""

    @property
    def name(self) -> str:
        return f"block {self.block} {self.kind}"

    @property
    def paths(self) -> list[str]:
        return [path for group in self.linears for path in group]


@dataclass(frozen=True)
class Block:
    """One transformer block; a sublayer that was removed is None."""

    index: int
    path: str
    attention: Sublayer | None
    feed_forward: Sublayer | None

    @property
    def sublayers(self) -> list[Sublayer]:
        return [s for s in (self.attention, self.feed_forward) if s is not None]

    @property
    def linear_groups(self) -> list[tuple[str, ...]]:
        """Linear layers of the block in the order of execution, grouped by common input."""
        return [group for sublayer in self.sublayers for group in sublayer.linears]

    @property
    def linear_paths(self) -> list[str]:
        return [path for group in self.linear_groups for path in group]


@dataclass(frozen=True)
class Structure:
    """The blocks of a model in order, and what surrounds them."""

    kind: Kind
    blocks: tuple[Block, ...]
    hidden_size: int

    @property
    def sublayers(self) -> list[Sublayer]:
        return [s for block in self.blocks for s in block.sublayers]

    @property
    def linear_paths(self) -> list[str]:
        return [path for block in self.blocks for path in block.linear_paths]


def model_kind(model: PreTrainedModel) -> Kind:
    """`causal` for a model with a language-model head that predicts the next token, else `encoder`."""
    name = type(model).__name__
    return "causal" if name.endswith(("ForCausalLM", "LMHeadModel")) else "encoder"


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """What `forward` needs so that no keys and values are kept: a decoder without a head keeps them too, and whoever runs its blocks again would add to those."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(outputs m, inputs n) of any linear-like layer."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def linear_weight(layer: nn.Module) -> torch.Tensor:
    """The weight as [m outputs, n inputs], whatever the layer stores; a view where it can be one."""
    if isinstance(layer, Conv1D):
        return layer.weight.T
    if isinstance(layer, KernelLayer):
        return layer.dense_weight()
    assert isinstance(layer, nn.Linear)
    return layer.weight


def is_whole(model: nn.Module, path: str) -> bool:
    """Whether a dense layer stands at a path that is not itself a factor of a layer of low rank."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return isinstance(model.get_submodule(path), DENSE) and not isinstance(parent, LowRankLinear)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at the dotted `path` of `model`, with the training mode of what stood there."""
    parent, _, name = path.rpartition(".")
    module.train(model.get_submodule(path).training)
    setattr(model.get_submodule(parent), name, module)


def find_structure(model: PreTrainedModel) -> Structure:
    """Trace a forward pass of four tokens and read off the structure.

    Raises InputError for a model without a list of blocks or whose blocks have no linear layers.
    """
    blocks_path = _blocks_path(model)
    calls = _trace(model, blocks_path)
    modules = dict(model.named_modules())
    blocks = tuple(
        _block(index, f"{blocks_path}.{index}", modules, calls)
        for index in range(len(modules[blocks_path]))  # type: ignore[arg-type]
    )
    if not any(block.sublayers for block in blocks):
        raise InputError(f"{type(model).__name__}: no linear layers found in its blocks ({blocks_path})")
    return Structure(model_kind(model), blocks, _hidden_size(model))


def remove_sublayer(model: PreTrainedModel, sublayer: Sublayer) -> None:
    """Take a sublayer out of the model for good: its parameters, its arithmetic, its norm and its cache entry."""
    for path, spec in sublayer.stubs:
        set_module(model, path, stub_from_spec(dict(spec)))
    if sublayer.norm is not None:
        before = _probe(model)
        kept = model.get_submodule(sublayer.norm)
        set_module(model, sublayer.norm, RemovedNorm())
        if not torch.equal(before, _probe(model)):  # its output also feeds the residual stream: it has to stay
            set_module(model, sublayer.norm, kept)
    renumber_attention(model)


def renumber_attention(model: nn.Module) -> None:
    """Let a remaining attention take index 0 of the key-value cache.

    transformers asks entry 0 for the length of the past; were it left empty, cached decoding would be silently wrong.
    The one that takes it over must be of the same kind (sliding or full), since the cache is built by `layer_types`.
    """
    config = getattr(model, "config", None)
    if config is None:
        return
    types = getattr(config.get_text_config(decoder=True), "layer_types", None)
    attentions = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and _is_attention(m)]
    attentions = [m for m in attentions if not isinstance(m, RemovedAttention)]
    if not attentions or any(m.layer_idx == 0 for m in attentions):
        return
    heir = next((m for m in attentions if not types or types[int(m.layer_idx)] == types[0]), None)  # type: ignore[arg-type]
    if heir is None:
        kind = types[0] if types else ""
        raise InputError(f"the last {kind} attention cannot be removed: the key-value cache needs one of its kind")
    heir.layer_idx = 0  # type: ignore[assignment]


def stub_from_spec(spec: dict[str, Any]) -> nn.Module:
    """Build the module that stands for something removed."""
    if spec["form"] == "removed":
        return RemovedLinear(spec["out_features"])
    if spec["form"] == "removed_attention":
        return RemovedAttention(spec["out_features"], spec["values"])
    return RemovedNorm()


@dataclass
class _Calls:
    """What a traced forward pass showed: per module the input and output tensors, and the order of the calls."""

    order: list[str]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, Any]


def _blocks_path(model: PreTrainedModel) -> str:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not isinstance(module[0], LINEAR)
    }
    if not lists:
        raise InputError(f"{type(model).__name__}: no list of {count} transformer blocks found in it")
    return max(lists, key=lambda name: (sum(p.numel() for p in lists[name].parameters()), -name.count(".")))


@torch.no_grad()
def _probe(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.tensor([[1, 2, 3, 2]], device=model.device)
    was_training = model.training
    model.eval()
    result = model(input_ids=ids)
    model.train(was_training)
    return result[0]


def _trace(model: PreTrainedModel, blocks_path: str) -> _Calls:
    calls = _Calls([], {}, {})
    prefix = blocks_path + "."

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensor = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
            calls.order.append(name)
            if tensor is not None:
                calls.inputs[name] = tensor

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            calls.outputs[name] = output

        return hook

    handles = []
    for name, module in model.named_modules():
        if name.startswith(prefix):
            handles += [
                module.register_forward_pre_hook(before(name), with_kwargs=True),
                module.register_forward_hook(after(name)),
            ]
    try:
        _probe(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _block(index: int, path: str, modules: dict[str, nn.Module], calls: _Calls) -> Block:
    prefix = path + "."
    linears = [name for name in calls.order if name.startswith(prefix) and isinstance(modules[name], LINEAR)]
    core = _attention_core(prefix, modules, calls)
    attention_linears: list[str] = []
    if core is not None:
        root = prefix + core[len(prefix) :].split(".")[0]
        attention_linears = [name for name in linears if name.startswith((root + ".", core + "."))]
    others = [name for name in linears if name not in attention_linears]
    attention = feed_forward = None
    if core is not None and attention_linears:
        stubs = _attention_stubs(core, attention_linears, modules, calls)
        norm = _feeding_norm(prefix, [core, *attention_linears], linears, modules, calls)
        attention = Sublayer("attention", index, _grouped(attention_linears, calls), stubs, norm)
    if others:
        stubs = _feed_forward_stubs(prefix, others, modules, calls)
        norm = _feeding_norm(prefix, [path_ for path_, _ in stubs] + others, linears, modules, calls)
        feed_forward = Sublayer("feed_forward", index, _grouped(others, calls), stubs, norm)
    return Block(index, path, attention, feed_forward)


def _attention_core(prefix: str, modules: dict[str, nn.Module], calls: _Calls) -> str | None:
    """The innermost attention module of a block that was called and is still there."""
    names = [n for n in dict.fromkeys(calls.order) if n.startswith(prefix) and _is_attention(modules[n])]
    names = [n for n in names if not isinstance(modules[n], RemovedAttention)]
    inner = [n for n in names if not any(other.startswith(n + ".") for other in names)]
    return inner[0] if inner else None


def _attention_stubs(core: str, linears: list[str], modules: dict[str, nn.Module], calls: _Calls) -> Any:
    output = calls.outputs[core]
    first = output[0] if isinstance(output, tuple) else output
    values = len(output) if isinstance(output, tuple) else 1
    stubs = [(core, _spec(form="removed_attention", out_features=first.shape[-1], values=values))]
    for name in _whole(linears, modules):
        if not name.startswith(core + "."):
            stubs.append((name, _spec(form="removed", out_features=linear_shape(modules[name])[0])))
    return tuple(stubs)


def _feed_forward_stubs(prefix: str, linears: list[str], modules: dict[str, nn.Module], calls: _Calls) -> Any:
    linears = _whole(linears, modules)
    children = list(dict.fromkeys(prefix + name[len(prefix) :].split(".")[0] for name in linears))
    width = linear_shape(modules[linears[-1]])[0]
    if len(children) == 1 and isinstance(calls.outputs.get(children[0]), torch.Tensor):
        return ((children[0], _spec(form="removed", out_features=width)),)
    # In several parts: what lies between them then works on a width of 1.
    widths = [1] * (len(linears) - 1) + [width]
    return tuple((n, _spec(form="removed", out_features=w)) for n, w in zip(linears, widths, strict=True))


def _whole(linears: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The layers of low rank and the sums in place of what each is made of."""
    return list(dict.fromkeys(_outermost(name, modules) for name in linears))


def _outermost(name: str, modules: dict[str, nn.Module]) -> str:
    names = name.split(".")
    above = (".".join(names[:depth]) for depth in range(1, len(names)))
    return next((path for path in above if isinstance(modules[path], (LowRankLinear, SumLinear))), name)


def _spec(**fields: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(fields.items())


def _feeding_norm(
    prefix: str, members: list[str], linears: list[str], modules: dict[str, nn.Module], calls: _Calls
) -> str | None:
    """The normalisation, a child of the block, whose output goes into `members` and into no other linear layer."""
    for name, output in calls.outputs.items():
        child = name.startswith(prefix) and "." not in name[len(prefix) :]
        if not child or "norm" not in type(modules[name]).__name__.lower() or not isinstance(output, torch.Tensor):
            continue
        readers = {n for n, tensor in calls.inputs.items() if tensor is output and n.startswith(prefix)}
        foreign = [n for n in readers if n in linears and n not in members]
        if readers & set(members) and not foreign:
            return name
    return None


def _grouped(linears: list[str], calls: _Calls) -> tuple[tuple[str, ...], ...]:
    groups: list[list[str]] = []
    for name in linears:
        if groups and calls.inputs[groups[-1][0]] is calls.inputs[name]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return tuple(tuple(group) for group in groups)


def _hidden_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def iterate_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All linear-like layers of a model with their paths."""
    for name, module in model.named_modules():
        if isinstance(module, LINEAR):
            yield name, module
