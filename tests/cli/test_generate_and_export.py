"""`generate` and `export`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tensorpress.artifact import RECORD, save_model
from tensorpress.evaluators import reading
from tensorpress.kernels import cpu_linear
from tensorpress.loading import load


def test_generate(call, original, mixed, store):
    code, out, _ = call("generate", original, "  the cat\n\tsat", "--tokens", 12)
    assert code == 0 and out.startswith("  the cat\n\tsat") and len(out) > len("  the cat\n\tsat\n")
    assert "\x1b" not in out
    assert call("generate", original, "  the cat\n\tsat", "--tokens", 12, "--seed", 5)[1] == out
    drawn = [call("generate", original, "the cat", "--temperature", 1.0, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert call("generate", mixed.name, "the cat", "--tokens", 3, "--kernels", "reference", "--store", store)[0] == 0


@pytest.mark.skipif(cpu_linear.compiled() is None, reason="the compiled kernels were not built")
def test_the_compiled_decoder_writes_what_transformers_does(call, plain, work, store, monkeypatch):
    folder = work / "rounded"
    shutil.copytree(plain, folder)
    (folder / RECORD).unlink()
    model = load(plain, kernels="reference")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_model(model, folder, torch.bfloat16)
    runners = []
    take = reading.reader_for
    monkeypatch.setattr(reading, "reader_for", lambda *asked: runners.append(take(*asked)) or runners[-1])
    asked = ("generate", folder, "the cat", "--tokens", 20)
    texts = [call(*asked, "--kernels", kernels)[1] for kernels in ("reference", "cpu", "auto")]
    assert len(set(texts)) == 1 and len(texts[0]) > len("the cat\n")
    assert [reader.runner for reader in runners[:2]] == ["transformers", "compiled decoder"]
    drawn = [call(*asked, "--kernels", "cpu", "--temperature", 1.0, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 5.0}))
    runners.clear()
    other = call(*asked, "--kernels", "cpu")
    assert other[0] == 0 and other[1] != texts[0] and not runners  # transformers, which knows what that is


def test_every_kernel_writes_the_same_text(call, plain, store):
    texts = {
        call("generate", plain, "the cat", "--tokens", 20, "--kernels", k)[1] for k in ("auto", "reference", "unpacked")
    }
    assert len(texts) == 1


def test_generate_refuses(refused, original, encoder):
    assert "encoder" in refused("generate", encoder, "the cat")
    assert "empty" in refused("generate", original, "")
    assert "128 in all" in refused("generate", original, "the cat", "--tokens", 200)
    assert "--temperature" in refused("generate", original, "the cat", "--temperature", -1)
    assert "known: auto" in refused("generate", original, "the cat", "--kernels", "magic")


def test_export(call, refused, plain, mixed, store, original, work):
    code, out, _ = call("export", plain, "out", "--format", "gptq")
    assert code == 0 and out == "out\n"
    config = json.loads((work / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert "exists already" in refused("export", plain, "out")
    assert "not quantized" in refused("export", original, "other")
    assert "decomposed" in refused("export", mixed.name, "other", "--store", store)
    for layout in ("gguf", "compressed-tensors", "onnx"):
        assert "not built yet; there is: gptq" in refused("export", plain, "other", "--format", layout)
    assert "did you mean gptq" in refused("export", plain, "other", "--format", "gtpq")
