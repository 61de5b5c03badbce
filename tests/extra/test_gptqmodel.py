"""The extra `gptq`: our plain GPTQ folders open in transformers through gptqmodel, with our logits. Run by `make test-gptq`."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.extra
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_gptq_folder_opens_through_gptqmodel(tmp_path, bits):
    pytest.importorskip("gptqmodel")
    from tensorpress.artifact import save_model
    from tensorpress.compressors.base import Calibration
    from tensorpress.compressors.quantize.gptq import GPTQ
    from tensorpress.loading import load

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    windows = torch.randint(0, 256, (8, 64))
    model, _ = GPTQ(bits=bits, group_size=32).compress(
        model, Calibration(windows, windows, windows.flatten(), 0, lambda: model)
    )
    save_model(model, tmp_path, torch.float16)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    layers = {type(module).__module__.split(".")[0] for module in theirs.modules()}
    assert "gptqmodel" in layers, f"opened without gptqmodel: {layers}"
    ours = load(tmp_path, dtype=torch.float32)
    assert not any(type(m).__module__.startswith("gptqmodel") for m in ours.modules())
    with torch.no_grad():
        expected = ours(input_ids=windows[:2]).logits
        found = theirs(input_ids=windows[:2]).logits.float()
    assert (found - expected).abs().max() < 5e-3 * max(1.0, float(expected.abs().max()))
