"""Quantized linear layers on the CPU in C++ (`kernels/cpu`): AVX-512, AVX2, both with VNNI where it is there, or any other processor.

Two backends: `cpu` multiplies the integers with the inputs, exact up to rounding: with BF16 instructions as bf16, inputs of another precision as
the sum of two bf16, which has 16 bits; where bytes are multiplied faster than floats as 16-bit integers, by a scale for each token and group of
inputs; elsewhere as fp32. `cpu_int8` rounds the inputs to 8 bits in the same way, and multiplies integers. Both read the weights in
their own layout, made once from the GPTQ layout. The work is spread over torch's own threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import statistics
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tensorpress.kernels import registry
from tensorpress.kernels.origin import Origin

if TYPE_CHECKING:
    from tensorpress.kernels.quantized_linear import QuantizedLinear

LANES, STEP = 16, 32
LONGEST = 512
"""Inputs that share a scale at most: longer groups are cut, so that 8-bit inputs get a scale for each piece."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MODES = {"cpu_int8": 1, "cpu": 0}
LEVELS = ("portable", "avx2", "avxvnni", "avx512vl", "avx512")
"""Instruction sets, from the least."""
WORTH_A_THREAD = 1 << 18
"""As in kernels/cpu/api.cpp."""


class Weights(ctypes.Structure):
    """`tp_weights` of kernels/cpu/linear.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "blocks", "groups", "group")),
        ("bits", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("data", "scale", "zero", "order", "bias")),
    )


FILE = Path(__file__).parent / "libcpu.so.1"
"""Made by setup.py."""


@functools.cache
def fingerprint() -> str:
    """Digest of the compiled code, empty where it was not built: figures of speed are remembered with it."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest() if FILE.is_file() else ""


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """The compiled code, on torch's threads; None where it was not built."""
    try:
        code = ctypes.CDLL(str(FILE))
    except OSError:
        return None
    code.tp_instructions.restype = ctypes.c_char_p
    code.tp_product.argtypes = [
        ctypes.POINTER(Weights), ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, *[ctypes.c_int] * 3
    ]  # fmt: skip
    code.tp_pack.argtypes = [ctypes.POINTER(Weights), *[ctypes.c_void_p] * 4, ctypes.c_int32, ctypes.c_int]
    code.tp_read.argtypes, code.tp_read.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], ctypes.c_uint64
    code.tp_decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_int]
    code.tp_limit_threads.argtypes = [ctypes.c_int64]
    code.tp_use_pool.argtypes = [ctypes.c_void_p]
    code.tp_use_pool(_torch_threads())
    return code


def instructions() -> str | None:
    """The instruction set in use, one of LEVELS; None where nothing was built."""
    code = compiled()
    return None if code is None else str(code.tp_instructions().decode())


def read_bandwidth(megabytes: int = 512, repeats: int = 9) -> float:
    """Bytes per second at which torch's threads read memory one after the other; the median of some tries."""
    code = compiled()
    assert code is not None
    room = torch.ones(megabytes << 20, dtype=torch.uint8)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        code.tp_read(room.data_ptr(), room.nbytes, torch.get_num_threads())
        seconds.append(time.perf_counter() - began)
    return room.nbytes / statistics.median(seconds)


def limit_threads(work: int = WORTH_A_THREAD) -> None:
    """Use a thread for each so many multiply-adds or bytes of one product, 0 for all threads always; for tests."""
    code = compiled()
    assert code is not None
    code.tp_limit_threads(work)


def limit_instructions(name: str) -> None:
    """Use no more than this instruction set from now on; for tests."""
    code = compiled()
    assert code is not None
    code.tp_limit(LEVELS.index(name))


def _torch_threads() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch itself uses; None where it uses another kind of threads."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.is_file():
            try:
                function = ctypes.CDLL(str(path)).GOMP_parallel
            except (OSError, AttributeError):
                return None
            return ctypes.cast(function, ctypes.c_void_p).value
    return None


class Packed:
    """The weights of a layer in the layout of the compiled code."""

    def __init__(self, layer: QuantizedLinear):
        code = compiled()
        assert code is not None
        tensors = (layer.qweight, layer.qzeros, layer.g_idx)
        if any(t.dtype != torch.int32 for t in tensors) or layer.scales.dtype != torch.float16:
            raise ValueError("a quantized layer has packed integers in int32 and scales in float16")  # what C reads
        check_groups(layer)
        groups, order = places(layer.g_idx, layer.scales.shape[0])
        self.made_of, self.zero_offset = Origin(_made_of(layer)), layer.zero_offset
        self.outputs, self.inputs, self.bits = layer.out_features, layer.in_features, layer.bits
        blocks, count = -(-self.outputs // LANES), len(groups)
        group = len(order) // count
        middle = 1 << (self.bits - 1)
        zeros = _zero_points(layer)
        symmetric = bool((zeros == middle).all())
        self.data = torch.empty(blocks * count * group * 2 * self.bits, dtype=torch.uint8)
        self.scale = torch.empty(blocks, count, LANES, dtype=torch.float16)
        self.zero = None if symmetric else torch.empty(blocks, count, LANES, dtype=torch.int16)
        plain = torch.arange(len(order), dtype=torch.int32)
        plain[self.inputs :] = -1
        self.order = None if torch.equal(order, plain) else order
        self.bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
        self.weights = Weights(
            self.outputs, self.inputs, blocks, count, group, self.bits,
            self.data.data_ptr(), self.scale.data_ptr(), _address(self.zero), _address(self.order), _address(self.bias),
        )  # fmt: skip
        words, scales = layer.qweight.contiguous(), layer.scales.contiguous()
        packed_zeros = layer.qzeros.contiguous()
        code.tp_pack(
            ctypes.byref(self.weights), words.data_ptr(), packed_zeros.data_ptr(), scales.data_ptr(), groups.data_ptr(),
            layer.zero_offset, torch.get_num_threads(),
        )  # fmt: skip

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of a layer makes its own."""
        return type(None), ()

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.nbytes for t in (self.data, self.scale, self.zero, self.order, self.bias) if t is not None)

    def is_of(self, layer: QuantizedLinear) -> bool:
        """Whether it was made of the layer as it is."""
        form = layer.bits == self.bits and layer.zero_offset == self.zero_offset
        return form and self.made_of.holds(_made_of(layer))

    def __call__(self, x: torch.Tensor, mode: int) -> torch.Tensor:
        """The product [..., outputs] with x [..., inputs], in the dtype of x. Raises MemoryError."""
        return multiply(self.weights, x, mode)


def multiply(weights: Weights, x: torch.Tensor, mode: int) -> torch.Tensor:
    """The product [..., outputs] of packed weights with x [..., inputs], in the dtype of x. Raises MemoryError, ValueError for other inputs."""
    inputs, shape = weights.inputs, x.shape
    if not shape or shape[-1] != inputs:
        raise ValueError(f"inputs of the shape {[*shape]} for a layer of {inputs}")
    flat = x if len(shape) == 2 else x.reshape(-1, inputs)
    stride, step = flat.stride()
    if step != 1:
        flat, stride = flat.contiguous(), inputs
    y = x.new_empty((*shape[:-1], weights.outputs))
    return _multiplied(weights, flat, y, flat.shape[0], stride, 1, mode)


def multiply_columns(weights: Weights, x: torch.Tensor, batch: int, columns: int) -> torch.Tensor:
    """W times each of x, numbers [batch, inputs, columns] in this order: [batch, outputs, columns]. Raises MemoryError, ValueError for other inputs."""
    if x.numel() != batch * weights.inputs * columns:
        raise ValueError(f"inputs of the shape {[*x.shape]} for a layer of {weights.inputs}, {batch} times {columns}")
    y = x.new_empty(batch, weights.outputs, columns)
    return _multiplied(weights, x.contiguous(), y, batch * columns, weights.inputs * columns, columns, MODES["cpu"])


def _multiplied(
    weights: Weights, x: torch.Tensor, y: torch.Tensor, rows: int, stride: int, columns: int, mode: int
) -> torch.Tensor:
    code = compiled()
    assert code is not None
    if code.tp_product(
        ctypes.byref(weights), x.data_ptr(), y.data_ptr(), rows, stride, columns, TYPES[x.dtype], mode, torch.get_num_threads()
    ):  # fmt: skip
        raise MemoryError(f"a linear layer of {rows} rows: no memory for its inputs")
    return y


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _made_of(layer: QuantizedLinear) -> tuple[torch.Tensor | None, ...]:
    return layer.qweight, layer.qzeros, layer.scales, layer.g_idx, layer.bias


def _zero_points(layer: QuantizedLinear) -> torch.Tensor:
    from tensorpress.kernels.packing import unpack

    return unpack(layer.qzeros.T.contiguous(), layer.bits, layer.out_features) + layer.zero_offset


def check_groups(layer: QuantizedLinear) -> None:
    """Refuse inputs that belong to no group. Raises ValueError."""
    groups = layer.scales.shape[0]
    if layer.g_idx.numel() and not 0 <= int(layer.g_idx.min()) <= int(layer.g_idx.max()) < groups:
        raise ValueError(f"g_idx names groups from {int(layer.g_idx.min())} to {int(layer.g_idx.max())} of {groups}")


def places(g_idx: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the inputs go: each group's inputs side by side, cut into pieces of one length, a multiple of 32.

    Returns the layer's group of each piece, int32 [pieces], and the input at each place, int32 [pieces * length], -1 for none.
    """
    counts = torch.bincount(g_idx.long(), minlength=groups)
    longest = max(int(counts.max()), 1)
    length = -(-longest // -(-longest // LONGEST))  # of pieces as even as can be
    length = -(-length // STEP) * STEP
    pieces = -(-counts // length)
    of = torch.repeat_interleave(torch.arange(groups), pieces)
    order = torch.full((len(of) * length,), -1, dtype=torch.int32)
    first = (torch.cumsum(pieces, 0) - pieces) * length  # place of each group's first input
    sort = torch.argsort(g_idx.long(), stable=True)
    within = torch.arange(len(sort)) - torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    order[torch.repeat_interleave(first, counts) + within] = sort.to(torch.int32)
    return of.to(torch.int32), order


_shared: weakref.WeakValueDictionary[int, Packed] = weakref.WeakValueDictionary()
"""What layers of the same memory share, by the address of the integers."""


def packed(layer: QuantizedLinear) -> Packed:
    """The layer's weights in the layout of the compiled code, made anew if they changed."""
    kept: Packed | None = layer.packed
    if kept is None or not kept.is_of(layer):
        kept = _shared.get(layer.qweight.data_ptr())
        if kept is None or not kept.is_of(layer):
            kept = _shared[layer.qweight.data_ptr()] = Packed(layer)
        layer.packed = kept
    return kept


def run(mode: str, layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """The product of a layer, by the reference where gradients or another precision are asked for."""
    if x.dtype not in TYPES or x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
        return registry.backends("quantized_linear")["reference"].run(layer, x)
    return packed(layer)(x, MODES[mode])


def can_run(layer: nn.Module) -> bool:
    """Whether the code was built, and the layer is where it can be read."""
    return compiled() is not None and layer.qweight.device.type == "cpu"
