"""Quantized linear layers and steps of MPO chains on a GPU, in Triton; right by test in its interpreter on the CPU.

Weights are read in the GPTQ layout as it is stored. `decode` takes a row at a time and splits the sum over inputs among programs, whose parts
are then added in a fixed order; `prefill` multiplies tiles on the tensor cores. Both sum in fp32.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of Triton's kernels are pointers and numbers of the kernel's language, not of Python's.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

DECODE_ROWS = 8
"""Up to so many rows each is read by itself: a tile of the tensor cores has 16."""
PROGRAMS = 4
"""Programs for each multiprocessor that the sum is split for."""


def interpreted() -> bool:
    """Whether Triton's interpreter does the work, on the CPU; it multiplies no tiles of bf16, which are widened then."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def _field(words, at, stride, there, BITS: tl.constexpr):
    """Integers of BITS bits, the at-th of a stream whose words lie `stride` apart; those of 3 bits may cross words."""
    first = at * BITS
    word, offset = first // 32, (first % 32).to(tl.uint32)
    low = tl.load(words + word * stride, mask=there, other=0).to(tl.uint32, bitcast=True)
    value = low >> offset
    if BITS == 3:
        crosses = offset + BITS > 32
        high = tl.load(words + (word + 1) * stride, mask=there & crosses, other=0).to(tl.uint32, bitcast=True)
        value |= tl.where(crosses, high << ((32 - offset) % 32), 0)
    return (value & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _weights(words, zeros, scales, group_of, k, n, N, K, ZERO_WORDS, OFFSET: tl.constexpr, BITS: tl.constexpr):
    """Dequantized weights [k, n] in fp32; zero where there are none."""
    there = (k < K)[:, None] & (n < N)[None, :]
    group = tl.load(group_of + k, mask=k < K, other=0)
    values = _field(words + n[None, :], k[:, None] + 0 * n[None, :], N, there, BITS)
    zero = _field(zeros + group[:, None] * ZERO_WORDS, 0 * k[:, None] + n[None, :], 1, there, BITS) + OFFSET
    scale = tl.load(scales + group[:, None] * N + n[None, :], mask=there, other=0).to(tl.float32)
    return (values - zero).to(tl.float32) * scale


@triton.jit
def _decode(
    x, words, zeros, scales, group_of, parts, M, N, K, ZERO_WORDS, OFFSET: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of one row and a block of outputs, the part of the sum that STEPS blocks of inputs give: parts [splits, M, N]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, split = tl.program_id(1), tl.program_id(2)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(STEPS):
        k = (split * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        weights = _weights(words, zeros, scales, group_of, k, n, N, K, ZERO_WORDS, OFFSET, BITS)
        inputs = tl.load(x + row * K + k, mask=k < K, other=0)
        total += tl.sum(inputs.to(tl.float32)[:, None] * weights.to(x.dtype.element_ty).to(tl.float32), 0)
    tl.store(parts + (split * M + row) * N + n, total, mask=n < N)


@triton.jit
def _prefill(
    x, words, zeros, scales, group_of, bias, y, M, N, K, ZERO_WORDS, OFFSET: tl.constexpr, BITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of y [M, N]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        weights = _weights(words, zeros, scales, group_of, k, n, N, K, ZERO_WORDS, OFFSET, BITS)
        inputs = tl.load(
            x + m[:, None].to(tl.int64) * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0
        )
        weights = weights.to(x.dtype.element_ty)
        if WIDE:
            inputs, weights = inputs.to(tl.float32), weights.to(tl.float32)
        total += tl.dot(inputs, weights, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    there = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m[:, None].to(tl.int64) * N + n[None, :], total.to(y.dtype.element_ty), mask=there)


@triton.jit
def _step(
    matrix, state, out, P, Q, S, COLUMNS, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """A tile of out [batch, P, S] = matrix [P, Q] times each of state [batch, Q, S]; a column is a place in batch and S."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    batch, s = (column // S).to(tl.int64), column % S
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, Q, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        left = tl.load(matrix + p[:, None] * Q + q[None, :], mask=(p < P)[:, None] & (q < Q)[None, :], other=0)
        at = batch[None, :] * Q * S + q[:, None] * S + s[None, :]
        right = tl.load(state + at, mask=(q < Q)[:, None] & (column < COLUMNS)[None, :], other=0)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    at = batch[None, :] * P * S + p[:, None] * S + s[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(p < P)[:, None] & (column < COLUMNS)[None, :])


def quantized_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The product of a quantized layer with x [..., inputs], in the dtype of x."""
    outputs, inputs = layer.out_features, layer.in_features
    rows = x.reshape(-1, inputs).contiguous()
    tensors = (rows, layer.qweight.contiguous(), layer.qzeros.contiguous(), layer.scales.contiguous(), layer.g_idx)
    shape = (rows.shape[0], outputs, inputs, layer.qzeros.shape[1])
    if rows.shape[0] <= DECODE_ROWS:
        y = _decoded(tensors, shape, layer)
        y = y if layer.bias is None else y + layer.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], outputs)
    y = x.new_empty(rows.shape[0], outputs)
    tile = 64 if rows.shape[0] > 32 else 32 if rows.shape[0] > 16 else 16
    _prefill[(triton.cdiv(rows.shape[0], tile), triton.cdiv(outputs, 64))](
        *tensors, y if layer.bias is None else layer.bias, y, *shape, layer.zero_offset, layer.bits, layer.bias is not None, interpreted(), tile, 64, 64
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], outputs)


def _decoded(tensors: tuple[torch.Tensor, ...], shape: tuple[int, int, int, int], layer: Any) -> torch.Tensor:
    rows, outputs, inputs, _ = shape
    block_n, block_k = 64, 64
    blocks = triton.cdiv(inputs, block_k)
    wanted = PROGRAMS * _multiprocessors(tensors[0].device) // (triton.cdiv(outputs, block_n) * max(rows, 1)) + 1
    steps = 1
    while steps * wanted < blocks:  # powers of two: few kernels are compiled
        steps *= 2
    splits = triton.cdiv(blocks, steps)
    parts = torch.empty(splits, rows, outputs, dtype=torch.float32, device=tensors[0].device)
    if rows:
        _decode[(triton.cdiv(outputs, block_n), rows, splits)](
            *tensors, parts, *shape, layer.zero_offset, layer.bits, steps, block_n, block_k
        )
    return parts.sum(0)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def chain_step(matrix: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """[p, q] times each of [batch, q, columns], without copies."""
    (outputs, inner), (batch, _, columns) = matrix.shape, state.shape
    out = state.new_empty(batch, outputs, columns)
    if out.numel():
        _step[(triton.cdiv(outputs, 32), triton.cdiv(batch * columns, 64))](
            matrix, state.contiguous(), out, outputs, inner, columns, batch * columns, interpreted(), 32, 64, 32
        )
    return out
