"""Tuning by parts leaves the rest bit for bit; squeezing takes the cheapest bond, keeps its budget and its gap."""

import copy
from dataclasses import replace

import pytest
import torch

from tensorpress.artifact import save_model
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.decompose.tensor_train import bond_spectra
from tensorpress.compressors.recover.mpo_tune import MPOTune, central_core
from tensorpress.compressors.recover.squeeze import Squeeze, _Squeezing, cores_of, layer_of, squeezable
from tensorpress.errors import InputError
from tensorpress.kernels.mpo_linear import MPOLinear, mpo_to_matrix
from tensorpress.loading import load
from tensorpress.structure import find_structure

TUNING = {"tokens": 480, "batch_tokens": 96, "length": 12, "learning_rate": 5e-3}


@pytest.fixture
def decomposed(make_model, make_calibration):
    """A model with MPO layers (or low ranks), its original, and calibration that knows the original."""

    def make(name="llama", **fields):
        original, calibration = make_model(name), make_calibration(12, 16)
        calibration.original = lambda: original
        model, _ = MPO(**fields).compress(copy.deepcopy(original), calibration)
        return model, calibration

    return make


def plain(sites):
    return {"metric": "weights", "keep": 0.5, "sites": sites}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", ["auxiliary", "central", "all"])
@pytest.mark.parametrize(("name", "sites"), [("llama", 3), ("gpt2", 5), ("bert", 4)])
def test_what_is_not_trained_is_bit_for_bit_as_it_was(
    decomposed, make_ids, outputs, tmp_path, name, sites, train, dtype
):
    model, calibration = decomposed(name, **plain(sites))
    model = model.to(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model, report = MPOTune(train=train, **TUNING).compress(model, calibration)
    expected = set()
    for path, layer in model.named_modules():
        if isinstance(layer, MPOLinear):
            central = central_core(layer)
            chosen = {"all": lambda k, c: True, "central": lambda k, c: k == c, "auxiliary": lambda k, c: k != c}[train]
            expected |= {f"{path}.cores.{k}" for k in range(sites) if chosen(k, central)}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= expected and all(p.dtype == dtype for p in model.parameters())
    assert report.layers[0].error_after <= report.layers[0].error_before
    if dtype == torch.float32:
        assert len(changed) > 0.9 * len(expected) and report.layers[0].action == "tuned"
        assert report.layers[0].error_after < report.layers[0].error_before
    numbers = sum(before[n].numel() for n in expected)
    assert report.summary["trainable_parameters"] == numbers
    cores = sum(p.numel() for n, p in before.items() if ".cores." in n)
    assert report.summary["trainable_share"] == pytest.approx(numbers / cores)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    ids = make_ids(1, 7)
    expected_outputs = outputs(model, ids)
    save_model(model, tmp_path, torch.float32)
    opened, bound = load(tmp_path, dtype=dtype, kernels="reference"), 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(outputs(opened, ids), expected_outputs, rtol=bound, atol=bound)


def test_the_central_core_is_the_one_in_the_middle():
    def layer(*numbers):
        edges = [1, *numbers, 1]
        cores = [torch.zeros(edges[k], 2, 2, edges[k + 1]) for k in range(len(edges) - 1)]
        return MPOLinear.from_cores(cores, None)

    assert central_core(layer(3, 4)) == 1 and central_core(layer(3, 4, 4, 2)) == 2
    assert central_core(layer(2, 4, 3)) == 2 and central_core(layer(3, 4, 2)) == 1


def test_tuning_needs_three_cores(make_model, decomposed, one_line):
    for model in (make_model("llama"), decomposed(**plain(2))[0], decomposed(keep=0.5, plans="low_rank")[0]):
        with pytest.raises(InputError) as caught:
            MPOTune(tokens=10).check_layers(model, find_structure(model))
        one_line(caught, "mpo_tune: no layer is a matrix product operator of three or more cores; put it behind mpo")


# --- squeezing


@pytest.mark.parametrize(
    "fields", [plain(3), plain(2), {"keep": 0.6, "plans": "low_rank", "multiple": 1}, {"keep": 0.6, "pivots": False}]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_cuts_lose_what_was_estimated(decomposed, name, fields):
    """One cut a round and no tuning: the estimate is the error, and it is the smallest there is."""
    model, calibration = decomposed(name, **fields)
    before = {path: mpo_to_matrix([c.double() for c in cores_of(layer)]) for path, layer in squeezable(model).items()}
    config = Squeeze(keep=0.9, between=1, tokens=0, gap=100)
    work = _Squeezing(config, model, find_structure(model), calibration)
    cheapest = min(
        work._cuts({path: [len(s) for s in spectra] for path, spectra in work.spectra.items()}), key=lambda c: c.error
    )
    assert work._cut() == 1
    after = {path: mpo_to_matrix([c.double() for c in cores_of(layer)]) for path, layer in squeezable(model).items()}
    errors = {path: float((after[path] - before[path]).norm() / before[path].norm()) for path in before}
    assert errors.pop(cheapest.path) == pytest.approx(cheapest.error, rel=1e-3, abs=1e-6)
    assert not any(errors.values())
    for path, layer in squeezable(model).items():
        for place, spectrum in enumerate(bond_spectra(cores_of(layer))):
            for bond in (cheapest.to,) if (path, place) == (cheapest.path, cheapest.bond) else (len(spectrum),):
                assert len(spectrum) == bond


@pytest.mark.parametrize("tokens", [0, 200])
def test_what_is_measured_is_the_model_as_it_is_stored(decomposed, tokens):
    model, calibration = decomposed(**plain(3))
    calibration = replace(calibration, stored=torch.bfloat16)
    model, report = Squeeze(keep=0.8, between=12, tokens=tokens, gap=100).compress(model, calibration)
    assert report.summary["rounds"] and all(torch.equal(p, p.bfloat16().to(p.dtype)) for p in model.parameters())
    assert report.summary["loss_after"] == pytest.approx(report.summary["rounds"][-1]["loss"], rel=1e-6)


def test_it_comes_down_to_the_budget_and_tuning_helps(decomposed, make_ids, outputs, tmp_path):
    model, calibration = decomposed(**plain(3))
    twin = copy.deepcopy(model)
    numbers = sum(p.numel() for layer in squeezable(model).values() for n, p in layer.named_parameters() if n != "bias")
    tuned, report = Squeeze(keep=0.6, between=12, tokens=480, batch_tokens=96, learning_rate=3e-3, gap=100).compress(
        model, calibration
    )
    cut, direct = Squeeze(keep=0.6, between=12, tokens=0, gap=100).compress(twin, calibration)
    for found, told in ((tuned, report), (cut, direct)):
        now = sum(p.numel() for layer in squeezable(found).values() for n, p in layer.named_parameters() if n != "bias")
        assert now <= 0.6 * numbers and told.summary["kept"] == pytest.approx(now / numbers)
        assert now == sum(row.parameters_after for row in told.layers) and told.summary["stopped"] == "keep was reached"
        assert sum(r["cuts"] for r in told.summary["rounds"]) > 12
    assert report.summary["loss_after"] < direct.summary["loss_after"]
    assert report.summary["loss_after"] == pytest.approx(report.summary["rounds"][-1]["loss"], rel=1e-5)
    ids = make_ids(1, 7)
    save_model(tuned, tmp_path, torch.float32)
    torch.testing.assert_close(outputs(load(tmp_path), ids), outputs(tuned, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 96])
def test_bonds_beside_a_cut_come_down_with_it(decomposed, tokens):
    """With sites of 2 x 2 a first bond of 3 leaves the second one 12 of its 16."""
    model, calibration = decomposed(metric="weights", keep=0.999, sites=5)
    before = sum(len(s) for layer in squeezable(model).values() for s in bond_spectra(cores_of(layer)))
    _, report = Squeeze(keep=0.8, between=8, tokens=tokens, batch_tokens=96, gap=100).compress(model, calibration)
    assert report.summary["kept"] <= 0.8 and report.summary["stopped"] == "keep was reached"
    assert sum(len(s) for layer in squeezable(model).values() for s in bond_spectra(cores_of(layer))) < before


@pytest.mark.parametrize("between", [200, 10])
def test_it_stops_at_the_gap_with_the_last_model_that_held_it(decomposed, between):
    model, calibration = decomposed(**plain(3))
    first = copy.deepcopy(model.state_dict())
    model, report = Squeeze(keep=0.1, between=between, tokens=0, gap=0).compress(model, calibration)
    told, rounds = report.summary, report.summary["rounds"]
    assert told["loss_after"] <= told["loss_before"]
    if told["stopped"].startswith("the loss rose by"):
        held = {"kept": 1, "loss": told["loss_before"]} if len(rounds) == 1 else rounds[-2]
        assert rounds[-1]["loss"] > told["loss_before"] and "note" in told
        assert told["kept"] == held["kept"] and told["loss_after"] == pytest.approx(held["loss"], rel=1e-5)
        state = model.state_dict()
        if len(rounds) == 1:
            assert state.keys() == first.keys() and all(torch.equal(state[n], first[n]) for n in first)
    else:  # a model of random weights can gain by being cut
        assert told["kept"] <= 0.1


def test_layers_of_the_same_kind_come_back(decomposed):
    for fields in (plain(3), {"keep": 0.6, "plans": "low_rank"}, {"keep": 0.6, "pivots": False}):
        model, _ = decomposed("gpt2", **fields)
        for layer in squeezable(model).values():
            again = layer_of(layer, cores_of(layer))
            assert type(again) is type(layer) and again.spec() == layer.spec()
            torch.testing.assert_close(again.dense_weight(), layer.dense_weight(), rtol=1e-4, atol=1e-5)
            assert torch.equal(again.bias, layer.bias)


def test_bad_squeezes(make_model, decomposed, one_line):
    model = make_model("llama")
    with pytest.raises(InputError) as caught:
        Squeeze(keep=0.5).check_layers(model, find_structure(model))
    one_line(caught, "squeeze: no layer is decomposed; put it behind mpo")
    model, _ = decomposed(**plain(3))
    with pytest.raises(InputError) as caught:
        Squeeze(keep=0.0001).check_layers(model, find_structure(model))
    one_line(caught, r"squeeze: keep 0\.0001 cannot be met; the smallest is 0\.\d+")
    least = float(str(caught.value).rpartition(" ")[2])
    Squeeze(keep=least).check_layers(model, find_structure(model))
    with pytest.raises(InputError):
        Squeeze(keep=least - 2e-4).check_layers(model, find_structure(model))
    for fields in ({}, {"keep": 0}, {"keep": 0.5, "stride": 0}, {"keep": 0.5, "gap": -1}):
        with pytest.raises(ValueError):
            Squeeze(**fields)
