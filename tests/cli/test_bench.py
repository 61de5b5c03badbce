"""`bench`: the speed of a model, alone or beside its original."""

from __future__ import annotations

import json

import pytest
import torch


def test_bench(call, original, mixed, store, work):
    threads = torch.get_num_threads()
    asked = ("bench", mixed.name, "--against", original, "--prompt", 16, "--tokens", 3, "--repeats", 2, "--threads", 1)
    code, out, _ = call(*asked, "--store", store, "--json", "b.json")
    assert code == 0 and "quantized_linear:" in out and "prefill" in out
    answer = json.loads((work / "b.json").read_text())
    metrics, conditions = answer["metrics"], answer["conditions"]
    assert metrics["decode_speedup"] == pytest.approx(
        metrics["decode_tokens_per_second"] / metrics["original_decode_tokens_per_second"]
    )
    assert (conditions["prompt_tokens"], conditions["decode_tokens"], conditions["repeats"]) == (16, 3, 2)
    assert conditions["threads"] == 1 and conditions["speed_dtype"] == conditions["dtype"] == "float32"
    assert (conditions["dataset"], conditions["tokens"], conditions["window"]) == ("random tokens", 19, 16)
    assert any(name.startswith("mpo_linear:") for name in conditions["kernels"])
    assert conditions["original_kernels"].keys() == {"dense:torch"}
    assert torch.get_num_threads() == threads


def test_bench_alone_claims_no_speedup(call, mixed, store, encoder, work):
    asked = ("bench", mixed.name, "--repeats", 1, "--tokens", 2, "--kernels", "reference", "--store", store)
    code, out, _ = call(*asked, "--json", "b.json")
    assert code == 0 and "--against" in out
    answer = json.loads((work / "b.json").read_text())
    assert answer["metrics"].keys() == {"prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes"}
    assert "original_kernels" not in answer["conditions"]
    assert call("bench", encoder, "--repeats", 1, "--json", "b.json")[0] == 0
    assert "decode_tokens_per_second" not in json.loads((work / "b.json").read_text())["metrics"]


def test_bench_refuses(refused, original, encoder):
    assert "known: auto" in refused("bench", original, "--kernels", "magic")
    assert "--repeats" in refused("bench", original, "--repeats", 0)
    assert "not its original" in refused("bench", original, "--against", encoder)
    assert "--threads" in refused("bench", original, "--threads", 0)


def test_bench_by_backend(call, refused, original, plain, store, work):
    asked = ("bench", plain, "--against", original, "--prompt", 8, "--tokens", 2, "--repeats", 1)
    code, out, _ = call(*asked, "--batch", "2,1", "--store", store, "--json", "b.json")
    assert code == 0 and "by" in out and "of reading" in out
    for column in ("prefill", "decode", "p50", "p90", "GB/s", "memory"):
        assert column in out, column
    rows = json.loads((work / "b.json").read_text())["backends"]
    assert {row["batch"] for row in rows} == {1, 2} and {row["of"] for row in rows} == {"model", "original"}
    assert {row["backend"] for row in rows if row["of"] == "original"} >= {"torch"}
    assert all(row["decode_tokens_per_second"] > 0 for row in rows)
    assert call(*asked, "--batch", "1", "--kernels", "reference", "--store", store, "--json", "b.json")[0] == 0
    rows = json.loads((work / "b.json").read_text())["backends"]
    assert {row["backend"] for row in rows if row["of"] == "model"} == {"reference"}
    assert call(*asked, "--batch", "0", "--store", store, "--json", "b.json")[0] == 0
    assert "backends" not in json.loads((work / "b.json").read_text())
    for text in ("", "a", "1;2", "-1", "2000", "1.5"):
        assert "whole numbers from 1 to 1024" in refused("bench", plain, f"--batch={text}")
