"""Quantization of both factors of a low rank: the gauge before it, and the outer factor fitted to what the inner one became."""

import copy
import functools

import pytest
import torch
from torch import nn

from tensorpress.artifact import save_model
from tensorpress.compressors.decompose.factorize import Factorize
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.decompose.weighted_low_rank import damped, low_rank_layer
from tensorpress.compressors.quantize import gptq
from tensorpress.compressors.quantize.factors import Contracted, factor_pairs, refitted, spread
from tensorpress.compressors.quantize.gptq import GPTQ, dequantized, output_error, quantize_matrix
from tensorpress.errors import InputError
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.loading import load
from tensorpress.structure import find_structure, linear_weight, set_module

SHAPES = [(12, 7, 5), (7, 12, 3), (9, 9, 8), (2, 5, 1), (33, 17, 17)]


def inputs_of(features):
    """The moments of correlated inputs of uneven size."""
    x = torch.randn(6 * features, features, dtype=torch.float64) @ torch.randn(features, features, dtype=torch.float64)
    return x.T @ x / len(x)


@pytest.mark.parametrize("pivoted", [True, False])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), SHAPES)
def test_the_gauge_changes_no_weight(seed, outputs, inputs, rank, pivoted):
    left, right = torch.randn(outputs, rank, dtype=torch.float64), torch.randn(rank, inputs, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64)
    layer = low_rank_layer(left, right, bias, torch.float64, pivoted=pivoted)
    found = spread(layer)
    torch.testing.assert_close(found.dense_weight(), left @ right, rtol=1e-8, atol=1e-8)
    a, b = found.outer.weight.detach(), found.inner.weight.detach()
    values = torch.linalg.svdvals(left @ right)[:rank]
    for gram in (a.T @ a, b @ b.T):  # both carry the root of each singular value
        torch.testing.assert_close(torch.linalg.eigvalsh(gram).flip(0), values, rtol=1e-6, atol=1e-6 * float(values[0]))
    assert torch.equal(spread(layer).inner.weight, found.inner.weight)


@pytest.mark.parametrize(("outputs", "inputs", "rank"), SHAPES)
def test_the_outer_factor_is_the_best_for_the_rounded_inner(seed, outputs, inputs, rank):
    """Against least squares on the inputs themselves, and against every small change of it."""
    outer, inner = torch.randn(outputs, rank, dtype=torch.float64), torch.randn(rank, inputs, dtype=torch.float64)
    left, _, right = torch.linalg.svd(inner, full_matrices=False)
    even = left @ right  # a random square matrix may be as good as singular, and has many such factors then
    inner, h = inputs**0.5 * even, damped(inputs_of(inputs), 1e-3)
    rounded = inner + 0.1 * torch.randn_like(inner)
    found = refitted(outer, inner, rounded, h, 0.0)
    root = torch.linalg.cholesky(h)
    oracle = torch.linalg.lstsq((rounded @ root).T, (outer @ inner @ root).T).solution.T
    torch.testing.assert_close(found, oracle, rtol=1e-5, atol=1e-5 * float(oracle.abs().max()))

    def error(a):
        d = outer @ inner - a @ rounded
        return float(((d @ h) * d).sum())

    assert error(found) <= error(outer) * (1 + 1e-9)
    for _ in range(10):
        assert error(found + 1e-3 * torch.randn_like(found)) >= error(found) * (1 - 1e-9)
    same = refitted(outer, even, even, h, 0.01)
    torch.testing.assert_close(same, outer, rtol=1e-5, atol=1e-5 * float(outer.abs().max()))


def test_both_make_rounding_cost_less(seed):
    """Weights of falling spectrum at 3 bits: the error of the output, with pivots and made ready."""
    plain, even, ready = 0.0, 0.0, 0.0
    for _ in range(10):
        u, v = (torch.linalg.qr(torch.randn(48, 24, dtype=torch.float64)).Q for _ in range(2))
        layer = low_rank_layer(u * torch.linspace(1, 0.05, 24), v.T, None, torch.float64, pivoted=True)
        weight, h = layer.dense_weight().detach(), inputs_of(48)
        plain += output_error(weight, rounded_pair(layer, h, refit=False), h)
        even += output_error(weight, rounded_pair(spread(layer), h, refit=False), h)
        ready += output_error(weight, rounded_pair(spread(layer), h, refit=True), h)
    assert ready < even < 0.8 * plain


def rounded_pair(layer, h, *, refit):
    inner, outer = layer.inner.weight.detach(), layer.outer.weight.detach()

    def quantized(weight, moments):
        return dequantized(*quantize_matrix(weight, moments, 3, weight.shape[1]), weight.shape[1])

    low = quantized(inner, h)
    if refit:
        outer = refitted(outer, inner, low, h, 0.01)
    pair = copy.deepcopy(layer)
    pair.inner.weight.data, pair.outer.weight.data = low, quantized(outer, low @ h @ low.T)
    return pair.dense_weight().detach()


def test_a_model_of_low_ranks(seed, make_model, make_calibration, make_ids, plain_kernels):
    """Every pair is quantized without pivots; one of which a factor stays at 16 bits keeps its gauge."""
    model = make_model("llama")
    calibration = make_calibration()
    paths = find_structure(model).linear_paths
    for path in paths:
        layer = model.get_submodule(path)
        u, s, v = torch.linalg.svd(linear_weight(layer).detach().double(), full_matrices=False)
        rank = len(s) // 2 - 1
        set_module(
            model, path, low_rank_layer(u[:, :rank] * s[:rank], v[:rank], layer.bias, torch.float32, pivoted=True)
        )
    assert set(factor_pairs(model)) == set(paths)
    numbers = {path: sum(p.numel() for p in pair.parameters()) for path, pair in factor_pairs(model).items()}
    kept = paths[0]
    model, report = GPTQ(bits=4, group_size=16, bits_for={f"{kept}.outer": 16}).compress(model, calibration)
    assert len(report.layers) == 2 * len(paths) - 1
    whole = {row.layer.rpartition(".")[0] for row in report.layers} - {kept}
    of_pairs = [row for row in report.layers if not row.layer.startswith(kept)]
    assert len(whole) == len(paths) - 1
    assert sum(row.bytes_before for row in of_pairs) == sum(numbers[path] for path in whole) * 2
    assert factor_pairs(model) == {}
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, LowRankLinear) and isinstance(layer.inner, QuantizedLinear)
        assert (layer.pivots is not None) == (path == kept) == (type(layer.outer) is nn.Linear)
    logits = model(input_ids=make_ids(2, 12)).logits
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_factors_that_are_larger_than_their_product_are_quantized_as_one(seed, make_model, make_calibration, name):
    model = make_model(name)
    paths = find_structure(model).linear_paths
    before = {}
    for count, path in enumerate(paths):
        layer = model.get_submodule(path)
        weight = linear_weight(layer).detach().double()
        (m, n), bias = weight.shape, getattr(layer, "bias", None)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        rank = -(-m * n // (m + n)) - 1 + count % 2
        set_module(model, path, low_rank_layer(u[:, :rank] * s[:rank], v[:rank], bias, torch.float32, pivoted=True))
        before[path] = model.get_submodule(path)
    whole = set(paths[1::2])
    eight = next(path for path in paths if path in whole)
    expected = {path: layer.dense_weight().detach().clone() for path, layer in before.items()}
    numbers = {path: layer.inner.weight.numel() + layer.outer.weight.numel() for path, layer in before.items()}
    model, report = GPTQ(bits=4, group_size=16, bits_for={f"{eight}.*": 8}).compress(model, make_calibration())
    rows = {row.layer: row for row in report.layers}
    for path in paths:
        made = model.get_submodule(path)
        assert isinstance(made, QuantizedLinear if path in whole else LowRankLinear)
        near = 0.02 if path == eight else 0.4
        assert (made.dense_weight() - expected[path]).norm() < near * expected[path].norm()
        if path in whole:
            assert made.bits == (8 if path == eight else 4)
            assert rows[path].bytes_before == 2 * numbers[path]
            assert (made.bias is None) == (before[path].bias is None)
    assert not any(isinstance(part, Contracted) for part in model.modules())


@pytest.mark.parametrize("form", ["low_rank_sparse", "block_low_rank"])
def test_parts_of_sums_stay_factors_and_folders_open_again(
    seed, make_model, make_calibration, make_ids, tmp_path, outputs, plain_kernels, form
):
    model, calibration = make_model("llama"), make_calibration()
    model, _ = Factorize(form=form, keep=0.9).compress(model, calibration)
    model, report = GPTQ(bits=4, group_size=16).compress(model, calibration)
    assert report.layers and all(row.layer.endswith((".inner", ".outer")) for row in report.layers)
    save_model(model, tmp_path / "m", torch.float32)
    ids = make_ids(2, 9)
    torch.testing.assert_close(
        outputs(load(tmp_path / "m", kernels="reference"), ids), outputs(model, ids), rtol=1e-4, atol=1e-4
    )


def test_folders_of_products_open_again(make_model, make_calibration, make_ids, tmp_path, outputs, plain_kernels):
    model, calibration = make_model("llama"), make_calibration()
    model, _ = MPO(keep=0.95, metric="inputs", plans="low_rank", multiple=1, allocation="uniform").compress(
        model, calibration
    )
    assert len(factor_pairs(model)) == 21
    model, _ = GPTQ(bits=4, group_size=16).compress(model, calibration)
    assert sum(isinstance(part, QuantizedLinear) for part in model.modules()) == 21
    save_model(model, tmp_path, torch.float32)
    ids = make_ids(2, 9)
    torch.testing.assert_close(
        outputs(load(tmp_path, kernels="reference"), ids), outputs(model, ids), rtol=1e-4, atol=1e-4
    )


def test_bits_that_leave_nothing_to_do_are_refused(make_model, make_calibration, one_line):
    model = make_model("llama")
    with pytest.raises(InputError) as caught:
        GPTQ(bits_for={"*": 16}, group_size=16).compress(model, make_calibration())
    one_line(caught, "bits_for: every dense layer is left at 16 bits")
    GPTQ(bits_for={"*_proj": 16}, group_size=16).check(model, find_structure(model))  # factors may come before it


@pytest.mark.parametrize("keep", [0.6, 0.9])
def test_a_walk_over_low_ranks_goes_on_where_it_was_killed(
    make_model, make_calibration, make_ids, tmp_path, monkeypatch, outputs, keep
):
    model, calibration = make_model("llama"), make_calibration(scratch=tmp_path / "s")
    model, _ = MPO(keep=keep, metric="inputs", plans="low_rank", multiple=2, allocation="uniform").compress(
        model, make_calibration()
    )
    monkeypatch.setattr(gptq, "walk", functools.partial(gptq.walk, checkpoint_seconds=0))
    method = GPTQ(group_size=16)
    whole, report = method.compress(copy.deepcopy(model), calibration)
    visit = GPTQ._visit

    def dies(self, model, block, inputs):
        if block.index == 2:
            raise KeyboardInterrupt
        return visit(self, model, block, inputs)

    monkeypatch.setattr(GPTQ, "_visit", dies)
    with pytest.raises(KeyboardInterrupt):
        method.compress(copy.deepcopy(model), calibration)
    assert (tmp_path / "s").exists()
    monkeypatch.setattr(GPTQ, "_visit", visit)
    again, rows = method.compress(model, calibration)
    products = [row.layer for row in rows.layers if not row.layer.endswith((".inner", ".outer"))]
    assert (keep == 0.9) == bool(products)
    assert [row.layer for row in rows.layers] == [row.layer for row in report.layers]
    ids = make_ids(2, 9)
    torch.testing.assert_close(outputs(again, ids), outputs(whole, ids), rtol=0, atol=0)
    assert not (tmp_path / "s").exists()
