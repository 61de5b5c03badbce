"""MPO layers in the fewest numbers: the same weight, what they say they store, and gradients for what they do store."""

import copy
import math

import pytest
import torch

from tensorpress.artifact import save_model
from tensorpress.compressors.decompose.tensor_train import capped_bonds, decompose, full_bonds, least_numbers
from tensorpress.errors import InputError
from tensorpress.kernels import registry
from tensorpress.kernels.kernel_layer import KernelLayer
from tensorpress.kernels.mpo_linear import mpo_to_matrix
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear
from tensorpress.loading import layers_of, load
from tensorpress.structure import find_structure, linear_weight, set_module

SPLITS = [
    ((4, 6), (5, 6)),
    ((2, 3, 4), (5, 2, 3)),
    ((3, 2, 2, 2), (2, 5, 3, 1)),
    ((24, 1), (1, 30)),
    ((12, 2), (1, 30)),
]


def made(rows, columns, bond, bias=True, dtype=torch.float64):
    weight = torch.randn(24, 30, dtype=torch.float64)
    cores = decompose(weight, rows, columns, capped_bonds(rows, columns, bond))
    return PivotedMPOLinear.from_cores(cores, torch.randn(24, dtype=dtype) if bias else None, dtype), mpo_to_matrix(
        cores
    )


@pytest.mark.parametrize("kernel", ["reference", "expanded", "auto"])
@pytest.mark.parametrize("bond", [1, 4, 1000])
@pytest.mark.parametrize(("rows", "columns"), SPLITS)
def test_it_is_the_weight_in_as_many_numbers(seed, rows, columns, bond, kernel):
    layer, weight = made(rows, columns, bond)
    layer.kernel = kernel
    x = torch.randn(2, 3, 30, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ weight.T + layer.bias, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(layer.dense_weight(), weight, rtol=1e-8, atol=1e-8)
    bonds = capped_bonds(rows, columns, bond)
    assert sum(core.numel() for core in layer.cores) == least_numbers(rows, columns, bonds)
    assert all(len(p) == math.ceil(r / 8) for p, r in zip(layer._pivots(), layer.rows(), strict=True))
    if bond == 1000 and len(rows) == 2:
        assert sum(core.numel() for core in layer.cores) == weight.numel() and bonds == full_bonds(rows, columns)
    layer.check()
    again = KernelLayer.kinds[layer.operation].from_numbers(layer.numbers())
    assert again.spec() == layer.spec()


@pytest.mark.parametrize(("rows", "columns"), SPLITS)
def test_gradients_reach_what_is_stored(seed, rows, columns):
    layer, _ = made(rows, columns, 4)
    x = torch.randn(5, 30, dtype=torch.float64)
    for kernel in ("reference", "expanded"):
        layer.kernel = kernel
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert all(core.grad is not None for core in layer.cores)
    at = next(k for k, core in enumerate(layer.cores) if core.numel())
    core, step = layer.cores[at], 1e-6
    place = (0,) * core.ndim
    slope = float(core.grad[place])
    values = []
    with torch.no_grad():
        layer.kernel = "reference"
        for sign in (1, -1):
            core[place] += sign * step
            values.append(float(layer(x).square().sum()))
            core[place] -= sign * step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_what_is_kept_follows_the_cores(seed):
    layer, _ = made(*SPLITS[1], 4, dtype=torch.float32)
    layer.kernel = "expanded"
    layer.requires_grad_(False)
    x = torch.randn(3, 30)
    layer(x)
    assert layer.kept_bytes() >= sum(core.nbytes for core in layer.expanded().cores)
    layer.cores[0].mul_(0.5)
    torch.testing.assert_close(
        layer(x), torch.nn.functional.linear(x, layer.dense_weight(), layer.bias), rtol=1e-4, atol=1e-4
    )
    clone = copy.deepcopy(layer)
    assert clone.made is None
    torch.testing.assert_close(clone(x), layer(x))
    layer.release()
    assert layer.made is None and layer.kept_bytes() == 0
    half = layer.bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert {b.name for b in registry.backends(layer.operation).values()} == {"reference", "expanded"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_folders_open_again(make_model, make_ids, outputs, tmp_path, name, one_line):
    from safetensors.torch import load_file, save_file

    model, ids = make_model(name), make_ids(2, 9)
    from tensorpress.compressors.decompose.tensor_train import factors

    for place, path in enumerate(find_structure(model).linear_paths):
        layer = model.get_submodule(path)
        weight = linear_weight(layer).detach()
        rows, columns = (factors(size, 2 + place % 2) for size in weight.shape)
        cores = decompose(weight, rows, columns, capped_bonds(rows, columns, 6))
        set_module(model, path, PivotedMPOLinear.from_cores(cores, getattr(layer, "bias", None), weight.dtype))
    expected = outputs(model, ids)
    save_model(model, tmp_path, torch.float32)
    opened = load(tmp_path, dtype=torch.float32)
    assert layers_of(opened) == layers_of(model)
    torch.testing.assert_close(outputs(opened, ids), expected, rtol=0, atol=1e-4)
    tensors = load_file(tmp_path / "model.safetensors")
    bad = next(name for name in sorted(tensors) if name.endswith(".pivots_0"))
    tensors[bad][0] ^= 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    one_line(caught, r"pivots_0: not \d+ of the \d+ bits are set")


def test_bad_shapes():
    for arguments in (((2, 3), (4, 5), (9, 3)), ((2,), (3,), ())):
        with pytest.raises(ValueError, match="n - 1 bonds"):
            PivotedMPOLinear(*arguments, bias=False)
    with pytest.raises(ValueError, match="bond 1 of 9 is above the 8 rows"):
        PivotedMPOLinear((2, 3), (4, 5), (9,), bias=False)
