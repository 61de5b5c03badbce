import pytest

from tensorpress.evaluators.catalog import MEASURES, applicable, relative_metrics


def test_every_measure_stands_under_its_name():
    assert list(MEASURES) == ["perplexity", "fidelity", "size", "speed", "generation", "sts"]
    assert all(measure.name == name for name, measure in MEASURES.items())
    assert [name for name, measure in MEASURES.items() if measure.timed] == ["speed"]


def test_what_applies_to_which_kind():
    assert [name for name in MEASURES if applicable(name, "causal")] == [n for n in MEASURES if n != "sts"]
    assert [name for name in MEASURES if applicable(name, "encoder")] == ["fidelity", "size", "speed", "sts"]
    with pytest.raises(KeyError):
        applicable("beauty", "causal")


def test_ratios_are_given_where_both_sides_were_measured():
    original = {"perplexity": 10.0, "parameters": 100.0, "weight_bytes": 400.0}
    assert relative_metrics({"perplexity": 12.0, "weight_bytes": 50.0}, original) == {
        "perplexity_ratio": 1.2,
        "size_ratio": 0.25,
    }
    assert relative_metrics({"perplexity_other": 12.0}, original) == {}
    assert relative_metrics({}, original) == {}
    assert relative_metrics(original, original) == {"perplexity_ratio": 1.0, "size_ratio": 2.0}
