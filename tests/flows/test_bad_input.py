"""Bad input: exit code 2, one clear line, nothing written."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

GPTQ = {"use": "gptq", "after": "model", "group_size": 32}


def refused(result, *parts, lines=1):
    """Exit code 2, as many lines as problems, each with what is expected in it; no traceback, nothing written."""
    assert result.code == 2, (result.code, result.out, result.err)
    found = [line for line in result.err.splitlines() if line.strip()]
    assert len(found) == lines, result.err
    for part in parts:
        assert re.search(part, result.err), f"{part!r} not in {result.err!r}"
    assert "Traceback" not in result.err + result.out
    assert not Path("mlruns").exists()


@pytest.mark.parametrize(
    ("steps", "parts"),
    [
        ({"q": {**GPTQ, "bitz": 4}}, [r"steps\.q\.bitz", "unknown key", "did you mean bits"]),
        ({"q": {**GPTQ, "act_order": "perhaps"}}, [r"steps\.q\.act_order", "perhaps", "bool"]),
        ({"a": {**GPTQ, "after": "b"}, "b": {**GPTQ, "after": "a"}}, ["comes after itself", "a -> b -> a"]),
        ({"q": {"use": "gptq"}}, [r"steps\.q\.after", "is missing"]),
        (
            {"q": {**GPTQ, "after": "prun"}, "prune": {"use": "finercut", "after": "model", "remove": 0.2}},
            ["'prun'", "did you mean prune"],
        ),
        ({"q": {**GPTQ, "use": "gptk"}}, [r"steps\.q\.use", "no method 'gptk'", "did you mean gptq"]),
        ({"q": {**GPTQ, "bits": 5}}, [r"steps\.q\.bits", "found 5", "2, 3, 4 or 8"]),
        ({"q": {**GPTQ, "group_size": 48}}, [r"steps\.q\.group_size", "48 does not divide the 32 inputs"]),
        ({"m": {"use": "mpo", "after": "model", "keep": 0}}, [r"steps\.m\.keep", "found 0", "greater than 0"]),
        ({"m": {"use": "mpo", "after": "model", "keep": 2}}, [r"steps\.m\.keep", "found 2", "less than 1"]),
        ({"m": {"use": "mpo", "after": "model"}}, [r"steps\.m", "keep", "bond_dimension"]),
        ({"q": GPTQ, "m": {"use": "mpo", "after": "q", "keep": 0.5}}, ["may not come after q", "decompose first"]),
        ({"q": {**GPTQ, "bits": {"each": []}}}, [r"steps\.q\.bits", "each"]),
        ({"model": GPTQ}, [r"steps\.model", "choose another"]),
    ],
)
def test_steps(recipe, tensorpress_run, steps, parts):
    refused(tensorpress_run("run", recipe(steps=steps)), *parts)


def test_every_problem_has_its_line(recipe, tensorpress_run):
    refused(
        tensorpress_run("run", recipe(steps={"a": {**GPTQ, "bits": 5}, "b": {**GPTQ, "bitz": 1}})),
        "bits",
        "bitz",
        lines=2,
    )


@pytest.mark.parametrize("verb", ["run", "plan", "validate"])
def test_missing_recipe_and_broken_yaml(place, tensorpress_run, verb):
    refused(tensorpress_run(verb, "none.yaml"), "none.yaml", "no such recipe")
    refused(tensorpress_run(verb, "quikstart"), "did you mean quickstart")
    Path("broken.yaml").write_text("name: [unclosed")
    refused(tensorpress_run(verb, "broken.yaml"), "not YAML")
    Path("list.yaml").write_text("- a\n- b\n")
    refused(tensorpress_run(verb, "list.yaml"), "mapping")


def test_texts(recipe, tensorpress_run, place):
    path = recipe()
    Path("train.txt").write_text(" \n")
    refused(tensorpress_run("run", path), r"data\.calibration", "is empty")
    Path("train.txt").write_text("short")
    refused(tensorpress_run("run", path), r"data\.calibration", "fewer than two windows of 32")
    Path("train.txt").write_bytes(b"\xff\xfe\x00bad")
    refused(tensorpress_run("run", path), "UTF-8")
    Path("train.txt").unlink()
    refused(tensorpress_run("run", path), "no such file")
    shutil.copy("test.txt", "train.txt")
    refused(tensorpress_run("run", path), "calibration text", "never saw")
    Path("train.txt").write_text("one more line\n" * 50 + Path("test.txt").read_text())
    refused(tensorpress_run("run", path), "calibration text", "never saw")
    Path("train.txt").write_text(Path("test.txt").read_text()[:500])  # the part that is measured on
    refused(tensorpress_run("run", path), "calibration text", "never saw")


def test_model_folders(recipe, tensorpress_run, place):
    path = recipe()
    weights = place / "llama/model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    refused(tensorpress_run("run", path), "model.safetensors", "no whole safetensors file")
    weights.write_bytes(b"\xff" * 8 + whole[8:])
    refused(tensorpress_run("run", path), "no whole safetensors file")

    weights.write_bytes(whole)
    tensors = load_file(weights)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(tensorpress_run("run", path), re.escape(name), "NaN")

    weights.unlink()
    torch.save({"a": torch.ones(1)}, place / "llama/pytorch_model.bin")
    refused(tensorpress_run("run", path), "pytorch_model.bin", "pickled")
    (place / "llama/pytorch_model.bin").unlink()
    refused(tensorpress_run("run", path), "no model.safetensors")
    (place / "llama/config.json").unlink()
    refused(tensorpress_run("run", path), "no config.json")


def test_weights_that_do_not_fill_the_model(recipe, tensorpress_run, place):
    path = place / "llama/model.safetensors"
    tensors = load_file(path)
    gone = sorted(name for name in tensors if "mlp" in name)[0]
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    refused(tensorpress_run("run", recipe()), "its weights lack", re.escape(gone))


def test_a_config_that_does_not_fit_the_weights(recipe, tensorpress_run, place):
    path = place / "llama/config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "intermediate_size": 48}))
    refused(tensorpress_run("run", recipe()), "mlp", r"\[32, 64\]", r"\[32, 48\]")
    path.write_text(json.dumps({key: value for key, value in whole.items() if key != "architectures"}))
    refused(tensorpress_run("run", recipe()), "architectures: is missing", "ForCausalLM")
    path.write_text(json.dumps({**whole, "architectures": ["LlamaForSequenceClassification"]}))
    refused(tensorpress_run("run", recipe()), "head of LlamaForSequenceClassification would be lost")
    path.write_text(json.dumps({**whole, "quantization_config": {"quant_method": "awq", "bits": 4}}))
    refused(tensorpress_run("run", recipe()), "'awq' cannot be opened", "tensorpress, gptq")
    path.write_text(json.dumps({**whole, "hidden_act": "nonsense"}))
    refused(tensorpress_run("run", recipe()), "llama: cannot be opened", "nonsense")
    path.write_text(json.dumps({**whole, "num_hidden_layers": 2}))
    refused(tensorpress_run("run", recipe()), "has no place for the weights", r"model\.layers\.2")


def test_gates_that_cannot_be_measured_or_cannot_fail(recipe, tensorpress_run):
    for gate, parts in {
        "perplexity_ratio": [r"gates\.perplexity_ratio", "min, max or both"],
        "embedding_cosine": [r"gates\.embedding_cosine", "not measured", "causal"],
        "perplexity_ratio_other": ["not measured", "without data.evaluation.other"],
        "parsable_functions": ["not measured"],
    }.items():
        bound = {} if gate == "perplexity_ratio" else {"max": 1.0}
        measures = ["perplexity", "fidelity", "generation"]
        refused(tensorpress_run("run", recipe(gates={gate: bound}, evaluate=measures)), *parts)
    refused(tensorpress_run("run", recipe(gates={"size_ratio": {"min": 2, "max": 1}})), "not above its max")
    refused(tensorpress_run("run", recipe(evaluate=[])), "evaluate", "at least 1")


def test_windows_longer_than_the_model_takes(recipe, tensorpress_run):
    for name in ("calibration", "evaluation"):
        refused(
            tensorpress_run("run", recipe(), "--set", f"data.{name}.length=193"), f"data.{name}.length", "192 tokens"
        )


def test_tokenizer_that_does_not_match_the_embedding(recipe, tensorpress_run, place):
    config = json.loads((place / "llama/tokenizer.json").read_text())
    config["model"]["vocab"]["zzz"] = 5000
    (place / "llama/tokenizer.json").write_text(json.dumps(config))
    refused(tensorpress_run("run", recipe()), "ids up to 5000", "260 rows")


def test_shard_index_that_leads_outside(recipe, tensorpress_run, place):
    (place / "llama/model.safetensors").rename(place / "other.safetensors")
    (place / "llama/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    refused(tensorpress_run("run", recipe()), "outside the folder")


def test_hub_id_when_no_hub_answers(recipe, tensorpress_run, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    refused(tensorpress_run("run", recipe(model={"source": "some/model"})), "some/model", "no model hub answers")
    assert time.monotonic() - start < 10


def test_paths_outside(recipe, tensorpress_run, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.txt"
    outside.write_text("secret " * 500)
    data = {"calibration": {"source": str(outside), "length": 32}, "evaluation": {"source": "test.txt", "length": 32}}
    refused(tensorpress_run("run", recipe(data=data)), "outside", "--set data.calibration.source=")
    Path("link.txt").symlink_to(outside)
    data["calibration"]["source"] = "link.txt"
    refused(tensorpress_run("run", recipe(data=data)), "outside")
    allowed = tensorpress_run("validate", recipe(), "--set", f"data.calibration.source={outside}")
    assert allowed.code == 0, allowed.err


def test_places_that_cannot_be_written(recipe, tensorpress_run):
    Path("file").write_text("a file")
    refused(tensorpress_run("run", recipe(), "--store", "file/store"), "cannot be written")
    refused(tensorpress_run("run", recipe(), "--json", "none/out.json"), "--json", "none")
    refused(tensorpress_run("run", recipe(), "--store", "/proc/store"), "/proc/store cannot be written")
    refused(tensorpress_run("run", recipe(), "--store", "long" * 100), "cannot be written")
    Path("half").mkdir()
    Path("half/models").write_text("a file")
    refused(tensorpress_run("run", recipe(), "--store", "half"), "half/models is a file")
    assert [path.name for path in Path("half").iterdir()] == ["models"]


def test_encoder_given_to_what_needs_a_causal_model(recipe, tensorpress_run):
    steps = {"cut": {"use": "finercut", "after": "model", "remove": 0.2, "distance": "js"}}
    refused(
        tensorpress_run("run", recipe(model={"source": "bert"}, steps=steps, evaluate=["size"])),
        "causal model",
        "angular",
    )
    refused(tensorpress_run("run", recipe(model={"source": "bert"})), "perplexity cannot measure", "encoder")


def test_overrides_and_options(recipe, tensorpress_run):
    refused(tensorpress_run("run", recipe(), "--set", "steps.quantize.bits"), "--set")
    refused(tensorpress_run("run", recipe(), "--set", "steps.quantize.bits=7"), "found 7")
    refused(tensorpress_run("run", recipe(), "--kernels", "warp"), "kernels", "'warp' is not known")
    refused(tensorpress_run("run"), "Missing argument")
    refused(tensorpress_run("compres"), "No such command")
