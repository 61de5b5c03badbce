"""The compiled decoder against transformers: every family, mixed layers, text in parts; what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tensorpress.compressors.decompose.mpoe import MPOE
from tensorpress.kernels import cpu_linear
from tensorpress.kernels.decoder import AT_ONCE, FAMILIES, Decoder, refusal
from tensorpress.kernels.factorized_embedding import FactorizedEmbedding
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.structure import find_structure, remove_sublayer, set_module

pytestmark = pytest.mark.skipif(cpu_linear.compiled() is None, reason="the compiled kernels were not built")
ODD = {"hidden_size": 40, "intermediate_size": 52, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}


@pytest.fixture
def make(make_model):
    """`make("llama", bits=[4, None])`: a model whose dense weights are exact in bf16; layers take turns among the bits, None stays dense."""

    def make(name="llama", bits=(None,), window=None, **changes):
        size = {"sliding_window": window} if name in ("mistral", "qwen2", "qwen3") else {}
        model = make_model(name, **{**ODD, **size, **changes})
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        for index, path in enumerate(find_structure(model).linear_paths):
            width = bits[index % len(bits)]
            if width is not None:
                set_module(model, path, quantized(model.get_submodule(path), width, odd=index % 2 == 1))
        return model

    return make


def quantized(layer: nn.Linear, bits: int, odd: bool) -> QuantizedLinear:
    """A random layer of the same shape; an odd one has zero points and its inputs in groups at random."""
    outputs, inputs = layer.weight.shape
    groups = -(-inputs // 16)
    index = torch.arange(inputs) // 16
    zeros = torch.full((groups, outputs), 1 << (bits - 1))
    if odd:
        index, zeros = index[torch.randperm(inputs)], torch.randint(1, 1 << bits, (groups, outputs))
    values, scales = (
        torch.randint(0, 1 << bits, (inputs, outputs)),
        (torch.rand(groups, outputs) + 0.1) * 0.5 / (1 << bits),
    )
    return QuantizedLinear.from_integers(values, zeros, scales, index, bits, 16, layer.bias)


def oracle(model, ids):
    """The logits of transformers in fp64, by the reference."""
    with torch.no_grad():
        return model.double()(input_ids=ids[None]).logits[0]


def read(model, ids, **options):
    return Decoder(model, places=64, **options)(ids, len(ids))


ROUNDING = {"portable": 1e-5, "avx512": 1e-3} | dict.fromkeys(("avx2", "avxvnni", "avx512vl"), 5e-4)
"""Inputs are floats, two bf16, or integers of 16 bits; through three blocks."""


def close(found, wanted, share):
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error < share, error


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bits", [(None,), (4,), (2, 3, 8, None, 4)], ids=str)
def test_logits_are_those_of_transformers(make, level, name, bits, make_ids):
    model, ids = make(name, bits), make_ids(1, 23)[0]
    found = read(model, ids)
    close(found, oracle(model, ids), ROUNDING[level])


@pytest.mark.parametrize("changes", [
    {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"hidden_act": "gelu_pytorch_tanh"}, {"attention_bias": True},
    {"mlp_bias": True}, {"tie_word_embeddings": True}, {"head_dim": 24}, {"vocab_size": 37}, {"hidden_size": 33 * 4},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 16}},
], ids=str)  # fmt: skip
def test_shapes_and_settings(make, level, changes):
    model = make("llama", (4, None), **changes)
    ids = torch.randint(model.config.vocab_size, (11,))
    close(read(model, ids), oracle(model, ids), ROUNDING[level])


@pytest.mark.parametrize("mode", ["cpu", "cpu_int8"])
def test_in_parts_it_is_the_same(make, level, make_ids, mode):
    model, ids = make("qwen3", (4, 3)), make_ids(1, 23)[0]
    decoder = Decoder(model, mode, places=23)
    whole = decoder(ids, 23)
    for parts in ((1,) * 23, (5, 1, 1, 16), (22, 1)):
        decoder.reset()
        found = torch.cat([decoder(part, len(part)) for part in ids.split(parts)])
        close(found, whole.double(), 1e-5)
    decoder.reset(7)
    close(decoder(ids[7:], 2), whole[-2:].double(), 1e-5)


def test_what_comes_later_does_not_reach_back(make, level, make_ids):
    """Neither a later token of the same call nor what was forgotten, even where it is not a number."""
    model, ids = make("llama", (4, None)), make_ids(1, 21)[0]
    decoder = Decoder(model, places=21)
    wanted = decoder(ids, 21)
    lost = int(ids[-1])
    with torch.no_grad():
        model.model.embed_tokens.weight[lost] = torch.nan
    ids[:-1][ids[:-1] == lost] = (lost + 1) % 64
    decoder.reset()
    clean = decoder(ids[:-1], 20)
    decoder.reset()
    found = decoder(ids, 21)
    assert torch.equal(found[:20], clean) and not found[20].isfinite().any() and wanted.isfinite().all()
    decoder.reset(12)
    close(decoder(ids[12:20], 8), clean[12:].double(), 1e-5)


@pytest.mark.parametrize("wanted", [1, 3, 300])
def test_long_texts_are_read_in_pieces(make, wanted):
    model = make("llama", (4,), max_position_embeddings=2 * AT_ONCE)
    ids = torch.randint(64, (AT_ONCE + 90,))
    found = Decoder(model, places=AT_ONCE + 90)(ids, wanted)
    assert found.shape == (wanted, 64)
    close(found, oracle(model, ids)[-wanted:], 1e-3)


def test_removed_sublayers(make, level, make_ids):
    model, ids = make("llama", (4, None), num_hidden_layers=4), make_ids(1, 9)[0]
    blocks = find_structure(model).blocks
    for sublayer in (blocks[0].attention, blocks[1].feed_forward, blocks[2].attention, blocks[2].feed_forward):
        remove_sublayer(model, sublayer)
    close(read(model, ids), oracle(model, ids), ROUNDING[level])


def test_bfloat16(make, level, make_ids):
    """Inputs of layers are rounded to bf16, as transformers does it; sums are kept finer."""
    model, ids = make("llama", (4, None)), make_ids(1, 23)[0]
    found = read(model.bfloat16(), ids)
    close(found, oracle(model, ids), 0.03)


def test_eight_bit_inputs(make, level, make_ids):
    model, ids = make("llama", (4, 8)), make_ids(1, 23)[0]
    wanted = oracle(model, ids)
    close(read(model.float(), ids, kernel="cpu_int8"), wanted, 0.1)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads(make, make_ids, threads):
    model, ids = make("llama", (4, 2)), make_ids(1, 23)[0]
    wanted, before = read(model, ids), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(read(model, ids), wanted)
    finally:
        torch.set_num_threads(before)


def test_tokens_and_lengths_that_there_are_not(make):
    model = make()
    decoder = Decoder(model, places=8)
    for bad in ([64], [-1], list(range(9))):
        with pytest.raises(ValueError, match="of 8: too many, or not of the vocabulary"):
            decoder(torch.tensor(bad))
    with pytest.raises(ValueError, match="3 logits are wanted of 2 tokens in 1"):
        decoder(torch.tensor([1, 2]), 3)
    assert decoder.place == 0
    decoder(torch.arange(8))
    with pytest.raises(ValueError, match="1 tokens behind 8 of 8"):
        decoder(torch.tensor([1]))


def test_what_it_refuses(make, make_model, make_calibration):
    assert "no decoder of the kinds" in refusal(make_model("gpt2"))
    assert "no decoder of the kinds" in refusal(make_model("bert"))
    assert "window of 8" in refusal(make("mistral", window=8), 9) and refusal(make("mistral", window=8), 8) is None
    assert "float16" in refusal(make().half())
    with pytest.raises(ValueError, match="finer than bfloat16"):
        Decoder(make_model("llama"))
    model = make()
    set_module(model, "model.layers.1.mlp.up_proj", MPOLinear((4, 13), (5, 8), (3,), bias=False))
    assert refusal(model) == "up_proj of block 1 is a MPOLinear"
    grown, _ = MPOE(experts=2, bond_dimension=4).compress(make(), make_calibration())
    assert refusal(grown) == "gate_proj of block 0 is a SharedMixture"
    table = FactorizedEmbedding(model.config.vocab_size, (5, 52), (5, 8), (3,))
    model = make()
    set_module(model, "model.embed_tokens", table)
    assert refusal(model) == "its embedding is a FactorizedEmbedding"


def test_bytes(make):
    model = make("llama", (4,))
    decoder = Decoder(model, places=16)
    assert decoder.kept_bytes == 3 * 2 * 2 * 16 * 10 * 4
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert decoder.nbytes > sum(layer.qweight.nbytes for layer in layers)
