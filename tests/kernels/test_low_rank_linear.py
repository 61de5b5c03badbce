"""Layers of low rank: as many numbers as a rank needs, the same matrix, whatever their two layers are made of."""

import copy
import math

import pytest
import torch
from torch import nn

from tensorpress.artifact import plain_gptq, save_model
from tensorpress.compressors.decompose.weighted_low_rank import low_rank_layer, weighted_svd
from tensorpress.compressors.prune.finercut import FinerCut
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.errors import InputError
from tensorpress.kernels.low_rank_linear import LowRankLinear, low_rank_numbers, pack_bits, unpack_bits
from tensorpress.kernels.pivoted_mpo_linear import pivot_rows
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.loading import layers_of, load
from tensorpress.structure import find_structure, linear_shape, linear_weight, remove_sublayer, set_module


def layer_of(outputs, inputs, rank, pivoted, bias=True, dtype=torch.float64):
    left, right = torch.randn(outputs, rank, dtype=torch.float64), torch.randn(rank, inputs, dtype=torch.float64)
    layer = low_rank_layer(left, right, torch.randn(outputs, dtype=dtype) if bias else None, dtype, pivoted=pivoted)
    return layer, left @ right


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65, 200])
def test_bits_there_and_back(seed, count):
    mask = torch.rand(count) < 0.4
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(count / 8)
    assert torch.equal(unpack_bits(packed, count), mask)
    assert [int(packed[i // 8]) >> i % 8 & 1 for i in range(count)] == mask.int().tolist()


@pytest.mark.parametrize("pivoted", [True, False])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(12, 7, 5), (7, 12, 3), (9, 9, 8), (2, 5, 1), (33, 17, 17)])
def test_it_is_the_product_in_as_many_numbers(seed, outputs, inputs, rank, pivoted):
    layer, product = layer_of(outputs, inputs, rank, pivoted)
    x = torch.randn(3, 4, inputs, dtype=torch.float64)
    expected = x @ product.T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.dense_weight(), product, rtol=1e-9, atol=1e-9)
    numbers = layer.inner.weight.numel() + layer.outer.weight.numel()
    assert numbers == low_rank_numbers(outputs, inputs, rank, pivoted)
    if pivoted:
        assert numbers == rank * (outputs + inputs - rank) and len(layer.pivots) == math.ceil(outputs / 8)
        layer.check()


def test_at_full_rank_it_holds_the_matrix_and_nothing_more(seed):
    for outputs, inputs in [(9, 6), (6, 9)]:
        weight = torch.randn(outputs, inputs, dtype=torch.float64)
        svd = weighted_svd(weight)
        rank = min(inputs, outputs - 1)
        layer = low_rank_layer(svd.left[:, :rank], svd.right[:rank], None, torch.float64, pivoted=True)
        if rank == inputs:
            assert sum(p.numel() for p in layer.parameters()) == outputs * inputs
            torch.testing.assert_close(layer.dense_weight(), weight, rtol=1e-9, atol=1e-10)


def test_pivots_span_the_other_rows(seed):
    left = torch.randn(40, 11, dtype=torch.float64)
    mask, coefficients = pivot_rows(left)
    assert int(mask.sum()) == 11 and coefficients.shape == (29, 11)
    torch.testing.assert_close(coefficients @ left[mask], left[~mask], rtol=1e-9, atol=1e-9)
    assert coefficients.abs().max() < 20  # tame: what makes it fit for 16 bits
    with pytest.raises(ValueError, match="rank below 3"):
        pivot_rows(torch.zeros(5, 3))


@pytest.mark.parametrize("pivoted", [True, False])
def test_in_sixteen_bits_it_is_as_near_as_sixteen_bits_are(seed, pivoted):
    outputs, inputs, rank = 96, 80, 40
    decay = torch.logspace(0, -3, rank, dtype=torch.float64)
    product = torch.randn(outputs, rank, dtype=torch.float64) * decay @ torch.randn(rank, inputs, dtype=torch.float64)
    svd = weighted_svd(product)
    layer = low_rank_layer(svd.left[:, :rank], svd.right[:rank], None, torch.bfloat16, pivoted=pivoted)
    assert layer.inner.weight.dtype == torch.bfloat16
    error = (layer.dense_weight().double() - product).norm() / product.norm()
    assert error < 0.03
    found = copy.deepcopy(layer).double().dense_weight()
    assert (found - product).norm() / product.norm() < 0.03


@pytest.fixture
def low_ranked(make_model, seed):
    """Every layer of a model of a third of its rank, every other one with pivots."""

    def make(name):
        model = make_model(name)
        for place, path in enumerate(find_structure(model).linear_paths):
            layer = model.get_submodule(path)
            svd = weighted_svd(linear_weight(layer).detach())
            rank = min(linear_shape(layer)) // 3
            left, right = svd.left[:, :rank], svd.right[:rank]
            bias = getattr(layer, "bias", None)
            set_module(model, path, low_rank_layer(left, right, bias, torch.float32, pivoted=place % 2 == 0))
        return model

    return make


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt"])
def test_folders_open_again(low_ranked, make_ids, outputs, tmp_path, name, stored):
    model, ids = low_ranked(name), make_ids(2, 9)
    before = outputs(model, ids)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    save_model(model, tmp_path / "a", stored)
    if stored == torch.float32:
        assert torch.equal(outputs(model, ids), before)
    opened = load(tmp_path / "a", dtype=torch.float32)
    assert layers_of(opened) == layers_of(model)
    torch.testing.assert_close(outputs(opened, ids), outputs(model, ids), rtol=0, atol=1e-5)
    opened.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(outputs(load(tmp_path / "b"), ids), outputs(opened, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_their_factors_can_be_quantized(
    low_ranked, make_calibration, make_ids, outputs, tmp_path, name, bits, plain_kernels
):
    model, ids = low_ranked(name), make_ids(2, 9)
    before = outputs(model, ids)
    model, report = GPTQ(bits=bits, group_size=32).compress(model, make_calibration())
    factors = [path for path in find_structure(model).linear_paths if path.endswith((".inner", ".outer"))]
    assert len(report.layers) == len(factors) == 2 * sum(isinstance(m, LowRankLinear) for m in model.modules())
    assert all(isinstance(model.get_submodule(path), QuantizedLinear) for path in factors)
    assert plain_gptq(model) is None
    after = outputs(model, ids)
    assert (after - before).norm() < {4: 0.5, 8: 0.05}[bits] * before.norm()
    save_model(model, tmp_path, torch.float32)
    torch.testing.assert_close(outputs(load(tmp_path), ids), after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "phi"])
def test_sublayers_made_of_them_can_be_removed(low_ranked, make_ids, outputs, tmp_path, name):
    model = low_ranked(name)
    before = sum(p.numel() for p in model.parameters())
    for kind in ("attention", "feed_forward"):
        sublayer = getattr(find_structure(model).blocks[1], kind)
        remove_sublayer(model, sublayer)
    assert sum(p.numel() for p in model.parameters()) < before
    save_model(model, tmp_path, torch.float32)
    ids = make_ids(2, 9)
    torch.testing.assert_close(outputs(load(tmp_path), ids), outputs(model, ids), rtol=0, atol=1e-5)


def test_finercut_and_gradients(low_ranked, make_calibration):
    model = low_ranked("llama")
    FinerCut(remove=0.2, samples=2).compress(model, make_calibration())
    layer = next(m for m in model.modules() if isinstance(m, LowRankLinear))
    layer(torch.randn(4, layer.in_features)).square().sum().backward()
    assert layer.inner.weight.grad.abs().sum() > 0 and layer.outer.weight.grad.abs().sum() > 0


def test_pivots_that_were_changed_are_seen(seed):
    layer, _ = layer_of(12, 7, 4, True, bias=False)
    x = torch.randn(2, 7, dtype=torch.float64)
    layer(x)
    mask = unpack_bits(layer.pivots, 12).flip(0)
    layer.pivots.copy_(pack_bits(mask))
    expected = torch.cat((layer.inner.weight, layer.outer.weight @ layer.inner.weight))
    y = torch.empty(12, 7, dtype=torch.float64)
    y[mask], y[~mask] = expected[:4], expected[4:]
    torch.testing.assert_close(layer(x), x @ y.T)
    clone = copy.deepcopy(layer)
    torch.testing.assert_close(clone(x), layer(x))


def test_bad_specs_and_files(low_ranked, tmp_path, one_line):
    from safetensors.torch import load_file, save_file

    for rank in (0, 12, 13):
        with pytest.raises(ValueError, match="a rank from 1 to 11"):
            LowRankLinear(7, 12, rank, pivoted=True, bias=False)
    save_model(low_ranked("llama"), tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(".pivots"))
    tensors[name][0] ^= 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    one_line(caught, f"{name.removesuffix('.pivots')}: pivots: not \\d+ of the \\d+ bits are set")


def test_traced(seed):
    layer, _ = layer_of(12, 7, 4, True)
    x = torch.randn(3, 7, dtype=torch.float64)
    exported = torch.export.export(nn.Sequential(layer), (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))
