"""Training of one block: the held-out loss falls or the block stays as it came, and nothing but the factors moves."""

import copy

import pytest
import torch

from tensorpress.compressors.calibration import walk
from tensorpress.compressors.decompose.block_training import _Data, _schedule, train_block
from tensorpress.compressors.decompose.site_plans import WORD, fit, plans
from tensorpress.structure import find_structure, linear_shape, linear_weight, set_module

WINDOWS, LENGTH, BATCH = 40, 12, 8


def decompose(model, block, kind, pivoted, share=0.5):
    """Replace every linear layer of a block, for its weight alone."""
    for path in block.linear_paths:
        layer = model.get_submodule(path)
        plan = next(plan for plan in plans(*linear_shape(layer), 2, "auto") if plan.kind == kind)
        bond = plan.largest(share * WORD * linear_weight(layer).numel(), pivoted)
        arguments = (linear_weight(layer).detach(), layer.bias, None, None)
        found = fit(plan, bond, *arguments, pivoted=pivoted, sweeps=0, damping=1e-3)
        set_module(model, path, found.layer)


def visited(model, ids, act, kind="low_rank", pivoted=True):
    """Decompose the second block of a model, hand its inputs to `act`, and return what that gives."""
    told = []

    def visit(block, inputs):
        if block.index == 1:
            decompose(model, block, kind, pivoted)
            told.append(act(inputs))
        return []

    walk(model, find_structure(model), ids, visit, with_original=True, batch_tokens=BATCH * LENGTH)
    return told[0]


def held_out_loss(inputs, windows):
    """The relative error on the last windows, from scratch."""
    ours, theirs = (torch.cat(list(one.run()))[-windows:].double() for one in (inputs, inputs.original))
    return float((ours - theirs).square().sum() / theirs.square().sum())


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module, before):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


FORMS = [("low_rank", True), ("low_rank", False), ("balanced", True), ("balanced", False), ("folded", True)]
CASES = [("llama", *form) for form in FORMS] + [(name, "low_rank", True) for name in ("gpt2", "bert", "gemma3")]


@pytest.mark.parametrize(("name", "kind", "pivoted"), CASES)
def test_trained_factors_come_nearer_and_all_else_stays(make_model, make_ids, name, kind, pivoted):
    model, ids = make_model(name), make_ids(WINDOWS, LENGTH)

    def act(inputs):
        factors = {n for n, _ in inputs.module.named_parameters() if any(f in n for f in ("cores", "inner", "outer"))}
        before, original = state(inputs.module), state(inputs.original.module)
        for parameter in inputs.module.parameters():
            parameter.requires_grad_(bool(torch.rand(()) < 0.5))
        next(inputs.module.parameters()).grad = (grad := torch.ones_like(next(inputs.module.parameters())))
        flags = [p.requires_grad for p in inputs.module.parameters()]
        expected = held_out_loss(inputs, WINDOWS // 8)
        told = train_block(inputs, 60, 3e-3, 0)
        assert told.loss_before == pytest.approx(expected, rel=1e-3)
        assert told.loss_after == pytest.approx(held_out_loss(inputs, WINDOWS // 8), rel=1e-3)
        assert told.loss_after < 0.9 * told.loss_before and 0 < told.steps <= 60
        assert changed(inputs.module, before) == factors and not changed(inputs.original.module, original)
        assert [p.requires_grad for p in inputs.module.parameters()] == flags
        first, *others = inputs.module.parameters()
        assert first.grad is grad and torch.equal(grad, torch.ones_like(first)) and all(p.grad is None for p in others)

    visited(model, ids, act, kind, pivoted)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 1e-2, 1.0, 100.0, 1e20])
def test_no_learning_rate_does_harm(make_model, make_ids, rate):
    def act(inputs):
        before, expected = state(inputs.module), held_out_loss(inputs, WINDOWS // 8)
        told = train_block(inputs, 20, rate, 0)
        assert told.loss_after <= told.loss_before
        assert (told.steps == 0) == (told.loss_after == told.loss_before) == (not changed(inputs.module, before))
        assert held_out_loss(inputs, WINDOWS // 8) <= expected * (1 + 1e-5)
        assert told.steps == 0 or rate < 100

    visited(make_model("llama"), make_ids(WINDOWS, LENGTH), act)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_precision_is_kept_and_counts(make_model, make_ids, dtype):
    def act(inputs):
        told = train_block(inputs, 60, 3e-3, 0)
        assert {p.dtype for p in inputs.module.parameters()} == {dtype}
        assert told.loss_after < 0.95 * told.loss_before
        assert told.loss_after == pytest.approx(held_out_loss(inputs, WINDOWS // 8), rel=1e-3)
        small = train_block(inputs, 1, 1e-9, 0)  # a change that rounding takes back
        assert small.steps == 0 and small.loss_after == small.loss_before

    visited(make_model("llama").to(dtype), make_ids(WINDOWS, LENGTH), act)


def test_masters_gather_what_a_stored_weight_cannot(make_model, make_ids):
    """Steps that are far below the spacing of bf16 at these weights add up."""

    def act(inputs):
        before = state(inputs.module)
        assert train_block(inputs, 100, 2e-5, 0).steps > 0
        large = {name: weight.abs() > 0.1 for name, weight in before.items() if "inner" in name or "outer" in name}
        return [bool((inputs.module.state_dict()[name] != before[name])[where].any()) for name, where in large.items()]

    assert any(visited(make_model("llama").bfloat16(), make_ids(WINDOWS, LENGTH), act))


def test_the_same_bits_for_the_same_seed(make_model, make_ids):
    model, ids = make_model("llama"), make_ids(WINDOWS, LENGTH)

    def trained(seed):
        def act(inputs):
            torch.rand(3)
            random = torch.get_rng_state()
            told = train_block(inputs, 20, 3e-3, seed)
            assert torch.equal(random, torch.get_rng_state())
            return told, state(inputs.module)

        return visited(copy.deepcopy(model), ids, act)

    (told, weights), (again, twin), (_, other) = trained(1), trained(1), trained(2)
    assert told == again and all(torch.equal(weights[name], twin[name]) for name in weights)
    assert any(not torch.equal(weights[name], other[name]) for name in weights)


def test_dropout_and_kernels_rest_while_a_block_is_trained(make_model, make_ids):
    def act(inputs):
        expected = held_out_loss(inputs, WINDOWS // 8)
        layers = [part for part in inputs.module.modules() if hasattr(part, "kernel")]
        assert layers
        for layer in layers:
            layer.kernel = "auto"
        inputs.module.train()
        inputs.module.mlp.eval()
        told = train_block(inputs, 10, 3e-3, 0)
        assert told.loss_before == pytest.approx(expected, rel=1e-3)
        assert {layer.kernel for layer in layers} == {"auto"}
        assert inputs.module.training and inputs.module.attn.training and not inputs.module.mlp.training

    visited(make_model("gpt2"), make_ids(WINDOWS, LENGTH), act, "balanced")


@pytest.mark.parametrize(("windows", "steps"), [(1, 20), (WINDOWS, 0)])
def test_nothing_to_train_on_or_for(make_model, make_ids, windows, steps):
    def act(inputs):
        before = state(inputs.module)
        told = train_block(inputs, steps, 3e-3, 0)
        assert told.steps == 0 and told.loss_after == told.loss_before == pytest.approx(
            held_out_loss(inputs, 5), rel=1e-3
        )
        assert not changed(inputs.module, before)

    visited(make_model("llama"), make_ids(windows, LENGTH), act)


def test_a_block_that_is_dense_stays(make_model, make_ids):
    model, told = make_model("llama"), []
    before = state(model)

    def visit(block, inputs):
        told.append(train_block(inputs, 5, 1e-2, 0))
        return []

    walk(model, find_structure(model), make_ids(8, LENGTH), visit, with_original=True)
    assert [(one.loss_before, one.loss_after, one.steps) for one in told] == [(0.0, 0.0, 0)] * 3
    assert not changed(model, before)


@pytest.mark.parametrize(
    ("windows", "counts"), [(40, [8, 8, 8, 8, 3]), (33, [8, 8, 8, 5, 0]), (8, [7]), (2, [1]), (1, [0])]
)
def test_held_out_windows_are_not_trained_on(make_model, make_ids, windows, counts):
    def act(inputs):
        data = _Data(inputs, inputs.original)
        assert data.counts == counts and data.trained == [k for k, count in enumerate(counts) if count]
        losses, held_out = [data.loss(index).item() for index in data.trained], data.held_out_loss()
        for target, count in zip(data.targets, counts, strict=True):
            target[count:].neg_()
        assert [data.loss(index).item() for index in data.trained] == losses and data.held_out_loss() > 1.2 * held_out

    visited(make_model("llama"), make_ids(windows, LENGTH), act)


def test_the_schedule_rises_and_ends_at_nothing():
    shares = [_schedule(k / 1000) for k in range(1001)]
    top = shares.index(max(shares))
    assert 0.95 < shares[top] <= 1 and shares[0] == 0 and shares[-1] == pytest.approx(0, abs=1e-12)
    assert shares[: top + 1] == sorted(shares[: top + 1]) and shares[top:] == sorted(shares[top:], reverse=True)
