import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tensorpress.errors import InputError
from tensorpress.evaluators.base import EvaluationData, Subject
from tensorpress.evaluators.catalog import relative_metrics
from tensorpress.evaluators.size import Size, original_parameters
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.structure import iterate_linears, linear_shape, set_module

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


@pytest.fixture
def seed():
    drawn = random.SystemRandom().randrange(1 << 30)
    print("seed", drawn)
    torch.manual_seed(drawn)
    return drawn


def llama(**overrides):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides}))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def measure(folder, original_folder):
    subject = Subject(None, lambda: None, folder, original_folder, folder == original_folder)
    return Size().evaluate(subject, EvaluationData(torch.zeros(1, 2), 1, None, "none")).metrics


def quantize(model, bits):
    """Put empty quantized layers in place of the blocks' linear layers."""
    for path, layer in list(iterate_linears(model)):
        if ".layers." in path:
            outputs, inputs = linear_shape(layer)
            set_module(model, path, QuantizedLinear(inputs, outputs, bits, 16, bias=layer.bias is not None))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_dense_models(tied, dtype, seed, tmp_path):
    model = llama(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path)
    metrics = measure(tmp_path, tmp_path)
    file = (tmp_path / "model.safetensors").stat().st_size
    assert metrics["parameters"] == count(model)
    assert metrics["weight_bytes"] == file > count(model) * dtype.itemsize
    assert metrics["bits_per_parameter"] == pytest.approx(8 * file / count(model))
    assert metrics["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    ratio = relative_metrics(metrics, metrics)["size_ratio"]
    assert ratio == pytest.approx(metrics["bits_per_parameter"] / 16)
    assert ratio == pytest.approx(dtype.itemsize / 2, rel=0.1)  # the baseline is 16-bit whatever the type stored


def test_a_tied_head_that_was_written_twice_counts_once(seed, tmp_path):
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert original_parameters(tmp_path) == count(model)


@pytest.mark.parametrize("bits", [3, 4])
def test_quantized_layers_count_the_weights_that_they_hold(bits, seed, tmp_path):
    dense, small = tmp_path / "dense", tmp_path / "small"
    model = llama(attention_bias=True)
    parameters = count(model)
    model.save_pretrained(dense)
    quantize(model, bits).save_pretrained(small)
    metrics, original = measure(small, dense), measure(dense, dense)
    assert metrics["parameters"] == original["parameters"] == parameters
    assert original_parameters(small) == parameters  # an original may itself be packed
    assert metrics["bits_per_parameter"] == pytest.approx(8 * metrics["weight_bytes"] / parameters)
    assert relative_metrics(metrics, original)["size_ratio"] == pytest.approx(
        metrics["weight_bytes"] / (2 * parameters)
    )
    assert metrics["weight_bytes"] < original["weight_bytes"]


def test_packed_weights_without_their_groups_are_refused(seed, tmp_path):
    quantize(llama(), 4).save_pretrained(tmp_path)
    tensors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.endswith("g_idx")}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="g_idx beside it"):
        original_parameters(tmp_path)


def test_cores_count_as_the_numbers_that_are_stored(seed, tmp_path):
    dense, small = tmp_path / "dense", tmp_path / "small"
    model = llama()
    model.save_pretrained(dense)
    set_module(model, "model.layers.0.mlp.up_proj", MPOLinear((8, 8), (4, 8), (3,), bias=False))
    model.save_pretrained(small)
    metrics = measure(small, dense)
    assert metrics["parameters"] == count(model)
    assert metrics["bits_per_parameter"] == pytest.approx(8 * metrics["weight_bytes"] / original_parameters(dense))


def test_masks_and_positions_are_no_parameters(seed, tmp_path):
    gpt2, bert = tmp_path / "gpt2", tmp_path / "bert"
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=16))
    model.save_pretrained(gpt2)
    tensors = load_file(gpt2 / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, gpt2 / "model.safetensors", {"format": "pt"})
    assert original_parameters(gpt2) == count(model)
    encoder = BertModel(BertConfig(**SIZES))
    encoder.save_pretrained(bert)
    tensors = load_file(bert / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(512)[None]
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    assert original_parameters(bert) == count(encoder)


def test_shards_count_together(seed, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    metrics = measure(tmp_path, tmp_path)
    assert metrics["parameters"] == count(model)
    assert metrics["weight_bytes"] == sum(shard.stat().st_size for shard in shards)


def test_only_what_is_needed_to_run_counts(seed, tmp_path):
    llama().save_pretrained(tmp_path)
    before = measure(tmp_path, tmp_path)["bytes"]
    for name in (
        "README.md",
        "tensorpress.json",
        "map.png",
        "LICENSE",
        "test.txt",
        ".gitattributes",
        "pytorch_model.bin",
    ):
        (tmp_path / name).write_text("x" * 1000)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "tokenizer.json").write_text("x" * 1000)
    assert measure(tmp_path, tmp_path)["bytes"] == before
    for name in ("merges.txt", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "something.else"):
        (tmp_path / name).write_text(json.dumps("x" * 98))
    assert measure(tmp_path, tmp_path)["bytes"] == before + 5 * 100
