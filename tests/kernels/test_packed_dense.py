"""Compiled 2:4 layers, and matrices with several columns, against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from tensorpress.kernels import cpu_linear, registry
from tensorpress.kernels.packed_dense import PackedDense, PackedSparse, multiply_columns
from tensorpress.kernels.semi_structured_linear import SemiStructuredLinear

pytestmark = pytest.mark.skipif(cpu_linear.compiled() is None, reason="the compiled kernels were not built")
SHAPES = [(16, 32), (1, 4), (5, 12), (3, 1), (40, 100), (17, 33), (33, 2), (70, 513)]


def make(outputs, inputs, bias=True):
    """A random layer in bf16, four inputs with up to two weights."""
    weight = torch.randn(outputs, -(-inputs // 4), 4)
    weight[torch.rand(weight.shape).argsort(2).argsort(2) < 2] = 0
    weight = weight.flatten(1)[:, :inputs].bfloat16()
    return SemiStructuredLinear.from_dense(weight, torch.randn(outputs) if bias else None), weight


def run(layer, x):
    return registry.backends("semi_structured_linear")["cpu"].run(layer, x)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_are_exact_up_to_rounding(level, outputs, inputs, seed):
    for bias in (True, False):
        layer, weight = make(outputs, inputs, bias)
        for shape in ((), (0,), (1,), (2,), (3,), (2, 9)):
            x = torch.randn(*shape, inputs)
            shift = 0 if layer.bias is None else layer.bias.double()
            wanted, size = x.double() @ weight.double().T + shift, x.abs().double() @ weight.abs().double().T + 1e-3
            found = run(layer, x)
            assert found.shape == (*shape, outputs) and found.dtype == x.dtype
            assert ((found.double() - wanted).abs() <= 1e-6 * (size + abs(shift))).all()
            half = run(layer, x.bfloat16())
            assert half.dtype == torch.bfloat16
            wanted = x.bfloat16().double() @ weight.double().T + shift
            assert ((half.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6 * (size + abs(shift))).all()


def test_nine_bits_a_weight_are_read(seed):
    layer, weight = make(64, 256, bias=False)
    assert PackedSparse(layer).nbytes * 8 == 9 * weight.numel()


def test_auto_may_take_it_and_counts_what_it_reads(seed):
    layer, _ = make(32, 64)
    assert "cpu" in [backend.name for backend in registry.candidates("semi_structured_linear", layer)]
    layer.kernel = "cpu"
    layer(torch.randn(1, 64).bfloat16())
    assert layer.read_bytes(1) == layer.packed.nbytes == layer.kept_bytes({"cpu"})
    layer.release()
    assert layer.packed is None


def test_other_precisions_are_the_references(seed):
    layer, _ = make(8, 16)
    assert not registry.backends(layer.operation)["cpu"].can_run(layer.float())
    with pytest.raises(ValueError, match="finer than bfloat16"):
        layer.values = torch.randn(8, 8)
        PackedSparse(layer)


def test_weights_that_change_are_packed_again_and_gradients_are_the_references(seed):
    layer, weight = make(8, 16)
    layer.kernel, x = "cpu", torch.randn(3, 16)
    before = layer(x)
    with torch.no_grad():
        layer.values.mul_(2)
        assert torch.allclose(layer(x), 2 * before - layer.bias, atol=1e-5)
    x.requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, 2 * weight.float().sum(0).expand(3, 16), atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "p", "q", "columns"),
    [(3, 5, 7, 4), (1, 40, 33, 1), (9, 3, 70, 2), (70, 1, 1, 3), (0, 2, 3, 4), (2, 17, 1030, 5)],
)
def test_a_matrix_times_columns(level, batch, p, q, columns, seed):
    matrix = torch.randn(p, q).bfloat16()
    packed = PackedDense(matrix, None)
    state = torch.randn(batch, q, columns).bfloat16()
    for x in (state, state.float(), state.transpose(1, 2).contiguous().transpose(1, 2)):
        y = multiply_columns(packed, x, batch, columns)
        assert y.dtype == x.dtype and y.shape == (batch, p, columns) and y.is_contiguous()
        wanted, size = matrix.double() @ x.double(), matrix.double().abs() @ x.double().abs()
        assert (
            (y.double() - wanted).abs() <= 1e-6 * size + (2**-8 * wanted.abs() if x.dtype != torch.float32 else 0)
        ).all()
    with pytest.raises(ValueError, match="for a layer of"):
        multiply_columns(packed, torch.randn(2, q + 1, 3), 2, 3)
