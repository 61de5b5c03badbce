import copy
import random

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from tensorpress.evaluators import perplexity
from tensorpress.evaluators.base import EvaluationData, Subject
from tensorpress.evaluators.fidelity import Fidelity, divergence, embedding_cosine


@pytest.fixture
def seed():
    drawn = random.SystemRandom().randrange(1 << 30)
    print("seed", drawn)
    return drawn


SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 53,
    "max_position_embeddings": 64,
}


def tiny(kind, seed):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "causal" else BertModel(BertConfig(**SIZES))
    for parameter in model.parameters():
        parameter.data.mul_(6)
    return model.eval()


def random_windows(seed, count=5, length=12):
    return torch.randint(53, (count, length), generator=torch.Generator().manual_seed(seed))


def evaluate(model, original, windows, folder):
    subject = Subject(model, lambda: original, folder, folder, model is original)
    return Fidelity().evaluate(subject, EvaluationData(windows, windows.numel(), None, "random"))


def test_divergence_of_a_model_from_its_copy_is_zero(seed):
    model = tiny("causal", seed)
    assert divergence(model, copy.deepcopy(model), random_windows(seed)) == (0.0, 1.0)


@torch.no_grad()
def test_divergence_is_that_of_a_naive_float64_loop(seed, monkeypatch):
    original, model, windows = tiny("causal", seed), tiny("causal", seed + 1), random_windows(seed)
    monkeypatch.setattr(perplexity, "TOKENS_PER_FORWARD", 24)
    monkeypatch.setattr(perplexity, "SCRATCH_BYTES", 53 * 4 * 6 * 5)
    kl, agreement = divergence(original, model, windows)
    p, q = (m.double()(windows).logits.softmax(-1) for m in (original, model))
    naive = sum(
        float(p[w, t, v] * (p[w, t, v].log() - q[w, t, v].log()))
        for w in range(5)
        for t in range(12)
        for v in range(53)
    )
    assert kl == pytest.approx(naive / 60, rel=1e-4)
    assert agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_the_original_is_not_computed(kind, seed, tmp_path):
    model = tiny(kind, seed)
    model.forward = None
    expected = {"kl_divergence": 0.0, "top1_agreement": 1.0} if kind == "causal" else {"embedding_cosine": 1.0}
    assert evaluate(model, model, random_windows(seed), tmp_path).metrics == expected


def test_a_limited_number_of_tokens_is_read(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(Fidelity, "TOKENS", 30)
    original, model, windows = tiny("causal", seed), tiny("causal", seed + 1), random_windows(seed)
    result = evaluate(model, original, windows, tmp_path)
    assert result.conditions["fidelity_tokens"] == 24
    assert result.metrics["kl_divergence"] == divergence(original, model, windows[:2])[0] > 0


@torch.no_grad()
def test_embedding_cosine_of_encoders(seed, tmp_path):
    original, model, windows = tiny("encoder", seed), tiny("encoder", seed + 1), random_windows(seed)
    assert embedding_cosine(original, copy.deepcopy(original), windows) == pytest.approx(1.0, abs=1e-6)
    measured = evaluate(model, original, windows, tmp_path).metrics["embedding_cosine"]
    a, b = (m.double()(windows).last_hidden_state.mean(1) for m in (original, model))
    expected = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    assert measured == pytest.approx(float(expected), abs=1e-5)
