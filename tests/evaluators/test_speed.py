from functools import partial

import pytest
import torch

from tensorpress.evaluators.speed import Speed, resident_bytes
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.structure import set_module

PREFILL = {"prefill_tokens_per_second", "original_prefill_tokens_per_second", "prefill_speedup", "peak_memory_bytes"}
DECODE = {"decode_tokens_per_second", "original_decode_tokens_per_second", "decode_speedup"}


@pytest.fixture
def make_long(make_model):
    """`make_long("bert")`: a model of two blocks with positions for a prompt and what follows it."""
    return partial(make_model, num_hidden_layers=2, max_position_embeddings=256)


@pytest.fixture
def speed(evaluate):
    """`speed(model, original)`: the result on random windows."""
    return lambda model, original: evaluate(Speed(), model, original, torch.randint(64, (9, 32)))


def test_a_quantized_model_beside_its_original(make_long, speed):
    model, original = make_long(), make_long()
    set_module(model, "model.layers.0.mlp.up_proj", QuantizedLinear(32, 48, 4, 16, bias=False))
    result = speed(model, original)
    assert result.metrics.keys() == PREFILL | DECODE
    assert all(value > 0 for value in result.metrics.values())
    for phase in ("prefill", "decode"):
        rate, reference = (result.metrics[f"{name}{phase}_tokens_per_second"] for name in ("", "original_"))
        assert result.metrics[f"{phase}_speedup"] == pytest.approx(rate / reference)
    kernels = result.conditions["kernels"]
    assert sum(number for name, number in kernels.items() if name.startswith("quantized_linear:")) == 1
    assert kernels["dense:torch"] == 14
    assert result.conditions["original_kernels"] == {"dense:torch": 15}
    assert result.conditions["prompt_tokens"] == 128
    assert result.conditions["decode_tokens"] == 32
    assert result.conditions["batch"] == 1
    assert result.conditions["threads"] == torch.get_num_threads()
    assert 3 <= result.conditions["repeats"] <= 5
    assert result.conditions["device"]
    assert result.metrics["peak_memory_bytes"] == resident_bytes(model) < resident_bytes(original)


def test_the_original_has_a_speedup_of_one(make_long, speed):
    model = make_long()
    metrics = speed(model, model).metrics
    assert metrics.keys() == PREFILL | DECODE
    assert metrics["prefill_speedup"] == metrics["decode_speedup"] == 1.0
    assert metrics["decode_tokens_per_second"] == metrics["original_decode_tokens_per_second"]


def test_prompt_and_decode_stay_within_the_positions(make_long, speed):
    model = make_long(max_position_embeddings=48)
    longest = []
    model.model.register_forward_hook(lambda m, a, o: longest.append(o.past_key_values.get_seq_length()))
    conditions = speed(model, model).conditions
    assert (conditions["prompt_tokens"], conditions["decode_tokens"]) == (24, 24)
    assert max(longest) == 48


def test_the_budget_ends_the_repeats(make_long, speed, monkeypatch):
    monkeypatch.setattr(Speed, "BUDGET", 0.0)
    model = make_long()
    assert speed(model, model).conditions["repeats"] == 3


def test_models_run_in_turns_after_a_warm_up(make_long, speed):
    order = []
    model, original = make_long(), make_long()
    for name, each in (("model", model), ("original", original)):
        each.register_forward_pre_hook(
            lambda m, a, k, name=name: order.append((name, k["input_ids"].shape[1])), with_kwargs=True
        )
    repeats = speed(model, original).conditions["repeats"]
    one = [[(name, 128)] + [(name, 1)] * 32 for name in ("model", "original")]
    assert order == (one[0] + one[1]) * (1 + repeats)


def test_encoders_have_no_decode(make_long, speed):
    model, original = make_long("bert"), make_long("bert")
    result = speed(model, original)
    assert result.metrics.keys() == PREFILL
    assert result.conditions["decode_tokens"] == 0


def test_what_a_kernel_keeps_is_resident():
    layer = QuantizedLinear(64, 32, 4, 32, bias=False)
    before = resident_bytes(layer)
    layer.kernel = "unpacked"
    layer(torch.ones(1, 64))
    assert resident_bytes(layer) == before + 4 * 64 * 32


def test_shared_weights_are_resident_once(make_long):
    tied = make_long(tie_word_embeddings=True)
    buffers = sum(b.numel() * b.element_size() for b in tied.buffers())
    assert resident_bytes(tied) == 4 * sum(p.numel() for p in tied.parameters()) + buffers
    assert resident_bytes(make_long()) - resident_bytes(tied) == 4 * 64 * 32
