"""Checks of a model folder before anything is loaded: one clear line for everything that is wrong with it."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from tensorpress.errors import InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LARGEST_HEADER = 100_000_000
LARGEST_TEXT = 500_000_000
"""Bytes of a configuration, an index or a tokenizer; the largest that are known have 35 MB."""
READ_WHOLE = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "vocab*")
STORED = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""How tensors may be stored, as safetensors names it."""
LARGEST_SIZE = 2**31 - 1
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers")
"""Fields of a config that say how many layers there are."""
WIDTHS = (
    "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "n_embd",
    "n_head", "n_heads", "n_inner", "n_positions", "ffn_dim", "dim", "hidden_dim", "d_model", "word_embed_proj_dim",
    "max_position_embeddings",
)  # fmt: skip
"""Fields of a config that make shapes."""


def check_folder(folder: Path) -> PretrainedConfig:
    """Refuse a folder that is no model folder, holds pickles only, or whose safetensors are cut off.

    Returns its config. Raises InputError with one line that says what is wrong and where.
    """
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; a model is a folder with config.json and *.safetensors")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: has no config.json; a model folder needs config.json and *.safetensors")
    check_small_files(folder)
    tensors = sum(check_safetensors(file) for file in weight_files(folder))
    _check_sizes(folder / "config.json", _raw_config(folder), tensors)
    return read_config(folder)


def read_config(folder: Path) -> PretrainedConfig:
    """Read config.json with transformers; remote code is never run. Raises InputError."""
    raw = _raw_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{folder / 'config.json'}: model_type {raw['model_type']!r} cannot be used: {one_line(error)}"
        ) from None
    _check_supported(folder / "config.json", raw)
    text = config.get_text_config()
    if not isinstance(getattr(text, "vocab_size", None), int):
        raise InputError(f"{folder / 'config.json'}: names no vocab_size of a model of type {config.model_type}")
    return config


def _raw_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {one_line(error)}") from None
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise InputError(f"{file}: names no model_type")
    if not isinstance(raw["model_type"], str) or len(raw["model_type"]) > 100:
        raise InputError(f"{file}: model_type: found {str(raw['model_type'])[:80]!r}, expected a name")
    _refuse_code(file, raw)
    for name in ("dtype", "torch_dtype"):
        dtype = getattr(torch, str(raw.get(name) or "float32").removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"{file}: {name}: found {str(raw[name])[:80]!r}, expected float32, bfloat16 or float16")
    return raw


def _refuse_code(file: Path, raw: Any) -> None:
    """Refuse a config that names code of a hub or allows it; transformers took such words from a config more than once.

    (CVE-2026-4372: `_attn_implementation_internal`; CVE-2026-5241: `trust_remote_code`.) Raises InputError.
    """
    if not isinstance(raw, dict):
        return
    for name, value in raw.items():
        named = list(value.values()) if isinstance(value, dict) else [value]
        if "_implementation" in name and any(isinstance(n, str) and not re.fullmatch(r"\w*", n) for n in named):
            raise InputError(
                f"{file}: {name}: names code from elsewhere, which is never run; expected a word such as sdpa"
            )
        if name == "trust_remote_code" and value:
            raise InputError(f"{file}: trust_remote_code: code of a model is never run; take the line out")
        _refuse_code(file, value)


def _check_sizes(file: Path, raw: dict[str, Any], tensors: int) -> None:
    """Refuse sizes that no model has: what is made of them first would take all memory, or for ever. Raises InputError."""
    quantized = raw.get("quantization_config")
    specs = quantized.get("layers") if isinstance(quantized, dict) else None
    deepest = tensors + (len(specs) if isinstance(specs, dict) else 0)  # a layer has weights, unless it was removed
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for name, value in part.items():
            if name not in DEPTHS + WIDTHS or value is None:
                continue
            most = deepest if name in DEPTHS else LARGEST_SIZE
            if type(value) is not int or not 1 <= value <= most:
                why = f" (its weights are {tensors} tensors)" if name in DEPTHS else ""
                found = str(value) if len(str(value)) < 40 else f"{str(value)[:37]}..."
                raise InputError(f"{file}: {name}: found {found}, expected a whole number from 1 to {most}{why}")


def check_small_files(folder: Path) -> None:
    """Refuse links that lead elsewhere, and what is no plain file, or too large, among the files that are read whole. Raises InputError."""
    _check_links(folder)
    for file in sorted(path for pattern in READ_WHOLE for path in folder.glob(pattern)):
        if file.is_dir() or file.suffix == ".safetensors":
            continue
        if not file.is_file():
            raise InputError(f"{file}: is no file that can be read")
        if file.stat().st_size > LARGEST_TEXT:
            raise InputError(f"{file}: has {file.stat().st_size:,} bytes; at most {LARGEST_TEXT:,} are read")


def _check_links(folder: Path) -> None:
    """Refuse a link that leads out of the folder: what it names would be read, and carried along. Raises InputError.

    A folder of a hub's cache (`snapshots/REVISION`) is made of links to the `blobs` beside its `snapshots`.
    """
    home = folder.resolve()
    rooms = [home, *(above.parent / "blobs" for above in home.parents if above.name == "snapshots")]
    inner = [
        folder,
        *(path for path in folder.iterdir() if path.is_dir()),
    ]  # transformers reads chat templates of a folder
    for file in sorted(path for part in inner for path in part.iterdir() if path.is_symlink()):
        try:
            target = file.resolve()
        except (OSError, RuntimeError):  # links in a circle
            target = Path()
        if not any(target.is_relative_to(room) for room in rooms):
            raise InputError(f"{file}: is a link that leads out of the folder; put the file itself there")


def _check_supported(file: Path, raw: dict[str, Any]) -> None:
    """Refuse a head that would be lost, and weights that others have quantized. Raises InputError."""
    named = raw.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if not name.endswith(("ForCausalLM", "Model")):
        raise InputError(
            f"{file}: architectures: {f'the head of {name} would be lost' if name else 'is missing'}; a model is a causal "
            "language model (...ForCausalLM, ...LMHeadModel) or an encoder without a head (...Model)"
        )
    quantized = raw.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if quantized is not None and method not in ("tensorpress", "gptq"):
        raise InputError(
            f"{file}: quantization_config: quant_method {str(method)[:80]!r} cannot be opened; known: tensorpress, gptq"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, the single one or those of its index.

    Raises InputError when there is none (naming pickles, which are refused), or the index leads out of the folder.
    """
    single = folder / "model.safetensors"
    if single.is_file():  # transformers takes it before an index
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            names = []
        if not names:
            raise InputError(f"{index}: is not an index of safetensors files")
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(f"{index}: names {name!r}, which lies outside the folder; shards lie beside the index")
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: is missing, though {index.name} names it")
        return [folder / name for name in names]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{folder}: has only pickled weights ({pickles[0]}), which can run code when opened; convert it to safetensors"
        )
    raise InputError(f"{folder}: has no model.safetensors")


def check_safetensors(file: Path) -> int:
    """Refuse a safetensors file whose header or length is not whole; returns its number of tensors. Raises InputError."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 < header <= min(LARGEST_HEADER, size - 8):
        raise InputError(f"{file}: is no whole safetensors file (header of {header} bytes in a file of {size})")
    try:
        with safe_open(file, framework="pt") as tensors:
            return len(tensors.keys())
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{file}: is no whole safetensors file ({one_line(error)})") from None


def shapes_of(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors of a checked folder; no weight is read."""
    return {name: shape for name, (shape, _) in stored_in(folder).items()}


def stored_in(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type (as safetensors names it) of each tensor of a checked folder; no weight is read."""
    found: dict[str, tuple[list[int], str]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                found[name] = part.get_shape(), str(part.get_dtype())
    return found


def check_finite(folder: Path) -> None:
    """Refuse weights with NaN or infinity, naming the first tensor that has one. Raises InputError."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                kind = str(tensors.get_slice(name).get_dtype())
                if kind not in STORED:
                    raise InputError(f"{file}: tensor {name} is stored as {kind}; known: {', '.join(STORED)}")
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise InputError(f"{file}: tensor {name} holds NaN or infinity")


def check_tokenizer(tokenizer: Any, config: PretrainedConfig, folder: Path) -> None:
    """Refuse a tokenizer whose ids do not fit into the model's embedding. Raises InputError."""
    rows = config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {largest}, the embedding {rows} rows: they do not belong together"
        )


def one_line(error: BaseException) -> str:
    """What an error says, as one line; where its first line only announces the next, both. Names of classes are left out."""
    if isinstance(error, KeyError):
        return f"{str(error)[:200]} is missing or not known"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    said = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", said)
    said = re.sub(r"\b[A-Z]\w*(?:Error|Exception): ?", "", said)
    return said[:300] or f"{type(error).__name__} without a word of why"
