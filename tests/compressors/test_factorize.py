"""Structured forms of a weight: bytes that hold, errors that are told, steps that never lose, and matrices of the form found again."""

import copy
import itertools
import math

import pytest
import torch

from tensorpress.compressors.decompose.factorize import Factorize, InputMoments
from tensorpress.compressors.decompose.form_parts import (
    BlockPart,
    ChannelPart,
    LowRankPart,
    MPOPart,
    SparsePart,
)
from tensorpress.compressors.decompose.forms import Form, alternate, fit, stored_bytes
from tensorpress.compressors.decompose.site_plans import SitePlan
from tensorpress.compressors.decompose.tensor_train import factors
from tensorpress.compressors.decompose.weighted_low_rank import damped, weighted_error
from tensorpress.errors import InputError
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear
from tensorpress.kernels.sparse_linear import ChannelLinear, SparseLinear
from tensorpress.kernels.sum_linear import SumLinear
from tensorpress.structure import find_structure, linear_weight

SHAPES = [(15, 21), (21, 15), (12, 33)]
FORMS = {
    "svd": Form("svd", pivoted=False),
    "whitened_svd": Form("whitened_svd", pivoted=False),
    "pivoted": Form("whitened_svd"),
    "kronecker": Form("kronecker", pivoted=False),
    "kronecker pivoted": Form("kronecker"),
    "block_low_rank": Form("block_low_rank", blocks=3),
    "low_rank_sparse": Form("low_rank_sparse", sparse=0.05),
    "channels": Form("low_rank_sparse", sparse=0.1, channels=True),
    "mpo_sparse": Form("mpo_sparse", sparse=0.05),
    "mpo_sparse plain": Form("mpo_sparse", pivoted=False, sparse=0.05),
    "mpo_sparse 3 sites": Form("mpo_sparse", sparse=0.05, sites=3),
}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def moment(size, seen=None):
    """A second moment of correlated vectors of uneven size; singular where fewer are seen than it has rows."""
    x = randn(seen or 3 * size, size) @ randn(size, size)
    return x.T @ x / len(x)


def metrics(size):
    return {
        "plain": None,
        "diagonal": moment(size).diagonal().clone(),
        "full": moment(size),
        "singular": moment(size, 4),
    }


@pytest.mark.parametrize("metric", ["plain", "diagonal", "full", "singular"])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("name", FORMS)
def test_bytes_hold_and_the_loss_told_is_that_of_the_stored_weight(seed, name, outputs, inputs, metric):
    form, weight, bias = FORMS[name], randn(outputs, inputs), randn(outputs)
    h = metrics(inputs)[metric]
    smallest = form.smallest(outputs, inputs)
    for allowance in (smallest, 0.6 * 2 * weight.numel(), 0.83 * 2 * weight.numel()):
        found = fit(form, allowance, weight, bias, h)
        assert found.bytes == stored_bytes(found.layer) <= allowance
        assert found.bytes == sum(part.bytes for part in form.parts(outputs, inputs, allowance))
        error = weighted_error(found.layer.dense_weight().detach() - weight, h)
        whole = weighted_error(weight, h)
        assert found.loss == pytest.approx(error, rel=1e-6, abs=1e-12 * whole) and found.loss < whole
        x = randn(4, inputs)
        torch.testing.assert_close(found.layer(x), x @ found.layer.dense_weight().T + bias, rtol=1e-8, atol=1e-8)
    assert fit(form, smallest - 1, weight, bias, h) is None
    larger = fit(form, 0.9 * 2 * weight.numel(), weight, bias, None)
    assert larger.bytes > smallest


def parts_for(name, outputs, inputs):
    plan = SitePlan("low_rank", (outputs, 1), (1, inputs))
    balanced = SitePlan("balanced", factors(outputs, 2), factors(inputs, 2))
    first = {"mpo": MPOPart(balanced, 3, True, 1), "low rank": LowRankPart(plan, 3, True)}
    beside = {
        "blocks": BlockPart(outputs, inputs, 3),
        "sparse": SparsePart(outputs, inputs, 20),
        "channels": ChannelPart(outputs, inputs, 3),
    }
    one, other = name.split(" + ")
    return [first[one], beside[other]]


@pytest.mark.parametrize("metric", ["plain", "full", "singular"])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize(
    "name", ["low rank + blocks", "low rank + sparse", "low rank + channels", "mpo + sparse", "mpo + blocks"]
)
def test_alternation_never_raises_the_error(seed, name, outputs, inputs, metric):
    weight, h = randn(outputs, inputs), metrics(inputs)[metric]
    parts = parts_for(name, outputs, inputs)
    solved, losses = alternate(parts, weight, h, 6)
    assert all(after <= before for before, after in itertools.pairwise(losses))
    error = weighted_error(weight - solved[0].matrix - solved[1].matrix, h)
    assert losses[-1] == pytest.approx(error, rel=1e-6, abs=1e-12 * weighted_error(weight, h))
    alone = weighted_error(weight - parts[0].solve(weight, h, None).matrix, h)
    room = 1e-12 * weighted_error(weight, h)
    assert losses[-1] <= alone * (1 + 1e-9) + room  # what stands beside it is not for nothing


@pytest.mark.parametrize("part", ["blocks", "channels", "sparse"])
def test_a_part_is_the_least_squares_solution(seed, part):
    """No other numbers at its places are better: the gradient of the error there is nothing."""
    weight, h = randn(15, 21), moment(21)
    beside = parts_for(f"low rank + {part}", 15, 21)[1]
    solved = beside.solve(weight, h, None)
    if part == "sparse":  # conjugate gradients go on from where they are
        for _ in range(60):
            solved = beside._values(weight, h, solved.made_of[0], solved.matrix)
    places = solved.matrix != 0
    assert int(places.sum()) == {"blocks": 15 * 21 // 3, "channels": 15 * 3, "sparse": 20}[part]
    gradient = ((weight - solved.matrix) @ h)[places]
    assert gradient.abs().max() <= 1e-5 * (weight @ h).abs().max()


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_matrix_of_the_form_is_found(seed, outputs, inputs, data):
    h = moment(inputs) if data else None
    low_rank = randn(outputs, 2) @ randn(2, inputs)
    balanced = SitePlan("balanced", factors(outputs, 2), factors(inputs, 2))
    cores = [randn(1, balanced.rows[0], balanced.columns[0], 2), randn(2, balanced.rows[1], balanced.columns[1], 1)]
    kronecker = MPOLinear.from_cores(cores, None).dense_weight().detach()
    blocks = torch.block_diag(*randn(3, outputs // 3, inputs // 3))
    whole, nearly = 2 * outputs * inputs, 0.9 * 2 * outputs * inputs
    low = SitePlan("low_rank", (outputs, 1), (1, inputs))
    exact = [
        (Form("svd", pivoted=False), low_rank, low.bytes(2, False)),
        (Form("svd"), low_rank, low.bytes(2, True)),
        (Form("whitened_svd"), low_rank, nearly),
        (Form("kronecker", pivoted=False), kronecker, balanced.bytes(2, False)),
        (Form("kronecker"), kronecker, balanced.bytes(2, True)),
        (Form("kronecker"), kronecker, nearly),
        (Form("block_low_rank", blocks=3), blocks, nearly),
        (Form("block_low_rank", blocks=3), low_rank, nearly),
        (Form("low_rank_sparse", sparse=0.05), low_rank, nearly),
        (Form("mpo_sparse", sparse=0.05), kronecker, nearly),
    ]
    for form, weight, allowance in exact:
        assert allowance < whole
        found = fit(form, allowance, weight, None, h)
        assert (found.layer.dense_weight().detach() - weight).norm() <= 1e-6 * weight.norm(), form


def test_sums_are_found_by_alternation(seed):
    """Low rank beside blocks, a few large weights or a few inputs: of parts of that size, nothing is lost."""
    low_rank, plan = randn(36, 1) @ randn(1, 42), SitePlan("low_rank", (36, 1), (1, 42))
    first = LowRankPart(plan, 1, True)
    blocks = torch.block_diag(*randn(6, 6, 7))
    spikes = torch.zeros(36, 42, dtype=torch.float64)
    places = torch.randperm(36 * 42)[:20]
    spikes.view(-1)[places] = 100 + 100 * torch.rand(20).double()
    columns = torch.zeros(36, 42, dtype=torch.float64)
    columns[:, torch.randperm(42)[:3]] = 30 * randn(36, 3)
    for beside, part in [
        (blocks, BlockPart(36, 42, 6)),
        (spikes, SparsePart(36, 42, 20)),
        (columns, ChannelPart(36, 42, 3)),
    ]:
        weight = low_rank + beside
        solved, losses = alternate([first, part], weight, None, 200)
        assert losses[-1] <= 1e-8 * weighted_error(weight), type(part)
        if not isinstance(part, ChannelPart):  # in whose columns the low rank can be anything
            assert (solved[0].matrix - low_rank).norm() <= 1e-2 * low_rank.norm()


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_enough_bytes_lose_nothing(seed, outputs, inputs):
    weight, h = randn(outputs, inputs), moment(inputs)
    plenty = 100 * weight.numel()
    forms = ["kronecker", "kronecker pivoted", "low_rank_sparse", "mpo_sparse", "mpo_sparse 3 sites"]
    if outputs > inputs:  # a rank below the outputs is whole
        forms += ["svd", "whitened_svd", "pivoted", "block_low_rank", "channels"]
    for name in forms:
        form = Form("low_rank_sparse", sparse=1.0) if name == "low_rank_sparse" else FORMS[name]
        found = fit(form, plenty, weight, None, h)
        assert found.loss <= 1e-12 * weighted_error(weight, h), name
        assert (found.layer.dense_weight().detach() - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_what_data_is_worth(seed, outputs, inputs):
    weight, h = randn(outputs, inputs), moment(inputs)
    allowance = 0.7 * 2 * weight.numel()

    def lost(form, metric, bytes_=allowance):
        return weighted_error(fit(form, bytes_, weight, None, metric).layer.dense_weight().detach() - weight, h)

    whitened = lost(Form("whitened_svd", pivoted=False), h)
    assert whitened <= lost(Form("svd", pivoted=False), None) * (1 + 1e-9)
    assert lost(Form("whitened_svd", pivoted=True), h) <= whitened * (1 + 1e-9)  # a larger rank for the same bytes
    for kind in ("kronecker", "mpo_sparse"):
        refined = [lost(Form(kind, sweeps=sweeps), h) for sweeps in (0, 1, 4)]
        assert refined[0] * (1 + 1e-9) >= refined[1] and (kind != "kronecker" or refined[1] * (1 + 1e-9) >= refined[2])
    for pivoted in (True, False):
        nothing_apart = fit(Form("low_rank_sparse", pivoted=pivoted, sparse=0.0), allowance, weight, None, h)
        plain = fit(Form("whitened_svd", pivoted=pivoted), allowance, weight, None, h)
        assert isinstance(nothing_apart.layer, LowRankLinear)
        assert torch.equal(nothing_apart.layer.dense_weight(), plain.layer.dense_weight())


def test_asvd_is_the_truncated_svd_of_the_scaled_weight(seed):
    moments = InputMoments(21)
    batches = [torch.randn(50, 21) * torch.logspace(-1, 1, 21), torch.randn(7, 21)]
    for batch in batches:
        moments.add(batch)
    x = torch.cat(batches)
    torch.testing.assert_close(moments.mean, x.abs().mean(0))
    torch.testing.assert_close(moments.second.matrix, x.T @ x / 57)
    weight, scales = randn(15, 21), x.double().abs().mean(0) ** 0.5
    u, s, v = torch.linalg.svd(weight * scales, full_matrices=False)
    expected = u[:, :4] * s[:4] @ v[:4] / scales
    method = Factorize(form="asvd", keep=0.5)
    metric = method._minimised(damped(moments.second.matrix, 1e-3), moments.mean)
    found = fit(Form("asvd", pivoted=False), 2 * 4 * (15 + 21), weight, None, metric)
    torch.testing.assert_close(found.layer.dense_weight(), expected, rtol=1e-4, atol=1e-5)


PARTS = {
    "svd": LowRankLinear, "whitened_svd": LowRankLinear, "asvd": LowRankLinear, "kronecker": PivotedMPOLinear,
    "block_low_rank": SumLinear, "low_rank_sparse": SumLinear, "mpo_sparse": SumLinear,
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("form", PARTS)
def test_whole_models(make_model, make_calibration, make_ids, outputs, name, form):
    model, told = make_model(name), []
    calibration = make_calibration(12, 16, progress=lambda *what: told.append(what))
    paths = find_structure(model).linear_paths
    weights = {path: linear_weight(model.get_submodule(path)).detach().clone() for path in paths}
    biases = {path: model.get_submodule(path).bias for path in paths}
    twin = copy.deepcopy(model)
    model, report = Factorize(form=form, keep=0.6).compress(model, calibration)
    assert [row.layer for row in report.layers] == paths and told[-1][0] == "factorize"
    for row in report.layers:
        layer, weight = model.get_submodule(row.layer), weights[row.layer]
        assert isinstance(layer, PARTS[form]) and row.action == f"factorize {form}"
        assert row.bytes_before == 2 * weight.numel() and row.bytes_after == stored_bytes(layer)
        assert row.bytes_after <= 0.6 * row.bytes_before and row.parameters_after < row.parameters_before
        assert 0 < row.error_after < 1 and row.detail["shape"] == (*weight.shape,) and row.detail["losses"]
        assert layer.dense_weight().shape == weight.shape and layer.dense_weight().dtype == weight.dtype
        assert (layer.bias is None) == (biases[row.layer] is None)
        if layer.bias is not None:
            assert torch.equal(layer.bias, biases[row.layer])
    before, after = (sum(getattr(row, f"bytes_{when}") for row in report.layers) for when in ("before", "after"))
    assert report.summary["kept_bytes"] == after / before and report.summary["form"] == form
    found = outputs(model, make_ids(2, 9))
    assert torch.isfinite(found).all()
    Factorize(form=form, keep=0.6).compress(twin, calibration)
    first, second = model.state_dict(), twin.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_error_told_is_that_of_the_output(make_model, make_calibration):
    """Of the first layers, whose inputs nothing has changed yet: root of the share of the output's square that is lost."""
    original, calibration = make_model("llama"), make_calibration(40, 16)
    seen = []
    layer = original.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, y: seen.append(args[0].detach().flatten(0, 1).double()))
    with torch.no_grad():
        original(calibration.windows)
    layer._forward_hooks.clear()
    x, errors = torch.cat(seen), {}
    for form in ("svd", "whitened_svd", "asvd", "low_rank_sparse"):
        model, report = Factorize(form=form, keep=0.5, damping=1e-9).compress(copy.deepcopy(original), calibration)
        row = next(row for row in report.layers if row.layer.endswith("layers.0.self_attn.q_proj"))
        weight = model.model.layers[0].self_attn.q_proj.dense_weight().detach().double()
        wanted = layer.weight.detach().double()
        share = (x @ (weight - wanted).T).norm() / (x @ wanted.T).norm()
        assert row.error_after == pytest.approx(float(share), rel=1e-3)
        errors[form] = row.error_after
    assert errors["whitened_svd"] <= min(errors["svd"], errors["asvd"]) * (1 + 1e-5)


def test_choices(make_model, make_calibration):
    calibration = make_calibration(12, 16)
    model, report = Factorize(form="low_rank_sparse", keep=0.6, channels=True, sparse=0.1, layers=("*mlp*",)).compress(
        make_model("llama"), calibration
    )
    assert len(report.layers) == 9 and all("mlp" in row.layer for row in report.layers)
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down.parts[1], ChannelLinear) and down.parts[1].count == 4
    assert down.parts[0].pivots is not None
    model, _ = Factorize(form="low_rank_sparse", keep=0.6, pivots=False).compress(make_model("llama"), calibration)
    down = model.model.layers[0].mlp.down_proj
    assert down.parts[0].pivots is None and isinstance(down.parts[1], SparseLinear)
    assert down.parts[1].count == int(0.03 * 32 * 48)
    for form in ("svd", "whitened_svd", "asvd"):
        assert not Factorize(form=form, keep=0.5).chosen.pivoted
        assert Factorize(form=form, keep=0.5, pivots=True).chosen.pivoted
    model, _ = Factorize(form="kronecker", keep=0.6, pivots=False).compress(make_model("llama"), calibration)
    assert isinstance(model.model.layers[0].mlp.down_proj, MPOLinear)
    model, report = Factorize(form="mpo_sparse", keep=0.6, sites=3).compress(make_model("llama"), calibration)
    assert len(model.model.layers[0].mlp.down_proj.parts[0].cores) == 3
    assert Factorize(**Factorize(form="asvd", keep=0.5, alpha=1).model_dump()) == Factorize(
        form="asvd", keep=0.5, alpha=1
    )


@pytest.mark.parametrize(
    "form", ["whitened_svd", "asvd", "kronecker", "block_low_rank", "low_rank_sparse", "mpo_sparse"]
)
def test_inputs_that_are_never_anything_but_zero(make_model, make_calibration, make_ids, outputs, form):
    model = make_model("llama")
    model.model.layers[1].input_layernorm.weight.data.zero_()
    model, report = Factorize(form=form, keep=0.6).compress(model, make_calibration(12, 16))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(math.isfinite(row.error_after) for row in report.layers)
    assert torch.isfinite(outputs(model, make_ids(1, 5))).all()


def test_few_tokens_are_said_and_what_cannot_shrink_stays(make_model, make_calibration):
    _, report = Factorize(keep=0.5).compress(make_model("llama"), make_calibration(2, 12))
    assert "calibration has 24 tokens, fewer than the 48 inputs of the widest layer" in report.summary["note"]
    # 2 x 8: of the fewest bytes, 2 * 9 numbers and a byte of pivots, a sparse part takes it above the dense 32
    model = make_model("llama", hidden_size=8, intermediate_size=24, head_dim=2, num_key_value_heads=1)
    model, report = Factorize(form="low_rank_sparse", keep=0.9, sparse=0.2).compress(model, make_calibration(12, 16))
    dense = {row.layer for row in report.layers if row.action == "dense"}
    assert dense == {row.layer for row in report.layers if row.layer.endswith(("k_proj", "v_proj"))}
    assert report.summary["left_dense"] == len(dense) == 6
    assert all(isinstance(model.get_submodule(path), torch.nn.Linear) for path in dense)
    for form in (Form("svd"), Form("kronecker"), Form("low_rank_sparse")):
        assert form.smallest(1, 7) is None


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"keep": 0.001}, r"keep: 0\.001 cannot be met by whitened_svd; the smallest is 0\.\d+, for .*_proj"),
        ({"keep": 0.1, "form": "block_low_rank"}, r"keep: 0\.1 cannot be met by block_low_rank; the smallest is 0\.\d+"),
        ({"keep": 0.1, "form": "low_rank_sparse", "sparse": 0.2}, r"cannot be met by low_rank_sparse"),
        ({"keep": 0.5, "form": "block_low_rank", "blocks": 5}, r"blocks: 5 does not divide .* of 32 x 32; use a divisor of 32"),
        ({"keep": 0.5, "form": "mpo_sparse", "sites": 7}, r"sites: 7 sites; .* of 32 x 32 carries 5 at most"),
        ({"keep": 0.5, "layers": ("*nothing*",)}, r"layers: \*nothing\* matches no dense layer; the first block has .*q_proj"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(make_model, make_calibration, one_line, fields, match):
    model = make_model("llama")
    with pytest.raises(InputError) as caught:
        Factorize(**fields).check(model, find_structure(model))
    one_line(caught, match)
    if "the smallest" in match:
        smallest = float(caught.value.problems[0].split("smallest is ")[1].split(",")[0])
        _, report = Factorize(**{**fields, "keep": smallest}).compress(model, make_calibration(12, 16))
        assert all(row.bytes_after <= smallest * row.bytes_before for row in report.layers)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"keep": 1.0}, "keep"), ({}, "keep"), ({"keep": 0.5, "form": "tucker"}, "form"),
        ({"keep": 0.5, "channels": True}, "channels is for form: low_rank_sparse; found form: whitened_svd"),
        ({"keep": 0.5, "sweeps": 1}, "sweeps is for form: kronecker or"),
        ({"keep": 0.5, "blocks": 4}, "blocks is for form: block_low_rank"),
        ({"keep": 0.5, "alpha": 1.0}, "alpha is for form: asvd"), ({"keep": 0.5, "sites": 3}, "sites is for form: mpo_sparse"),
        ({"keep": 0.5, "form": "low_rank_sparse", "sparse": 1.0}, "sparse"),
    ],
)  # fmt: skip
def test_bad_fields_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        Factorize(**fields)


def test_what_it_may_not_follow():
    assert set(Factorize.may_not_follow) == {"gptq", "mpo", "factorize"}
    assert all("\n" not in why for why in Factorize.may_not_follow.values())
