"""Opens model folders and artifacts, with any mix of MPO, pruned and quantized layers.

`config.json` carries `quantization_config = {"quant_method": "tensorpress", "layers": {path: spec}}`; before the weights
are read (`tensorpress.quantizer`), each path gets the empty module that its spec describes. A folder in the plain GPTQ
layout is opened the same way, its layers found from the checkpoint's own tensor names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from torch import nn

from tensorpress.checks import check_folder, one_line, stored_in, weight_files
from tensorpress.errors import InputError
from tensorpress.kernels import registry
from tensorpress.kernels.factorized_embedding import FactorizedEmbedding, TiedHead, tie_heads
from tensorpress.kernels.kernel_layer import KernelLayer, kernel_layers
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.mpoe import SharedExperts
from tensorpress.kernels.quantized_linear import BITS
from tensorpress.kernels.removed import RemovedAttention, RemovedLinear, RemovedNorm
from tensorpress.kernels.shared_mpo_linear import tie_cores
from tensorpress.kernels.sparse_linear import ChannelLinear, SparseLinear
from tensorpress.kernels.sum_linear import SumLinear
from tensorpress.specs import module_from_spec
from tensorpress.structure import iterate_linears, linear_shape, renumber_attention, set_module

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

METHOD = "tensorpress"
FORMAT_VERSION = 1
BUFFERS = (
    "inv_freq",
    ".masked_bias",
    ".attn.bias",
    ".attention.bias",
    "position_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
)
"""Ends of names that old checkpoints carry and no output needs."""
PACKED = {torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8"}
"""What safetensors calls the types of packed integers."""
SMALL = 1 << 24
"""Numbers that a model may hold beside twice its weights: buffers that are made, not read."""
REPLACED = (
    KernelLayer,
    LowRankLinear,
    SumLinear,
    FactorizedEmbedding,
    TiedHead,
    SharedExperts,
    RemovedLinear,
    RemovedAttention,
    RemovedNorm,
)


def gptq_layers(model: nn.Module, config: dict[str, Any], files: list[Path]) -> dict[str, dict]:
    """The specs of all layers of `model` whose packed weights stand in the checkpoint `files`."""
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    bits, group_size = config.get("bits"), config.get("group_size")
    if (
        type(bits) is not int
        or type(group_size) is not int
        or bits not in BITS
        or not (group_size > 0 or group_size == -1)
    ):
        raise InputError(
            f"config.json: quantization_config: found bits {str(bits)[:40]!r} and group_size {str(group_size)[:40]!r}, "
            f"expected one of {', '.join(map(str, BITS))} and a whole number above 0, or -1"
        )
    layers: dict[str, dict] = {}
    for path, layer in iterate_linears(model):
        found = next((n for n in names if n == f"{path}.qweight" or n.endswith(f".{path}.qweight")), None)
        if found is None:
            continue
        out_features, in_features = linear_shape(layer)
        layers[path] = {
            "form": "gptq",
            "in_features": in_features,
            "out_features": out_features,
            "bits": bits,
            "group_size": group_size,
            "zero_offset": 0 if layout == "gptq_v2" else 1,
            "bias": found.removesuffix("qweight") + "bias" in names,
        }
    return layers


def apply_layers(model: nn.Module, layers: dict[str, dict]) -> None:
    """Put the empty module of each spec at its path, made on torch's default device.

    Raises InputError for a path that the model does not have, and for a spec that cannot be there.
    """
    if not isinstance(layers, dict):
        raise InputError(f"artifact: layers: found a {type(layers).__name__}, expected a mapping of paths to layers")
    for path, spec in layers.items():
        try:
            replaced = model.get_submodule(path) if path else None
        except AttributeError:
            replaced = None
        if replaced is None:
            raise InputError(f"artifact: layer {path[:200]} is not in {type(model).__name__}")
        set_module(model, path, module_from_spec(spec, path, replaced))
        # An architecture's own initialisation looks for the dense weight: it must pass over what holds this module.
        # Not over what holds an embedding: it makes buffers there.
        deepest = path.count(".") + 1
        for depth in range(deepest if spec["form"] == "embedding" else 0, deepest + 1):
            model.get_submodule(".".join(path.split(".")[:depth]))._is_hf_initialized = True  # type: ignore[assignment]
    try:
        tie_cores(model)
        tie_heads(model)
    except ValueError as error:
        raise InputError(f"artifact: {error}") from None
    renumber_attention(model)


def layers_of(model: nn.Module) -> dict[str, dict]:
    """The specs of all modules of `model` that tensorpress put there: the inverse of `apply_layers`."""
    parts = {part for module in model.modules() if isinstance(module, SumLinear) for part in module.parts}
    parts |= {module.table for module in model.modules() if isinstance(module, TiedHead)}
    return {
        path: module.spec()
        for path, module in model.named_modules()
        if isinstance(module, REPLACED) and module not in parts
    }


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    kernels: str = "auto",
    device: str = "cpu",
) -> PreTrainedModel:
    """Open a model folder or an artifact in evaluation mode.

    `kernels` is `auto` or the name of one backend for all its compressed layers. Raises InputError for a folder that
    cannot be opened.
    """
    folder = Path(folder)
    config = check_folder(folder)
    if (config_of(config).get("quant_method")) == "gptq":  # ours, also where gptqmodel is installed
        config.quantization_config = artifact_config(layer_specs(folder, config))
    with _one_line(folder):
        _check_fits(folder, config)
        model, found = _auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told by _check_whole
        )
    _check_whole(folder, model, found)
    for path, module in model.named_modules():
        if isinstance(module, (KernelLayer, LowRankLinear, SparseLinear, ChannelLinear)):
            try:
                module.check()
            except ValueError as error:
                raise InputError(f"{folder}: {path}: {error}") from None
    use_kernels(model, kernels)
    return model.to(device).eval()


def outline(folder: Path) -> PreTrainedModel:
    """The model of a checked folder for asking what it is made of: its weights on the meta device. Raises InputError.

    A forward pass of it may fail where the architecture looks at values (mixtures, relative positions).
    """
    return _outline(folder, check_folder(folder)).eval()


def _outline(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model = _auto_class(config).from_config(config)
        apply_layers(model, layer_specs(folder, config))
    return model


def layer_specs(folder: Path, config: PretrainedConfig) -> dict[str, dict]:
    """What stands in a compressed folder at which path: from its config, or in the plain GPTQ layout from its tensors' names."""
    value = config_of(config)
    if value.get("quant_method") != "gptq":
        return value.get("layers") or {}
    with torch.device("meta"):
        empty = _auto_class(config).from_config(config)
    return gptq_layers(empty, value, weight_files(folder))


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Make one line of what transformers and torch raise for a config that they stumble over. Raises InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{folder}: cannot be opened: {one_line(error)}") from None


def check_version(version: Any) -> None:
    """Refuse an artifact's format that is none, or newer than this code. Raises InputError."""
    if type(version) is not int or version < 1:
        raise InputError(f"artifact: format_version: found {str(version)[:40]!r}, expected a whole number from 1")
    if version > FORMAT_VERSION:
        raise InputError(f"artifact format {version} is newer than this tensorpress reads ({FORMAT_VERSION})")


def _check_fits(folder: Path, config: PretrainedConfig) -> None:
    """Refuse, before memory is asked for, a model that is far larger than the weights that are to fill it. Raises InputError.

    Weights that are missing or of another shape would be drawn at random first, in full size.
    """
    stored = stored_in(folder)
    model = _outline(folder, config)
    for name, tensor in sorted(model.state_dict().items()):
        if name not in stored:
            continue
        shape, kind = stored[name]
        if [*tensor.shape] != shape:
            raise InputError(f"{folder}: tensor {name} has the shape {shape}; config.json says {[*tensor.shape]}")
        if tensor.dtype in PACKED and kind != PACKED[tensor.dtype]:  # transformers leaves integers as they are stored
            raise InputError(f"{folder}: tensor {name} is stored as {kind}; packed integers are {PACKED[tensor.dtype]}")
        if tensor.is_floating_point() and not kind.removeprefix("B").startswith("F"):
            raise InputError(f"{folder}: tensor {name} is stored as {kind}; it should be F32, F16 or BF16")
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    there = sum(math.prod(shape) for shape, _ in stored.values())
    if wanted > 2 * there + SMALL:
        raise InputError(f"{folder}: the model of its config.json has {wanted:,} numbers, its weights have {there:,}")


def _check_whole(folder: Path, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Refuse weights that do not fill the model, which would be drawn at random, or that it has no place for. Raises InputError.

    A pooler that an encoder's checkpoint leaves out is not missed: the hidden states do not depend on it.
    """
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise InputError(
            f"{folder}: its weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    strange = sorted(name for name in found["unexpected_keys"] if not name.endswith(BUFFERS))
    if strange:
        more = f" and {len(strange) - 1} more" if strange[1:] else ""
        raise InputError(f"{folder}: the model of its config.json has no place for the weights {strange[0]}{more}")
    if found["mismatched_keys"]:
        name, shape, wanted = sorted(found["mismatched_keys"])[0]
        raise InputError(f"{folder}: tensor {name} has the shape {[*shape]}; config.json says {[*wanted]}")


def artifact_config(layers: dict[str, dict]) -> dict[str, Any]:
    """The `quantization_config` of an artifact: which module stands at which path."""
    return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "layers": layers}


def config_of(config: PretrainedConfig) -> dict[str, Any]:
    """A model config's `quantization_config` as a dict; empty if it has none."""
    value = getattr(config, "quantization_config", None)
    if value is None:
        return {}
    return value if isinstance(value, dict) else value.to_dict()


def use_kernels(model: nn.Module, name: str) -> None:
    """Let one backend compute all layers that it knows; `auto` lets the registry choose. Raises InputError."""
    known = {backend for operation in registry.operations() for backend in registry.backends(operation)}
    if name != "auto" and name not in known:
        raise InputError(f"kernels: {name!r} is not known; known: auto, {', '.join(sorted(known))}")
    if registry.asked_for() not in {"auto", *known}:
        raise InputError(
            f"{registry.VARIABLE}: {registry.asked_for()!r} is not known; known: auto, {', '.join(sorted(known))}"
        )
    for layer in kernel_layers(model):
        layer.release()
        layer.__dict__.pop("taken", None)
        layer.kernel = name if name in registry.backends(layer.operation) else "auto"


def use_quick_kernels(model: nn.Module) -> None:
    """For measuring quality: keep dense weights in memory where there is plenty, which changes no number."""
    use_kernels(model, "reference")
    layers = [layer for layer in kernel_layers(model) if layer.judged_by != "reference"]
    if 4 * sum(layer.in_features * layer.out_features for layer in layers) < free_bytes(model.device) / 4:
        for layer in layers:
            layer.kernel = layer.judged_by


def free_bytes(device: Any) -> int:
    """Memory that is free where a model lies."""
    if getattr(device, "type", "cpu") == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # a library user may not have it

    return int(psutil.virtual_memory().available)


def _auto_class(config: PretrainedConfig) -> Any:
    """The class that opens a config: with a language-model head where the architecture has one, else the bare model."""
    from transformers import AutoModel, AutoModelForCausalLM  # a second, only where a model is opened

    name = (config.architectures or [""])[0]
    causal = name.endswith(("ForCausalLM", "LMHeadModel"))
    return AutoModelForCausalLM if causal else AutoModel
