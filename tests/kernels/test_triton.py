"""Triton's kernels in its interpreter, on the CPU; on a GPU where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from tensorpress.kernels import registry
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read when Triton is imported: in a process of its own
works = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU; interpreted by test_in_the_interpreter")
CUT = INTERPRETED and DEVICE == "cpu"
"""The interpreter makes bf16 by cutting digits off, where a GPU rounds: weights and results are then off by twice as much."""
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-7 if CUT else 2**-8, torch.float16: 2**-11}


@pytest.fixture
def triton_linear():
    from tensorpress.kernels import triton_linear

    return triton_linear


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run by themselves")
def test_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "--no-header",
        __file__,
    ]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"^(\d+) passed, 2 skipped", done.stdout, re.MULTILINE), done.stdout[-300:]


def random_layer(inputs, outputs, bits, group, shuffled, bias):
    groups = -(-inputs // group)
    index = torch.arange(inputs) // group
    return QuantizedLinear.from_integers(
        torch.randint(0, 1 << bits, (inputs, outputs)),
        torch.randint(1, 1 << bits, (groups, outputs)),
        (torch.rand(groups, outputs) + 0.1) / (1 << bits),
        index[torch.randperm(inputs)] if shuffled else index,
        bits,
        group,
        torch.randn(outputs) if bias else None,
    ).to(DEVICE)


@works
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("inputs", "outputs", "group"), [(45, 7, 15), (96, 70, 32), (200, 1, 200)])
def test_a_quantized_layer(seed, triton_linear, inputs, outputs, group, bits, dtype):
    layer = random_layer(inputs, outputs, bits, group, shuffled=bits != 4, bias=bits != 8)
    weight = layer.dense_weight().to(dtype).double()
    for rows in (0, 1, 3, 8, 9, 20):
        x = torch.randn(rows, inputs, device=DEVICE).to(dtype)
        y = triton_linear.quantized_linear(layer, x)
        bias = 0 if layer.bias is None else layer.bias.double()
        expected, size = x.double() @ weight.T + bias, x.double().abs() @ weight.abs().T + abs(bias)
        assert y.dtype == dtype and y.shape == (rows, outputs)
        weights_off = 2**-7 if CUT and dtype == torch.bfloat16 else 0.0
        allowed = UNIT[dtype] * expected.abs() + (2**-22 * inputs**0.5 + weights_off) * size
        assert ((y.double() - expected).abs() <= allowed).all()


@works
def test_inputs_of_any_shape_and_stride(seed, triton_linear):
    layer = random_layer(64, 40, 4, 32, shuffled=False, bias=True)
    x = torch.randn(64, 2, 3, device=DEVICE).permute(1, 2, 0)
    expected = registry.backends("quantized_linear")["reference"].run(layer, x)
    torch.testing.assert_close(triton_linear.quantized_linear(layer, x), expected, rtol=1e-4, atol=1e-4)
    x[0, 0, 0] = float("nan")
    y = triton_linear.quantized_linear(layer, x)
    assert y[0, 0].isnan().all() and not y[0, 1:].isnan().any() and not y[1].isnan().any()


@works
def test_every_split_of_the_sum(seed, triton_linear, monkeypatch):
    layer = random_layer(500, 9, 4, 100, shuffled=True, bias=False)
    x = torch.randn(2, 500, device=DEVICE)
    expected = registry.backends("quantized_linear")["reference"].run(layer, x)
    for processors in (1, 2, 1000):
        monkeypatch.setattr(triton_linear, "_multiprocessors", lambda device, found=processors: found)
        torch.testing.assert_close(triton_linear.quantized_linear(layer, x), expected, rtol=1e-4, atol=1e-4)


@works
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "p", "q", "columns"), [(3, 5, 7, 4), (1, 40, 33, 1), (9, 3, 70, 2), (70, 1, 1, 3), (0, 2, 3, 4)]
)
def test_a_step_of_a_chain(seed, triton_linear, batch, p, q, columns, dtype):
    matrix, state = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((p, q), (batch, q, columns)))
    expected = torch.einsum("pq,bqc->bpc", matrix.double(), state.double())
    size = torch.einsum("pq,bqc->bpc", matrix.double().abs(), state.double().abs())
    y = triton_linear.chain_step(matrix, state)
    assert y.dtype == dtype and y.shape == (batch, p, columns)
    assert ((y.double() - expected).abs() <= UNIT[dtype] * expected.abs() + 2**-20 * size).all()


@works
def test_layers_take_it_by_name(seed, triton_linear):
    quantized = random_layer(64, 40, 4, 32, shuffled=False, bias=True)
    cores = [torch.randn(1, 4, 5, 6), torch.randn(6, 3, 2, 1)]
    mpo = MPOLinear.from_cores(cores, torch.randn(12)).requires_grad_(False).to(DEVICE)
    for layer, operation in ((quantized, "quantized_linear"), (mpo, "mpo_linear")):
        x = torch.randn(11, layer.in_features, device=DEVICE)
        expected = registry.backends(operation)["reference"].run(layer, x)
        layer.kernel = "triton"
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert registry.names_in_use(layer) == {f"{operation}:triton": 1}
        x.requires_grad_(True)
        layer(x).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
    assert mpo.kept_bytes(["triton"]) == mpo.kept_bytes() > 0


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="it can")
def test_without_a_gpu_or_the_interpreter_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not registry.triton_runs(torch.zeros(1))
    layer = random_layer(16, 4, 4, 16, shuffled=False, bias=False).cpu()
    layer.kernel = "triton"
    with pytest.raises(ValueError, match="cannot run"):
        layer(torch.zeros(1, 16))
