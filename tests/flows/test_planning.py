"""What is known of a recipe before it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model

from tensorpress.loading import load, outline
from tensorpress.structure import find_structure

SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_an_outline_has_the_structure_and_no_weights(place):
    model = outline(place / "llama")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert find_structure(model) == find_structure(load(place / "llama"))


def test_an_architecture_that_looks_at_values_is_checked_all_the_same(recipe, place, tensorpress_run):
    torch.manual_seed(0)
    config = DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"], max_position_embeddings=64)
    DebertaV2Model(config).save_pretrained(place / "deberta")
    for file in (place / "bert").glob("tokenizer*"):
        (place / "deberta" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RuntimeError):
        find_structure(outline(place / "deberta"))
    settings = {"model": {"source": "deberta"}, "evaluate": ["fidelity", "size"]}
    assert tensorpress_run("validate", recipe(**settings)).code == 0
    steps = {"quantize": {"use": "gptq", "after": "model", "group_size": 48}}
    refused = tensorpress_run("validate", recipe(**settings, steps=steps))
    assert refused.code == 2 and "48 does not divide" in refused.err


def test_a_plan_names_the_bytes_that_a_run_then_has(recipe, prefect_api, monkeypatch, tensorpress_run):
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    steps = {
        "decompose": {"use": "mpo", "after": "model", "keep": 0.5, "layers": ["*mlp*"]},
        "cut": {"use": "finercut", "after": "model", "remove": 0.34, "samples": 1},
        "quantize": {"use": "gptq", "after": "cut", "group_size": 32, "bits": {"each": [8, 4, 2]}},
    }
    path = recipe(steps=steps, evaluate=["size"])
    planned = tensorpress_run("plan", path, "--json", "plan.json")
    assert planned.code == 0, planned.err
    expected = {node["node"]: node["bytes"] for node in json.loads(Path("plan.json").read_text())["nodes"]}
    assert tensorpress_run("run", path, "--json", "run.json").code == 0
    artifacts = json.loads(Path("run.json").read_text())["artifacts"]
    made = {a["node"]: (Path(a["path"]) / "model.safetensors").stat().st_size for a in artifacts}
    for node, size in made.items():
        assert expected[node] == pytest.approx(size, rel=0.25), node

    decomposed = next(a["path"] for a in artifacts if a["node"] == "decompose")
    steps = {"quantize": {"use": "gptq", "after": "model", "group_size": 32}}
    again = tensorpress_run(
        "plan", recipe(steps=steps, model={"source": decomposed}, evaluate=["size"]), "--json", "p2.json"
    )
    assert again.code == 0, again.err
    (node,) = json.loads(Path("p2.json").read_text())["nodes"]
    assert 0 < node["bytes"] < made["decompose"]


def test_steps_on_decomposed_layers_ask_for_the_step_that_makes_them(recipe, prefect_api, monkeypatch, tensorpress_run):
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    balanced = {"use": "mpo", "after": "model", "keep": 0.6, "plans": "balanced", "sites": 3, "multiple": 1}
    tune = {"use": "mpo_tune", "tokens": 64, "batch_tokens": 64, "length": 32}
    squeeze = {"use": "squeeze", "keep": 0.8, "tokens": 0}
    whole = {"decompose": balanced, "tune": {**tune, "after": "decompose"}, "press": {**squeeze, "after": "tune"}}
    path = recipe(steps=whole, evaluate=["size"])
    assert tensorpress_run("run", path, "--json", "run.json").code == 0
    nodes = [a["node"] for a in json.loads(Path("run.json").read_text())["artifacts"]]
    assert nodes == [*whole]
    for step in (tune, squeeze):
        refused = tensorpress_run("validate", recipe(steps={"s": {**step, "after": "model"}}))
        assert refused.code == 2 and f"steps.s: {step['use']}: no layer is" in refused.err
