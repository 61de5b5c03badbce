"""Checks of a model folder before anything is loaded: one clear line for everything that is wrong with it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from tensorpress.errors import InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LARGEST_HEADER = 100_000_000


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
    for file in weight_files(folder):
        check_safetensors(file)
    return read_config(folder)


def read_config(folder: Path) -> PretrainedConfig:
    """Read config.json with transformers; remote code is never run. Raises InputError."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / 'config.json'}: cannot be read: {one_line(error)}") from None
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise InputError(f"{folder / 'config.json'}: names no model_type")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{folder / 'config.json'}: model_type {raw['model_type']!r} cannot be used: {one_line(error)}"
        ) from None
    _check_supported(folder / "config.json", raw)
    return config


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
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if quantized and method not in ("tensorpress", "gptq"):
        raise InputError(
            f"{file}: quantization_config: quant_method {method!r} cannot be opened; known: tensorpress, gptq"
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


def check_safetensors(file: Path) -> None:
    """Refuse a safetensors file whose header or length is not whole. Raises InputError."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 < header <= min(LARGEST_HEADER, size - 8):
        raise InputError(f"{file}: is no whole safetensors file (header of {header} bytes in a file of {size})")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{file}: is no whole safetensors file ({one_line(error)})") from None


def check_finite(folder: Path) -> None:
    """Refuse weights with NaN or infinity, naming the first tensor that has one. Raises InputError."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
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
    """What an error says, as one line; where its first line only announces the next, both."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return said[:300] or type(error).__name__
