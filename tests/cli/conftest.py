"""The command line in an empty folder, and what its verbs work on: models and artifacts of three blocks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from tensorpress.artifact import RECORD, save_model
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.digest import of_file
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.source import folder_digest
from tensorpress.structure import find_structure, linear_shape, remove_sublayer, set_module

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 128,
}
DIGEST = "abcdef0123456789abcdef0123456789"
TEXT = "the quick brown fox jumps over the lazy dog and runs away from 17 bears.\n" * 40


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def original(place, save_folder):
    torch.manual_seed(0)
    return save_folder(LlamaForCausalLM(LlamaConfig(**SIZES)), place / "original")


@pytest.fixture(scope="session")
def encoder(place, save_folder):
    torch.manual_seed(0)
    return save_folder(BertModel(BertConfig(**SIZES)), place / "encoder")


@pytest.fixture(scope="session")
def text(place):
    (place / "text.txt").write_text(TEXT)
    return place / "text.txt"


@pytest.fixture
def write_artifact(original, make_byte_tokenizer):
    """`write_artifact(model, root, name)`: an artifact as the store has them, without the fresh process that checks one."""

    def write(model, root, name):
        folder = root / "models" / name
        folder.mkdir(parents=True)
        save_model(model, folder, torch.float32)
        make_byte_tokenizer(pad_token="<pad>").save_pretrained(folder)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": of_file(p)} for p in folder.iterdir()}
        config = {"use": "gptq", "bits": 4, "group_size": 16}
        record = {
            "digest": name, "root": folder_digest(original), "base": original.name, "seconds": 2.5,
            "chain": [{"step": "quantize", "use": "gptq", "config": config, "digest": name, "seconds": 2.5}],
            "files": files,
        }  # fmt: skip
        (folder / RECORD).write_text(json.dumps(record))
        return folder

    return write


def quantize(model, paths):
    for path in paths:
        rows, columns = linear_shape(model.get_submodule(path))
        layer = QuantizedLinear(columns, rows, 4, 16, bias=False)
        layer.scales.fill_(0.01)
        layer.qweight.random_()
        set_module(model, path, layer)


@pytest.fixture
def store(tmp_path):
    """A store that is not there yet; `mixed` and `plain` lie in it."""
    return tmp_path / "store"


@pytest.fixture
def mixed(store, original, write_artifact):
    """An artifact: block 0 decomposed, block 1 without feed-forward, the rest 4 bits."""
    model = LlamaForCausalLM.from_pretrained(original)
    remove_sublayer(model, find_structure(model).blocks[1].feed_forward)
    blocks = find_structure(model).blocks
    MPO(metric="weights", keep=0.5, layers=("model.layers.0.*",)).compress(
        model, SimpleNamespace(progress=lambda *_: None)
    )
    quantize(model, [path for block in blocks[1:] for path in block.linear_paths])
    return write_artifact(model.eval(), store, DIGEST)


@pytest.fixture
def plain(store, original, write_artifact):
    """An artifact that is GPTQ throughout."""
    model = LlamaForCausalLM.from_pretrained(original)
    quantize(model, find_structure(model).linear_paths)
    return write_artifact(model.eval(), store, DIGEST[::-1])


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder that the command line runs in, empty at first."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(work, tensorpress_run):
    """`call("eval", folder)`: (exit code, standard output, standard error) of the command line, run in `work`."""
    return tensorpress_run


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() or path.is_dir()}


@pytest.fixture
def refused(call, tmp_path):
    """`refused("eval", "nothing")`: the one error line; nothing was written anywhere."""

    def run(*arguments):
        before = everything(tmp_path)
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert err.count("error:") == 1 and err.count("\n") == 1, err
        assert everything(tmp_path) == before
        return err

    return run
