"""2:4 layers against dense weights in float64: packing, every backend, and what is kept of weights that change."""

import copy
import itertools
import pickle
import re

import pytest
import torch
from torch import nn

from tensorpress.kernels import registry
from tensorpress.kernels.semi_structured_linear import SemiStructuredLinear, pack_places, unpack_places

SHAPES = [(8, 16), (1, 4), (5, 12), (3, 1), (1, 2), (7, 11), (6, 21), (2, 30)]
KERNELS = list(registry.backends("semi_structured_linear"))
PLACES = list(itertools.combinations(range(4), 2))


def sparse(outputs, inputs, dtype=torch.float64):
    """A random matrix with at most two of four, often fewer."""
    weight = torch.randn(outputs, inputs, dtype=dtype)
    for row in range(outputs):
        for first in range(0, inputs, 4):
            four = weight[row, first : first + 4]
            four[torch.randperm(len(four))[int(torch.randint(0, 3, ())) :]] = 0
    return weight


def make(outputs, inputs, bias=True, dtype=torch.float64):
    weight = sparse(outputs, inputs, dtype)
    return SemiStructuredLinear.from_dense(weight, torch.randn(outputs, dtype=dtype) if bias else None), weight


def product(weight, layer, x):
    return x.double() @ weight.double().T + (0 if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("fours", [1, 2, 5, 8])
def test_places_are_packed_and_unpacked(seed, fours):
    places = torch.tensor([[PLACES[i] for i in torch.randint(0, 6, (fours,))] for _ in range(9)])
    packed = pack_places(places)
    assert packed.dtype == torch.uint8 and packed.shape == (9, -(-fours // 2))
    assert torch.equal(unpack_places(packed, fours), places)
    for row, four in itertools.product(range(9), range(fours)):
        bits = int(packed[row, four // 2]) >> 4 * (four % 2) & 15
        assert (bits & 3, bits >> 2) == tuple(places[row, four].tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_dense_weight_comes_back(seed, outputs, inputs, dtype):
    layer, weight = make(outputs, inputs, dtype=dtype)
    fours = -(-inputs // 4)
    assert layer.values.shape == (outputs, 2 * fours) and layer.values.dtype == dtype
    assert layer.indices.shape == (outputs, -(-fours // 2)) and layer.indices.dtype == torch.uint8
    assert torch.equal(layer.dense_weight(), weight) and layer.dense_weight().dtype == dtype
    layer.check()
    SemiStructuredLinear(inputs, outputs, bias=False).check()


def test_every_pair_of_places(seed):
    weight = torch.zeros(10, 4)
    for row, places in enumerate([*PLACES, (0,), (1,), (2,), (3,)]):
        weight[row, list(places)] = torch.randn(len(places))
    layer = SemiStructuredLinear.from_dense(weight, None)
    assert torch.equal(layer.dense_weight(), weight)
    assert [tuple(places) for places in unpack_places(layer.indices, 1)[:6, 0].tolist()] == PLACES


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_backend_against_float64(seed, outputs, inputs, bias):
    layer, weight = make(outputs, inputs, bias)
    for shape in ((), (0,), (1,), (5,), (2, 3)):
        x = torch.randn(*shape, inputs, dtype=torch.float64)
        for layer.kernel in (*KERNELS, "auto"):
            if layer.kernel == "auto" or registry.backends(layer.operation)[layer.kernel].can_run(layer):
                found = layer(x)
                assert found.shape == (*shape, outputs) and found.dtype == torch.float64
                torch.testing.assert_close(found, product(weight, layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["reference", "matrix"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_result_has_the_inputs_precision(seed, kernel, stored, dtype, tolerance):
    layer, weight = make(7, 22, dtype=stored)
    layer.kernel, x = kernel, torch.randn(3, 22).to(dtype)
    expected = product(weight, layer, x)
    assert layer(x).dtype == dtype
    assert (layer(x).double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kernel", ["reference", "matrix", "auto"])
def test_gradients_reach_inputs_and_values(seed, kernel):
    layer, weight = make(7, 11)
    layer.kernel, x = kernel, torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 7, dtype=torch.float64)
    layer(x).mul(y).sum().backward()
    torch.testing.assert_close(x.grad, y @ weight, rtol=1e-12, atol=1e-12)
    layer.values.requires_grad_()
    layer(x.detach()).mul(y).sum().backward()
    expected = nn.functional.pad(y.T @ x.detach(), (0, 1)).view(7, 3, 4).gather(2, unpack_places(layer.indices, 3))
    torch.testing.assert_close(layer.values.grad.view(7, 3, 2), expected, rtol=1e-12, atol=1e-12)
    assert layer.matrix is None


@pytest.mark.parametrize("kernel", ["reference", "matrix"])
def test_nan_in_inputs_and_weights(seed, kernel):
    layer, weight = make(7, 11)
    layer.kernel, x = kernel, torch.randn(2, 11, dtype=torch.float64)
    x[1, 4] = torch.nan
    found = layer(x)
    assert found[1].isnan().all()  # the dense product multiplies it with zeros too
    torch.testing.assert_close(found[0], product(weight, layer, x[0]), rtol=1e-12, atol=1e-12)
    weight[3, :4] = torch.tensor([0, torch.nan, 0, torch.inf])
    again = SemiStructuredLinear.from_dense(weight, None).dense_weight()
    torch.testing.assert_close(again, weight, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", ["reference", "matrix"])
def test_weights_that_change_are_seen(seed, kernel):
    layer, _ = make(7, 11)
    layer.kernel, x = kernel, torch.randn(2, 11, dtype=torch.float64)

    def check(found=layer):
        torch.testing.assert_close(found(x), product(found.dense_weight(), found, x), rtol=1e-12, atol=1e-12)

    check()
    layer.values.mul_(2)
    check()
    layer.indices.fill_(0x44)
    check()
    layer.values = torch.randn_like(layer.values)
    check()
    layer.load_state_dict(make(7, 11)[0].state_dict())
    check()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.values.zero_()
        check(other)
    check()


class Kept:
    nbytes, data = 99, torch.zeros(99, dtype=torch.uint8)


def test_what_kernels_keep_is_counted_and_given_back(seed):
    layer, _ = make(7, 11)
    own = 8 * 7 * 6 + 7 * 2 + 8 * 7
    layer.kernel = "matrix"
    assert layer.kept_bytes() == 0 and layer.read_bytes(1) == own
    layer(torch.randn(1, 11, dtype=torch.float64))
    kept, layer.packed = layer.matrix, Kept()
    layer(torch.randn(1, 11, dtype=torch.float64))
    assert layer.matrix is kept
    assert [layer.kept_bytes(names) for names in (None, ["matrix"], ["cpu"], [])] == [616 + 99, 616, 99, 0]
    assert layer.read_bytes(1) == 616
    layer.release(["cpu"])
    assert layer.matrix is None and layer.kept_bytes() == 99
    layer.release(["matrix"])
    assert layer.kept_bytes() == 0
    layer.kernel = "reference"
    assert layer.read_bytes(1) == own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_follow_the_models_precision_and_indices_do_not(seed, dtype):
    layer, weight = make(7, 11, dtype=torch.float32)
    layer.kernel = "matrix"
    layer(torch.randn(1, 11))
    layer.packed = Kept()
    indices = layer.indices.clone()
    nn.Sequential(layer).to(dtype)
    assert layer.values.dtype == layer.bias.dtype == dtype and torch.equal(layer.indices, indices)
    assert layer.matrix is None and layer.packed is None
    assert torch.equal(layer.dense_weight(), weight.to(dtype))
    assert layer(torch.randn(1, 11).to(dtype)).dtype == dtype


def test_spec_rebuilds_the_empty_layer_and_the_state_fills_it(seed):
    for bias in (True, False):
        layer, weight = make(5, 13, bias)
        again = SemiStructuredLinear.from_spec(layer.spec()).double()
        assert again.spec() == layer.spec() and again.kernel == "auto" and not again.dense_weight().any()
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again.dense_weight(), weight)
        assert again.parameter_count() == 5 * 8 + 5 * bias


def test_more_than_two_of_four_are_refused(seed):
    weight = sparse(5, 23)
    weight[3, 20:23] = 1
    with pytest.raises(ValueError, match="row 3, inputs 20 to 22: 3 weights are not zero"):
        SemiStructuredLinear.from_dense(weight, None)
    weight[2, 4:8] = torch.nan
    with pytest.raises(ValueError, match="row 2, inputs 4 to 7: 4 weights are not zero"):
        SemiStructuredLinear.from_dense(weight, None)


@pytest.mark.parametrize(("nibble", "places"), [(0b1111, (3, 3)), (0b0001, (1, 0)), (0b0000, (0, 0)), (0b0110, (2, 1))])
def test_places_that_cannot_be_are_refused(seed, nibble, places):
    layer, _ = make(5, 20)
    layer.indices[4, 1] = layer.indices[4, 1] & 0x0F | nibble << 4
    message = f"indices: row 4, inputs from 12: the place {places[0]} is not before {places[1]}"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.check()
