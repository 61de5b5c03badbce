"""Contractions of an MPO with its inputs: every plan against einsum in float64, their costs, and what is kept of changing cores."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tensorpress.kernels import cpu_linear, mpo_contraction, registry
from tensorpress.kernels.mpo_contraction import TORCH, Contraction, Machine, Plan, merge, operations, plans, predicted
from tensorpress.kernels.mpo_linear import COMPILED, MPOLinear, mpo_linear_chain, mpo_linear_matrix, plan_for

COMPILES = cpu_linear.compiled() is not None
CASES = (
    ((3, 4), (5, 2), (6,)),
    ((7, 1), (1, 5), (4,)),  # a truncated singular value decomposition
    ((2, 3, 5), (3, 1, 2), (4, 7)),
    ((2, 1, 3, 2), (1, 4, 2, 3), (2, 5, 3)),
    ((6,), (5,), ()),
)


def random_cores(rows, columns, bonds):
    edges = (1, *bonds, 1)
    sites = zip(edges[:-1], rows, columns, edges[1:], strict=True)
    return [torch.randn(shape, dtype=torch.float64) for shape in sites]


def shapes_of(cores):
    return [tuple(core.shape) for core in cores]


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("rows", "columns", "bonds"), CASES)
def test_every_plan_is_the_matrix(seed, rows, columns, bonds, tokens):
    cores = random_cores(rows, columns, bonds)
    x = torch.randn(tokens, math.prod(columns), dtype=torch.float64)
    expected = x @ merge(cores).reshape(math.prod(rows), math.prod(columns)).T
    for plan in plans(len(rows)):
        torch.testing.assert_close(Contraction(cores, plan)(x), expected, rtol=1e-11, atol=1e-11)
        strided = x.repeat(1, 2)[:, : x.shape[1]]
        torch.testing.assert_close(Contraction(cores, plan)(strided[None]), expected[None], rtol=1e-11, atol=1e-11)


def test_how_many_plans_there_are():
    assert [sum(1 for _ in plans(sites)) for sites in (1, 2, 3, 4)] == [1, 3, 7, 15]
    assert len(set(plans(7))) == 127


@pytest.mark.parametrize(("rows", "columns", "bonds"), CASES)
def test_operations_are_those_that_happen(seed, rows, columns, bonds):
    cores = random_cores(rows, columns, bonds)
    x = torch.randn(4, math.prod(columns), dtype=torch.float64)
    for plan in plans(len(rows)):
        contraction = Contraction(cores, plan)
        with FlopCounterMode(display=False) as counted:
            contraction(x)
        assert counted.get_total_flops() == 2 * operations(shapes_of(cores), plan, 4)
        assert contraction.nbytes == 8 * mpo_contraction.kept_numbers(shapes_of(cores), plan)


def test_the_model_of_costs_prefers_what_reads_or_computes_least():
    machine = Machine(rate=1e11, batched=1e11, bandwidth=1e10, call=1e-6)
    low_rank = ((1, 1024, 1, 64), (64, 1, 1024, 1))
    best = mpo_contraction.best_chain(low_rank, 1, 2, machine, 1 << 20)
    assert best == Plan("right", (1, 2))  # down to 64 numbers first, then up
    matrix = Plan("left", (2,))
    assert predicted(low_rank, best, 1, 2, machine) < 0.2 * predicted(low_rank, matrix, 1, 2, machine)
    square = ((1, 32, 32, 256), (256, 32, 32, 1))  # as many numbers as half the matrix, and many times its operations
    chain = mpo_contraction.best_chain(square, 128, 2, machine, 1 << 20)
    assert predicted(square, chain, 128, 2, machine) > predicted(square, matrix, 128, 2, machine)
    assert mpo_contraction.best_chain(low_rank, 1, 2, machine, 1000) is None  # none that keeps so little
    assert mpo_contraction.best_chain(((1, 4, 4, 1),), 1, 2, machine, 1000) is None
    slow = Machine(rate=1e11, batched=1e9, bandwidth=1e10, call=1e-6)  # no fast code for many small products
    assert predicted(square, chain, 128, 2, slow) > 50 * predicted(square, chain, 128, 2, machine)
    assert predicted(low_rank, best, 128, 2, slow) == predicted(low_rank, best, 128, 2, machine)


@pytest.fixture
def layer(seed):
    made = MPOLinear.from_cores(random_cores((4, 3), (5, 2), (6,)), torch.randn(12, dtype=torch.float64))
    return made.requires_grad_(False)


@pytest.mark.parametrize("run", [mpo_linear_chain, mpo_linear_matrix])
def test_what_is_kept_follows_the_cores(layer, run):
    x = torch.randn(3, 10, dtype=torch.float64)

    def expected():
        return x @ layer.dense_weight().T + layer.bias

    torch.testing.assert_close(run(layer, x), expected(), rtol=1e-11, atol=1e-11)
    before = list(layer.kept_of.values())
    run(layer, x)
    assert [a is b for (_, a), (_, b) in zip(before, layer.kept_of.values(), strict=True)] == [True]
    layer.cores[1].mul_(2)
    torch.testing.assert_close(run(layer, x), expected(), rtol=1e-11, atol=1e-11)
    layer.cores[0] = torch.nn.Parameter(torch.randn_like(layer.cores[0]), requires_grad=False)
    torch.testing.assert_close(run(layer, x), expected(), rtol=1e-11, atol=1e-11)
    other = copy.deepcopy(layer)
    other.cores[0].zero_()
    torch.testing.assert_close(run(other, x), layer.bias.expand(3, -1))
    torch.testing.assert_close(run(layer, x), expected(), rtol=1e-11, atol=1e-11)
    assert run(layer, x[:0]).shape == (0, 12)


def test_kept_bytes_are_counted_and_given_back(layer):
    assert layer.kept_bytes() == 0
    mpo_linear_matrix(layer, torch.randn(1, 10, dtype=torch.float64))
    assert layer.kept_bytes() == layer.kept_bytes(["matrix"]) == 8 * 120
    for rows in (1, 5, 60, 500, 1):
        mpo_linear_chain(layer, torch.randn(rows, 10, dtype=torch.float64))
        assert len([key for key in layer.kept_of if key.startswith("chain")]) <= 2
    chain = layer.kept_bytes(["chain"])
    assert chain > 0 and layer.kept_bytes() == 8 * 120 + chain
    layer.release(["matrix"])
    assert layer.kept_bytes() == 8 * 120
    layer.release()
    assert layer.kept_bytes() == 0 and not layer.kept_of


def test_each_kind_does_its_own_products(layer):
    """Contractions in the same form are shared, what multiplies is not."""
    x, calls = torch.randn(2, 10, dtype=torch.float64), []

    def multiply(*arguments):
        calls.append(arguments)
        return TORCH.multiply(*arguments)

    other = dataclasses.replace(TORCH, name="other", multiply=multiply, has_rates=False)
    wanted = mpo_linear_chain(layer, x)
    assert torch.equal(mpo_linear_chain(layer, x, "other", other), wanted) and len(calls) == 2
    (_, one), (_, two) = layer.kept_of.values()
    assert all(a is b for a, b in zip(one.matrices, two.matrices, strict=True))


def test_copies_make_their_own(layer):
    x = torch.randn(2, 10).bfloat16()
    layer.bfloat16()
    compiled = [registry.backends("mpo_linear")[name].run for name in ("cpu_chain", "cpu_matrix")] * COMPILES
    for run in (mpo_linear_chain, mpo_linear_matrix, *compiled):
        layer.release()
        y = run(layer, x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.kept_bytes() == 0 and other.read_bytes(1) > 0
            assert torch.equal(run(other, x), y) and other.kept_of and layer.kept_of


def test_the_reference_is_expected_to_take_the_cheapest_way(seed):
    low_rank = MPOLinear.from_low_rank(torch.randn(1024, 16), torch.randn(16, 1024), None)
    expected = registry.backends("mpo_linear")["reference"].expected(low_rank, torch.randn(1, 1024))
    machine = mpo_contraction.machine_of("cpu", torch.float32, torch.get_num_threads())
    assert expected == pytest.approx(2 * 16 * 1024 / machine.rate)


@pytest.mark.parametrize("kernel", ["chain", "matrix", "auto"])
def test_gradients_reach_the_cores_of_a_first_layer(layer, kernel):
    layer.kernel = kernel
    layer.requires_grad_(True)
    layer(torch.randn(3, 10, dtype=torch.float64)).sum().backward()  # inputs that need none
    assert all(core.grad is not None and core.grad.abs().sum() > 0 for core in layer.cores)
    assert not layer.kept_of


def test_another_precision_goes_through_the_reference(layer):
    with pytest.raises(RuntimeError):  # as a dense layer
        mpo_linear_chain(layer, torch.randn(3, 10))
    assert not layer.kept_of


def test_the_plan_of_a_layer_is_of_its_size_of_batch(layer):
    (three, short), (eight, long) = (plan_for(layer, rows, torch.float64) for rows in (3, 8))
    assert three == eight and 0 < short <= long
    assert not plan_for(layer, 1, torch.float64)[0].is_matrix()


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [TORCH, *[COMPILED] * COMPILES], ids=lambda kind: kind.name)
def test_nothing_is_copied_between_steps(seed, kind):
    cores = [core.bfloat16() for core in random_cores((2, 3, 5), (3, 4, 2), (4, 7))]
    x = torch.randn(3, 24).bfloat16()
    for plan in plans(3):
        contraction = Contraction(cores, plan, kind)
        with Calls() as calls:
            contraction(x)
        assert calls.names and not {
            name for name in calls.names if "copy" in name or "clone" in name or "contiguous" in name
        }


@pytest.mark.skipif(cpu_linear.compiled() is None, reason="the compiled kernels were not built")
@pytest.mark.parametrize(("rows", "columns", "bonds"), CASES)
def test_the_compiled_ways_are_the_matrix(seed, rows, columns, bonds):
    cores = [core.bfloat16() for core in random_cores(rows, columns, bonds)]
    layer = MPOLinear.from_cores(cores, torch.randn(math.prod(rows)).bfloat16()).requires_grad_(False)
    known = registry.backends("mpo_linear")
    exact = [core.double() for core in cores]
    matrix = merge(exact).reshape(math.prod(rows), math.prod(columns))
    sizes = merge([core.abs() for core in exact]).reshape_as(matrix)
    for tokens in (0, 1, 9, 40):
        x = torch.randn(tokens, math.prod(columns)).bfloat16()
        wanted = x.double() @ matrix.T + layer.bias.double()
        room = (
            2**-7 * len(cores) * (x.double().abs() @ sizes.T + layer.bias.double().abs())
        )  # each step's result is rounded
        for name in ("cpu_chain", "cpu_matrix"):
            if not known[name].can_run(layer):
                assert name == "cpu_chain" and len(cores) == 1
                continue
            for shape in (x.shape, (1, *x.shape)):
                y = known[name].run(layer, x.view(shape))
                assert y.dtype == torch.bfloat16 and y.shape == (*shape[:-1], math.prod(rows))
                assert ((y.view(wanted.shape).double() - wanted).abs() <= room).all()
            if tokens:
                assert layer.kept_bytes([name]) > 0
                before = layer.bias.clone()
                layer.bias.add_(1)  # what is kept has no bias
                assert ((known[name].run(layer, x).double() - wanted - 1).abs() <= room + 2**-6).all()
                layer.bias.copy_(before)
    other = MPOLinear.from_cores([core.float() for core in cores], None)
    assert not known["cpu_chain"].can_run(other) and not known["cpu_matrix"].can_run(other)
