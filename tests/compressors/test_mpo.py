"""Matrix product operators: exact at full bonds, and as wrong below as the singular values that were dropped say."""

import itertools
import math

import numpy as np
import pytest
import torch

from tensorpress.artifact import save_model
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.decompose.tensor_train import (
    capped_bonds,
    decompose,
    factors,
    full_bonds,
    largest_bond,
    parameters,
)
from tensorpress.errors import InputError
from tensorpress.kernels.mpo_linear import MPOLinear, mpo_to_matrix
from tensorpress.loading import load
from tensorpress.structure import find_structure, linear_weight
from tensorpress.text import demo_folder

SPLITS = [
    ((4, 6), (5, 3)),
    ((1, 13), (7, 2)),
    ((3, 5, 2), (2, 7, 3)),
    ((2, 3, 2, 3), (3, 2, 2, 1)),
    ((2, 2, 3, 2, 1), (1, 2, 2, 3, 2)),
]


def sequential_svd(weight, rows, columns, bonds):
    """Left-to-right truncated SVDs in NumPy: the matrix that is left, and the sum of squares of what was dropped."""
    sites = len(rows)
    pairs = [axis for k in range(sites) for axis in (k, sites + k)]
    rest = weight.reshape(*rows, *columns).transpose(pairs).reshape(rows[0] * columns[0], -1)
    cores, dropped, left = [], 0.0, 1
    for k, bond in enumerate(bonds):
        u, s, vt = np.linalg.svd(rest, full_matrices=False)
        dropped += float((s[bond:] ** 2).sum())
        cores.append(u[:, :bond].reshape(left, rows[k], columns[k], bond))
        rest = (s[:bond, None] * vt[:bond]).reshape(bond * rows[k + 1] * columns[k + 1], -1)
        left = bond
    cores.append(rest.reshape(left, rows[-1], columns[-1], 1))
    whole = cores[0]
    for core in cores[1:]:
        whole = np.tensordot(whole, core, axes=(-1, 0))
    whole = whole.reshape([size for pair in zip(rows, columns, strict=True) for size in pair])
    order = [*range(0, 2 * sites, 2), *range(1, 2 * sites, 2)]
    return whole.transpose(order).reshape(weight.shape), dropped


def shape_of(rows, columns):
    return math.prod(rows), math.prod(columns)


@pytest.mark.parametrize(("rows", "columns"), SPLITS)
def test_lossless_at_full_bonds(seed, rows, columns):
    weight = torch.randn(shape_of(rows, columns), dtype=torch.float64)
    cores = decompose(weight, rows, columns, full_bonds(rows, columns))
    assert [tuple(core.shape[1:3]) for core in cores] == list(zip(rows, columns, strict=True))
    assert (mpo_to_matrix(cores) - weight).norm() <= 1e-13 * weight.norm()


@pytest.mark.parametrize("sites", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("shape", [(30, 42), (13, 17), (45, 7), (96, 32)])
def test_lossless_at_full_bonds_with_the_factors_that_are_chosen(seed, shape, sites):
    rows, columns = (factors(size, sites) for size in shape)
    weight = torch.randn(shape, dtype=torch.float64)
    cores = decompose(weight, rows, columns, full_bonds(rows, columns))
    assert (mpo_to_matrix(cores) - weight).norm() <= 1e-13 * weight.norm()


@pytest.mark.parametrize(("rows", "columns"), SPLITS)
def test_error_is_the_root_of_what_the_cuts_drop(seed, rows, columns):
    weight = torch.randn(shape_of(rows, columns), dtype=torch.float64)
    errors = []
    for bond in range(1, max(full_bonds(rows, columns))):
        bonds = capped_bonds(rows, columns, bond)
        found = mpo_to_matrix(decompose(weight, rows, columns, bonds))
        expected, dropped = sequential_svd(weight.numpy(), rows, columns, bonds)
        errors.append(float((found - weight).norm()))
        assert errors[-1] == pytest.approx(math.sqrt(dropped), rel=1e-6)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("sites", [2, 3, 5])
def test_both_hold_on_real_weights(sites):
    """Of the demo model: an attention's and a feed-forward's."""
    model = load(demo_folder(), dtype=torch.float32, kernels="reference")
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj", "model.layers.7.mlp.up_proj"):
        weight = linear_weight(model.get_submodule(path)).detach().double()
        rows, columns = (factors(size, sites) for size in weight.shape)
        full = full_bonds(rows, columns)
        assert (mpo_to_matrix(decompose(weight, rows, columns, full)) - weight).norm() <= 1e-12 * weight.norm()
        bonds = capped_bonds(rows, columns, max(full) // 3)
        _, dropped = sequential_svd(weight.numpy(), rows, columns, bonds)
        error = float((mpo_to_matrix(decompose(weight, rows, columns, bonds)) - weight).norm())
        assert error == pytest.approx(math.sqrt(dropped), rel=1e-6)


def test_two_sites_are_the_truncated_svd_of_the_rearranged_matrix(seed):
    """Van Loan and Pitsianis 1993: row (i1, j1) of the rearrangement is the block (i1, j1) of the matrix."""
    (m1, m2), (n1, n2) = (3, 5), (7, 4)
    weight = np.random.default_rng(seed).standard_normal((m1 * m2, n1 * n2))
    blocks = [weight[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2].ravel() for i in range(m1) for j in range(n1)]
    u, s, vt = np.linalg.svd(np.stack(blocks), full_matrices=False)
    for bond in (1, 2, 9, 20):
        expected = sum(s[k] * np.kron(u[:, k].reshape(m1, n1), vt[k].reshape(m2, n2)) for k in range(bond))
        found = mpo_to_matrix(decompose(torch.from_numpy(weight), (m1, m2), (n1, n2), (bond,)))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)
        assert float((found - torch.from_numpy(weight)).norm()) == pytest.approx(
            np.sqrt((s[bond:] ** 2).sum()), rel=1e-6, abs=1e-10
        )


def test_a_kronecker_product_is_found_exactly(seed):
    a, b, c = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 2), (2, 5), (4, 3)))
    weight = torch.kron(torch.kron(a, b), c)
    cores = decompose(weight, (3, 2, 4), (2, 5, 3), (1, 1))
    assert (mpo_to_matrix(cores) - weight).norm() <= 1e-13 * weight.norm()


def test_zero_one_site_and_low_precision(seed):
    assert not mpo_to_matrix(decompose(torch.zeros(6, 8), (2, 3), (4, 2), (3,))).any()
    cores = [core.requires_grad_() for core in decompose(torch.zeros(12, 8), (2, 3, 2), (4, 2, 1), (8, 2))]
    (mpo_to_matrix(cores) * torch.randn(12, 8)).sum().backward()
    assert bool(cores[0].grad.any()), "what is zero can be trained"
    weight = torch.randn(6, 8)
    (core,) = decompose(weight, (6,), (8,), ())
    assert torch.equal(core.reshape(6, 8), weight.double())
    cores = decompose(weight.bfloat16(), (2, 3), (4, 2), full_bonds((2, 3), (4, 2)))
    assert cores[0].dtype == torch.float64
    assert (mpo_to_matrix(cores) - weight.bfloat16().double()).norm() < 1e-12


@pytest.mark.parametrize("sites", [1, 2, 3, 4, 5, 7])
def test_factors_multiply_to_the_size_and_are_largest_in_the_middle(seed, sites):
    sizes = [1, 2, 13, 97, 288, 768, 1000, 1376, 3072, 4096, 11008, *torch.randint(1, 5000, (40,)).tolist()]
    for size in sizes:
        found = factors(size, sites)
        assert len(found) == sites and math.prod(found) == size and min(found) >= 1
        top = found.index(max(found))
        assert list(found[: top + 1]) == sorted(found[: top + 1]), found
        assert list(found[top:]) == sorted(found[top:], reverse=True), found


@pytest.mark.parametrize(
    ("size", "sites", "expected"),
    [
        (4096, 2, {64}), (4096, 4, {8}), (768, 5, {3, 4}), (768, 3, {8, 12}), (1024, 5, {4}), (1024, 2, {32}),
        (13, 3, {1, 13}), (1, 4, {1}), (26, 2, {2, 13}),
    ],
)  # fmt: skip
def test_factors_are_even(size, sites, expected):
    assert set(factors(size, sites)) == expected


def test_numbers_of_the_method_notes():
    """Parameter ratios of MPOP's layers as computed by hand (docs: 768x768 in three and five cores, 4096x4096 in two)."""
    for rows, bond, ratio in [
        ((8, 12, 8), 16, 0.066),
        ((8, 12, 8), 32, 0.257),
        ((3, 4, 4, 4, 4), 64, 0.153),
        ((64, 64), 128, 0.0625),
    ]:
        columns = rows[::-1] if len(rows) == 5 else rows
        size = math.prod(rows)
        assert parameters(rows, columns, capped_bonds(rows, columns, bond)) / size**2 == pytest.approx(ratio, abs=6e-4)
    assert full_bonds((8,) * 4, (8,) * 4) == (64, 4096, 64)
    assert capped_bonds((8,) * 4, (8,) * 4, 100) == (64, 100, 64)
    assert parameters((8,) * 4, (8,) * 4, (64, 100, 64)) == 2 * (64 * 64 + 64 * 64 * 100)


@pytest.mark.parametrize(("rows", "columns"), SPLITS)
def test_parameters_are_what_the_cores_hold(seed, rows, columns):
    for bond in (1, 2, 3, 1000):
        bonds = capped_bonds(rows, columns, bond)
        cores = decompose(torch.randn(shape_of(rows, columns)), rows, columns, bonds)
        assert parameters(rows, columns, bonds) == sum(core.numel() for core in cores)


@pytest.mark.parametrize(("rows", "columns"), SPLITS)
def test_largest_bond_is_the_largest(seed, rows, columns):
    top = max(full_bonds(rows, columns))
    counts = [0] + [parameters(rows, columns, capped_bonds(rows, columns, bond)) for bond in range(1, top + 1)]
    for budget in [0, 1, *range(0, counts[-1] + 10, max(1, counts[-1] // 50)), 1e9]:
        expected = max(bond for bond in range(top + 1) if counts[bond] <= budget)
        assert largest_bond(rows, columns, budget) == expected


# --- whole models


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma3", "opt", "gpt_neox"])
@pytest.mark.parametrize("fields", [{"keep": 0.5}, {"keep": 0.7, "sites": 3}, {"bond_dimension": 5, "sites": 4}])
def test_whole_model(make_model, make_calibration, make_ids, outputs, tmp_path, name, fields):
    model, told = make_model(name), []
    calibration = make_calibration(progress=lambda *what: told.append(what))
    paths = find_structure(model).linear_paths
    weights = {path: linear_weight(model.get_submodule(path)).detach().clone() for path in paths}
    biases = {path: model.get_submodule(path).bias for path in paths}
    before = sum(p.numel() for p in model.parameters())
    model, report = MPO(metric="weights", **fields).compress(model, calibration)
    assert [row.layer for row in report.layers] == paths and told[-1] == ("mpo", len(paths), len(paths))
    for row in report.layers:
        layer, weight = model.get_submodule(row.layer), weights[row.layer]
        held = sum(p.numel() for n, p in layer.named_parameters() if n != "bias")
        assert row.parameters_before == weight.numel() and row.parameters_after == held
        assert row.bytes_after == 2 * held
        found = linear_weight(layer).detach().double()
        if row.action == "dense":
            assert torch.equal(found, weight.double()) and row.error_after == 0
            continue
        assert isinstance(layer, MPOLinear) and held < weight.numel()
        assert held <= fields.get("keep", 1) * weight.numel()
        error = (found - weight.double()).norm() / weight.double().norm()
        assert row.error_after == pytest.approx(float(error), rel=1e-4, abs=1e-6)
        bonds, rows, columns = row.detail["bonds"], row.detail["out_factors"], row.detail["in_factors"]
        _, dropped = sequential_svd(weight.double().numpy(), rows, columns, bonds)
        assert row.error_after == pytest.approx(math.sqrt(dropped) / float(weight.double().norm()), rel=1e-5, abs=1e-9)
        assert (layer.bias is None) == (biases[row.layer] is None)
        assert layer.bias is None or torch.equal(layer.bias, biases[row.layer])
    gone = sum(row.parameters_before - row.parameters_after for row in report.layers)
    assert before - sum(p.numel() for p in model.parameters()) == gone > 0
    assert report.summary["kept"] == pytest.approx(1 - gone / sum(w.numel() for w in weights.values()))
    ids = make_ids(2, 9)
    expected = outputs(model, ids)
    save_model(model, tmp_path, torch.float32)
    torch.testing.assert_close(outputs(load(tmp_path), ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_at_nearly_full_bonds_gives_the_same_outputs(make_model, make_calibration, make_ids, outputs, name):
    """A weight of low rank in the rearranged form is kept exactly, so the outputs are the original's (Conv1D too)."""
    model, ids = make_model(name), make_ids(2, 9)
    for path in find_structure(model).linear_paths:
        weight = linear_weight(model.get_submodule(path))
        rows, columns = factors(weight.shape[0], 2), factors(weight.shape[1], 2)
        low = mpo_to_matrix(decompose(weight.detach(), rows, columns, (3,)))
        weight.data.copy_(low)
    before = outputs(model, ids)
    _, report = MPO(metric="weights", bond_dimension=3).compress(model, make_calibration())
    assert all(row.action == "mpo" and row.error_after < 1e-6 for row in report.layers)
    torch.testing.assert_close(outputs(model, ids), before, rtol=1e-4, atol=1e-4)


def test_layers_that_would_not_shrink_stay_dense(make_model, make_calibration):
    model = make_model("llama", intermediate_size=29)  # a prime
    _, report = MPO(metric="weights", keep=0.9).compress(model, make_calibration())
    actions = {row.layer.split(".")[-1]: row.action for row in report.layers}
    assert actions["q_proj"] == "mpo"
    assert report.summary["left_dense"] == sum(row.action == "dense" for row in report.layers)
    model = make_model("llama")
    _, report = MPO(metric="weights", bond_dimension=10_000).compress(model, make_calibration())
    assert report.summary.pop("note").startswith("every layer stays dense")
    assert report.summary == {"kept": 1.0, "layers": 21, "left_dense": 21}
    assert not any(isinstance(module, MPOLinear) for module in model.modules())


def test_patterns_choose_layers(make_model, make_calibration, one_line):
    model = make_model("llama")
    _, report = MPO(metric="weights", keep=0.5, layers=("*.1.mlp.*", "*q_proj")).compress(model, make_calibration())
    assert [row.layer for row in report.layers] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.self_attn.q_proj",
    ]
    with pytest.raises(InputError) as caught:
        MPO(metric="weights", keep=0.5, layers=("*c_attn*",)).check(model, find_structure(model))
    one_line(caught, r"layers: \*c_attn\* matches no dense layer; the first block has .*q_proj")


def test_training_mode_dtype_and_requires_grad(make_model, make_calibration):
    model = make_model("llama").train().to(torch.bfloat16)
    MPO(metric="weights", keep=0.5).compress(model, make_calibration())
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, MPOLinear) and layer.training
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in layer.parameters())


def test_the_same_twice(make_model, make_calibration):
    import copy

    first = make_model("gpt2")
    second = copy.deepcopy(first)
    for model in (first, second):
        MPO(metric="weights", keep=0.6, sites=3).compress(model, make_calibration())
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "one of keep .* and bond_dimension"),
        ({"keep": 0.5, "bond_dimension": 4}, "one of keep .* and bond_dimension"),
        ({"keep": 0}, "keep"), ({"keep": 1}, "keep"), ({"keep": 2}, "keep"), ({"keep": float("nan")}, "keep"),
        ({"bond_dimension": 0}, "bond_dimension"), ({"keep": 0.5, "sites": 1}, "sites"), ({"keep": 0.5, "site": 3}, "site"),
    ],
)  # fmt: skip
def test_bad_fields_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        MPO(metric="weights", **fields)
