import copy

import pytest
import torch

from tensorpress.evaluators import perplexity
from tensorpress.evaluators.fidelity import Fidelity, divergence, embedding_cosine


def test_divergence_of_a_model_from_its_copy_is_zero(make_sharp, make_ids):
    model = make_sharp()
    assert divergence(model, copy.deepcopy(model), make_ids(5, 12)) == (0.0, 1.0)


@torch.no_grad()
def test_divergence_is_that_of_a_naive_float64_loop(make_sharp, make_ids, monkeypatch):
    original, model, windows = make_sharp(), make_sharp(), make_ids(5, 12)
    monkeypatch.setattr(perplexity, "TOKENS_PER_FORWARD", 24)
    monkeypatch.setattr(perplexity, "SCRATCH_BYTES", 64 * 4 * 6 * 5)
    kl, agreement = divergence(original, model, windows)
    p, q = (m.double()(windows).logits.softmax(-1) for m in (original, model))
    naive = sum(
        float(p[w, t, v] * (p[w, t, v].log() - q[w, t, v].log()))
        for w in range(5)
        for t in range(12)
        for v in range(64)
    )
    assert kl == pytest.approx(naive / 60, rel=1e-4)
    assert agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_original_is_not_computed(make_sharp, make_ids, evaluate, kind):
    model = make_sharp(kind)
    model.forward = None
    expected = {"kl_divergence": 0.0, "top1_agreement": 1.0} if kind == "llama" else {"embedding_cosine": 1.0}
    assert evaluate(Fidelity(), model, model, make_ids(5, 12)).metrics == expected


def test_a_limited_number_of_tokens_is_read(make_sharp, make_ids, evaluate, monkeypatch):
    monkeypatch.setattr(Fidelity, "TOKENS", 30)
    original, model, windows = make_sharp(), make_sharp(), make_ids(5, 12)
    result = evaluate(Fidelity(), model, original, windows)
    assert result.conditions["fidelity_tokens"] == 24
    assert result.metrics["kl_divergence"] == divergence(original, model, windows[:2])[0] > 0


@torch.no_grad()
def test_embedding_cosine_of_encoders(make_sharp, make_ids, evaluate):
    original, model, windows = make_sharp("bert"), make_sharp("bert"), make_ids(5, 12)
    assert embedding_cosine(original, copy.deepcopy(original), windows) == pytest.approx(1.0, abs=1e-6)
    measured = evaluate(Fidelity(), model, original, windows).metrics["embedding_cosine"]
    a, b = (m.double()(windows).last_hidden_state.mean(1) for m in (original, model))
    expected = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    assert measured == pytest.approx(float(expected), abs=1e-5)
