"""The extra `gptq`: our plain GPTQ folders open in transformers through gptqmodel, with our logits. Run by `make test-gptq`.

gptqmodel's plain torch kernel computes in the dtype that is asked for, here fp16. Its choice for 4 bits on a CPU, `aten`,
rounds scales and activations to bf16 whatever is asked for: it is held to the rounding of bf16.
"""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaConfig, Qwen2Config

pytestmark = pytest.mark.extra
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROUNDINGS = 4
"""Largest difference of logits, in units of the rounding of the largest logit."""


@pytest.fixture
def quantized(tmp_path):
    """Make a GPTQ folder: (folder, windows)."""
    pytest.importorskip("gptqmodel")
    from tensorpress.artifact import save_model
    from tensorpress.compressors.base import Calibration
    from tensorpress.compressors.quantize.gptq import GPTQ

    def make(config, **settings):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        windows = torch.randint(0, 256, (8, 64))
        calibration = Calibration(windows, windows, windows.flatten(), 0, lambda: model)
        model, _ = GPTQ(group_size=32, **settings).compress(model, calibration)
        save_model(model, tmp_path, torch.float16)
        return tmp_path, windows[:2]

    return make


def logits_of(model, windows):
    with torch.no_grad():
        return model(input_ids=windows).logits.float()


def their_kernels(model):
    return {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("gptqmodel")}


def assert_same_logits(folder, windows, theirs, dtype):
    from tensorpress.loading import load

    ours = load(folder, dtype=torch.float32)
    assert not their_kernels(ours)
    expected, found = logits_of(ours, windows), logits_of(theirs, windows)
    allowed = ROUNDINGS * torch.finfo(dtype).eps * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= allowed


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_same_logits_within_fp16_rounding(quantized, bits, symmetric):
    folder, windows = quantized(LlamaConfig(**SIZES), bits=bits, symmetric=symmetric)
    backend = GPTQConfig(bits=bits, backend="gptq_torch")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, quantization_config=backend)
    assert their_kernels(theirs) == {"TorchLinear"}
    assert_same_logits(folder, windows, theirs, torch.float16)


def test_layers_with_a_bias(quantized):
    folder, windows = quantized(Qwen2Config(**SIZES), bits=4)
    backend = GPTQConfig(bits=4, backend="gptq_torch")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, quantization_config=backend)
    assert_same_logits(folder, windows, theirs, torch.float16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_opens_as_it_stands_with_the_kernel_that_gptqmodel_chooses(quantized, bits):
    folder, windows = quantized(LlamaConfig(**SIZES), bits=bits)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    kernels = their_kernels(theirs)
    assert kernels
    assert_same_logits(folder, windows, theirs, torch.bfloat16 if "TorchAtenLinear" in kernels else torch.float16)
