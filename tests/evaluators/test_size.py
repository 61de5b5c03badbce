import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorpress.errors import InputError
from tensorpress.evaluators.base import EvaluationData, Subject
from tensorpress.evaluators.catalog import relative_metrics
from tensorpress.evaluators.size import Size, original_parameters
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.structure import iterate_linears, linear_shape, set_module


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
def test_dense_models(make_model, tied, dtype, tmp_path):
    model = make_model(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path)
    metrics = measure(tmp_path, tmp_path)
    file = (tmp_path / "model.safetensors").stat().st_size
    assert metrics["parameters"] == model.num_parameters()
    assert metrics["weight_bytes"] == file > model.num_parameters() * dtype.itemsize
    assert metrics["bits_per_parameter"] == pytest.approx(8 * file / model.num_parameters())
    assert metrics["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    ratio = relative_metrics(metrics, metrics)["size_ratio"]
    assert ratio == pytest.approx(metrics["bits_per_parameter"] / 16)
    assert ratio == pytest.approx(dtype.itemsize / 2, rel=0.1)  # the baseline is 16-bit whatever the type stored


def test_a_tied_head_that_was_written_twice_counts_once(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert original_parameters(tmp_path) == model.num_parameters()


@pytest.mark.parametrize("bits", [3, 4])
def test_quantized_layers_count_the_weights_that_they_hold(make_model, bits, tmp_path):
    dense, small = tmp_path / "dense", tmp_path / "small"
    model = make_model(attention_bias=True)
    parameters = model.num_parameters()
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


def test_packed_weights_without_their_groups_are_refused(make_model, tmp_path):
    quantize(make_model(), 4).save_pretrained(tmp_path)
    tensors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.endswith("g_idx")}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="g_idx beside it"):
        original_parameters(tmp_path)


def test_cores_count_as_the_numbers_that_are_stored(make_model, tmp_path):
    dense, small = tmp_path / "dense", tmp_path / "small"
    model = make_model()
    model.save_pretrained(dense)
    set_module(model, "model.layers.0.mlp.up_proj", MPOLinear((8, 6), (4, 8), (3,), bias=False))
    model.save_pretrained(small)
    metrics = measure(small, dense)
    assert metrics["parameters"] == model.num_parameters()
    assert metrics["bits_per_parameter"] == pytest.approx(8 * metrics["weight_bytes"] / original_parameters(dense))


def test_masks_and_positions_are_no_parameters(make_model, tmp_path):
    gpt2, bert = tmp_path / "gpt2", tmp_path / "bert"
    model = make_model("gpt2")
    model.save_pretrained(gpt2)
    tensors = load_file(gpt2 / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, gpt2 / "model.safetensors", {"format": "pt"})
    assert original_parameters(gpt2) == model.num_parameters()
    encoder = make_model("bert")
    encoder.save_pretrained(bert)
    tensors = load_file(bert / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    assert original_parameters(bert) == encoder.num_parameters()


def test_shards_count_together(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    metrics = measure(tmp_path, tmp_path)
    assert metrics["parameters"] == model.num_parameters()
    assert metrics["weight_bytes"] == sum(shard.stat().st_size for shard in shards)


def test_only_what_is_needed_to_run_counts(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
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
