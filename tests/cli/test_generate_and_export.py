"""`generate` and `export`."""

from __future__ import annotations

import json


def test_generate(call, original, mixed, store):
    code, out, _ = call("generate", original, "  the cat\n\tsat", "--tokens", 12)
    assert code == 0 and out.startswith("  the cat\n\tsat") and len(out) > len("  the cat\n\tsat\n")
    assert "\x1b" not in out
    assert call("generate", original, "  the cat\n\tsat", "--tokens", 12, "--seed", 5)[1] == out
    drawn = [call("generate", original, "the cat", "--temperature", 1.0, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert call("generate", mixed.name, "the cat", "--tokens", 3, "--kernels", "reference", "--store", store)[0] == 0


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
