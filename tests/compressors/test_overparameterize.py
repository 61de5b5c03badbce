"""Over-parameterised fine-tuning: the same model before training, plain layers with the same function after it."""

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from tensorpress.artifact import save_model
from tensorpress.compressors.base import Calibration
from tensorpress.compressors.recover.overparameterize import (
    NextToken,
    Overparameterize,
    contract,
    expand,
    squared_gradients,
)
from tensorpress.errors import InputError, StepError
from tensorpress.kernels.kernel_layer import kernel_layers
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.loading import layers_of, load
from tensorpress.structure import DENSE, find_structure, linear_shape, linear_weight

ODD = {"hidden_size": 56, "intermediate_size": 90}


def calibration_of(seed, teacher, length=16, validation=4):
    """Text with a pattern in it, so that what is learnt on the stream helps on the validation windows."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = teacher.config.vocab_size
    ids = torch.randint(0, vocabulary, (3000,), generator=generator)
    ids[1::2] = (ids[::2] * 7 + 3) % vocabulary
    held, stream = ids[: validation * length].view(validation, length), ids[validation * length :]
    return Calibration(stream[: 8 * length].view(8, length), held, stream, seed, lambda: teacher)


def noisy(model, scale=0.02):
    """A copy that has something to learn."""
    student = copy.deepcopy(model)
    for parameter in student.parameters():
        parameter.data.add_(torch.randn_like(parameter) * scale)
    return student


def method(**fields):
    return Overparameterize(
        **{
            "matrices": 3,
            "sites": 3,
            "tokens": 2000,
            "batch_tokens": 256,
            "learning_rate": 2e-3,
            "validate_every": 0.5,
            "precision": "float32",
        }
        | fields
    )


def form(model):
    """Modules and parameters, without their values."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("sites", [2, 3, 5])
@pytest.mark.parametrize(("name", "changes"), [("llama", {}), ("gpt2", {}), ("opt", {}), ("phi3", {}), ("llama", ODD)])
def test_the_same_function_before_training_and_after_contraction(make_model, make_ids, outputs, name, changes, sites):
    model, ids = make_model(name, num_hidden_layers=2, **changes).double(), make_ids(2, 9)
    before, shape, weights = outputs(model, ids), form(model), state(model)
    paths = find_structure(model).linear_paths
    expanded = [expand(model, path, sites) for path in paths]
    assert len(kernel_layers(model)) == len(paths)
    for one in expanded:
        outputs_, inputs = linear_shape(one.plain)
        layer = model.get_submodule(one.path)
        assert one.numbers == sum(core.numel() for core in layer.cores) >= outputs_ * inputs
        assert len(layer.cores) == sites
    torch.testing.assert_close(outputs(model, ids), before, rtol=1e-10, atol=1e-10)
    for layer in kernel_layers(model):
        for parameter in layer.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.01)
    changed = outputs(model, ids)
    assert (changed - before).norm() > 1e-3 * before.norm()
    for one in expanded:
        contract(model, one)
    torch.testing.assert_close(outputs(model, ids), changed, rtol=1e-10, atol=1e-10)
    assert form(model) == shape and all(isinstance(model.get_submodule(path), DENSE) for path in paths)
    assert model.state_dict().keys() == weights.keys()


@pytest.mark.parametrize("objective", ["distill", "next_token"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_learns_and_is_a_plain_model_again(make_model, make_ids, outputs, seed, tmp_path, name, objective):
    teacher = make_model(name, num_hidden_layers=2)
    student, calibration = noisy(teacher), calibration_of(seed, teacher)
    shape, untouched, before = form(student), state(teacher), state(student)
    # 2000 tokens are too few in one draw of 40.
    student, report = method(objective=objective, tokens=6000).compress(student, calibration)
    assert form(student) == shape and not layers_of(student) and student.training is False
    assert all(torch.equal(tensor, untouched[key]) for key, tensor in teacher.state_dict().items())
    summary = report.summary
    assert summary["improved"] and summary["loss_after"] < summary["loss_before"] and summary["tokens"] <= 6000
    assert summary["matrices"] == [row.layer for row in report.layers] and len(report.layers) == 3
    for row in report.layers:
        key = f"{row.layer}.weight"
        change = (student.state_dict()[key] - before[key]).norm() / before[key].norm()
        assert row.action == "overparameterized" and row.detail["change"] == pytest.approx(float(change), rel=1e-3)
        assert row.bytes_after == row.bytes_before == 2 * row.parameters_after == 2 * before[key].numel()
        assert row.detail["trained_numbers"] > row.parameters_before and row.detail["change"] > 0
    lesson = teacher if objective == "distill" else NextToken(teacher)
    with torch.no_grad():
        p, q = (m(input_ids=calibration.validation)[0].double().log_softmax(-1) for m in (lesson, student))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(summary["loss_after"], rel=1e-3)
    ids = make_ids(2, 9)
    save_model(student, tmp_path, torch.float32)
    torch.testing.assert_close(outputs(load(tmp_path), ids), outputs(student, ids), rtol=0, atol=1e-5)


def test_the_divergence_from_the_next_token_is_the_language_model_loss(make_model, make_ids):
    model, other, ids = make_model("llama"), make_model("llama"), make_ids(3, 11)
    with torch.no_grad():
        lesson = NextToken(other)(ids)[0].log_softmax(-1)
        logits = model(input_ids=ids).logits
        kept = other(input_ids=ids).logits[:, -1]
    terms = (lesson.exp() * (lesson - logits.log_softmax(-1))).sum(-1)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(terms.mean(), expected)
    torch.testing.assert_close(lesson[:, -1], kept.log_softmax(-1))


def test_the_matrices_with_the_largest_gradients_are_taken(make_model, seed):
    model = make_model("llama", num_hidden_layers=2)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    calibration = calibration_of(seed, model)
    found = squared_gradients(model, find_structure(model), calibration.windows)
    windows = calibration.windows
    model.zero_grad()
    loss = model(input_ids=windows, labels=windows).loss
    loss.backward()
    for path, value in found.items():
        gradient = model.get_submodule(path).weight.grad
        assert value == pytest.approx(float(gradient.double().square().mean()), rel=1e-3)
    model.zero_grad()
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    _, report = method(tokens=300).compress(model, calibration)
    best = sorted(found, key=found.get, reverse=True)[:3]
    assert {row.layer for row in report.layers} == set(best)
    assert all(row.detail["squared_gradient"] == pytest.approx(found[row.layer], rel=1e-3) for row in report.layers)


def test_a_model_that_has_nothing_to_learn_comes_back_bit_for_bit(make_model, seed):
    teacher = make_model("gpt2", num_hidden_layers=2)
    student = copy.deepcopy(teacher)
    student, report = method(learning_rate=0.5).compress(student, calibration_of(seed, teacher))
    assert not report.summary["improved"] and "note" in report.summary
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), teacher.parameters(), strict=True))
    assert all(row.action == "unchanged" and row.detail["change"] == 0 for row in report.layers)


def test_a_training_that_breaks_leaves_a_plain_model(make_model, seed):
    teacher = make_model("llama", num_hidden_layers=2)
    student = noisy(teacher)
    shape = form(student)
    with pytest.raises(StepError):
        method(learning_rate=1e30, tokens=8000).compress(student, calibration_of(seed, teacher))
    assert form(student) == shape and not any(isinstance(module, MPOLinear) for module in student.modules())


def test_two_runs_give_the_same_bits_and_sixteen_bits_are_kept(make_model, seed):
    teacher = make_model("llama", num_hidden_layers=2)
    first = noisy(teacher).bfloat16()
    second, shape = copy.deepcopy(first), form(first)
    for student in (first, second):
        _, report = method(tokens=600).compress(student, calibration_of(seed, teacher.bfloat16()))
        assert report.summary["steps"] > 0
    # A gain that storing would eat is none; at the larger rate single numbers may round elsewhere.
    for worked, rate in (
        (torch.bfloat16, 1e-7),
        (torch.float32, 1e-7),
        (torch.bfloat16, 1e-12),
        (torch.float32, 1e-12),
    ):
        calibration = replace(calibration_of(seed, teacher), stored=torch.bfloat16)
        student = copy.deepcopy(first).to(worked)
        student, report = method(tokens=600, learning_rate=rate).compress(student, calibration)
        summary = report.summary
        assert all(torch.equal(p, p.bfloat16().to(worked)) for p in student.parameters())
        same = all(torch.equal(p.to(worked), q) for p, q in zip(first.parameters(), student.parameters(), strict=True))
        assert summary["improved"] == (summary["loss_after"] < summary["loss_before"]) == ("note" not in summary)
        assert same or rate != 1e-12
        assert summary["improved"] != same and (summary["improved"] or summary["best_step"] == 0)
        assert all((row.action == "unchanged") == same for row in report.layers)
    assert form(first) == shape
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("llama", {"matrices": 22}, r"matrices: 22; the model has 21 dense layers"),
        ("llama", {"sites": 7}, r"sites: 7 sites; .* of 32 x 32 carries 5 at most"),
        ("bert", {}, "the model predicts no tokens"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(make_model, one_line, name, fields, match):
    model = make_model(name)
    with pytest.raises(InputError) as caught:
        method(**fields).check(model, find_structure(model))
    one_line(caught, match)


def test_a_model_with_quantized_layers_is_refused(make_model, make_calibration, one_line):
    from tensorpress.compressors.quantize.gptq import GPTQ

    model, _ = GPTQ(bits=4, group_size=16).compress(make_model("llama"), make_calibration())
    with pytest.raises(InputError) as caught:
        method().check(model, find_structure(model))
    one_line(caught, "quantized weights cannot be trained")


@pytest.mark.parametrize("fields", [{"matrices": 0}, {"sites": 1}, {"tokens": 0}, {"objective": "both"}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        method(**fields)


def test_gradients_that_are_not_finite(make_model, seed):
    model = make_model("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    weights = [linear_weight(model.get_submodule(path)).clone() for path in find_structure(model).linear_paths]
    with pytest.raises(StepError, match="gradients of the model's loss are not finite"):
        method().compress(model, calibration_of(seed, model))
    found = [linear_weight(model.get_submodule(path)) for path in find_structure(model).linear_paths]
    assert all(torch.equal(a, b) for a, b in zip(weights, found, strict=True))
