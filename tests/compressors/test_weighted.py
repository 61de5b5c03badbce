"""Approximations against the output of a layer: optimal in float64, never worse by refinement, and budgets that hold."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tensorpress.compressors.decompose import site_plans
from tensorpress.compressors.decompose.allocation import Menu, allocate
from tensorpress.compressors.decompose.alternating import _Problem, refine
from tensorpress.compressors.decompose.site_plans import SitePlan, best_fit, fit, most_sites, plans
from tensorpress.compressors.decompose.tensor_train import (
    bond_spectra,
    canonical,
    capped_bonds,
    decompose,
    entropy,
    factors,
    full_bonds,
    least_numbers,
    matrix_spectra,
    parameters,
    rounded,
)
from tensorpress.compressors.decompose.weighted_low_rank import damped, low_rank_layer, weighted_error, weighted_svd
from tensorpress.compressors.decompose.weighted_tt_svd import weighted_tt_svd
from tensorpress.compressors.moments import PairedMoments, SecondMoment
from tensorpress.kernels.mpo_linear import mpo_to_matrix
from tensorpress.loading import load
from tensorpress.structure import find_structure, linear_weight
from tensorpress.text import demo_folder


def moment(size, seen=None):
    """A second moment of correlated vectors of uneven size; singular where fewer are seen than it has rows."""
    x = torch.randn(seen or 3 * size, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    return x.T @ x / len(x)


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


METRICS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("of_inputs", "of_outputs"), METRICS)
@pytest.mark.parametrize(("m", "n"), [(8, 13), (13, 8), (9, 9)])
def test_weighted_svd_is_the_truncated_svd_of_the_weighted_matrix(seed, m, n, of_inputs, of_outputs):
    """Eckart and Young on G^1/2 W H^1/2: errors of all ranks, and no other matrix of that rank is nearer."""
    weight = torch.randn(m, n, dtype=torch.float64)
    h, g = moment(n) if of_inputs else None, moment(m) if of_outputs else None
    found = weighted_svd(weight, h, g, damping=1e-12)
    left = torch.eye(m, dtype=torch.float64) if g is None else root(g)
    right = torch.eye(n, dtype=torch.float64) if h is None else root(h)
    values = torch.linalg.svdvals(left @ weight @ right)
    for rank in range(min(m, n) + 1):
        difference = weight - found.left[:, :rank] @ found.right[:rank]
        expected = float(values[rank:].square().sum())
        scale = float(values.square().sum())
        assert weighted_error(difference, h, g) == pytest.approx(expected, rel=1e-6, abs=1e-9 * scale)
        assert float(found.losses[rank]) == pytest.approx(expected, rel=1e-6, abs=1e-9 * scale)
    assert (found.left @ found.right - weight).norm() <= 1e-9 * weight.norm()


@pytest.mark.parametrize(("m", "n"), [(8, 13), (13, 8)])
def test_diagonal_metrics_are_the_full_ones_of_a_diagonal(seed, m, n):
    weight, h, g = torch.randn(m, n), torch.rand(n).double(), torch.rand(m).double()
    whole, diagonal = weighted_svd(weight, torch.diag(h), torch.diag(g)), weighted_svd(weight, h, g)
    torch.testing.assert_close(whole.losses, diagonal.losses, rtol=1e-9, atol=1e-10)
    for rank in (1, 4):
        torch.testing.assert_close(
            whole.left[:, :rank] @ whole.right[:rank], diagonal.left[:, :rank] @ diagonal.right[:rank]
        )
    assert weighted_error(weight, h, g) == pytest.approx(weighted_error(weight, torch.diag(h), torch.diag(g)))


@pytest.mark.parametrize(("m", "n"), [(8, 13), (13, 8), (20, 6)])
def test_inputs_that_are_linearly_dependent_need_no_damping(seed, m, n):
    """With inputs from a space of 3 dimensions rank 3 has no error at all, and full rank gives the weight back."""
    weight, h = torch.randn(m, n, dtype=torch.float64), moment(n, seen=3)
    found = weighted_svd(weight, h)
    assert weighted_error(weight - found.left[:, :3] @ found.right[:3], h) < 1e-9 * weighted_error(weight, h)
    assert (found.left @ found.right - weight).norm() <= 1e-9 * weight.norm()
    layer = low_rank_layer(found.left[:, :1], torch.zeros(1, n), None, torch.float32, pivoted=False)
    assert not bool(layer.dense_weight().any()) and bool(layer.outer.weight.any()), "what is zero can be trained"
    nothing = weighted_svd(torch.zeros(m, n), torch.zeros(n, n), torch.zeros(m, m))
    assert not nothing.right.any() and not nothing.losses.any()


SPLITS = [
    ((4, 6), (5, 6)),
    ((2, 3, 4), (5, 2, 3)),
    ((3, 2, 2, 2), (2, 5, 3, 1)),
    ((24, 1), (1, 30)),
    ((12, 2), (1, 30)),
]


@pytest.mark.parametrize(("of_inputs", "of_outputs"), METRICS)
@pytest.mark.parametrize(("rows", "columns"), SPLITS)
def test_refinement_never_raises_the_error_and_says_it_truly(seed, rows, columns, of_inputs, of_outputs):
    weight = torch.randn(24, 30, dtype=torch.float64)
    h, g = moment(30) if of_inputs else None, moment(24) if of_outputs else None
    cores = decompose(weight, rows, columns, capped_bonds(rows, columns, 5))
    found, errors = refine(cores, weight, h, g, sweeps=3)
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[0] == pytest.approx(weighted_error(weight - mpo_to_matrix(cores), h, g))
    assert errors[-1] == pytest.approx(weighted_error(weight - mpo_to_matrix(found), h, g), rel=1e-6)
    assert [core.shape[1:3] for core in found] == [core.shape[1:3] for core in cores]
    if of_inputs or of_outputs:
        assert errors[-1] < 0.9 * errors[0]
    elif len(rows) == 2:  # two sites: the start is the optimum
        assert errors[-1] == pytest.approx(errors[0], rel=1e-9)


@pytest.mark.parametrize("of_outputs", [None, "diagonal", "full"])
@pytest.mark.parametrize("of_inputs", [None, "diagonal", "full"])
def test_a_matrix_between_both_metrics(seed, of_inputs, of_outputs):
    """In memory row after row as the matrix is: what is added to it and multiplied with it would take longer."""
    matrix, h, g = torch.randn(24, 30, dtype=torch.float64), moment(30), moment(24)
    metrics = {None: (None, None), "diagonal": (h.diagonal(), g.diagonal()), "full": (h, g)}
    problem = _Problem(matrix, metrics[of_inputs][0], metrics[of_outputs][1])
    whole = {
        None: (torch.eye(30).double(), torch.eye(24).double()),
        "diagonal": (h.diag().diag(), g.diag().diag()),
        "full": (h, g),
    }
    expected = whole[of_outputs][1] @ matrix @ whole[of_inputs][0]
    found = problem.weighted(matrix)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize("better", [True, False])
def test_a_fit_keeps_the_better_of_its_start_and_what_was_refined(seed, monkeypatch, better):
    """Whatever the refinement says of itself, which may be in float32."""
    weight, h = torch.randn(24, 30), moment(30)
    plan = SitePlan("balanced", (4, 6), (5, 6))
    parts = (plan, 4, weight, None, h, None)
    start = fit(*parts, pivoted=False, sweeps=0, damping=1e-3)
    truly = fit(*parts, pivoted=False, sweeps=2, damping=1e-3)
    assert truly.loss < 0.95 * start.loss
    refined = truly.cores if better else [core * 1.5 for core in start.cores]
    monkeypatch.setattr(site_plans, "refine", lambda *args, **fields: (refined, [1.0, 0.0]))
    found = fit(*parts, pivoted=False, sweeps=2, damping=1e-3)
    assert found.loss == (truly.loss if better else start.loss)
    torch.testing.assert_close(found.layer.dense_weight(), (truly if better else start).layer.dense_weight())


@pytest.mark.parametrize("noise", [1.0, 1e-2])
@pytest.mark.parametrize("of_outputs", [False, True])
def test_what_is_left_follows_the_steps_in_float32_too(seed, noise, of_outputs):
    """Of weights that are not small; with an error of a hundredth it is told to a thousandth."""
    rows, columns = (4, 5, 8), (6, 4, 6)
    exact = mpo_to_matrix(decompose(torch.randn(160, 144), rows, columns, capped_bonds(rows, columns, 9)))
    weight = exact / exact.norm() + noise * nn.functional.normalize(torch.randn(160, 144), dim=(0, 1))
    h, g = moment(144).float(), moment(160).float() if of_outputs else None
    cores = decompose(weight, rows, columns, capped_bonds(rows, columns, 9))
    found, errors = refine(cores, weight, h, g, sweeps=4)
    exact_error = weighted_error(weight.double() - mpo_to_matrix([core.double() for core in found]), h, g)
    assert found[0].dtype == torch.float32 and errors[-1] == pytest.approx(exact_error, rel=1e-3)
    assert errors[-1] < 0.9 * errors[0]
    assert all(after <= before for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize(("rows", "columns"), SPLITS)
def test_a_core_is_solved_in_closed_form(seed, rows, columns):
    """At the solution the gradient by that core is nothing; conjugate gradients run to the end find the same error."""
    weight, h = torch.randn(24, 30, dtype=torch.float64), moment(30)
    problem = _Problem(weight, h, None)
    for k in range(len(rows)):
        moving = canonical(decompose(weight, rows, columns, capped_bonds(rows, columns, 4)), k)
        before = problem.left(moving)
        assert problem.is_small(moving, k)
        closed = [*moving[:k], problem.solved(moving, k), *moving[k + 1 :]]
        core, after = problem.descended(moving, k, 500, before)
        exact = problem.left([*moving[:k], core, *moving[k + 1 :]])
        torch.testing.assert_close((after.difference, after.pull), (exact.difference, exact.pull))
        least = problem.left(closed).error
        assert least == pytest.approx(after.error, rel=1e-5)
        for _ in range(20):
            nudged = [*closed]
            nudged[k] = closed[k] + 1e-3 * torch.randn_like(closed[k])
            assert problem.left(nudged).error >= least * (1 - 1e-12)
        assert least <= before.error * (1 + 1e-12)


def test_what_can_be_exact_is_found(seed):
    rows, columns = (4, 6), (5, 6)
    exact = mpo_to_matrix([torch.randn(1, 4, 5, 3).double(), torch.randn(3, 6, 6, 1).double()])
    start = decompose(exact + 0.3 * torch.randn(24, 30), rows, columns, (3,))
    _, errors = refine(start, exact, moment(30), sweeps=20)
    assert errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize(("rows", "columns"), SPLITS)
def test_canonical_forms_spectra_and_entropies(seed, rows, columns):
    weight = torch.randn(24, 30, dtype=torch.float64)
    cores = decompose(weight, rows, columns, full_bonds(rows, columns))
    for center in range(len(cores)):
        found = canonical(cores, center)
        assert (mpo_to_matrix(found) - weight).norm() <= 1e-12 * weight.norm()
        assert float(found[center].norm()) == pytest.approx(float(weight.norm()))
        for k, core in enumerate(found):
            left, i, j, right = core.shape
            matrix = core.reshape(left * i * j, right) if k < center else core.reshape(left, i * j * right).T
            if k != center:
                torch.testing.assert_close(matrix.T @ matrix, torch.eye(matrix.shape[1]).double())
    axes = [axis for k in range(len(rows)) for axis in (k, len(rows) + k)]
    tensor = weight.reshape(*rows, *columns).permute(axes)
    for k, spectrum in enumerate(bond_spectra(cores), 1):
        size = rows[0] * columns[0] if k == 1 else np.prod([r * c for r, c in zip(rows[:k], columns[:k], strict=True)])
        expected = torch.linalg.svdvals(tensor.reshape(int(size), -1))
        torch.testing.assert_close(spectrum[: len(expected)], expected, rtol=1e-9, atol=1e-9)
        without = matrix_spectra(weight, rows, columns)[k - 1]
        torch.testing.assert_close(without.square(), expected.square(), rtol=1e-9, atol=1e-9)
        assert 0 <= entropy(spectrum) <= np.log(len(expected)) + 1e-12
    assert entropy(torch.tensor([3.0])) == 0 and entropy(torch.zeros(4)) == 0
    assert entropy(torch.ones(8)) == pytest.approx(np.log(8))


@pytest.mark.parametrize("sites", [4, 5, 6, 7])
def test_entropies_rise_up_to_the_middle(seed, sites):
    """On random weights and on the demo model's: full bonds grow up to the middle, and what is shared over them with them."""
    model = load(demo_folder(), dtype=torch.float64, kernels="reference")
    paths = find_structure(model).linear_paths
    weights = [linear_weight(model.get_submodule(path)).detach() for path in paths[:: len(paths) // 5]]
    for weight in [torch.randn(192, 256, dtype=torch.float64), *weights]:
        rows, columns = (factors(size, sites) for size in weight.shape)
        bonds = full_bonds(rows, columns)
        entropies = [entropy(spectrum) for spectrum in matrix_spectra(weight, rows, columns)]
        for k in range(len(bonds) - 1):
            if bonds[k] != bonds[k + 1]:
                assert (entropies[k] < entropies[k + 1]) == (bonds[k] < bonds[k + 1])


@pytest.mark.parametrize(("m", "n"), [(256, 256), (768, 256), (100, 300)])
def test_pivots_never_have_a_lower_rank_than_plain_factors(m, n):
    """Whatever the multiple that bonds are rounded to; below a rank of sqrt(m / 16) the marks of pivots cost more than they save."""
    plan = SitePlan("low_rank", (m, 1), (1, n))
    for keep in np.linspace(0.05, 0.98, 200):
        allowance = keep * 2 * m * n
        bond = plan.largest(allowance, True, 16)
        assert plan.bytes(bond, True) <= allowance
        assert bond >= min(allowance // (2 * (m + n)), m - 1, n)


@pytest.mark.parametrize(("rows", "columns"), SPLITS)
def test_rounding_drops_what_it_says(seed, rows, columns):
    weight = torch.randn(24, 30, dtype=torch.float64)
    cores = decompose(weight, rows, columns, full_bonds(rows, columns))
    bonds = capped_bonds(rows, columns, 4)
    assert (mpo_to_matrix(rounded(cores, full_bonds(rows, columns))) - weight).norm() <= 1e-12 * weight.norm()
    found = mpo_to_matrix(rounded(cores, bonds))
    direct = mpo_to_matrix(decompose(weight, rows, columns, bonds))
    assert (found - weight).norm() == pytest.approx(float((direct - weight).norm()), rel=1e-9)


def test_the_gauge_is_free():
    assert least_numbers((4, 6), (5, 6), full_bonds((4, 6), (5, 6))) == 24 * 30
    assert least_numbers((24, 1), (1, 30), (7,)) == 7 * (24 + 30 - 7)
    bonds = (4, 6)
    assert parameters((2, 3, 4), (5, 2, 3), bonds) - least_numbers((2, 3, 4), (5, 2, 3), bonds) == 16 + 36


# --- plans


@pytest.mark.parametrize("which", ["auto", "low_rank", "balanced"])
@pytest.mark.parametrize(("m", "n"), [(24, 30), (30, 24), (13, 17), (13, 26), (2, 40)])
def test_plans_hold_what_they_say(seed, m, n, which):
    weight, h, g = torch.randn(m, n), moment(n), moment(m)
    for plan in plans(m, n, 2, which):
        assert np.prod(plan.rows) == m and np.prod(plan.columns) == n
        for allowance in (0.2 * 2 * m * n, 0.7 * 2 * m * n):
            for pivoted in (True, False):
                bond = plan.largest(allowance, pivoted)
                if not bond:
                    continue
                assert plan.bytes(bond, pivoted) <= allowance
                assert bond >= min(plan.full_bond, m - 1) or plan.bytes(bond + 1, pivoted) > allowance
                found = fit(plan, bond, weight, None, h, g, pivoted=pivoted, sweeps=1, damping=1e-3)
                stored = sum(p.numel() * 2 for p in found.layer.parameters())
                bits = sum(b.numel() for b in found.layer.buffers())
                assert found.bytes == stored + bits <= allowance
                dense = found.layer.dense_weight().detach().double()
                error = weighted_error(weight.double() - dense, h, g)
                assert found.loss == pytest.approx(error, rel=1e-2, abs=1e-4 * weighted_error(weight, h, g))


def test_the_best_plan_is_the_one_with_the_smallest_error_and_never_worse_than_whitened_svd(seed):
    h, g = moment(30), moment(24)
    low = torch.randn(24, 4) @ torch.randn(4, 30)
    kronecker = torch.kron(torch.randn(4, 5), torch.randn(6, 6)) + torch.kron(torch.randn(4, 5), torch.randn(6, 6))
    for weight, winner in ((low, "low rank"), (kronecker, "balanced 2 sites")):
        found, losses = best_fit(
            plans(24, 30, 2, "auto"), 2 * 24 * 30 * 0.4, weight, None, h, g, pivoted=True, sweeps=6, damping=1e-3
        )
        assert found.plan.name == winner and found.loss == min(losses.values()) <= losses["low rank"]
        assert set(losses) == {"low rank", "balanced 2 sites", "folded 2 sites"}
    nothing, losses = best_fit(
        plans(24, 30, 2, "auto"), 2 * 24 * 30, low, None, h, g, pivoted=True, sweeps=1, damping=1e-3
    )
    assert nothing is None and losses == {}


def test_multiples_where_they_can_be():
    plan = SitePlan("low_rank", (64, 1), (1, 64))
    assert plan.largest(2 * 64 * 64 * 0.75, True, 8) % 8 == 0
    assert plan.largest(plan.bytes(5, True), True, 8) == 5
    # Plans compete at equal bytes: no other plan leaves more of them than one step of its bonds.
    for sites in (2, 3, 5):
        plan = SitePlan("balanced", factors(640, sites), factors(256, sites))
        for keep in (0.3, 0.5, 0.8):
            bond = plan.largest(2 * 640 * 256 * keep, True, 16)
            assert plan.bytes(bond, True) <= 2 * 640 * 256 * keep < plan.bytes(bond + 1, True)
    assert most_sites(13, 17) == 1 and most_sites(64, 17) == 6 and most_sites(12, 7) == 3


# --- allocation


def test_allocation_against_all_choices(seed):
    """Within one step's gain of the optimum of all combinations, and never over the budget."""
    generator = np.random.default_rng(seed)
    for _ in range(30):
        menus = []
        for _ in range(4):
            costs = np.sort(generator.integers(1, 40, 5)).astype(float)
            menus.append(Menu(costs, np.sort(generator.random(5) ** 3)[::-1].copy()))
        least, most = (sum(float(f(menu.costs)) for menu in menus) for f in (np.min, np.max))
        for budget in np.linspace(least, most, 7):
            chosen = allocate(menus, budget)
            cost = sum(menu.costs[c] for menu, c in zip(menus, chosen, strict=True))
            loss = sum(menu.losses[c] for menu, c in zip(menus, chosen, strict=True))
            assert cost <= budget + 1e-9
            best = min(
                sum(menu.losses[c] for menu, c in zip(menus, all_chosen, strict=True))
                for all_chosen in itertools.product(range(5), repeat=4)
                if sum(menu.costs[c] for menu, c in zip(menus, all_chosen, strict=True)) <= budget + 1e-9
            )
            assert best - 1e-12 <= loss <= best + max(float(np.max(menu.losses)) for menu in menus)
        assert allocate(menus, most) == [int(np.lexsort((m.costs, m.losses))[0]) for m in menus]
        with pytest.raises(ValueError, match="at least"):
            allocate(menus, least - 0.5)


def test_a_layer_that_matters_gets_more():
    costs = np.arange(1, 11, dtype=float)
    dull, keen = Menu(costs, 1 / costs), Menu(costs, 100 / costs)
    first, second = allocate([dull, keen], 12)
    assert second > first and costs[first] + costs[second] <= 12


# --- moments


def test_moments_are_those_of_all_that_was_seen(seed):
    x, y = torch.randn(101, 7), torch.randn(101, 7)
    whole, pairs, diagonal = SecondMoment(7), PairedMoments(7), SecondMoment(7, diagonal=True)
    for part, other in zip(x.split(13), y.split(13), strict=True):
        whole.add(part)
        diagonal.add(part)
        pairs.add(part, other)
    torch.testing.assert_close(whole.matrix, x.T @ x / 101)
    torch.testing.assert_close(diagonal.matrix, (x.T @ x / 101).diagonal())
    torch.testing.assert_close(pairs.own.matrix, x.T @ x / 101)
    torch.testing.assert_close(pairs.strayed, (y - x).T @ x / 101)
    torch.testing.assert_close(
        damped(whole.matrix, 0.1), whole.matrix + 0.1 * whole.matrix.diagonal().mean() * torch.eye(7)
    )


def test_compensation_is_the_least_squares_fit_to_the_originals_output(seed, monkeypatch):
    monkeypatch.setattr("tensorpress.compressors.moments.STRAY_DAMPING", 1e-9)
    weight, x = torch.randn(5, 7), torch.randn(300, 7)
    original = x @ torch.randn(7, 7) + 0.1 * torch.randn(300, 7)
    pairs = PairedMoments(7)
    pairs.add(x, original)
    expected = torch.linalg.lstsq(x, original @ weight.T).solution.T
    torch.testing.assert_close(pairs.compensated(weight, 1.0), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pairs.compensated(weight, 0.0), weight)


@pytest.mark.parametrize(("of_inputs", "of_outputs"), METRICS)
@pytest.mark.parametrize(("rows", "columns"), SPLITS)
def test_weighted_tt_svd(seed, rows, columns, of_inputs, of_outputs):
    """Lossless at full bonds; with metrics that are Kronecker products its error is what its cuts drop of the weighted matrix."""
    weight = torch.randn(24, 30, dtype=torch.float64)
    full, bonds = full_bonds(rows, columns), capped_bonds(rows, columns, 4)
    h, g = moment(30) if of_inputs else None, moment(24) if of_outputs else None
    found = weighted_tt_svd(weight, rows, columns, full, h, g)
    assert (mpo_to_matrix(found) - weight).norm() <= 1e-9 * weight.norm()

    def product(sizes):
        parts, whole = [moment(size) for size in sizes], torch.ones(1, 1, dtype=torch.float64)
        for part in parts:
            whole = torch.kron(whole, part)
        return whole

    h, g = product(columns) if of_inputs else None, product(rows) if of_outputs else None
    left = torch.eye(24, dtype=torch.float64) if g is None else torch.linalg.cholesky(g)
    right = torch.eye(30, dtype=torch.float64) if h is None else torch.linalg.cholesky(h)
    scaled = left.T @ weight @ right
    plain = mpo_to_matrix(decompose(scaled, rows, columns, bonds))
    found = mpo_to_matrix(weighted_tt_svd(weight, rows, columns, bonds, h, g))
    assert weighted_error(weight - found, h, g) == pytest.approx(float((scaled - plain).square().sum()), rel=1e-3)
    diagonal = weighted_tt_svd(weight, rows, columns, bonds, torch.rand(30), None)
    assert [core.shape for core in diagonal] == [core.shape for core in decompose(weight, rows, columns, bonds)]
