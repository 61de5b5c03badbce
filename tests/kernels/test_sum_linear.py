"""Sums of layers and their sparse parts: the sum of the dense weights, whatever they are made of; there and back; gradients; bad files."""

import copy
import math

import pytest
import torch
from torch import nn

from tensorpress.compressors.decompose.weighted_low_rank import low_rank_layer
from tensorpress.kernels.block_diagonal_linear import BlockDiagonalLinear
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear
from tensorpress.kernels.sparse_linear import ChannelLinear, SparseLinear, index_dtype, sparse_bytes
from tensorpress.kernels.sum_linear import SumLinear

SHAPES = [(6, 9), (9, 6), (15, 21), (1, 3), (3, 1)]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def sparse_weight(outputs, inputs, share=0.3, dtype=torch.float64):
    weight = randn(outputs, inputs, dtype=dtype) * (torch.rand(outputs, inputs) < share)
    weight[-1, -1] = 1  # at least one
    return weight


def sparse_of(outputs, inputs, bias=False):
    return SparseLinear.from_dense(sparse_weight(outputs, inputs), randn(outputs) if bias else None)


def channels_of(outputs, inputs, count, bias=False):
    channels = torch.randperm(inputs)[:count].sort().values
    return ChannelLinear.from_columns(randn(outputs, count), channels, inputs, randn(outputs) if bias else None)


def parts_of(outputs, inputs):
    """One part of each form, for multiples of 3."""
    return [
        low_rank_layer(randn(outputs, 2), randn(2, inputs), None, torch.float64, pivoted=True),
        low_rank_layer(randn(outputs, 1), randn(1, inputs), None, torch.float64, pivoted=False),
        MPOLinear.from_cores([randn(1, 3, 3, 2), randn(2, outputs // 3, inputs // 3, 1)], None),
        PivotedMPOLinear.from_cores([randn(1, 3, 3, 2), randn(2, outputs // 3, inputs // 3, 1)], None, torch.float64),
        BlockDiagonalLinear.from_blocks(randn(3, outputs // 3, inputs // 3), None),
        sparse_of(outputs, inputs),
        channels_of(outputs, inputs, 2),
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(6, 9), (9, 6), (15, 21)])
def test_a_sum_is_the_sum_of_the_dense_weights(seed, outputs, inputs, bias):
    parts = parts_of(outputs, inputs)
    b = randn(outputs) if bias else None
    layer = SumLinear(parts, b)
    expected = sum(part.dense_weight() for part in parts)
    torch.testing.assert_close(layer.dense_weight(), expected)
    for x in (randn(inputs), randn(4, inputs), randn(2, 3, inputs), randn(0, inputs)):
        wanted = x @ expected.T + (b if bias else 0)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_sum_there_and_back(seed, where, bias):
    layer = SumLinear(parts_of(15, 21), randn(15) if bias else None)
    spec = layer.spec()
    assert [part["form"] for part in spec["parts"]] == [
        "low_rank", "low_rank", "mpo", "pivoted_mpo", "block_diagonal", "sparse", "channels",
    ]  # fmt: skip
    with torch.device(where):
        again = SumLinear.from_spec(spec)
    assert again.spec() == spec
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in layer.state_dict().items()
    }
    assert all(t.device.type == where for t in again.state_dict().values())
    again.load_state_dict(layer.state_dict(), assign=True)
    x = randn(5, 21)
    torch.testing.assert_close(again(x), layer(x), rtol=1e-12, atol=1e-12)
    clone = copy.deepcopy(layer)
    torch.testing.assert_close(clone(x), layer(x), rtol=1e-12, atol=1e-12)


def test_a_sum_has_gradients_and_can_be_traced(seed):
    layer, x = SumLinear(parts_of(6, 9), randn(6)), randn(4, 9).requires_grad_()
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    weight = layer.dense_weight().detach()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ weight.T + layer.bias.detach()) @ weight)
    exported = torch.export.export(nn.Sequential(layer.requires_grad_(False)), (x.detach(),))
    torch.testing.assert_close(exported.module()(x.detach()), layer(x.detach()))


def test_sums_that_cannot_be(seed):
    with pytest.raises(ValueError, match="parts of one shape"):
        SumLinear([], None)
    with pytest.raises(ValueError, match=r"parts of one shape; found \[\(6, 9\), \(9, 6\)\]"):
        SumLinear([sparse_of(6, 9), sparse_of(9, 6)], None)
    with pytest.raises(ValueError, match="parts without a bias"):
        SumLinear([sparse_of(6, 9, bias=True)], None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_sparse_there_and_back(seed, outputs, inputs, bias):
    weight = sparse_weight(outputs, inputs)
    layer = SparseLinear.from_dense(weight, randn(outputs) if bias else None)
    layer.check()
    assert torch.equal(layer.dense_weight(), weight) and layer.count == int((weight != 0).sum())
    assert layer.columns.dtype == torch.int16 and layer.starts.dtype == torch.int32
    held = 2 * layer.values.numel() + layer.columns.nbytes + layer.starts.nbytes
    assert held == sparse_bytes(outputs, inputs, layer.count)
    x = randn(2, 5, inputs)
    wanted = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)
        layer.values.mul_(2)  # what was kept is made anew
        torch.testing.assert_close(layer(x), nn.functional.linear(x, 2 * weight, layer.bias))
    with torch.device("meta"):
        again = SparseLinear.from_spec(layer.spec())
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again.dense_weight(), 2 * weight)
    empty = SparseLinear.from_spec(layer.spec())
    empty.check()
    assert not empty.dense_weight().any()


def test_a_mask_stores_zeros_too(seed):
    weight, mask = randn(7, 5), torch.rand(7, 5) < 0.5
    weight[0], mask[0] = 0, True
    layer = SparseLinear.from_dense(weight, None, mask)
    assert layer.count == int(mask.sum()) and torch.equal(layer.dense_weight(), weight * mask)
    assert index_dtype(2**15) == torch.int16 and index_dtype(2**15 + 1) == torch.int32
    wide = torch.zeros(2, 40000)
    wide[1, 39999] = 3
    layer = SparseLinear.from_dense(wide, None)
    assert layer.columns.dtype == torch.int32 and torch.equal(layer.dense_weight(), wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sparse_for_inputs_of_any_precision(seed, dtype):
    layer = SparseLinear.from_dense(sparse_weight(11, 13, dtype=torch.float32), randn(11, dtype=torch.float32))
    x = randn(3, 13).to(dtype)
    wanted = nn.functional.linear(x.double(), layer.dense_weight().double(), layer.bias.double())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = layer(x)
        assert found.dtype == dtype
        bound = 8 * math.sqrt(13) * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=bound, atol=4 * bound)
    narrow = copy.deepcopy(layer).to(torch.bfloat16)
    assert narrow.columns.dtype == torch.int16 and narrow.starts.dtype == torch.int32
    with torch.no_grad():
        assert narrow(x.bfloat16()).dtype == torch.bfloat16


def test_the_gradient_of_the_values(seed):
    layer = sparse_of(5, 7, bias=True)
    x = randn(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values, x: torch.func.functional_call(layer, {"values": values}, (x,)), (layer.values, x)
    )
    layer(x).sum().backward()
    rows, columns = (layer.dense_weight() != 0).nonzero(as_tuple=True)
    torch.testing.assert_close(layer.values.grad, x.detach().sum(0)[columns])
    assert len(rows) == layer.count


@pytest.mark.parametrize(("outputs", "inputs", "count"), [(6, 9, 4), (9, 6, 6), (1, 3, 1)])
def test_channels_there_and_back(seed, outputs, inputs, count):
    layer = channels_of(outputs, inputs, count, bias=True)
    layer.check()
    weight = torch.zeros(outputs, inputs, dtype=torch.float64)
    weight[:, layer.channels.long()] = layer.weight.detach()
    assert torch.equal(layer.dense_weight(), weight) and layer.channels.dtype == torch.int32
    x = randn(2, 3, inputs)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
    with torch.device("meta"):
        again = ChannelLinear.from_spec(layer.spec())
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again.dense_weight(), weight)
    layer.dense_weight().square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * layer.weight.detach())


def _swap(layer):
    layer.columns[[0, 1]] = layer.columns[[1, 0]]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.columns.__setitem__(0, 13), "columns: from 1 to 13, of 13 inputs"),
        (lambda s: s.columns.__setitem__(2, -1), "columns: from -1 to 9, of 13 inputs"),
        (lambda s: s.columns.__setitem__(1, 2), "columns: 2 is not before 2 in one row"),
        (_swap, "columns: 5 is not before 2 in one row"),
        (lambda s: s.starts.__setitem__(1, 3), "starts: do not rise from 0 to 4"),
        (lambda s: s.starts.__setitem__(0, 1), "starts: do not rise from 0 to 4"),
        (lambda s: s.starts.__setitem__(3, 5), "starts: do not rise from 0 to 4"),
    ],
)
def test_an_index_that_is_none_is_refused(change, match):
    weight = torch.zeros(3, 13)
    weight[0, 2] = weight[0, 5] = weight[2, 1] = weight[2, 9] = 1
    layer = SparseLinear.from_dense(weight, None)
    layer.check()
    change(layer)
    with pytest.raises(ValueError, match=match):
        layer.check()


def test_channels_that_are_none_are_refused():
    for channels, match in [([0, 9], "channels: from 0 to 9, of 9 inputs"), ([-1, 2], "from -1"), ([3, 3], "rise")]:
        layer = ChannelLinear.from_columns(torch.ones(2, 2), torch.tensor(channels), 9, None)
        with pytest.raises(ValueError, match=match):
            layer.check()
    for kind in (SparseLinear, ChannelLinear):
        for count in (0, 1000):
            with pytest.raises(ValueError, match="from 1 to"):
                kind(9, 2, count, bias=False)
