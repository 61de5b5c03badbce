"""The quantized layer under torch.compile: one graph, the layer's numbers, one set of packed weights."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from tensorpress.kernels import cpu_linear, operators, registry
from tensorpress.kernels.block_diagonal_linear import BlockDiagonalLinear
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.kernels.semi_structured_linear import SemiStructuredLinear
from tensorpress.structure import find_structure, set_module

KERNELS = ["auto", "reference", *(["cpu", "cpu_int8"] if cpu_linear.compiled() is not None else [])]


def make(inputs=96, outputs=24, bits=4, bias=True):
    groups = -(-inputs // 32)
    zeros = torch.randint(1, 1 << bits, (groups, outputs))
    return QuantizedLinear.from_integers(
        torch.randint(0, 1 << bits, (inputs, outputs)), zeros, torch.rand(groups, outputs), torch.arange(inputs) // 32,
        bits, 32, torch.randn(outputs) if bias else None,
    )  # fmt: skip


def arguments(layer, x, kernel):
    return x, layer.stored(), layer.operation, layer.numbers(), layer.out_features, kernel


def whole(model):
    """Compiled without a break, else it raises."""
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_an_operator_as_torch_wants_them(kernel, seed):
    layer = make(bias=kernel != "reference")
    for x in (torch.randn(3, 96), torch.randn(2, 5, 96).bfloat16()):
        torch.library.opcheck(operators.linear, arguments(layer, x, kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_it_is_one_graph_with_the_same_numbers(kernel, seed):
    model = nn.Sequential(make(), nn.SiLU(), nn.Linear(24, 64), make(64, 8))
    for layer in model:
        layer.kernel = kernel
    with torch.no_grad():
        for rows in (1, 7):
            x = torch.randn(rows, 96)
            wanted = model(x)
            assert torch.allclose(whole(model)(x), wanted, atol=1e-5 * float(wanted.abs().max()))


def others():
    """Layers of the other kinds, each with its kernels."""
    sparse = torch.randn(24, 96)
    sparse.view(24, 24, 4)[..., ::2] = 0
    cores = [torch.randn(1, 4, 12, 5), torch.randn(5, 6, 8, 1)]
    return {
        "mpo": MPOLinear.from_cores(cores, torch.randn(24)),
        "low rank": MPOLinear.from_low_rank(torch.randn(24, 3), torch.randn(3, 96), None),
        "2:4": SemiStructuredLinear.from_dense(sparse, None),
        "blocks": BlockDiagonalLinear.from_blocks(torch.randn(4, 6, 24), None),
    }


@pytest.mark.parametrize("kind", ["mpo", "low rank", "2:4", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_other_kinds_do_not_break_a_graph(kind, dtype, seed):
    layer = others()[kind].to(dtype)
    x = torch.randn(3, 96).to(dtype)
    with torch.no_grad():
        wanted = layer(x)
        for kernel, backend in registry.backends(layer.operation).items():
            if backend.can_run(layer):
                layer.kernel = kernel
                layer.release()
                found = whole(layer)(x)
                assert torch.allclose(found.float(), wanted.float(), atol=0.03 * float(wanted.abs().max()))
                torch.library.opcheck(operators.linear, arguments(layer, x, kernel))
                kept = layer.kept_bytes()  # by the graph alone
                assert not list(layer.kept()) and kept == layer.kept_bytes([kernel])
                layer(x)
                assert kept <= layer.kept_bytes() <= 2 * kept
                assert list(layer.kept()) or not kept


@pytest.mark.parametrize("kind", ["mpo", "low rank", "2:4", "blocks", "quantized"])
def test_numbers_rebuild_the_form(kind, seed):
    layer = make() if kind == "quantized" else others()[kind]
    again = type(layer).from_numbers(layer.numbers())
    assert again.spec() == layer.spec() and [*again.spec()][1:] == [*again.fields]
    assert [t.shape for t in again.stored()] == [t.shape for t in layer.stored()]
    again.place([t.detach() for t in layer.stored()])
    assert torch.equal(again.dense_weight(), layer.dense_weight())


def test_gradients_reach_the_tensors_of_a_layer_in_a_graph(seed):
    layer = others()["low rank"]
    layer.kernel = "auto"
    whole(layer)(torch.randn(2, 96)).sum().backward()
    assert all(core.grad is not None and core.grad.abs().sum() > 0 for core in layer.cores)


def test_a_whole_model_is_one_graph(make_model, make_ids, seed):
    model = make_model("llama", num_hidden_layers=1)
    for path in find_structure(model).linear_paths:
        layer = model.get_submodule(path)
        set_module(model, path, make(layer.in_features, layer.out_features, bias=False))
        model.get_submodule(path).kernel = "auto"
    ids = make_ids(1, 9)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        found = whole(model)(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.skipif(cpu_linear.compiled() is None, reason="the compiled kernels were not built")
def test_packed_weights_are_shared_made_anew_and_let_go(seed):
    layer, x = make(), torch.randn(2, 96)
    layer.kernel = "cpu"
    compiled = whole(layer)
    with torch.no_grad():
        before, eager = compiled(x), layer(x)
        assert torch.equal(before, eager)
        assert [each.packed for each in operators.layers_of(layer.qweight)] == [layer.packed]
        for change in (lambda: layer.scales.mul_(2), lambda: layer.qweight.add_(1), lambda: layer.bias.neg_()):
            before = layer(x)
            change()
            assert not torch.equal(compiled(x), before) and torch.equal(compiled(x), layer(x))
    torch.compiler.reset()
    gc.collect()  # what other tests left
    known = len(operators._layers)
    compiled = layer = None
    torch.compiler.reset()
    gc.collect()
    assert len(operators._layers) == known - 1


def test_one_layer_by_two_kernels_and_two_readings(seed):
    """Graphs that share integers do not change each other's kernel, bias or offset; what they keep is let go with the layer's."""
    layer, x = make(), torch.randn(2, 96)
    exact = operators.linear(*arguments(layer, x, "reference"))
    for kernel in KERNELS:
        found = operators.linear(*arguments(layer, x, kernel))
        assert torch.allclose(found, exact, atol=0.02 * float(exact.abs().max()))
    shifted = list(arguments(layer, x, "auto"))
    shifted[3] = [*shifted[3][:4], 1 - layer.zero_offset, shifted[3][5]]
    assert not torch.allclose(operators.linear(*shifted), exact, atol=1e-3)
    other = torch.zeros_like(layer.bias)
    found = operators.linear(x, [*layer.stored()[:-1], other], *arguments(layer, x, "reference")[2:])
    assert torch.allclose(found + layer.bias, exact, atol=1e-4)
    layer.release()
    assert layer.qweight not in operators._layers


def test_a_kernel_that_there_is_not_is_refused_in_a_graph_too(seed):
    layer = make()
    layer.kernel = "fast"
    with pytest.raises(ValueError, match="kernel 'fast' is not known for quantized_linear"), torch.no_grad():
        operators.linear(*arguments(layer, torch.randn(1, 96), "fast"))


def test_gradients_go_through_the_reference(seed):
    layer, x = make(), torch.randn(2, 96, requires_grad=True)
    layer.kernel = "auto"
    whole(layer)(x).sum().backward()
    assert torch.allclose(x.grad, layer.dense_weight().sum(0).expand(2, 96), atol=1e-4)


def test_exported_graphs_are_plain_torch(seed):
    layer = make().eval()
    layer.kernel = KERNELS[-1]
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(2, 96),))
    assert "tensorpress" not in str(program.graph)


@pytest.mark.parametrize("kind", ["mpo", "low rank", "2:4", "blocks", "quantized"])
def test_autocast_is_what_it_is_without_a_graph(kind, seed):
    layer = make() if kind == "quantized" else others()[kind]
    layer.kernel = "auto"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for x in (torch.randn(3, 96), torch.randn(3, 96).bfloat16()):
            wanted, found = layer(x), whole(layer)(x)
            assert torch.allclose(found.float(), wanted.float(), atol=0.03 * float(wanted.abs().max()))


def test_weights_that_lie_otherwise_are_seen_by_a_graph(seed):
    layer = BlockDiagonalLinear.from_blocks(torch.randn(4, 6, 6), None)
    layer.kernel, x = "blocks", torch.randn(3, 24)
    compiled = whole(layer)
    with torch.no_grad():
        compiled(x)
        layer.blocks.data = layer.blocks.data.transpose(1, 2)
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)


def test_what_graphs_keep_stays_for_the_kernels_that_stay(seed):
    layer, x = others()["mpo"], torch.randn(3, 96)
    layer.kernel = "matrix"
    with torch.no_grad():
        whole(layer)(x)
    kept = layer.kept_bytes()
    layer.release(["matrix"])
    assert layer.kept_bytes() == kept > 0
    layer.release(["chain"])
    assert layer.kept_bytes() == 0 and operators.layers_of(layer.stored()[0])
    layer.release()
    assert not operators.layers_of(layer.stored()[0])
