"""Readers of tokens, and the table of all backends."""

from __future__ import annotations

import pytest
import torch

from tensorpress.evaluators import reading
from tensorpress.evaluators.backends import backends_of, measure
from tensorpress.evaluators.reading import (
    COMPILED,
    TRANSFORMERS,
    CompiledReader,
    TransformersReader,
    cache_bytes,
    reader_for,
)
from tensorpress.evaluators.speed import resident_bytes
from tensorpress.kernels import cpu_linear
from tensorpress.kernels.block_diagonal_linear import BlockDiagonalLinear
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.kernels.semi_structured_linear import SemiStructuredLinear
from tensorpress.loading import use_kernels
from tensorpress.structure import find_structure, set_module

built = pytest.mark.skipif(cpu_linear.compiled() is None, reason="the compiled kernels were not built")
vectors = pytest.mark.skipif(
    cpu_linear.instructions() in (None, "portable"),
    reason="this processor has no vector instructions that are used",
)


@pytest.fixture
def quantized(make_model):
    """A model whose layers have 4 bits, and whose dense weights are exact in bf16."""
    model = make_model("llama", num_hidden_layers=2)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for path in find_structure(model).linear_paths:
        dense = model.get_submodule(path)
        groups = -(-dense.in_features // 16)
        layer = QuantizedLinear.from_integers(
            torch.randint(0, 16, (dense.in_features, dense.out_features)),
            torch.full((groups, dense.out_features), 8),
            torch.rand(groups, dense.out_features) * 0.05 + 0.01,
            torch.arange(dense.in_features) // 16,
            4,
            16,
            None,
        )
        set_module(model, path, layer)
    return model


@built
def test_both_readers_say_the_same(quantized):
    prompt = torch.randint(64, (1, 7))
    readers = [TransformersReader(quantized), CompiledReader(quantized, "cpu", 16)]
    for _ in range(2):  # a second text, which knows nothing of the first
        for tokens in (prompt, prompt[:, :1], prompt[:, 3:4]):
            logits = [reader.read(tokens) for reader in readers]
            assert logits[0].shape == logits[1].shape == (1, 64)
            torch.testing.assert_close(logits[1], logits[0].detach(), rtol=1e-3, atol=1e-3)
        for reader in readers:
            reader.forget()
    assert [reader.runner for reader in readers] == [TRANSFORMERS, COMPILED]
    assert readers[1].kernels() == {"quantized_linear:cpu": 14, "dense:cpu": 1}
    assert readers[0].kernels() == {"quantized_linear:reference": 14, "dense:torch": 1}
    with pytest.raises(ValueError, match="one text"):
        readers[1].read(torch.zeros(2, 3, dtype=torch.int64))


@vectors
def test_who_reads(quantized, make_model, monkeypatch):
    assert isinstance(reader_for(quantized, "auto", 16), CompiledReader)
    assert reader_for(quantized, "cpu_int8", 16).mode == "cpu_int8"
    assert isinstance(reader_for(quantized, "reference", 16), TransformersReader)
    monkeypatch.setenv("TENSORPRESS_KERNELS", "reference")
    assert isinstance(reader_for(quantized, "auto", 16), TransformersReader)
    monkeypatch.delenv("TENSORPRESS_KERNELS")
    assert isinstance(reader_for(make_model("gpt2"), "auto", 16), TransformersReader)
    finer = make_model("llama")  # dense weights that bf16 would round
    assert isinstance(reader_for(finer, "auto", 16), TransformersReader)
    room, decoder = reading.room_for(quantized, 16), CompiledReader(quantized, "cpu", 16).decoder
    assert decoder.nbytes + decoder.kept_bytes <= 3 * room  # small layers are filled up
    assert reading.room_for(quantized, 1016) - room == 1000 * decoder.kept_bytes // 16
    monkeypatch.setattr(reading, "free_bytes", lambda device: room)
    assert isinstance(reader_for(quantized, "auto", 16), TransformersReader)


@built
def test_a_row_for_each_backend_and_batch(quantized, make_model):
    original = make_model("llama", num_hidden_layers=2)
    for parameter in original.parameters():
        parameter.data = parameter.data.bfloat16().float()
    made = backends_of(quantized, "model", "auto", [1, 3], 12) + backends_of(original, "original", "auto", [1, 3], 12)
    done = []
    rows = measure(made, torch.randint(64, (3, 8)), 4, 2, lambda what, n, of: done.append((n, of)))
    compiled = {("model", mode, COMPILED, 1) for mode in ("cpu", "cpu_int8")} | {("original", "cpu", COMPILED, 1)}
    through = {("model", name, TRANSFORMERS, b) for name in ("cpu", "cpu_int8") for b in (1, 3)}
    assert {(r["of"], r["backend"], r["runner"], r["batch"]) for r in rows} == compiled | through | {
        ("original", "torch", TRANSFORMERS, batch) for batch in (1, 3)
    }
    assert done[-1] == (6, 6)
    for row in rows:
        for phase, tokens in (("prefill", 8), ("decode", 1)):
            assert 0 < row[f"{phase}_ms_p50"] <= row[f"{phase}_ms_p90"]
            rate = 1e3 * row["batch"] * tokens / row[f"{phase}_ms_p50"]
            assert row[f"{phase}_tokens_per_second"] == pytest.approx(rate)
        assert row["share_of_read_bandwidth"] > 0 and row["weight_gigabytes_per_second"] > 0
    memory = {(r["of"], r["backend"], r["runner"]): r["peak_memory_bytes"] for r in rows}
    assert memory["model", "cpu", TRANSFORMERS] == memory["model", "cpu_int8", TRANSFORMERS]
    assert memory["original", "torch", TRANSFORMERS] < memory["original", "cpu", COMPILED]
    named = next(r["kernels"] for r in rows if r["backend"] == "cpu_int8" and r["runner"] == TRANSFORMERS)
    assert named["quantized_linear:cpu_int8"] == 14


def test_structured_layers_are_measured_and_counted(make_model):
    model = make_model("llama")
    weight = torch.randn(48, 32) * torch.tensor([0, 1, 1, 0]).repeat(8)
    set_module(model, "model.layers.0.mlp.up_proj", SemiStructuredLinear.from_dense(weight, None))
    set_module(model, "model.layers.0.mlp.gate_proj", BlockDiagonalLinear.from_blocks(torch.randn(2, 24, 16), None))
    made = {backend.name: backend for backend in backends_of(model, "model", "auto", [2], 12)}
    assert {"blocks", "matrix"} <= made.keys() and "reference" not in made
    rows = {row["backend"]: row for row in measure([*made.values()], torch.randint(64, (2, 5)), 2, 1)}
    assert rows["blocks"]["kernels"]["block_diagonal_linear:blocks"] == 1
    assert rows["matrix"]["kernels"]["semi_structured_linear:matrix"] == 1
    kept, texts = 2 * 4 * 48 * 32, cache_bytes(model, 2, 7)
    heads, head = model.config.num_key_value_heads, model.config.hidden_size // model.config.num_attention_heads
    assert texts == 2 * model.config.num_hidden_layers * heads * head * 7 * 2 * 4
    use_kernels(model, "reference")
    assert rows["matrix"]["peak_memory_bytes"] == resident_bytes(model) + kept + texts


def test_one_backend_by_name_and_mpo_layers(make_model):
    model = make_model("llama")
    set_module(model, "model.layers.0.mlp.up_proj", MPOLinear((6, 8), (4, 8), (5,), bias=False))
    assert {b.name for b in backends_of(model, "model", "auto", [2], 12)} == {"matrix", "chain"}
    assert {b.name for b in backends_of(model, "model", "reference", [2], 12)} == {"reference"}
    (only,) = backends_of(model, "model", "chain", [2], 12)
    (row,) = measure([only], torch.randint(64, (2, 5)), 2, 1)
    assert row["kernels"]["mpo_linear:chain"] == 1 and row["backend"] == "chain"
