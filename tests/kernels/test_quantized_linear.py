"""The quantized layer against naive float64, and what must survive a change of dtype."""

import copy

import pytest
import torch
from torch import nn

from tensorpress.kernels import registry
from tensorpress.kernels.quantized_linear import QuantizedLinear, dequantize, quantized_linear_reference

BITS = (2, 3, 4, 8)
SHAPES = [(32, 8, 16), (48, 24, 48), (96, 33, 32), (45, 7, 15), (64, 31, 64)]


def make(inputs, outputs, group, bits, bias=True, zero_offset=1):
    groups = inputs // group
    values = torch.randint(0, 1 << bits, (inputs, outputs))
    zeros = torch.randint(zero_offset, 1 << bits, (groups, outputs))
    scales = (torch.rand(groups, outputs) * 0.1 + 0.01).to(torch.float16)
    index = torch.arange(inputs) // group
    shift = torch.randn(outputs) if bias else None
    layer = QuantizedLinear.from_integers(values, zeros, scales, index, bits, group, shift, zero_offset)
    weight = torch.empty(outputs, inputs, dtype=torch.float64)
    for k in range(inputs):
        for n in range(outputs):
            weight[n, k] = (int(values[k, n]) - int(zeros[k // group, n])) * float(scales[k // group, n])
    return layer, weight, shift


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("inputs", "outputs", "group"), SHAPES)
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_dense_weight_is_what_the_integers_stand_for(seed, bits, inputs, outputs, group, zero_offset):
    layer, weight, _ = make(inputs, outputs, group, bits, zero_offset=zero_offset)
    found = layer.dense_weight()
    assert found.dtype == torch.float32 and found.shape == (outputs, inputs)
    torch.testing.assert_close(found.double(), weight, rtol=2e-7, atol=0)
    stored = dequantize(layer.qweight, layer.qzeros, layer.scales, layer.g_idx, bits, zero_offset)
    assert torch.equal(stored.T, found)


def test_shuffled_groups_are_read_from_g_idx(seed):
    """Checkpoints of others may have act-order: input k then belongs to group g_idx[k]."""
    values, zeros = torch.randint(0, 16, (32, 8)), torch.randint(1, 16, (4, 8))
    scales, index = torch.rand(4, 8).half(), torch.randint(0, 4, (32,))
    layer = QuantizedLinear.from_integers(values, zeros, scales, index, 4, 8, None)
    expected = (values - zeros[index]).double() * scales[index].double()
    torch.testing.assert_close(layer.dense_weight().double(), expected.T, rtol=2e-7, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
def test_forward_against_float64(seed, bits, bias, dtype, tolerance):
    layer, weight, shift = make(96, 33, 32, bits, bias)
    x = torch.randn(2, 5, 96).to(dtype)
    expected = x.double() @ weight.T + (0 if shift is None else shift.double())
    found = quantized_linear_reference(layer, x)
    assert found.dtype == dtype and found.shape == (2, 5, 33)
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert (layer(x).double() - expected).abs().max() <= max(tolerance, 2e-2) * expected.abs().max()


def test_every_backend_here_agrees_with_float64(seed):
    layer, weight, shift = make(128, 64, 32, 4)
    x = torch.randn(3, 128)
    expected = x.double() @ weight.T + shift.double()
    for name, backend in registry.backends("quantized_linear").items():
        if backend.can_run(layer):
            layer.kernel = name
            difference = (layer(x).double() - expected).abs().max() / expected.abs().max()
            assert difference < 2e-2, f"{name}: {difference}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scales_stay_fp16_when_the_model_changes_its_dtype(seed, dtype):
    layer, _, _ = make(48, 24, 16, 4)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    model = nn.Sequential(layer, nn.Linear(24, 3))
    methods = {
        torch.bfloat16: model.bfloat16,
        torch.float16: model.half,
        torch.float32: model.float,
        torch.float64: model.double,
    }
    for change in (lambda: model.to(dtype), methods[dtype]):
        change()
        assert model[1].weight.dtype == dtype
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            found = getattr(layer, name)
            assert found.dtype == before[name].dtype and torch.equal(found, before[name]), name
    model.to(torch.bfloat16).float()
    assert layer.scales.dtype == torch.float16 and torch.equal(layer.scales, before["scales"])


def test_to_another_device_and_deepcopy(seed):
    layer, _, _ = make(48, 24, 16, 4)
    assert torch.equal(copy.deepcopy(layer).dense_weight(), layer.dense_weight())
    gone = copy.deepcopy(layer).to("meta", torch.bfloat16)
    assert gone.scales.device.type == "meta" and gone.scales.dtype == torch.float16


def test_spec_rebuilds_the_empty_layer_and_the_state_fills_it(seed):
    for group, bias, offset in ((16, True, 1), (-1, False, 0)):
        layer = QuantizedLinear(48, 20, 3, group, bias=bias, zero_offset=offset)
        layer.qweight.random_(), layer.scales.uniform_()
        again = QuantizedLinear.from_spec(layer.spec())
        assert again.spec() == layer.spec()
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again.dense_weight(), layer.dense_weight())


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(ValueError, match="bits must be one of"):
        QuantizedLinear(32, 8, 5, 16, bias=False)
    values, scales = torch.zeros(32, 8, dtype=torch.int64), torch.ones(2, 8)
    with pytest.raises(ValueError, match="must lie in"):  # a zero of 0 has no place in format 1
        QuantizedLinear.from_integers(values, torch.zeros(2, 8), scales, torch.arange(32) // 16, 4, 16, None)


def test_shapes_of_the_checkpoint_contract():
    layer = QuantizedLinear(96, 64, 4, 32, bias=True)
    assert {name: tuple(b.shape) for name, b in layer.named_buffers()} == {
        "qweight": (96 * 4 // 32, 64), "qzeros": (3, 64 * 4 // 32), "scales": (3, 64), "g_idx": (96,), "bias": (64,),
    }  # fmt: skip
    assert layer.g_idx.tolist() == [i // 32 for i in range(96)] and not list(layer.parameters())
