"""The sizes an MPO decomposition is asked for: kept when they can be, refused with the smallest that can where they cannot."""

import copy
import re

import pytest

from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.decompose.mpo_walk import Walk
from tensorpress.compressors.decompose.spending import curves, scaled_by, spend
from tensorpress.compressors.moments import output_moments
from tensorpress.errors import InputError
from tensorpress.structure import find_structure, linear_weight


def test_curves_menus_and_what_was_measured(make_model, make_calibration):
    model, calibration = make_model("llama"), make_calibration(20, 16)
    structure = find_structure(model)
    moments = output_moments(model, structure, structure.linear_paths, calibration.windows, 0)
    found = curves(
        model, structure, structure.linear_paths, calibration, moments, pivoted=True, multiple=2, damping=1e-3, probes=(0.3, 0.8)
    )  # fmt: skip
    dense = {path: 2.0 * linear_weight(model.get_submodule(path)).numel() for path in found}
    for path, curve in found.items():
        assert (curve.losses[:-1] >= curve.losses[1:]).all() and curve.losses[-1] == 0
        assert (curve.costs[:-1] < curve.costs[1:]).all() and curve.costs[-1] == dense[path]
        assert set(curve.measured) == {0.3, 0.8} and curve.measured[0.3] >= 0
        told = scaled_by(curve, dense[path])
        for share in (0.3, 0.8):
            wanted = max(curve.measured[share], 1e-3 * curve.at(share * dense[path]))
            assert told.at(share * dense[path]) == pytest.approx(wanted, rel=0.35)
        assert (told.losses[:-1] >= told.losses[1:]).all()
    budget = 0.5 * sum(dense.values())
    spent = spend(found, budget)
    assert sum(spent.values()) <= budget and set(spent) == set(dense)
    with pytest.raises(ValueError, match="at least"):
        spend(found, 1)


@pytest.mark.parametrize("way", ["predicted", "measured", "uniform"])
def test_budgets_in_bytes(make_model, make_calibration, way):
    model = make_model("llama")
    dense = sum(2 * linear_weight(model.get_submodule(p)).numel() for p in find_structure(model).linear_paths)
    _, report = MPO(bytes=int(0.45 * dense), allocation=way, multiple=1).compress(model, make_calibration(12, 16))
    assert 0.38 * dense < sum(row.bytes_after for row in report.layers) <= 0.45 * dense
    assert ("profile" in report.summary) == (way == "measured")
    assert sum(report.summary["plans"].values()) == len(report.layers)


def test_a_perplexity_ratio_is_kept(make_model, make_calibration):
    model = make_model("llama")
    calibration = make_calibration(12, 16)
    calibration.original = lambda: copy.deepcopy(model)
    twin = copy.deepcopy(model)
    twin, report = MPO(perplexity_ratio=1.002, multiple=1).compress(twin, calibration)
    assert report.summary["validation_perplexity_ratio"] <= 1.002
    walker = Walk(MPO(keep=0.5), model, find_structure(model), find_structure(model).linear_paths, calibration)
    assert walker._perplexity(twin) / walker._perplexity(model) == pytest.approx(
        report.summary["validation_perplexity_ratio"], rel=1e-5
    )
    assert report.summary["kept"] < 1
    with pytest.raises(InputError, match="perplexity_ratio: the model predicts no tokens"):
        MPO(perplexity_ratio=1.1).compress(make_model("bert"), calibration)


def test_a_bond_dimension_is_clamped_and_said(make_model, make_calibration):
    _, report = MPO(bond_dimension=1000).compress(make_model("llama"), make_calibration(12, 16))
    assert "the bond dimension of 21 layers is their full bond, below 1000" in report.summary["note"]
    assert report.summary["left_dense"] == 21
    _, report = MPO(bond_dimension=1000, metric="weights").compress(make_model("llama"), make_calibration())
    assert "the bond dimension of 21 layers is their full bond, below 1000" in report.summary["note"]
    _, report = MPO(bond_dimension=5, plans="low_rank", multiple=1).compress(
        make_model("llama"), make_calibration(12, 16)
    )
    assert all(row.detail["bonds"] == [5] for row in report.layers)


@pytest.mark.parametrize("sites", [2, 3])
def test_no_bond_is_above_the_one_asked_for(make_model, make_calibration, sites):
    _, report = MPO(bond_dimension=3, sites=sites, multiple=1).compress(make_model("gpt2"), make_calibration())
    assert max(bond for row in report.layers for bond in row.detail["bonds"]) == 3
    assert all(row.bytes_after < row.bytes_before for row in report.layers)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"keep": 0.0001}, r"keep: 0\.0001 cannot be met; the smallest is 0\.\d+"),
        ({"keep": 0.09, "allocation": "uniform"}, r"keep: 0\.09 cannot be met; the smallest is 0\.\d+, for .*_proj"),
        ({"bytes": 3000, "allocation": "uniform"}, r"bytes: 3,000 cannot be met; the smallest is [\d,]+, for"),
        ({"bytes": 10}, r"bytes: 10 cannot be met; the smallest is [\d,]+"),
        ({"keep": 0.5, "plans": "balanced", "sites": 7}, r"sites: 7 sites; .* of 32 x 32 carries 5 at most"),
        ({"keep": 0.5, "metric": "weights", "sites": 7}, r"sites: 7 sites; .* of 32 x 32 carries 5 at most"),
        ({"keep": 0.5, "layers": ("*nothing*",)}, r"layers: \*nothing\* matches no dense layer"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(make_model, one_line, fields, match):
    model = make_model("llama")
    with pytest.raises(InputError) as caught:
        MPO(**fields).check(model, find_structure(model))
    one_line(caught, match)


@pytest.mark.parametrize("allocation", ["predicted", "uniform"])
@pytest.mark.parametrize("size", ["keep", "bytes"])
def test_the_smallest_budget_that_is_named_is_accepted(make_model, allocation, size):
    model = make_model("llama")
    structure = find_structure(model)
    with pytest.raises(InputError) as caught:
        MPO(**{size: 1 if size == "bytes" else 1e-6}, allocation=allocation).check(model, structure)
    named = re.search(r"the smallest is ([\d.,]*\d)", str(caught.value))[1].replace(",", "")
    smallest = int(named) if size == "bytes" else float(named)
    MPO(**{size: smallest}, allocation=allocation).check(model, structure)
    with pytest.raises(InputError):
        MPO(**{size: smallest - 1 if size == "bytes" else smallest - 1e-4}, allocation=allocation).check(
            model, structure
        )


@pytest.mark.parametrize("fields", [{}, {"plans": "balanced"}, {"sites": 3}, {"plans": "balanced", "sites": 3}])
def test_a_model_can_be_made_at_the_smallest_budget_that_is_named(make_model, make_calibration, fields):
    """Layers of many shapes, some of which are cheaper as something other than a low rank."""
    sizes = {"intermediate_size": 160}
    structure = find_structure(make_model("llama", **sizes))
    with pytest.raises(InputError) as caught:
        MPO(keep=1e-6, **fields).check(make_model("llama", **sizes), structure)
    smallest = float(re.search(r"the smallest is ([\d.]*\d)", str(caught.value))[1])
    _, report = MPO(keep=smallest, sweeps=0, **fields).compress(make_model("llama", **sizes), make_calibration())
    before, after = (sum(getattr(row, f"bytes_{when}") for row in report.layers) for when in ("before", "after"))
    assert after <= smallest * before
    assert all(row.action != "dense" for row in report.layers)


def test_a_ratio_that_no_size_keeps_is_refused(make_model, make_calibration, one_line, monkeypatch):
    model = make_model("llama")
    calibration = make_calibration(12, 16)
    calibration.original = lambda: model
    monkeypatch.setattr(Walk, "_perplexity", lambda self, measured: 2.0 if measured is model else 3.0)
    with pytest.raises(InputError) as caught:
        MPO(perplexity_ratio=1.2, sweeps=0).compress(copy.deepcopy(model), calibration)
    one_line(caught, r"perplexity_ratio: 1\.2 was not reached; 1\.5 came nearest, at keep")


def test_layers_that_carry_fewer_sites_are_counted(make_model, make_calibration):
    model = make_model("llama", hidden_size=32, intermediate_size=64)  # 32 x 32 has five sites, 64 x 32 six
    _, report = MPO(keep=0.6, sites=6, allocation="uniform").compress(model, make_calibration(12, 16))
    note = "12 layers carry fewer than 6 sites; no plan of so many was tried for them"
    assert note in report.summary["note"]
    tried = {row.layer: row.detail["losses"] for row in report.layers if row.action != "dense"}
    assert tried and all(("balanced 6 sites" in losses) == ("mlp" in path) for path, losses in tried.items())
    assert all({f"balanced {count} sites" for count in (2, 3, 4, 5)} <= losses.keys() for losses in tried.values())


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"keep": 0.5, "bytes": 3}, "one of keep"), ({"perplexity_ratio": 1.1, "embeddings": 0.5}, "with embeddings use keep"),
        ({"perplexity_ratio": 1.0}, "perplexity_ratio"),
        ({"bytes": 100, "metric": "weights"}, "bytes needs metric"),
        ({"keep": 0.5, "metric": "weights", "plans": "low_rank"}, "balanced plans and the uniform allocation"),
        ({"keep": 0.5, "metric": "weights", "train_steps": 5}, "train_steps needs metric: loss or inputs"),
        ({"keep": 0.5, "metric": "weights", "allocation": "measured"}, "balanced plans and the uniform allocation"),
        ({"bond_dimension": 4, "allocation": "predicted"}, "a bond_dimension is the same for all layers"),
        ({"keep": 0.5, "probes": [0.5, 1.0]}, "probes: shares between 0 and 1"), ({"keep": 0.5, "probes": []}, "probes"),
        ({"keep": 0.5, "compensation": 2}, "compensation"), ({"keep": 0.5, "metric": "output"}, "metric"),
    ],
)  # fmt: skip
def test_bad_fields_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        MPO(**fields)
