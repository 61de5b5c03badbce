"""PELA: the rank that a share of the numbers gives, balanced factors, and a training that keeps to its bound."""

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from tensorpress.artifact import save_model
from tensorpress.compressors.base import Calibration
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.compressors.recover.pela import PELA, pela_rank
from tensorpress.errors import InputError
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.loading import load
from tensorpress.structure import find_structure, linear_weight


def calibration_of(seed, teacher, length=16, validation=4):
    """Text with a pattern in it, so that what is learnt on the stream helps on the validation windows."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = teacher.config.vocab_size
    ids = torch.randint(5, vocabulary, (3000,), generator=generator)
    ids[1::2] = (ids[::2] * 7 + 3) % (vocabulary - 5) + 5
    held, stream = ids[: validation * length].view(validation, length), ids[validation * length :]
    return Calibration(stream[: 4 * length].view(4, length), held, stream, seed, lambda: teacher)


def method(**fields):
    return PELA(
        **{"tokens": 6000, "batch_tokens": 256, "learning_rate": 3e-3, "validate_every": 0.5, "precision": "float32"}
        | fields
    )


def factors_of(model):
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    return [p for layer in layers for p in (layer.inner.weight, layer.outer.weight)]


def state_of_blocks(model, ids):
    """What each block gives, in float64."""
    seen, handles = [], []
    for block in find_structure(model).blocks:
        hook = lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
        handles.append(model.get_submodule(block.path).register_forward_hook(hook))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return [states.double() for states in seen]


def loss(teacher, student, ids, weight):
    with torch.no_grad():
        p, q = (model(input_ids=ids)[0].double().log_softmax(-1) for model in (teacher, student))
    task = float((p.exp() * (p - q)).sum(-1).mean())
    pairs = zip(state_of_blocks(teacher, ids), state_of_blocks(student, ids), strict=True)
    errors = [float((b - a).square().mean() / a.var(unbiased=False)) for a, b in pairs]
    return task + weight * sum(errors) / len(errors)


@pytest.mark.parametrize("c", [1.5, 2, 3])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (33, 77), (768, 256), (5, 40)])
def test_the_rank_keeps_one_part_in_c(outputs, inputs, c):
    rank = pela_rank(outputs, inputs, c)
    assert rank * (outputs + inputs) <= outputs * inputs / c < (rank + 1) * (outputs + inputs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3"])
def test_the_factors_are_the_svd_and_balanced(make_model, make_calibration, make_ids, outputs, tmp_path, name):
    model = make_model(name).double()
    weights = {p: linear_weight(model.get_submodule(p)).detach().clone() for p in find_structure(model).linear_paths}
    biases = {path: model.get_submodule(path).bias for path in weights}
    model, report = PELA(c=2, tokens=0).compress(model, make_calibration())
    assert [row.layer for row in report.layers] == list(weights) and report.summary["kept"] <= 0.5
    for row in report.layers:
        layer, weight = model.get_submodule(row.layer), weights[row.layer]
        rank = row.detail["rank"]
        assert isinstance(layer, LowRankLinear) and layer.pivots is None and layer.rank == rank
        singular = torch.linalg.svdvals(weight)
        inner, outer = layer.inner.weight, layer.outer.weight
        torch.testing.assert_close(inner @ inner.T, singular[:rank].diag(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(outer.T @ outer, singular[:rank].diag(), rtol=1e-6, atol=1e-6)
        error = float((singular[rank:].square().sum() / singular.square().sum()).sqrt())
        assert row.error_after == pytest.approx(error, rel=1e-6) and row.error_before == row.error_after
        assert row.bytes_after == 2 * row.parameters_after == 2 * (inner.numel() + outer.numel())
        assert (layer.bias is None) == (biases[row.layer] is None)
        assert layer.bias is None or torch.equal(layer.bias, biases[row.layer])
    ids = make_ids(2, 9)
    model = model.float()
    save_model(model, tmp_path, torch.float32)
    torch.testing.assert_close(outputs(load(tmp_path), ids), outputs(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_learns_outputs_and_features(make_model, seed, name):
    teacher = make_model(name, num_hidden_layers=2)
    calibration, untouched = calibration_of(seed, teacher), copy.deepcopy(teacher.state_dict())
    start, _ = method(tokens=0).compress(copy.deepcopy(teacher), calibration)
    student, report = method(feature_weight=2.0).compress(copy.deepcopy(teacher), calibration)
    summary = report.summary
    ids = calibration.validation
    assert summary["loss_before"] == pytest.approx(loss(teacher, start, ids, 2.0), rel=1e-3)
    assert summary["loss_after"] == pytest.approx(loss(teacher, student, ids, 2.0), rel=1e-3)
    assert summary["improved"] and summary["loss_after"] < 0.9 * summary["loss_before"]
    assert all(row.error_after != row.error_before and row.detail["largest_change"] > 0 for row in report.layers)
    assert all(torch.equal(tensor, untouched[key]) for key, tensor in teacher.state_dict().items())
    assert all(p.dtype == torch.float32 and p.grad is None for p in student.parameters())


@pytest.mark.parametrize("rate", [5e-3, 1e-8, 1e-12])
@pytest.mark.parametrize("worked", [torch.bfloat16, torch.float32])
def test_what_counts_is_the_model_as_it_is_stored(make_model, seed, rate, worked):
    """Changes too small for the stored precision are no gain: the truncated SVD stays, and is said."""
    teacher = make_model("llama", num_hidden_layers=2).bfloat16().to(worked)
    calibration = replace(calibration_of(seed, teacher), stored=torch.bfloat16)
    start, _ = method(tokens=0).compress(copy.deepcopy(teacher), calibration)
    student, report = method(learning_rate=rate).compress(copy.deepcopy(teacher), calibration)
    summary, ids = report.summary, calibration.validation
    assert all(p.dtype == worked and torch.equal(p, p.bfloat16().to(worked)) for p in student.parameters())
    assert summary["loss_before"] == pytest.approx(loss(teacher, start, ids, 1.0), rel=0.02)
    assert summary["loss_after"] == pytest.approx(loss(teacher, student, ids, 1.0), rel=0.02)
    assert summary["improved"] == (summary["loss_after"] < summary["loss_before"]) == ("note" not in summary)
    if rate != 1e-8:  # where single numbers may round elsewhere
        assert summary["improved"] == (rate == 5e-3)
    if not summary["improved"]:
        assert summary["loss_after"] == summary["loss_before"]
        assert all(torch.equal(a, b) for a, b in zip(start.parameters(), student.parameters(), strict=True))


def test_errors_are_those_of_the_stored_factors(make_model, make_calibration):
    model = make_model("llama", num_hidden_layers=1)
    weights = {p: linear_weight(model.get_submodule(p)).detach().clone() for p in find_structure(model).linear_paths}
    calibration = replace(make_calibration(), stored=torch.bfloat16)
    model, report = PELA(c=2, tokens=0).compress(model, calibration)
    for row in report.layers:
        found, weight = model.get_submodule(row.layer).dense_weight().detach(), weights[row.layer]
        error = float((found.double() - weight.double()).norm() / weight.double().norm())
        assert row.error_before == row.error_after == pytest.approx(error, rel=1e-9)


def test_features_are_nearer_where_they_are_learnt(make_model, seed):
    teacher = make_model("llama", num_hidden_layers=3)
    calibration, distances = calibration_of(seed, teacher), {}
    for weight in (0.0, 20.0):
        student, _ = method(feature_weight=weight, tokens=12_000).compress(copy.deepcopy(teacher), calibration)
        ids = calibration.validation
        distances[weight] = loss(teacher, student, ids, 1.0) - loss(teacher, student, ids, 0.0)
    assert distances[20.0] < distances[0.0]


@pytest.mark.parametrize("bound", [1e-4, 3e-3])
def test_the_bound_holds(make_model, seed, bound):
    teacher = make_model("llama", num_hidden_layers=2)
    calibration = calibration_of(seed, teacher)
    start, _ = method(tokens=0).compress(copy.deepcopy(teacher), calibration)
    student, report = method(bound=bound).compress(copy.deepcopy(teacher), calibration)
    changes = [float((b - a).detach().abs().max()) for a, b in zip(factors_of(start), factors_of(student), strict=True)]
    assert 0.9 * bound < max(changes) <= bound * (1 + 1e-3)
    assert max(row.detail["largest_change"] for row in report.layers) == pytest.approx(max(changes), rel=1e-6)
    free, _ = method().compress(copy.deepcopy(teacher), calibration)
    assert (
        max(float((b - a).detach().abs().max()) for a, b in zip(factors_of(start), factors_of(free), strict=True))
        > bound
    )


def test_some_layers_and_then_quantized(make_model, seed, make_ids, outputs, tmp_path):
    teacher = make_model("llama", num_hidden_layers=2)
    model, report = method(layers=("*mlp*",), tokens=500).compress(
        copy.deepcopy(teacher), calibration_of(seed, teacher)
    )
    assert len(report.layers) == 6 and all("mlp" in row.layer for row in report.layers)
    model, _ = GPTQ(bits=8, group_size=-1).compress(model, calibration_of(seed, teacher))
    save_model(model, tmp_path, torch.float32)
    ids = make_ids(2, 9)
    torch.testing.assert_close(outputs(load(tmp_path), ids), outputs(model, ids), rtol=0, atol=1e-4)


def test_an_original_with_other_blocks_is_refused(make_model, seed, one_line):
    teacher = make_model("gpt2", num_hidden_layers=2)
    with pytest.raises(InputError) as caught:
        method().compress(make_model("llama", num_hidden_layers=2), calibration_of(seed, teacher))
    one_line(caught, "other blocks than the original")


def test_factors_are_not_taken_for_layers(make_model, make_calibration, one_line):
    model, _ = PELA(c=2, tokens=0).compress(make_model("llama"), make_calibration())
    with pytest.raises(InputError) as caught:
        PELA(c=2, tokens=0).check(model, find_structure(model))
    one_line(caught, "matches no dense layer")


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"c": 100}, r"c: 100 leaves no rank for .*"), ({"layers": ("*no*such*",)}, "matches no dense")],
)
def test_what_cannot_be_is_refused_before_any_work(make_model, one_line, fields, match):
    model = make_model("llama")
    with pytest.raises(InputError) as caught:
        method(**fields).check(model, find_structure(model))
    one_line(caught, match)


@pytest.mark.parametrize("fields", [{"c": 1}, {"tokens": -1}, {"bound": 0}, {"feature_weight": -1}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        method(**fields)
