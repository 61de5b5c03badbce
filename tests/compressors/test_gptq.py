"""GPTQ against the plain optimal-brain-surgeon loop in float64, on matrices and on whole models."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from tensorpress.artifact import plain_gptq, save_model
from tensorpress.compressors.moments import SecondMoment
from tensorpress.compressors.quantize.gptq import (
    GPTQ,
    Grid,
    dequantized,
    fit_grid,
    inverse_factor,
    output_error,
    quantize_matrix,
)
from tensorpress.errors import InputError, StepError
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.loading import load
from tensorpress.structure import find_structure, linear_weight


def problem(rows, columns, tokens=None):
    """A weight and the Hessian of correlated inputs of uneven size, in float64."""
    mix = torch.randn(columns, columns, dtype=torch.float64) / columns**0.5 + torch.eye(columns, dtype=torch.float64)
    x = (
        torch.randn(tokens or 4 * columns, columns, dtype=torch.float64)
        @ mix
        * (torch.rand(columns).double() * 3 + 0.1)
    )
    return torch.randn(rows, columns, dtype=torch.float64), 2 / len(x) * x.T @ x


def naive(weight, hessian, bits, group_size, symmetric, act_order, damping=0.01):
    """Column by column; the inverse Hessian of what is left is computed anew each time, by inverting that matrix."""
    w, h = weight.clone(), hessian.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    rows, columns = w.shape
    importance = h.diagonal().clone()
    damped = h + damping * importance.mean() * torch.eye(columns, dtype=h.dtype)
    groups = columns // group_size
    grids = [None] * groups

    def fit(group):
        part = slice(group * group_size, (group + 1) * group_size)
        grids[group] = fit_grid(w[:, part], importance[part], bits, symmetric)

    order = list(range(columns))
    if act_order:
        for group in range(groups):
            fit(group)
        order = torch.argsort(importance, descending=True, stable=True).tolist()
    integers, compensated = torch.zeros_like(w), torch.zeros_like(w)
    for done, column in enumerate(order):
        group = column // group_size
        if not act_order and column % group_size == 0:
            fit(group)
        left = order[done:]
        inverse = torch.linalg.inv(damped[left][:, left])
        grid = grids[group]
        compensated[:, column] = w[:, column]
        integers[:, column] = grid.integers(w[:, column : column + 1])[:, 0]
        rounded = grid.round(w[:, column : column + 1])[:, 0]
        w[:, left] -= ((w[:, column] - rounded) / inverse[0, 0])[:, None] * inverse[0]
        w[:, column] = rounded
    scales = torch.cat([grid.scale for grid in grids], 1)
    zeros = torch.cat([grid.zero.expand(rows, 1) for grid in grids], 1)
    return integers, scales, zeros, compensated


SHAPES = [(5, 24, 24), (7, 30, 5), (3, 48, 16), (9, 33, 11), (1, 12, 3)]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_is_the_naive_surgeon(seed, rows, columns, group, symmetric, act_order):
    for bits in (2, 3, 4, 8):
        weight, hessian = problem(rows, columns)
        integers, scales, zeros, compensated = naive(weight, hessian, bits, group, symmetric, act_order)
        found = quantize_matrix(weight, hessian, bits, group, symmetric=symmetric, act_order=act_order, block=7)
        assert torch.equal(found[0], integers) and torch.equal(found[1], scales) and torch.equal(found[2], zeros)
        # Each integer is the one nearest to the compensated weight, which the naive loop keeps.
        nearest = Grid(scales.repeat_interleave(group, 1), zeros.repeat_interleave(group, 1), bits).integers(
            compensated
        )
        assert torch.equal(found[0], nearest)
        assert found[0].min() >= 0 and found[0].max() < 2**bits


def test_factor_holds_the_inverses_of_what_is_left(seed):
    """Row i of U is the first row of the inverse of H[i:, i:] over the root of its first entry."""
    _, hessian = problem(1, 37)
    upper, damping = inverse_factor(hessian, 0.01)
    assert damping == 0.01
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(37, dtype=torch.float64)
    for i in range(37):
        inverse = torch.linalg.inv(damped[i:, i:])
        expected = inverse[0] / inverse[0, 0].sqrt()
        assert (upper[i, i:] - expected).norm() <= 1e-9 * expected.norm()
        assert not upper[i, :i].any()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("columns", "group"), [(96, 12), (96, 24), (96, 48), (96, 96), (60, 20), (64, 1)])
def test_block_size_changes_nothing(seed, columns, group, act_order):
    """Groups that end inside a block, reach over its end, or span several of them (group 96, block 128 and the like)."""
    weight, hessian = problem(6, columns)
    whole = quantize_matrix(weight, hessian, 3, group, act_order=act_order, block=columns)
    for block in (1, 5, 16, 32, 40, 128):
        for expected, found in zip(
            whole, quantize_matrix(weight, hessian, 3, group, act_order=act_order, block=block), strict=True
        ):
            assert torch.equal(expected, found), f"block {block}"


def test_group_of_96_over_the_block_of_128(seed):
    weight, hessian = problem(3, 192)
    for act_order in (True, False):
        expected = naive(weight, hessian, 4, 96, True, act_order)
        found = quantize_matrix(weight, hessian, 4, 96, act_order=act_order)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=False))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_loses_less_than_rounding_to_nearest(seed, bits, act_order):
    wins, ratios = 0, []
    for _ in range(20):
        weight, hessian = problem(12, 48)
        integers, scales, zeros = quantize_matrix(weight, hessian, bits, 16, act_order=act_order)
        wide = Grid(scales.repeat_interleave(16, 1), zeros.repeat_interleave(16, 1), bits)
        plain = output_error(weight, wide.round(weight), hessian)
        found = output_error(weight, dequantized(integers, scales, zeros, 16), hessian)
        wins += found <= plain
        ratios.append(found / plain)
    assert wins >= 19 and sum(ratios) / len(ratios) < 0.9, (wins, sorted(ratios))


def test_output_error_is_that_of_the_outputs(seed):
    x, weight = torch.randn(200, 17, dtype=torch.float64), torch.randn(9, 17, dtype=torch.float64)
    other = weight + torch.randn_like(weight) * 0.1
    expected = (x @ (weight - other).T).norm() / (x @ weight.T).norm()
    assert output_error(weight, other, 2 / 200 * x.T @ x) == pytest.approx(float(expected), rel=1e-12)
    assert output_error(weight, weight, x.T @ x) == 0


def test_hessian_is_the_running_mean(seed):
    hessian, x = SecondMoment(13, scale=2.0), torch.randn(101, 13)
    for part in x.split([1, 40, 0, 37, 23]):
        if len(part):
            hessian.add(part)
    expected = 2 / 101 * x.double().T @ x.double()
    assert hessian.vectors == 101
    torch.testing.assert_close(hessian.matrix.double(), expected, rtol=1e-5, atol=1e-6)
    half = SecondMoment(13, scale=2.0)
    half.add(x.bfloat16())
    assert half.matrix.dtype == torch.float32


def test_dead_inputs_become_zero_and_hurt_nobody(seed):
    weight, hessian = problem(6, 32)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[torch.randperm(32)[:9]] = True
    hessian[dead], hessian[:, dead] = 0, 0
    weight[:, dead] *= 1000  # would ruin the grid of its group
    for act_order in (True, False):
        integers, scales, zeros = quantize_matrix(weight, hessian, 4, 16, act_order=act_order)
        result = dequantized(integers, scales, zeros, 16)
        assert not result[:, dead].any()
        assert output_error(weight, result, hessian) < 0.2
        assert torch.equal(integers, naive(weight, hessian, 4, 16, True, act_order)[0])


def test_all_inputs_dead(seed):
    weight = torch.randn(4, 16, dtype=torch.float64)
    integers, scales, zeros = quantize_matrix(weight, torch.zeros(16, 16), 4, 8)
    assert not dequantized(integers, scales, zeros, 8).any() and (scales == 1).all()


def test_fewer_tokens_than_inputs(seed):
    weight, hessian = problem(6, 48, tokens=5)
    assert torch.linalg.matrix_rank(hessian) == 5
    integers, scales, zeros = quantize_matrix(weight, hessian, 4, 16)
    assert torch.isfinite(dequantized(integers, scales, zeros, 16)).all()
    assert output_error(weight, dequantized(integers, scales, zeros, 16), hessian) < 0.2


def test_damping_is_raised_until_the_matrix_can_be_inverted(seed):
    base = torch.randn(12, 12, dtype=torch.float64)
    hessian = base @ base.T
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.05 * hessian.diagonal().mean()  # rounding errors can do that, on a smaller scale
    indefinite = vectors @ values.diag() @ vectors.T
    upper, damping = inverse_factor(indefinite, 0.001)
    assert damping == pytest.approx(0.1)
    damped = indefinite + damping * indefinite.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["one entry", "everything"])
def test_inputs_that_are_not_finite_stop_the_step(seed, value, where):
    weight, hessian = problem(3, 16)
    if where == "one entry":
        hessian[4, 7] = hessian[7, 4] = value
    else:
        hessian[:] = value
    with pytest.raises(StepError, match="not finite"):
        quantize_matrix(weight, hessian, 4, 16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_grid_is_one_that_can_be_stored_and_none_of_the_search_is_better(seed, bits, symmetric):
    w, importance = torch.randn(40, 16, dtype=torch.float64), torch.rand(16, dtype=torch.float64) + 0.01
    grid = fit_grid(w, importance, bits, symmetric)
    assert torch.equal(grid.scale, grid.scale.half().double()) and (grid.scale > 0).all()
    assert torch.equal(grid.zero, grid.zero.round()) and grid.zero.min() >= 0 and grid.zero.max() < 2**bits
    if symmetric:
        assert (grid.zero == 2 ** (bits - 1)).all()
    assert not grid.round(torch.zeros(40, 3).double()).any()  # zero stays zero
    again = grid.round(grid.round(w))
    torch.testing.assert_close(again, grid.round(w))
    # No single shrink of the range is better for any row.
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best = ((grid.round(w) - w).square() * importance).sum(1)
    for shrink in [1 - 0.6 * step / 40 for step in range(40)]:
        scale = ((high - low) * shrink / (2**bits - 1)).half().double()
        zero = (
            torch.full_like(scale, 2 ** (bits - 1))
            if symmetric
            else (-low * shrink / scale).round().clamp(0, 2**bits - 1)
        )
        rounded = ((w / scale).round() + zero).clamp(0, 2**bits - 1)
        other = (((rounded - zero) * scale - w).square() * importance).sum(1)
        assert (best <= other * (1 + 1e-12)).all()


def test_importance_decides_which_columns_are_met(seed):
    w = torch.randn(200, 8, dtype=torch.float64)
    important = torch.full((8,), 1e-3, dtype=torch.float64)
    important[2] = 1.0
    even = fit_grid(w, torch.ones(8).double(), 3, True)
    tilted = fit_grid(w, important, 3, True)
    assert (tilted.round(w) - w)[:, 2].square().sum() < (even.round(w) - w)[:, 2].square().sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_of_one_sign_and_of_next_to_nothing(seed, symmetric):
    w = torch.stack([torch.zeros(8), torch.rand(8) + 1, -torch.rand(8) - 1, torch.rand(8) * 1e-30]).double()
    grid = fit_grid(w, torch.ones(8).double(), 4, symmetric)
    rounded = grid.round(w)
    assert torch.isfinite(rounded).all() and torch.isfinite(grid.scale).all()
    assert grid.scale[0] == 1 and not rounded[0].any()
    assert ((rounded - w).abs() <= 0.2 * w.abs().amax(1, keepdim=True) + 1e-20).all()


# --- whole models


def method(**fields):
    return GPTQ(**{"bits": 4, "group_size": 16} | fields)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma2", "opt_post", "gpt_neox"])
@pytest.mark.parametrize(
    "fields", [{}, {"bits": 3, "symmetric": False, "act_order": False}, {"bits": 8, "group_size": -1}]
)
def test_whole_model(make_model, make_calibration, outputs, tmp_path, name, fields, plain_kernels):
    model = make_model(name)
    structure, calibration = find_structure(model), make_calibration(6, 12)
    weights = {path: linear_weight(model.get_submodule(path)).detach().double() for path in structure.linear_paths}
    biases = {path: model.get_submodule(path).bias for path in structure.linear_paths}
    untouched = {n: p.clone() for n, p in model.named_parameters() if not n.startswith(tuple(structure.linear_paths))}
    before = outputs(model, calibration.windows)
    compressor = method(**fields)
    model, report = compressor.compress(model, calibration)
    assert [row.layer for row in report.layers] == structure.linear_paths
    for row in report.layers:
        layer = model.get_submodule(row.layer)
        assert isinstance(layer, QuantizedLinear) and layer.bits == compressor.bits
        assert row.parameters_before == row.parameters_after == weights[row.layer].numel()
        assert row.bytes_before == 2 * row.parameters_before
        assert row.bytes_after == sum(
            t.numel() * t.element_size() for t in (layer.qweight, layer.qzeros, layer.scales, layer.g_idx)
        )
        assert 0 < row.error_after < 1 and 0 < row.error_before < 1
        distance = (layer.dense_weight().double() - weights[row.layer]).norm() / weights[row.layer].norm()
        assert 0 < distance < 1
        assert (layer.bias is None) == (biases[row.layer] is None)
        assert layer.bias is None or torch.equal(layer.bias, biases[row.layer])
    assert sum(r.error_after for r in report.layers) < sum(r.error_before for r in report.layers)
    assert report.summary == {"bits": compressor.bits, "group_size": compressor.group_size, "layers": len(weights)}
    assert all(torch.equal(parameter, untouched[n]) for n, parameter in model.named_parameters())
    after = outputs(model, calibration.windows)
    assert (after - before).norm() < {2: 2, 3: 1, 4: 0.5, 8: 0.05}[compressor.bits] * before.norm()

    plain = plain_gptq(model)
    assert plain is not None and plain["bits"] == compressor.bits and plain["group_size"] == compressor.group_size
    assert plain["sym"] is compressor.symmetric and plain["desc_act"] is False and plain["quant_method"] == "gptq"
    layout = "gptq" if compressor.symmetric else "gptq_v2"
    assert plain["format"] == plain["checkpoint_format"] == layout
    first = structure.blocks[0]
    inner = [path for group in plain["modules_in_block_to_quantize"] for path in group]
    assert [f"{first.path}.{path}" for path in inner] == first.linear_paths
    save_model(model, tmp_path, torch.float32)
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == plain
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == plain
    auto = AutoModel if name == "bert" else AutoModelForCausalLM
    for opened in (load(tmp_path), auto.from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(outputs(opened, calibration.windows), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tensors_of_the_standard_layout(make_model, make_calibration, tmp_path, name):
    model = make_model(name, **({"n_inner": 64} if name == "gpt2" else {"intermediate_size": 64}))
    paths = find_structure(model).linear_paths
    shapes = {path: linear_weight(model.get_submodule(path)).shape for path in paths}
    method().compress(model, make_calibration())
    save_model(model, tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    for path, (outs, ins) in shapes.items():
        found = {part: tensors[f"{path}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert found["qweight"].shape == (ins * 4 // 32, outs) and found["qweight"].dtype == torch.int32
        assert found["qzeros"].shape == (ins // 16, outs * 4 // 32) and found["qzeros"].dtype == torch.int32
        assert (found["qzeros"] == 0x77777777).all()  # version 1 stores the zero of 8 minus one
        assert found["scales"].shape == (ins // 16, outs) and found["scales"].dtype == torch.float16
        assert found["g_idx"].tolist() == [i // 16 for i in range(ins)] and found["g_idx"].dtype == torch.int32
        assert f"{path}.weight" not in tensors
        # Read with nothing but the description of the layout.
        dense = model.get_submodule(path).dense_weight()
        for k, n in torch.stack([torch.randint(0, ins, (50,)), torch.randint(0, outs, (50,))], 1).tolist():
            q = (int(found["qweight"][k // 8, n]) & 0xFFFFFFFF) >> 4 * (k % 8) & 15
            assert float(dense[n, k]) == pytest.approx((q - 8) * float(found["scales"][k // 16, n]), rel=1e-6)


def test_asymmetric_zeros_are_stored_as_they_are(make_model, make_calibration, tmp_path):
    model = make_model("llama")
    method(symmetric=False).compress(model, make_calibration())
    save_model(model, tmp_path, torch.float32)
    layer = model.model.layers[0].mlp.down_proj
    tensors = load_file(tmp_path / "model.safetensors")
    words = tensors["model.layers.0.mlp.down_proj.qzeros"].long() & 0xFFFFFFFF
    zeros = torch.stack([words >> 4 * j & 15 for j in range(8)], 2).flatten(1)
    values = layer.dense_weight().T.reshape(3, 16, 32) / layer.scales.float()[:, None]
    assert ((values + zeros[:, None]).round() >= 0).all() and ((values + zeros[:, None]).round() <= 15).all()
    assert layer.zero_offset == 0


def test_a_model_of_two_kinds_of_gptq_is_not_the_standard_layout(make_model, make_calibration):
    model = make_model("llama")
    assert plain_gptq(model) is None
    structure, calibration = find_structure(model), make_calibration()
    method().compress(model, calibration)
    assert plain_gptq(model) is not None
    path = structure.linear_paths[3]
    layer = model.get_submodule(path)
    model.set_submodule(path, QuantizedLinear(layer.in_features, layer.out_features, 3, 16, bias=False))
    assert plain_gptq(model) is None
    model.set_submodule(path, torch.nn.Linear(layer.in_features, layer.out_features, bias=False))
    assert plain_gptq(model) is None


def test_the_same_twice(make_model, make_calibration):
    import copy

    first, calibration = make_model("llama"), make_calibration()
    second = copy.deepcopy(first)
    method().compress(first, calibration)
    method().compress(second, calibration)
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_layers_of_a_group_share_the_inputs_that_compressed_layers_give(make_model, make_calibration):
    """The error in the report of the output projection is that of inputs which quantized q, k and v produce."""
    model, calibration = make_model("llama", num_hidden_layers=1), make_calibration(4, 10)
    structure = find_structure(model)
    weight = model.model.layers[0].self_attn.o_proj.weight.detach().clone()
    _, report = method(bits=2).compress(model, calibration)
    seen = []
    layer = model.get_submodule("model.layers.0.self_attn.o_proj")
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=calibration.windows)
    x = torch.cat(seen).double()
    expected = (x @ (weight.double() - layer.dense_weight().double()).T).norm() / (x @ weight.double().T).norm()
    (row,) = [row for row in report.layers if row.layer == "model.layers.0.self_attn.o_proj"]
    assert row.error_after == pytest.approx(float(expected), rel=1e-4)
    assert structure.blocks[0].linear_groups[0] == tuple(f"model.layers.0.self_attn.{p}_proj" for p in "qkv")


def test_only_dense_layers_are_quantized(make_model, make_calibration):
    from tensorpress.compressors.decompose.mpo import MPO

    model, calibration = make_model("llama"), make_calibration()
    MPO(metric="weights", keep=0.5, layers=("*mlp*",)).compress(model, calibration)
    _, report = method().compress(model, calibration)
    assert len(report.layers) == 3 * 4 and all("self_attn" in row.layer for row in report.layers)
    assert plain_gptq(model) is None


@pytest.mark.parametrize(
    ("name", "group", "parts"),
    [
        ("llama", 20, ["group_size: 20 does not divide the 32 inputs of .*q_proj", "use 16, 32, or -1"]),
        ("llama", 32, ["group_size: 32 does not divide the 48 inputs of .*down_proj", "use 16, or -1"]),
        ("gpt2", 48, ["does not divide the 32 inputs of transformer.h.0.attn.c_attn"]),
        ("llama", 0, ["group_size: found 0, expected -1 .* or a positive number"]),
        ("llama", -2, ["group_size: found -2"]),
    ],
)
def test_group_size_that_does_not_fit_is_one_line(make_model, make_calibration, one_line, name, group, parts):
    model = make_model(name)
    with pytest.raises(InputError) as caught:
        method(group_size=group).check(model, find_structure(model))
    one_line(caught, *parts)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(InputError):
        method(group_size=group).compress(model, make_calibration())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_model_without_dense_layers_is_refused(make_model, make_calibration, one_line):
    model = make_model("llama")
    method().compress(model, make_calibration())
    with pytest.raises(InputError) as caught:
        method().check(model, find_structure(model))
    one_line(caught, "no dense linear layers left")


@pytest.mark.parametrize(
    "fields", [{"bits": 5}, {"damping": 0}, {"damping": 1.5}, {"group": 4}, {"bits": "four"}, {"use": "mpo"}]
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        method(**fields)


def test_bits_for_some_layers(make_model, make_calibration, make_ids, outputs, tmp_path, one_line, plain_kernels):
    """The first pattern that matches counts; 16 bits leave a layer dense; the folder is no plain GPTQ one."""
    model, ids = make_model("llama"), make_ids(2, 9)
    down = linear_weight(model.model.layers[1].mlp.down_proj).detach().clone()
    method = GPTQ(bits=4, group_size=16, bits_for={"*.down_proj": 16, "*.1.mlp.*": 8, "*.mlp.*": 3})
    model, report = method.compress(model, make_calibration())
    actions = {row.layer.removeprefix("model.layers."): row.action for row in report.layers}
    assert actions["0.self_attn.q_proj"] == "gptq 4 bits" and actions["0.mlp.up_proj"] == "gptq 3 bits"
    assert actions["1.mlp.up_proj"] == "gptq 8 bits" and "1.mlp.down_proj" not in actions
    assert torch.equal(linear_weight(model.model.layers[1].mlp.down_proj), down)
    assert model.model.layers[1].mlp.up_proj.bits == 8 and model.model.layers[2].mlp.up_proj.bits == 3
    errors = {row.layer: row.error_after for row in report.layers}
    assert errors["model.layers.1.mlp.up_proj"] < errors["model.layers.0.mlp.up_proj"]
    assert plain_gptq(model) is None
    save_model(model, tmp_path, torch.float32)
    torch.testing.assert_close(outputs(load(tmp_path), ids), outputs(model, ids), rtol=0, atol=1e-4)
    with pytest.raises(InputError) as caught:
        GPTQ(bits_for={"*nothing*": 8}).check_layers(make_model("llama"), find_structure(make_model("llama")))
    one_line(caught, r"bits_for: \*nothing\* matches no layer; the first block has .*q_proj")
    with pytest.raises(ValueError, match="bits_for"):
        GPTQ(bits_for={"*": 5})
