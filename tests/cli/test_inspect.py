"""`inspect`: the map of a model's layers, and its parameters beside the dense ones."""

from __future__ import annotations

import json

import pytest

from tensorpress.cli.structure import dense_parameters
from tensorpress.evaluators.size import original_parameters


def test_inspect(call, mixed, store, original, work):
    code, out, _ = call("inspect", mixed.name[:6], "--layers", "--store", store, "--json", "i.json")
    assert code == 0
    found = json.loads((work / "i.json").read_text())
    assert (found["blocks"], found["sublayers"], found["whole"]) == (3, 5, True)
    assert found["removed"] == [{"block": 1, "sublayer": "feed_forward"}]
    assert found["original_parameters"] == original_parameters(original) > found["parameters"]
    forms = {(layer["block"], layer["form"]) for layer in found["layers"]}
    assert forms == {(0, "mpo"), (1, "4 bits"), (2, "4 bits")}
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("mlp", "self_attn"))}
    assert rows["mlp.up_proj"] == ["▦", "×", "4"] and rows["self_attn.q_proj"] == ["▦", "4", "4"]
    assert "quantize (gptq 4 bits, g16" in out and "whole" in out and "model.layers.2.mlp.down_proj" in out
    stored = sum(layer["bytes"] for layer in found["layers"])
    assert stored < found["weight_bytes"] <= found["bytes"]


def test_inspect_a_dense_model(call, original, encoder, work):
    for folder in (original, encoder):
        code, out, _ = call("inspect", folder, "--json", "i.json")
        found = json.loads((work / "i.json").read_text())
        assert code == 0 and "■ dense" in out and "×" not in out
        assert found["parameters"] == found["original_parameters"] and found["whole"] is None
    assert call("inspect", original, "--store", "not there")[0] == 0
    assert not (work / "not there").exists()


def test_inspect_a_plain_gptq_model(call, plain, original, work):
    assert call("inspect", plain, "--json", "i.json")[0] == 0
    found = json.loads((work / "i.json").read_text())
    assert {layer["form"] for layer in found["layers"]} == {"4 bits"}
    assert found["parameters"] == found["original_parameters"] == original_parameters(original)


def test_many_blocks_are_numbered_by_fives(call, make_folder):
    _, out, _ = call("inspect", make_folder(num_hidden_layers=12))
    header = next(line for line in out.splitlines() if line.startswith("block"))
    row = next(line for line in out.splitlines() if line.startswith("mlp.up_proj"))
    assert header.split() == ["block", "0", "5", "10"]
    assert row.count("■") == 12 and row[header.index("5")] == "■" and header.index("5") - header.index("0") == 10


@pytest.mark.parametrize("tied", [False, True])
def test_dense_parameters(make_model, tied, tmp_path):
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert dense_parameters(model.config) == model.num_parameters() == original_parameters(tmp_path)
