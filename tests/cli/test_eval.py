"""`eval`: one model's measures, alone or beside its original."""

from __future__ import annotations

import json

import pytest

from tensorpress.evaluators.size import original_parameters


def test_eval_alone(call, original, text, work, tmp_path):
    store = tmp_path / "fresh"
    asked = ("eval", original, "--text", text, "--length", 64, "--samples", 4, "--store", store, "--json", "e.json")
    code, out, _ = call(*asked)
    assert code == 0 and "perplexity" in out
    answer = json.loads((work / "e.json").read_text())
    assert answer["model"] == str(original)
    assert answer["metrics"]["perplexity"] == pytest.approx(260, rel=0.2)  # the weights are random
    assert answer["metrics"]["size_ratio"] == pytest.approx(2, rel=0.1)
    assert not [key for key in answer["metrics"] if "perplexity_ratio" in key or "speedup" in key]
    assert answer["conditions"]["window"] == 64 and answer["conditions"]["dataset"] == "text.txt"
    assert {"tokens", "dtype", "threads", "kernels"} <= set(answer["conditions"])
    remembered = {path: path.stat().st_mtime_ns for path in (store / "evaluations").iterdir()}
    (work / "e.json").unlink()
    assert call(*asked)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (store / "evaluations").iterdir()} == remembered
    assert json.loads((work / "e.json").read_text()) == answer


def test_eval_against_the_original(call, original, text, mixed, store, work):
    code, out, _ = call(
        "eval", mixed.name[:7], "--text", text, "--length", 32, "--samples", 3, "--store", store, "--json", "e.json",
        "--against", original, "--other", text, "--measure", "perplexity", "--measure", "fidelity", "--measure", "size",
    )  # fmt: skip
    assert code == 0 and "original" in out
    answer = json.loads((work / "e.json").read_text())
    metrics = answer["metrics"]
    assert metrics["perplexity_ratio"] == pytest.approx(metrics["perplexity"] / answer["original"]["perplexity"])
    assert metrics["kl_divergence"] > 0 == answer["original"]["kl_divergence"]
    assert metrics["size_ratio"] < answer["original"]["size_ratio"]
    assert "perplexity_ratio_other" in metrics


def test_eval_of_an_artifact_alone_counts_the_dense_parameters(call, original, mixed, store, text, work):
    asked = ("eval", mixed.name, "--text", text, "--length", 32, "--measure", "size", "--store", store)
    assert call(*asked, "--json", "e.json")[0] == 0
    answer = json.loads((work / "e.json").read_text())
    dense = original_parameters(original)
    assert answer["metrics"]["bits_per_parameter"] == pytest.approx(8 * answer["metrics"]["weight_bytes"] / dense)
    assert answer["conditions"]["original_parameters"] == dense > answer["metrics"]["parameters"]


def test_eval_of_an_encoder(call, encoder, text, work, tmp_path):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("score,sentence1,sentence2\n5,a cat,a cat\n1,a cat,the moon\n3,a dog,a cat\n")
    asked = ("eval", encoder, "--text", text, "--length", 32, "--pairs", pairs, "--store", tmp_path / "s")
    assert call(*asked, "--json", "e.json")[0] == 0
    metrics = json.loads((work / "e.json").read_text())["metrics"]
    assert -100 <= metrics["sts_spearman"] <= 100
    assert "bytes" in metrics and "perplexity" not in metrics


def test_generation_shows_samples_where_it_is_asked_for(call, original, text, tmp_path):
    asked = ("eval", original, "--text", text, "--length", 32, "--samples", 2, "--store", tmp_path / "s")
    code, out, _ = call(*asked, "--measure", "generation")
    assert code == 0 and "===== continuation" in out and "quick brown" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--text", "missing.txt"), "no such file"),
        (("--length", 4096), "128 tokens at most"),
        (("--length", 4), "--length"),
        (("--measure", "perplexty"), "did you mean perplexity"),
        (("--measure", "sts"), "kind causal"),
        (("--measure", "fidelity"), "--against"),
        (("--pairs", "pairs.csv"), "kind causal"),
        (("--other", "missing.txt"), "--other"),
        (("--dtype", "int3"), "int3"),
        (("--json", "no/such/folder.json"), "--json"),
        (("--against", "no/such/original"), "no such folder"),
        (("--nonsense",), "nonsense"),
    ],
)
def test_eval_refuses(refused, original, text, tmp_path, more, said):
    assert said in refused("eval", original, "--text", text, "--length", 64, "--store", tmp_path / "none", *more)


def test_eval_refuses_a_short_text_and_other_kinds(refused, original, encoder, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    none = ("--store", tmp_path / "none", "--length", 64)
    assert "fewer than one window" in refused("eval", original, "--text", short, *none)
    assert "not its original" in refused("eval", original, "--text", text, "--against", encoder, *none)
    assert "--pairs" in refused("eval", encoder, "--text", text, "--measure", "sts", *none)
    missing = refused("eval", encoder, "--text", text, "--pairs", "nowhere.csv", *none)
    assert "--pairs: nowhere.csv: no such file" in missing
