"""One Prefect server for all flow tests, and a small model with its texts on disk."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 192,
}


def words(seed: int, count: int) -> str:
    chosen = random.Random(seed)
    return " ".join(
        chosen.choice(["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "runs", "away"])
        for _ in range(count)
    )


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running server; runs of the command line find it by PREFECT_API_URL."""
    from tensorpress.flows.server import PrefectServer

    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    address = server.wait()
    yield address
    server.stop()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_folder: Any) -> Path:
    """A working folder with a bf16 llama, a bert, texts and sentence pairs."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_folder(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).to(torch.bfloat16), tmp_path / "llama")
    save_folder(BertModel(BertConfig(**SIZES)), tmp_path / "bert")
    (tmp_path / "train.txt").write_text(words(1, 600))
    (tmp_path / "test.txt").write_text(words(2, 200))
    rows = [f"{i % 6},{words(i, 4)},{words(i + 50, 4)}" for i in range(20)]
    (tmp_path / "pairs.csv").write_text("score,sentence1,sentence2\n" + "\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def recipe(place: Path) -> Callable[..., Path]:
    """`recipe(steps={...}, gates=...)`: writes recipe.yaml for the llama, with what is given in place of the defaults."""

    def write(**fields: Any) -> Path:
        data = {
            "name": "tiny",
            "model": {"source": "llama"},
            "data": {
                "calibration": {"source": "train.txt", "samples": 6, "length": 32},
                "evaluation": {"source": "test.txt", "samples": 8, "length": 32},
            },
            "steps": {"quantize": {"use": "gptq", "after": "model", "group_size": 32}},
            "evaluate": ["perplexity", "fidelity", "size"],
        }
        data.update(fields)
        path = place / "recipe.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write
