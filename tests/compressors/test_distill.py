"""Distillation: the loss falls, the best weights come back, and everything else is as it was."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from pydantic import ValidationError

from tensorpress.compressors.base import Calibration
from tensorpress.compressors.recover.distill import FLOOR, Distill, schedule
from tensorpress.errors import InputError, StepError
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.structure import find_structure, remove_sublayer, set_module
from tensorpress.text import Marks


@pytest.fixture
def make_teacher(make_model):
    """`make_teacher("gpt2")`: a model of two blocks."""
    return partial(make_model, num_hidden_layers=2)


def pruned(model):
    """A copy without its second attention."""
    student = copy.deepcopy(model)
    remove_sublayer(student, find_structure(student).blocks[1].attention)
    return student


def calibration_of(seed, teacher, length=16, validation=4):
    """Text with a pattern in it, so that what is learnt on the stream helps on the validation windows."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = teacher.config.vocab_size
    ids = torch.randint(0, vocabulary, (3000,), generator=generator)
    ids[1::2] = (ids[::2] * 7 + 3) % vocabulary
    held = ids[: validation * length].view(validation, length)
    stream = ids[validation * length :]
    return Calibration(stream[: 4 * length].view(4, length), held, stream, seed, lambda: teacher)


def method(**fields):
    return Distill(**{"tokens": 8000, "batch_tokens": 256, "learning_rate": 3e-3, "precision": "float32"} | fields)


def kl(teacher, student, ids):
    p = teacher(input_ids=ids).logits.double().log_softmax(-1)
    q = student(input_ids=ids).logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_encoders_are_trained_on_windows_with_their_marks(seed, make_teacher):
    teacher = make_teacher("bert")
    calibration, student = calibration_of(seed, teacher), pruned(teacher)
    marks = calibration.marks = Marks((1,), (2, 3))
    calibration.validation = marks.around(calibration.validation[:, :13])
    stream, seen = calibration.stream, []
    student.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    _, report = method(tokens=1000).compress(student, calibration)
    assert report.summary["tokens"] == sum(ids.numel() for ids in seen) and seen[0].shape[1] == 16
    places = {tuple(stream[start : start + 13].tolist()) for start in range(len(stream) - 12)}
    for row in torch.cat(seen).tolist():
        assert row[0] == 1 and row[-2:] == [2, 3] and tuple(row[1:-2]) in places
    with pytest.raises(InputError, match=r"length 3; the tokenizer's marks alone are 3 tokens"):
        method(length=3).compress(student, calibration)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_falls_and_is_what_is_reported(make_teacher, seed, kind):
    teacher = make_teacher(kind)
    student, calibration = pruned(teacher), calibration_of(seed, teacher)
    untouched, before = state(teacher), kl(teacher, student, calibration.validation)
    student, report = method().compress(student, calibration)
    after = kl(teacher, student, calibration.validation)
    (row,) = report.layers
    assert row.layer == "model" and row.action == "distilled"
    assert row.error_before == pytest.approx(before, rel=1e-3, abs=1e-6) and row.error_after == pytest.approx(
        after, rel=1e-3, abs=1e-6
    )
    assert after < 0.8 * before
    assert same(teacher, untouched)
    summary = report.summary
    assert summary["tokens"] == 8000 and summary["steps"] == 32 and summary["skipped"] == 0
    assert summary["curve"][0] == (0, row.error_before) and summary["curve"][-1][0] == 8000
    assert len(summary["curve"]) == 11 and min(loss for _, loss in summary["curve"]) == row.error_after
    assert summary["trainable_parameters"] == row.parameters_before == sum(p.numel() for p in student.parameters())


def test_two_runs_give_the_same_bits(make_teacher, seed):
    teacher = make_teacher()
    first, second, third = pruned(teacher), pruned(teacher), pruned(teacher)
    _, report_a = method(precision="auto").compress(first, calibration_of(seed, teacher))
    torch.rand(3)  # the global generator has no part in it
    _, report_b = method(precision="auto").compress(second, calibration_of(seed, teacher))
    other = calibration_of(seed, teacher)
    other.seed += 1
    method(precision="auto").compress(third, other)
    assert same(first, state(second)) and report_a.summary == report_b.summary
    assert not same(first, state(third))


def test_small_backward_passes_change_nothing(make_teacher, seed, monkeypatch):
    teacher = make_teacher()
    first, second = pruned(teacher), pruned(teacher)
    method(tokens=1024).compress(first, calibration_of(seed, teacher))
    monkeypatch.setattr("tensorpress.compressors.recover.distill.MICRO_BATCH", 1)
    method(tokens=1024).compress(second, calibration_of(seed, teacher))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("rate", [1.0, 100.0])
def test_training_that_does_harm_returns_the_model_unchanged(make_teacher, seed, rate):
    teacher = make_teacher()
    student = pruned(teacher)
    before = state(student)
    student, report = method(learning_rate=rate, tokens=2000).compress(student, calibration_of(seed, teacher))
    assert same(student, before)
    assert report.layers[0].action == "unchanged" and report.summary["improved"] is False
    assert "nothing was better" in report.summary["note"]
    assert report.summary["best_step"] == 0 and report.layers[0].error_after == report.layers[0].error_before
    assert len(report.summary["curve"]) > 1


def test_the_best_measurement_wins_not_the_last(make_teacher, seed, monkeypatch):
    """The rate explodes half way: what was best before that comes back."""
    monkeypatch.setattr(
        "tensorpress.compressors.recover.distill.schedule", lambda progress: 1.0 if progress < 0.5 else 1000.0
    )
    teacher = make_teacher()
    student, calibration = pruned(teacher), calibration_of(seed, teacher)
    student, report = method().compress(student, calibration)
    losses = [loss for _, loss in report.summary["curve"]]
    assert losses[-1] > losses[0] > min(losses) == report.layers[0].error_after
    assert 0 < report.summary["best_step"] < report.summary["steps"]
    assert kl(teacher, student, calibration.validation) == pytest.approx(min(losses), rel=1e-4)


def test_a_loss_that_stays_without_a_value_ends_the_step(make_teacher, seed):
    teacher = make_teacher()
    student, calibration = pruned(teacher), calibration_of(seed, teacher)
    before, count = state(student), [0]

    def spoil(module, args, output):
        count[0] += torch.is_grad_enabled()
        return output * float("nan") if torch.is_grad_enabled() else output

    handle = student.model.norm.register_forward_hook(spoil)
    with pytest.raises(StepError, match=r"no finite loss in 10 steps in a row; try a learning_rate below 0.003"):
        method().compress(student, calibration)
    handle.remove()
    assert count == [10] and same(student, before)


def test_single_losses_without_a_value_are_skipped(make_teacher, seed):
    teacher = make_teacher()
    student, count = pruned(teacher), [0]

    def spoil(module, args, output):
        count[0] += torch.is_grad_enabled()
        return output * float("inf") if torch.is_grad_enabled() and count[0] % 4 == 0 else output

    student.model.norm.register_forward_hook(spoil)
    student, report = method().compress(student, calibration_of(seed, teacher))
    assert report.summary["skipped"] == 8 and report.summary["improved"]
    assert all(p.isfinite().all() for p in student.parameters())


def test_minutes_end_the_training(make_teacher, seed):
    teacher = make_teacher()
    _, report = method(tokens=None, minutes=0.01).compress(pruned(teacher), calibration_of(seed, teacher))
    assert report.summary["steps"] > 0 and report.layers[0].seconds < 5
    assert report.summary["curve"][-1][0] <= report.summary["tokens"]


def test_cores_are_trained_and_flags_and_kernels_come_back(make_teacher, seed):
    teacher = make_teacher()
    student = copy.deepcopy(teacher)
    layer = MPOLinear((8, 6), (8, 4), (6,), bias=False)
    for core in layer.cores:
        torch.nn.init.normal_(core, std=0.2)
    set_module(student, "model.layers.0.mlp.up_proj", layer)
    layer.kernel = "dense"
    for number, parameter in enumerate(student.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    flags = [p.requires_grad for p in student.parameters()]
    before = state(student)
    student, report = method().compress(student.train(), calibration_of(seed, teacher))
    assert report.summary["improved"]
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"model.layers.0.mlp.up_proj.cores.0", "model.layers.0.mlp.up_proj.cores.1"} <= changed
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= changed
    assert [p.requires_grad for p in student.parameters()] == flags
    assert all(p.grad is None for p in student.parameters()) and student.training and layer.kernel == "dense"


def test_tied_embeddings_stay_tied(make_teacher, seed):
    teacher = make_teacher(tie_word_embeddings=True)
    student, report = method().compress(pruned(teacher), calibration_of(seed, teacher))
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert report.summary["trainable_parameters"] == sum(p.numel() for p in student.parameters())


def test_an_encoder_learns_the_last_hidden_states(make_teacher, seed):
    teacher = make_teacher("bert")
    student, calibration = pruned(teacher), calibration_of(seed, teacher)

    def error(model):
        with torch.no_grad():
            a, b = (m(input_ids=calibration.validation)[0].double() for m in (teacher, model))
        return ((a - b).square().mean() / a.var(unbiased=False)).item()

    before = error(student)
    student, report = method().compress(student, calibration)
    assert report.layers[0].error_before == pytest.approx(before, rel=1e-3, abs=1e-6)
    assert report.layers[0].error_after == pytest.approx(error(student), rel=1e-4)
    assert error(student) < 0.8 * before


def test_a_bfloat16_model_keeps_its_dtype_and_is_measured_in_it(make_teacher, seed):
    teacher = make_teacher().to(torch.bfloat16)
    student, calibration = pruned(teacher), calibration_of(seed, teacher)
    before = kl(teacher, student, calibration.validation)
    student, report = method().compress(student, calibration)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert report.layers[0].error_before == pytest.approx(before, rel=1e-3, abs=1e-6)
    assert report.layers[0].error_after == pytest.approx(kl(teacher, student, calibration.validation), rel=1e-3)
    assert report.layers[0].error_after < before


def test_temperature_and_bfloat16_arithmetic(make_teacher, seed):
    teacher = make_teacher()
    student, report = method(temperature=2.0, precision="bfloat16").compress(
        pruned(teacher), calibration_of(seed, teacher)
    )
    assert report.summary["precision"] == "bfloat16" and report.summary["improved"]
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_budgets_smaller_than_a_step(make_teacher, seed):
    teacher = make_teacher()
    _, report = method(tokens=1).compress(pruned(teacher), calibration_of(seed, teacher))
    assert (report.summary["steps"], report.summary["tokens"]) == (1, 16)
    _, report = method(tokens=300).compress(pruned(teacher), calibration_of(seed, teacher))
    assert (report.summary["steps"], report.summary["tokens"]) == (2, 288)


def test_the_schedule_rises_and_falls():
    points = [schedule(i / 1000) for i in range(1001)]
    peak = points.index(max(points))
    assert points[:peak] == sorted(points[:peak]) and points[peak:] == sorted(points[peak:], reverse=True)
    assert max(points) == pytest.approx(1) and points[-1] == pytest.approx(FLOOR) and 0 < points[0] < FLOOR


def test_refusals(make_teacher, seed):
    for fields in ({}, {"tokens": 5, "minutes": 1.0}, {"tokens": 0}, {"tokens": 5, "validate_every": 0}):
        with pytest.raises(ValidationError):
            Distill(**fields)
    model = make_teacher()
    with pytest.raises(InputError, match="length 65 is more than the model's 64 positions"):
        method(length=65).check(model, find_structure(model))
    with pytest.raises(InputError, match="the calibration text has 10 tokens, fewer than one window of 16"):
        short = calibration_of(seed, model)
        short.stream = short.stream[:10]
        method().compress(pruned(model), short)
    with pytest.raises(InputError, match="no window for validation"):
        method().compress(pruned(model), calibration_of(seed, model, validation=0))
    assert "gptq" in Distill.may_not_follow
    set_module(model, "model.layers.0.mlp.up_proj", QuantizedLinear(32, 48, 4, 16, bias=False))
    with pytest.raises(InputError, match="quantized weights cannot be trained; put it before the quantization"):
        method().check(model, find_structure(model))


@pytest.mark.parametrize("rate", [3e-3, 1e-7, 1e-12])
def test_a_gain_that_storing_would_eat_is_none(make_teacher, seed, rate):
    """Worked on in float32, stored in bf16: what counts is the model as it will be stored."""
    teacher = make_teacher("llama").bfloat16().float()
    student = pruned(teacher)
    calibration, before = replace(calibration_of(seed, teacher), stored=torch.bfloat16), state(student)
    student, report = method(learning_rate=rate).compress(student, calibration)
    (row,) = report.layers
    assert all(p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float()) for p in student.parameters())
    assert row.error_after == pytest.approx(kl(teacher, student, calibration.validation), rel=1e-3)
    assert report.summary["improved"] == (row.error_after < row.error_before) != same(student, before)
    if rate != 1e-7:  # where single numbers may round elsewhere
        assert report.summary["improved"] == (rate == 3e-3)
