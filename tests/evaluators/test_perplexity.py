import copy
import math

import pytest
import torch

from tensorpress.errors import InputError
from tensorpress.evaluators import perplexity as measure
from tensorpress.evaluators.catalog import relative_metrics
from tensorpress.evaluators.fidelity import Fidelity, divergence


@torch.no_grad()
def naive_nats(model, windows):
    model = model.double()
    total, tokens = 0.0, 0
    for window in windows:
        logits = model(window[None]).logits[0]
        for position in range(1, len(window)):
            row = [math.exp(float(x - logits[position - 1].max())) for x in logits[position - 1]]
            total -= math.log(row[int(window[position])] / sum(row))
            tokens += 1
    model.float()
    return total, tokens


def test_nll_is_that_of_a_naive_float64_loop(make_sharp, make_ids):
    model, windows = make_sharp(), make_ids(5, 13)
    nats, tokens = measure.nll(model, windows)
    expected, count = naive_nats(model, windows)
    assert tokens == count == 5 * 12
    assert nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_batches_and_chunks_change_nothing(make_sharp, make_ids, count, monkeypatch):
    model, windows = make_sharp(), make_ids(count, 11)
    whole = measure.nll(model, windows)
    monkeypatch.setattr(measure, "TOKENS_PER_FORWARD", 33)
    monkeypatch.setattr(measure, "SCRATCH_BYTES", model.config.vocab_size * 4 * 2 * 5)
    reports = []
    cut = measure.nll(model, windows, lambda *report: reports.append(report))
    assert cut[1] == whole[1] == count * 10
    assert cut[0] == pytest.approx(whole[0], rel=1e-6)
    assert reports[-1] == ("perplexity", count, count)
    assert len(reports) == -(-count // 3)


def test_large_vocabularies_get_small_batches_and_chunks():
    windows = torch.zeros(40, 256, dtype=torch.int64)
    assert [len(batch) for batch in measure.batches(windows, 1000)] == [16, 16, 8]
    assert {len(batch) for batch in measure.batches(windows, 500_000)} == {1}
    chunks = list(measure.row_chunks(1001, 150_000, copies=2))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(1001))
    assert max(chunk.stop - chunk.start for chunk in chunks) * 150_000 * 4 * 2 <= measure.SCRATCH_BYTES


@pytest.mark.parametrize(("value", "holds"), [(math.nan, math.isnan), (math.inf, math.isnan), (-math.inf, math.isinf)])
def test_bad_logits_reach_the_result(make_sharp, make_ids, evaluate, value, holds):
    model, windows = make_sharp(), make_ids(3, 9)
    original, token = copy.deepcopy(model), int(windows[1, 4])

    def spoil(module, args, output):
        output[..., token] = value

    model.lm_head.register_forward_hook(spoil)
    metrics = evaluate(measure.Perplexity(), model, model, windows).metrics
    assert holds(metrics["perplexity"])
    assert holds(metrics["bits_per_byte"])
    assert holds(divergence(original, model, windows)[0])


def test_perplexity_and_bits_per_byte_of_a_uniform_model(make_sharp, make_ids, evaluate):
    model = make_sharp()
    model.lm_head.weight.data.zero_()
    windows = make_ids(3, 17)
    others = {"other_windows": windows[:2], "other_bytes": 34, "other_name": "another"}
    result = evaluate(measure.Perplexity(), model, model, windows, **others)
    uniform = {"perplexity": 64, "bits_per_byte": 2, "perplexity_other": 64, "bits_per_byte_other": 6}
    assert result.metrics == pytest.approx(uniform, rel=1e-5)
    assert result.conditions["tokens"] == 3 * 16
    assert result.conditions["window"] == 17
    assert result.conditions["dtype"] == "float32"


def test_perplexity_too_large_for_a_float_is_infinite():
    assert measure.perplexity(1e6, 10) == math.inf
    assert measure.perplexity(math.inf, 10) == math.inf
    assert math.isnan(measure.perplexity(math.nan, 10))


def test_windows_that_cannot_be_scored_are_refused(make_sharp, make_ids, evaluate):
    model = make_sharp()
    with pytest.raises(ValueError, match="no token with a context"):
        measure.nll(model, torch.zeros(4, 1, dtype=torch.int64))
    for evaluator in (measure.Perplexity(), Fidelity()):
        with pytest.raises(InputError, match=r"data\.evaluation\.length: windows of 65 tokens; .* takes 64 at most"):
            evaluate(evaluator, model, model, make_ids(2, 65))


def test_ratio_to_the_original(make_sharp, make_ids, evaluate):
    original, model, windows = make_sharp(), make_sharp(), make_ids(4, 10)
    others = {"other_windows": windows[:1], "other_bytes": 30}
    ours, theirs = (evaluate(measure.Perplexity(), m, original, windows, **others).metrics for m in (model, original))
    ratios = relative_metrics(ours, theirs)
    expected = math.exp((naive_nats(model, windows)[0] - naive_nats(original, windows)[0]) / 36)
    assert ratios["perplexity_ratio"] == pytest.approx(expected, rel=1e-4)
    assert ratios["perplexity_ratio_other"] == ours["perplexity_other"] / theirs["perplexity_other"]
    assert relative_metrics(theirs, theirs) == {"perplexity_ratio": 1.0, "perplexity_ratio_other": 1.0}
