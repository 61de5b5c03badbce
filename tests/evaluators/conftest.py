"""Models far from uniform, and what a measure says of them."""

from __future__ import annotations

import pytest

from tensorpress.evaluators.base import EvaluationData, Subject


@pytest.fixture
def make_sharp(make_model):
    """`make_sharp("bert")`: two blocks, and outputs far from uniform."""

    def make(name="llama"):
        model = make_model(name, num_hidden_layers=2)
        for parameter in model.parameters():
            parameter.data.mul_(3)
        return model

    return make


@pytest.fixture
def evaluate(tmp_path):
    """`evaluate(Fidelity(), model, original, windows)`: the result for a model, which may be the original itself."""

    def run(measure, model, original, windows, tokenizer=None, **fields):
        subject = Subject(model, lambda: original, tmp_path, tmp_path, model is original)
        return measure.evaluate(subject, EvaluationData(windows, 3 * windows.numel(), tokenizer, "random", **fields))

    return run
