"""Where a model comes from: the demo model, a folder, or a hub id; checked whole before anything is done with it."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer, PretrainedConfig

from tensorpress import digest
from tensorpress.checks import (
    check_finite,
    check_folder,
    check_small_files,
    check_tokenizer,
    one_line,
    weight_files,
)
from tensorpress.errors import InputError
from tensorpress.loading import config_of, load
from tensorpress.text import demo_folder

HUB_TIMEOUT = 3.0
"""Seconds that a model hub has to answer at all."""
NEEDED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
)


@dataclass(frozen=True)
class ModelHandle:
    """A checked model folder. What is passed between tasks: never the model itself."""

    path: str
    digest: str

    @property
    def folder(self) -> Path:
        return Path(self.path)


def resolve(source: str, revision: str | None = None) -> Path:
    """The folder of a source: `demo`, a folder, or a hub id (fetched, or taken from the local cache).

    Raises InputError within seconds when it is none of these or no hub answers.
    """
    if source == "demo":
        return demo_folder()
    if not source:
        raise InputError(
            "model.source: no such folder: it is empty; a model is `demo`, a folder, or a hub id (owner/name)"
        )
    try:
        path = Path(source).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, a home of nobody, a null character
        path, there = Path(), False
    if there or source.startswith(("/", ".", "~")) or source.count("/") != 1:
        if there:
            return path
        raise InputError(
            f"model.source: no such folder: {source}; a model is `demo`, a folder, or a hub id (owner/name)"
        )
    return _from_hub(source, revision)


def check_source(folder: Path) -> ModelHandle:
    """Check a model folder whole (config, safetensors, finite weights that fill the model, tokenizer) and name it by its content.

    Raises InputError with one clear line.
    """
    config = check_folder(folder)
    check_finite(folder)
    check_tokenizer(read_tokenizer(folder), config, folder)
    load(folder)
    return ModelHandle(str(folder.resolve()), folder_digest(folder))


def folder_digest(folder: Path) -> str:
    """Digest of everything in a model folder that makes the model: weights, config, tokenizer."""
    return digest.of_files(source_files(folder), folder)


def source_files(folder: Path) -> list[Path]:
    """The files of a model folder that make the model."""
    files = set(weight_files(folder))
    for pattern in NEEDED:
        files.update(path for path in folder.glob(pattern) if path.is_file())
    return sorted(files)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises InputError when there is none that can be read."""
    check_small_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("One plus one is 2.", add_special_tokens=False, verbose=False)  # some break when they are first used
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' Rust is no Exception
        files = [path for pattern in ("tokenizer*", "vocab*", "*.model") for path in folder.glob(pattern)]
        reason = one_line(error) if files else "it has no tokenizer.json"
        raise InputError(f"{folder}: its tokenizer cannot be read: {reason}") from None


def is_compressed(config: PretrainedConfig) -> bool:
    """Whether a model folder is an artifact or quantized already."""
    return bool(config_of(config))


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    with contextlib.suppress(LocalEntryNotFoundError, FileNotFoundError, ValueError, InputError):
        known = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
        if weight_files(known):  # not just the config that someone asked for once
            return known
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not answers(f"{endpoint}/api/models/{name}", HUB_TIMEOUT):  # what is asked first below, without a limit of time
        raise InputError(f"model.source: {name} is not a folder here, and no model hub answers at {endpoint}")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, etag_timeout=HUB_TIMEOUT))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = one_line(error)
        raise InputError(f"model.source: {name} cannot be fetched from {endpoint}: {reason}") from None


def answers(address: str, seconds: float) -> bool:
    """Whether anything answers at an address within that time, name service included (which knows no limit of its own).

    Whatever goes wrong (names have rules too) counts as no answer: a thread would print it.
    """
    found: list[int] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            found.append(httpx.head(address, timeout=seconds, follow_redirects=False).status_code)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return bool(found)
