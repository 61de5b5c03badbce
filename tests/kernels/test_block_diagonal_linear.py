"""Block-diagonal layers against loops in float64: every backend, gradients, and what is kept of weights that change."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tensorpress.kernels import registry
from tensorpress.kernels.block_diagonal_linear import BlockDiagonalLinear
from tensorpress.kernels.kernel_layer import kernel_layers

SHAPES = [(1, 5, 7), (2, 1, 3), (3, 4, 5), (7, 3, 1), (4, 8, 16)]
KERNELS = list(registry.backends("block_diagonal_linear"))


def make(count, outputs, inputs, bias=True, dtype=torch.float64):
    """A layer that needs no gradients, and its dense weight."""
    blocks = torch.randn(count, outputs, inputs, dtype=dtype)
    layer = BlockDiagonalLinear.from_blocks(blocks, torch.randn(count * outputs, dtype=dtype) if bias else None)
    weight = torch.zeros(count * outputs, count * inputs, dtype=torch.float64)
    for block in range(count):
        for row in range(outputs):
            for column in range(inputs):
                weight[block * outputs + row, block * inputs + column] = blocks[block, row, column]
    return layer.requires_grad_(False), weight


def product(weight, layer, x):
    return x.double() @ weight.T + (0 if layer.bias is None else layer.bias.detach().double())


@pytest.mark.parametrize(("count", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_backend_against_float64(seed, count, outputs, inputs, bias):
    layer, weight = make(count, outputs, inputs, bias)
    assert torch.equal(layer.dense_weight(), weight)
    for shape in ((), (0,), (1,), (5,), (2, 3), (2, 0)):
        x = torch.randn(*shape, count * inputs, dtype=torch.float64)
        for layer.kernel in (*KERNELS, "auto"):
            found = layer(x)
            assert found.shape == (*shape, count * outputs) and found.dtype == torch.float64
            torch.testing.assert_close(found, product(weight, layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_other_precisions(seed, kernel, dtype, tolerance):
    layer, weight = make(3, 4, 5, dtype=dtype)
    layer.kernel, x = kernel, torch.randn(6, 15).to(dtype)
    expected = product(weight, layer, x)
    assert layer(x).dtype == dtype
    assert (layer(x).double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_that_are_not_contiguous_or_do_not_fit(seed, kernel):
    layer, weight = make(3, 4, 5)
    layer.kernel, x = kernel, torch.randn(15, 6, dtype=torch.float64).T
    torch.testing.assert_close(layer(x), product(weight, layer, x), rtol=1e-12, atol=1e-12)
    for shape in ((2, 5), (3, 10), (2, 30)):
        with pytest.raises(RuntimeError):
            layer(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
def test_gradients_of_blocks_bias_and_inputs(seed, kernel):
    layer, weight = make(3, 4, 5)
    layer.requires_grad_(True)
    layer.kernel, x = kernel, torch.randn(7, 15, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    dense, bias, other = (t.detach().clone().requires_grad_() for t in (weight, layer.bias, x))
    (other @ dense.T + bias).square().sum().backward()
    expected = torch.stack([dense.grad[4 * b : 4 * b + 4, 5 * b : 5 * b + 5] for b in range(3)])
    for found, wanted in ((layer.blocks.grad, expected), (layer.bias.grad, bias.grad), (x.grad, other.grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert layer.matrix is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_reaches_every_output_of_its_block(seed, kernel):
    layer, weight = make(3, 4, 5)
    layer.kernel, x = kernel, torch.randn(2, 15, dtype=torch.float64)
    x[1, 7] = torch.nan
    found = layer(x)
    assert found[1, 4:8].isnan().all()
    torch.testing.assert_close(found[0], product(weight, layer, x[0]), rtol=1e-12, atol=1e-12)
    if kernel == "blocks":
        assert found[1, :4].isfinite().all() and found[1, 8:].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_that_change_are_seen(seed, kernel):
    layer, _ = make(3, 4, 5)
    layer.kernel, x = kernel, torch.randn(2, 15, dtype=torch.float64)

    def check(found=layer):
        torch.testing.assert_close(found(x), product(found.dense_weight(), found, x), rtol=1e-12, atol=1e-12)

    check()
    layer.blocks.mul_(2)
    check()
    layer.blocks = nn.Parameter(torch.randn_like(layer.blocks), requires_grad=False)
    check()
    layer.load_state_dict(make(3, 4, 5)[0].state_dict())
    check()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.blocks.zero_()
        check(other)
    check()


def test_what_matrix_keeps_is_counted_and_given_back(seed):
    layer, _ = make(3, 4, 5)
    layer.kernel = "matrix"
    x = torch.randn(2, 15, dtype=torch.float64)
    assert layer.kept_bytes() == 0 and layer.read_bytes(2) == 8 * (60 + 12)
    layer(x)
    kept = layer.matrix
    layer(x)
    assert layer.matrix is kept and layer.kept_bytes() == layer.kept_bytes(["matrix"]) == 8 * 180
    assert layer.kept_bytes(["blocks"]) == 0 and layer.read_bytes(2) == 8 * 180
    layer.release(["matrix"])
    assert layer.matrix is kept
    layer.float()
    assert layer.matrix is None and layer(x.float()).dtype == torch.float32
    layer.kernel = "blocks"
    assert layer.read_bytes(2) == 4 * (60 + 12)
    layer.release()
    assert layer.kept_bytes() == 0


def test_spec_rebuilds_the_empty_layer_and_the_state_fills_it(seed):
    for bias in (True, False):
        layer, _ = make(3, 4, 5, bias)
        again = BlockDiagonalLinear.from_spec(layer.spec()).double()
        assert again.spec() == layer.spec() and again.kernel == "auto"
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again.dense_weight(), layer.dense_weight())
        assert again.parameter_count() == 60 + 12 * bias


def test_blocks_are_copied_and_counted_by_name(seed):
    blocks = torch.randn(3, 4, 5)
    layer = BlockDiagonalLinear.from_blocks(blocks, None)
    before = layer.dense_weight()
    blocks.zero_()
    assert torch.equal(layer.dense_weight(), before)
    model = nn.Sequential(layer, nn.Linear(12, 2))
    assert registry.names_in_use(model) == {"block_diagonal_linear:reference": 1, "dense:torch": 1}
    assert kernel_layers(model) == [layer]


@pytest.mark.parametrize("count", [0, -1, 2, 7])
def test_blocks_that_do_not_divide_are_refused(count):
    with pytest.raises(ValueError, match=f"15 inputs and 12 outputs are not {count} blocks"):
        BlockDiagonalLinear(15, 12, count, bias=False)
