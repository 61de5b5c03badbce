"""Matrix product operators against einsum in float64, and their costs against counted multiplications."""

import math
import string

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tensorpress.kernels.mpo_linear import (
    MPOLinear,
    apply_cost,
    matrix_cost,
    mpo_apply,
    mpo_linear_dense,
    mpo_linear_reference,
    mpo_to_matrix,
)

CASES = [
    ((6,), (5,), ()),
    ((3, 7), (5, 2), (4,)),
    ((1, 13), (11, 1), (3,)),
    ((2, 5, 3), (3, 1, 7), (6, 4)),
    ((3, 2, 1, 5), (2, 3, 5, 1), (2, 7, 3)),
    ((2, 3, 2, 1, 3), (1, 2, 3, 2, 2), (2, 5, 4, 3)),
]


def random_cores(rows, columns, bonds, dtype=torch.float64):
    edges = (1, *bonds, 1)
    shapes = zip(edges[:-1], rows, columns, edges[1:], strict=True)
    return [torch.randn(shape, dtype=dtype) / math.sqrt(shape[0] * shape[2]) for shape in shapes]


def einsum_matrix(cores):
    """One einsum over all cores: letters r for bonds, then rows, then columns."""
    sites, letters = len(cores), iter(string.ascii_letters)
    bond, row, column = ([next(letters) for _ in range(count)] for count in (sites + 1, sites, sites))
    inputs = ",".join(bond[k] + row[k] + column[k] + bond[k + 1] for k in range(sites))
    result = torch.einsum(f"{inputs}->{''.join(row)}{''.join(column)}", *cores)
    return result.reshape(math.prod(c.shape[1] for c in cores), math.prod(c.shape[2] for c in cores))


@pytest.mark.parametrize(("rows", "columns", "bonds"), CASES)
def test_matrix_and_chain_against_einsum(seed, rows, columns, bonds):
    cores = random_cores(rows, columns, bonds)
    expected = einsum_matrix(cores)
    assert (mpo_to_matrix(cores) - expected).norm() <= 1e-12 * expected.norm()
    for shape in ((math.prod(columns),), (4, math.prod(columns)), (2, 3, math.prod(columns))):
        x = torch.randn(shape, dtype=torch.float64)
        y = mpo_apply(cores, x)
        assert y.shape == (*shape[:-1], math.prod(rows))
        assert (y - x @ expected.T).norm() <= 1e-12 * (x @ expected.T).norm()


def test_inputs_that_are_not_contiguous(seed):
    cores = random_cores((3, 4), (5, 6), (7,))
    x = torch.randn(30, 8, dtype=torch.float64).T
    torch.testing.assert_close(mpo_apply(cores, x), x @ einsum_matrix(cores).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize(("rows", "columns", "bonds"), CASES)
def test_costs_are_the_multiplications_that_happen(seed, tokens, rows, columns, bonds):
    cores = random_cores(rows, columns, bonds)
    x = torch.randn(tokens, math.prod(columns), dtype=torch.float64)
    with FlopCounterMode(display=False) as chain:
        mpo_apply(cores, x)
    with FlopCounterMode(display=False) as dense:
        x @ mpo_to_matrix(cores).T
    assert chain.get_total_flops() == 2 * apply_cost(cores, tokens)
    assert dense.get_total_flops() == 2 * matrix_cost(cores, tokens)
    shapes = [core.shape for core in cores]
    assert apply_cost(shapes, tokens) == apply_cost(cores, tokens)
    assert matrix_cost(shapes, tokens) == matrix_cost(cores, tokens)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 300])
def test_layer_against_float64_whichever_way_is_cheaper(seed, bias, tokens):
    cores = random_cores((8, 9), (6, 10), (11,))
    shift = torch.randn(72, dtype=torch.float64) if bias else None
    layer = MPOLinear.from_cores(cores, shift).requires_grad_(False)
    x = torch.randn(tokens, 60, dtype=torch.float64)
    expected = x @ einsum_matrix(cores).T + (0 if shift is None else shift)
    for run in (mpo_linear_dense, mpo_linear_reference, MPOLinear.forward):
        torch.testing.assert_close(run(layer, x), expected, rtol=1e-11, atol=1e-11)


def test_reference_takes_the_cheaper_way(seed, monkeypatch):
    layer = MPOLinear.from_cores(random_cores((16, 16), (16, 16), (4,)), None)
    taken = []
    monkeypatch.setattr("tensorpress.kernels.mpo_linear.mpo_linear_dense", lambda layer, x: taken.append("dense") or x)
    monkeypatch.setattr("tensorpress.kernels.mpo_linear.mpo_apply", lambda cores, x: taken.append("chain") or x)
    for tokens in (1, 2, 50, 4096):
        mpo_linear_reference(layer, torch.zeros(tokens, 256, dtype=torch.float64))
        chain, dense = apply_cost(list(layer.cores), tokens), matrix_cost(list(layer.cores), tokens)
        assert taken.pop() == ("chain" if chain < dense else "dense")
    expensive = MPOLinear.from_cores(random_cores((2, 2), (2, 2), (4,)), None)
    mpo_linear_reference(expensive, torch.zeros(512, 4, dtype=torch.float64))
    assert taken == ["dense"]


def test_gradients_reach_every_core(seed):
    cores = random_cores((3, 4), (5, 2), (3,))
    layer = MPOLinear.from_cores(cores, torch.randn(12, dtype=torch.float64))
    x = torch.randn(7, 10, dtype=torch.float64)
    layer(x).square().sum().backward()
    leaves = [core.clone().requires_grad_() for core in cores]
    (x @ einsum_matrix(leaves).T + layer.bias.detach()).square().sum().backward()
    for parameter, leaf in zip(layer.cores, leaves, strict=True):
        torch.testing.assert_close(parameter.grad, leaf.grad, rtol=1e-10, atol=1e-10)


def test_spec_rebuilds_the_empty_layer_and_the_state_fills_it(seed):
    layer = MPOLinear.from_cores(random_cores((3, 4, 2), (5, 2, 3), (3, 4)), torch.randn(24).double())
    again = MPOLinear.from_spec(layer.spec()).double()
    assert again.spec() == layer.spec() and (again.in_features, again.out_features) == (30, 24)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dense_weight(), layer.dense_weight()) and torch.equal(again.bias, layer.bias)


def test_cores_are_copied(seed):
    cores = random_cores((3, 4), (5, 2), (3,))
    layer = MPOLinear.from_cores(cores, None)
    before = layer.dense_weight().clone()
    cores[0].zero_()
    assert torch.equal(layer.dense_weight(), before)


def test_factors_and_bonds_that_do_not_belong_together():
    with pytest.raises(ValueError, match="bond"):
        MPOLinear((2, 3), (2, 3), (1, 2), bias=False)
    with pytest.raises(ValueError, match="bond"):
        MPOLinear((2, 3, 4), (2, 3), (1,), bias=False)


@pytest.mark.parametrize(("outputs", "rank", "inputs"), [(12, 3, 10), (1, 1, 5), (7, 2, 1), (40, 30, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_low_rank_is_two_plain_products(seed, outputs, rank, inputs, bias):
    left, right = torch.randn(outputs, rank).double(), torch.randn(rank, inputs).double()
    shift = torch.randn(outputs).double() if bias else None
    layer = MPOLinear.from_low_rank(left, right, shift).requires_grad_(False)
    assert torch.equal(layer.dense_weight(), left @ right) and layer.bonds == (rank,)
    for shape in ((0,), (1,), (2, 3)):
        x = torch.randn(*shape, inputs).double()
        expected = x @ right.T @ left.T + (0 if shift is None else shift)
        for layer.kernel in ("reference", "chain", "matrix", "dense"):
            torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)
    layer.kernel = "chain"
    with FlopCounterMode(display=False) as counted:
        layer(torch.randn(1, inputs).double())
    assert counted.get_total_flops() == 2 * rank * (outputs + inputs)
    assert layer.kept_bytes(["chain"]) == 0  # it multiplies with the factors where they lie


def test_the_reference_of_a_low_rank_never_makes_the_largest_tensor(seed):
    layer = MPOLinear.from_low_rank(torch.randn(40, 4), torch.randn(4, 30), None)
    with FlopCounterMode(display=False) as counted:
        layer(torch.randn(2, 30)).sum().backward()
    assert counted.get_total_flops() <= 3 * 2 * 2 * 4 * (40 + 30)
    assert all(core.grad is not None for core in layer.cores)


def test_factors_of_two_ranks_are_refused():
    with pytest.raises(ValueError, match="3 columns, the right one 4 rows"):
        MPOLinear.from_low_rank(torch.zeros(5, 3), torch.zeros(4, 5), None)
