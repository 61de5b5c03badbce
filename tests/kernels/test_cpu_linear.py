"""The compiled quantized layer against float64, on every instruction set, by emulation where the machine lacks it."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tensorpress.kernels import cpu_linear, registry
from tensorpress.kernels.packing import unpack
from tensorpress.kernels.quantized_linear import QuantizedLinear

SOURCES = Path(cpu_linear.__file__).parent / "cpu"
BITS = (2, 3, 4, 8)
SHAPES = [  # inputs, outputs, group
    (64, 16, 32), (96, 5, 32), (100, 1, 32), (256, 40, 128), (513, 33, 64), (700, 17, -1), (1, 3, -1), (1300, 20, -1),
]  # fmt: skip
ROWS = (1, 2, 3, 5, 17)

pytestmark = pytest.mark.skipif(cpu_linear.compiled() is None, reason="the compiled kernels were not built")


def make(inputs, outputs, group, bits, symmetric=True, order=False, zero_offset=1, bias=True):
    """A random layer; `order` gives its inputs to groups at random."""
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    index = torch.arange(inputs) // size
    if order:
        index = index[torch.randperm(inputs)]
    middle = 1 << (bits - 1)
    zeros = torch.full((groups, outputs), middle) if symmetric else torch.randint(1, 1 << bits, (groups, outputs))
    values = torch.randint(0, 1 << bits, (inputs, outputs))
    scales = torch.rand(groups, outputs) * 0.1 + 0.01
    shift = torch.randn(outputs) if bias else None
    return QuantizedLinear.from_integers(values, zeros, scales, index, bits, group, shift, zero_offset)


def cases(shape, bits):
    """Layers with and without zero points, activation order and bias, each with inputs of several rows."""
    for symmetric, order, offset, bias in ((True, False, 1, True), (False, True, 0, False), (False, False, 1, True)):
        layer = make(*shape, bits, symmetric, order, offset, bias)
        for rows in ROWS:
            yield layer, torch.randn(rows, shape[0])


def oracle(layer, x):
    """In float64, from the integers."""
    values = unpack(layer.qweight, layer.bits, layer.in_features).double()
    zeros = unpack(layer.qzeros.T.contiguous(), layer.bits, layer.out_features).T.double() + layer.zero_offset
    groups = layer.g_idx.long()
    weight = (values - zeros[groups]) * layer.scales.double()[groups]
    y = x.double() @ weight
    return y if layer.bias is None else y + layer.bias.double()


def rounded_inputs(layer, x, most=127.0):
    """What integer inputs stand for, rounded by a scale for each token and piece of a group; and their steps, in the shape of x."""
    pieces, order = cpu_linear.places(layer.g_idx, layer.scales.shape[0])
    places = order.view(len(pieces), -1)
    out, steps = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
    for piece in places:
        piece = piece[piece >= 0].long()
        part = x[:, piece].float()
        top = part.abs().amax(1, keepdim=True)
        ratio = torch.where(top > 1e-30, most / top, 0.0)
        q = part * ratio
        q = torch.trunc(q + torch.where(q < 0, -0.5, 0.5))
        steps[:, piece] = (top / most).double()
        out[:, piece] = q.double() * steps[:, piece]
    return out, steps


SIXTEEN = 32630.0
"""The largest integer of 16-bit inputs, which are two of 8 bits."""


def has_integers(level, layer):
    """Whether inputs of weight-only mode are integers of 16 bits there."""
    return level not in ("portable", "avx512") and not (level == "avx2" and layer.bits == 8)


def rounding(level, layer, x):
    """The most that results of weight-only mode may be off, for inputs in fp32."""
    size = sizes(layer, x)
    if level == "avx512":  # two bf16
        return 1e-5 * size
    if not has_integers(level, layer):
        return 1e-6 * size
    bias = 0 if layer.bias is None else layer.bias.double().abs()
    return 1e-6 * size + 0.501 * (sizes(layer, rounded_inputs(layer, x, SIXTEEN)[1]) - bias)


def close(y, wanted, size, tolerance=1.0):
    """Errors relative to the size that the sums have, not to sums that cancel."""
    assert y.shape == wanted.shape
    assert ((y.double() - wanted).abs() <= tolerance * size).all(), ((y.double() - wanted).abs() / size).max()


def sizes(layer, x):
    """What the absolute values of all products add up to: rounding errors are shares of this."""
    weight = layer.dense_weight().double().abs().T
    bias = 0 if layer.bias is None else layer.bias.double().abs()
    # zero points are taken off in sums of their own
    extra = layer.scales.double().abs()[layer.g_idx.long()] * (1 << layer.bits)
    return x.double().abs() @ (weight + extra) + bias + 1e-30


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_only_is_exact_up_to_rounding(level, bits, shape, seed):
    for layer, x in cases(shape, bits):
        y = registry.backends("quantized_linear")["cpu"].run(layer, x)
        close(y, oracle(layer, x), rounding(level, layer, x))
        if has_integers(level, layer):  # not only near: the products of the integers that it says
            rounded, steps = rounded_inputs(layer, x, SIXTEEN)
            tie = float(
                steps.max() / x.abs().sum(1).clamp_min(1e-3).min()
            )  # one that is rounded the other way moves by a step
            close(y, oracle(layer, rounded), sizes(layer, x), 5e-7 + tie)
        near = x.bfloat16().float()
        y = registry.backends("quantized_linear")["cpu"].run(layer, near)
        close(y, oracle(layer, near), 1e-6 * sizes(layer, near) if level == "avx512" else rounding(level, layer, near))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bit_inputs_are_exact_once_rounded(level, bits, shape, seed):
    for layer, x in cases(shape, bits):
        y = registry.backends("quantized_linear")["cpu_int8"].run(layer, x)
        near, _ = rounded_inputs(layer, x)
        step = x.abs().max() / 127  # a tie that is rounded the other way moves one input by one step
        close(y, oracle(layer, near), sizes(layer, x), 1e-6 + float(step / x.abs().sum(1).clamp_min(1e-3).min()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", list(cpu_linear.MODES))
def test_halves_in_and_out(level, dtype, mode, seed):
    layer = make(256, 40, 64, 4)
    x = torch.randn(3, 7, 256).to(dtype)
    y = registry.backends("quantized_linear")[mode].run(layer, x)
    assert y.dtype == dtype and y.shape == (3, 7, 40)
    wanted = oracle(layer, x.flatten(0, 1)).view(3, 7, 40)
    tolerance = (0.02 if mode == "cpu_int8" else 1e-5) * sizes(layer, x.flatten(0, 1)).view(3, 7, 40)
    room = wanted.abs() * torch.finfo(dtype).eps + tolerance
    assert ((y.double() - wanted).abs() <= room).all()


def test_layers_without_rows_and_views(level, seed):
    layer = make(96, 24, 32, 4)
    run = registry.backends("quantized_linear")["cpu"].run
    assert run(layer, torch.randn(0, 96)).shape == (0, 24) and run(layer, torch.randn(2, 0, 96)).shape == (2, 0, 24)
    wide = torch.randn(5, 200)
    for x in (wide[:, 7:103], torch.randn(96, 4).T, torch.randn(6, 96)[::2], wide.flatten()[3:99]):
        for view in (x, wide.bfloat16()[:, 7:103], wide.half().flatten()[3:99]):  # halves at odd places
            close(run(layer, view), run(layer, view.contiguous().clone()).double(), 1.0, 0.0)


@pytest.mark.parametrize("bits", BITS)
def test_extreme_scales_and_inputs(level, bits, seed):
    layer = make(128, 20, 32, bits, symmetric=False)
    layer.scales = (torch.rand(4, 20) * 65_000).half()
    layer.scales[0, 0], layer.scales[1, 1] = 6e-8, 0.0  # the smallest half, and none
    for size in (1e-30, 1e-3, 1e30):
        x = torch.randn(3, 128) * size
        for mode, tolerance in (("cpu", 1e-5), ("cpu_int8", 0.02)):
            y = registry.backends("quantized_linear")[mode].run(layer, x)
            close(y, oracle(layer, x), sizes(layer, x), tolerance)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", list(cpu_linear.MODES))
def test_what_is_not_finite_is_not_finite_afterwards(level, bits, mode, value, seed):
    layer = make(128, 20, 32, bits, symmetric=False)
    x = torch.randn(5, 128)
    x[1, 40] = value
    y = registry.backends("quantized_linear")[mode].run(layer, x)
    touched = layer.dense_weight()[:, 40] != 0
    assert not y[1, touched].isfinite().any()
    assert y[[0, 2, 3, 4]].isfinite().all()


def test_threads_and_calls_at_once_give_the_same_bits(seed):
    layer = make(256, 200, 64, 4)
    x = torch.randn(19, 256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = {mode: registry.backends("quantized_linear")[mode].run(layer, x) for mode in cpu_linear.MODES}
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            for mode, y in wanted.items():
                assert torch.equal(registry.backends("quantized_linear")[mode].run(layer, x), y)
        different = []

        def work():
            for _ in range(30):
                for mode, y in wanted.items():
                    if not torch.equal(registry.backends("quantized_linear")[mode].run(layer, x), y):
                        different.append(mode)

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not different
    finally:
        torch.set_num_threads(before)


def test_torchs_own_threads_are_found():
    """Else all products would be of one thread; another kind of threads than OpenMP's has no such function."""
    assert cpu_linear._torch_threads() is not None or "OpenMP" not in torch.__config__.parallel_info()


WITHOUT = """
import sys, torch
from pathlib import Path
from tensorpress.kernels import cpu_linear, registry
cpu_linear.FILE = Path("/nowhere/libcpu.so.1")
cpu_linear.compiled.cache_clear()
from tensorpress.kernels.quantized_linear import QuantizedLinear
index = torch.arange(64) // 32
layer = QuantizedLinear.from_integers(
    torch.randint(0, 16, (64, 8)), torch.full((2, 8), 8), torch.rand(2, 8), index, 4, 32, None
)
layer.kernel, x = "auto", torch.randn(3, 64)
with torch.no_grad():
    assert torch.allclose(layer(x), x @ layer.dense_weight().T, atol=1e-4)
print(cpu_linear.compiled(), cpu_linear.instructions(), *registry.names_in_use(layer))
sys.argv = ["tensorpress", "doctor"]
from tensorpress.cli.main import main
main()
"""


def test_without_compiled_code_the_reference_works_and_doctor_says_so():
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "300"},
    )
    assert ended.stdout.startswith("None None quantized_linear:reference"), ended.stderr
    assert "were not built" in ended.stdout


FORK = """
import os, torch
from tensorpress.kernels import cpu_linear, registry
from tensorpress.kernels.quantized_linear import QuantizedLinear
torch.set_num_threads(2)
cpu_linear.limit_threads(0)
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.semi_structured_linear import SemiStructuredLinear
index = torch.arange(256) // 64
layers = {
    f"{bits} bits": QuantizedLinear.from_integers(
        torch.randint(0, 1 << bits, (256, 200)), torch.full((4, 200), 2), torch.rand(4, 200), index, bits, 64, None
    )
    for bits in (2, 3, 4, 8)
}
sparse = torch.randn(200, 64, 4)
sparse[..., ::2] = 0
layers["2:4"] = SemiStructuredLinear.from_dense(sparse.flatten(1).bfloat16(), None)
layers["mpo"] = MPOLinear.from_low_rank(torch.randn(200, 9).bfloat16(), torch.randn(9, 256).bfloat16(), None)
x = torch.randn(5, 256).bfloat16()

def results():
    with torch.no_grad():
        return [
            backend.run(layer, x)
            for layer in layers.values()
            for name, backend in registry.backends(layer.operation).items()
            if name.startswith("cpu")
        ]

y = results()

def same():
    return all(torch.equal(a, b) for a, b in zip(results(), y, strict=True))

child = os.fork()
if child == 0:
    os._exit(0 if same() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same(), len(y))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_goes_on():
    ended = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["0", "True", "11"], ended.stderr


@pytest.mark.parametrize("bits", BITS)
def test_nothing_behind_the_end_is_read(level, bits, seed):
    """Every array, of the layer, packed, inputs and result, ends where a page begins that can be neither read nor written."""
    libc = ctypes.CDLL(None, use_errno=True)
    kept = []

    def at_the_end(tensor):
        page = mmap.PAGESIZE
        room = mmap.mmap(-1, (tensor.nbytes // page + 2) * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(room))
        size = len(room) - page
        assert libc.mprotect(ctypes.c_void_p(start + size), page, 0) == 0
        kept.append((room, start + size, page))
        view = torch.frombuffer(room, dtype=torch.uint8, count=size)[size - tensor.nbytes :].view(tensor.dtype)
        return view.view(tensor.shape).copy_(tensor)

    try:
        for inputs, group, symmetric, order in (
            (192, 64, True, False),
            (189, 64, False, False),
            (100, 32, False, True),
        ):
            layer = make(inputs, 21, group, bits, symmetric, order)
            plain = cpu_linear.Packed(layer)
            for name in ("qweight", "qzeros", "scales", "g_idx"):
                setattr(layer, name, at_the_end(getattr(layer, name)))
            packed = cpu_linear.Packed(layer)
            for name in ("data", "scale", "zero", "order", "bias"):
                if getattr(packed, name) is not None:
                    setattr(packed, name, at_the_end(getattr(packed, name)))
                    setattr(packed.weights, name, getattr(packed, name).data_ptr())
            for rows, dtype, mode in itertools.product((1, 6, 9), (torch.float32, torch.bfloat16), (0, 1)):
                x, y = at_the_end(torch.randn(rows, inputs).to(dtype)), at_the_end(torch.zeros(rows, 21, dtype=dtype))
                code, kind = cpu_linear.compiled(), cpu_linear.TYPES[dtype]
                where = ctypes.byref(packed.weights), x.data_ptr(), y.data_ptr()
                assert code.tp_product(*where, rows, inputs, 1, kind, mode, 2) == 0
                assert torch.equal(y, plain(x.clone(), mode))
                if rows % 3 == 0:
                    assert code.tp_product(*where, rows, 3 * inputs, 3, kind, mode, 2) == 0
                    each = plain(x.clone().view(-1, inputs, 3).transpose(1, 2).reshape(rows, inputs), mode)
                    assert torch.equal(y.view(-1, 21, 3).transpose(1, 2), each.view(-1, 3, 21))
    finally:
        for _, start, page in kept:
            libc.mprotect(ctypes.c_void_p(start), page, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", list(cpu_linear.MODES))
def test_many_rows(level, bits, mode, seed):
    """More than are worked on at once with weights that were expanded for them."""
    layer = make(192, 21, 64, bits, symmetric=False)
    x = torch.randn(150, 192)
    y = registry.backends("quantized_linear")[mode].run(layer, x)
    if mode == "cpu":
        close(y, oracle(layer, x), rounding(level, layer, x))
    each = torch.cat([registry.backends("quantized_linear")[mode].run(layer, row[None]) for row in x])
    close(y, each.double(), sizes(layer, x), 1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [1.0, -1.0, 61.0])
def test_the_largest_integers_and_inputs(level, bits, value, seed):
    """Sums are as large as they can be; 61 is a largest input whose quotient is no whole number in fp32."""
    largest = torch.full((128, 17), (1 << bits) - 1)
    layer = QuantizedLinear.from_integers(
        largest, torch.ones(1, 17), torch.ones(1, 17), torch.zeros(128), bits, 128, None
    )
    for rows in (1, 2, 5, 9):
        x = torch.full((rows, 128), value)
        for mode in cpu_linear.MODES:
            y = registry.backends("quantized_linear")[mode].run(layer, x)
            close(y, oracle(layer, x), oracle(layer, x).abs(), 2e-6)


@pytest.mark.parametrize("shape", [(2, 192), (4, 48), (96, 1), ()])
def test_inputs_of_another_width_are_refused(shape, seed):
    layer = make(96, 5, 32, 4)
    for mode in cpu_linear.MODES:
        with pytest.raises(ValueError, match="for a layer of 96"):
            registry.backends("quantized_linear")[mode].run(layer, torch.randn(shape))


def test_gradients_and_double_precision_go_through_the_reference(seed):
    layer = make(64, 8, 32, 4)
    layer.kernel = "cpu"
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dense_weight().sum(0).expand(2, 64), atol=1e-4)
    with torch.no_grad():
        close(layer(x.double()), oracle(layer, x), 1.0, 1e-4)


def test_a_layer_that_changes_is_packed_again(seed):
    layer, other = make(64, 8, 32, 4), make(64, 8, 32, 4)
    layer.kernel, x = "cpu", torch.randn(2, 64)
    with torch.no_grad():
        before = layer(x)
        layer.load_state_dict(other.state_dict())
        assert not torch.equal(layer(x), before) and torch.equal(
            layer(x), registry.backends("quantized_linear")["cpu"].run(other, x)
        )


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("level", ["0", "1", "2", "3", "4"])
def test_sanitizers_find_nothing(tmp_path_factory, level):
    program = tmp_path_factory.getbasetemp() / "sanitized"
    if not program.exists():
        flags = ["-std=c++17", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-w"]
        sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
        main = str(Path(__file__).parent / "sanitized.cpp")
        subprocess.run(["g++", *flags, f"-I{SOURCES}", *sources, main, "-o", str(program)], check=True, timeout=300)
    ended = subprocess.run([str(program), level], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and ended.stdout.startswith("calls"), ended.stderr[-2000:]
    if not ended.stdout.endswith(f" {cpu_linear.LEVELS[int(level)]}\n"):
        pytest.skip(f"this processor has no {cpu_linear.LEVELS[int(level)]}")


def test_small_products_are_not_worth_a_thread(seed):
    code, asked = cpu_linear.compiled(), []

    @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def pool(run, data, threads, _flags):
        asked.append(threads)
        run(data)  # one that takes all pieces

    layers = [make(inputs, outputs, 64, 4) for inputs, outputs in ((64, 64), (1024, 1024))]
    before = torch.get_num_threads()
    try:
        code.tp_use_pool(pool)
        for work, expected in ((0, [True, True]), (cpu_linear.WORTH_A_THREAD, [False, True])):
            cpu_linear.limit_threads(work)
            for layer, threads in zip(layers, expected, strict=True):
                asked.clear()
                x = torch.randn(3, layer.in_features)
                torch.set_num_threads(3)
                y = cpu_linear.packed(layer)(x, cpu_linear.MODES["cpu"])
                assert bool(asked) == threads and set(asked) <= {2, 3}
                wanted = oracle(layer, x)
                assert ((y - wanted).norm() / wanted.norm()) < 1e-4
    finally:
        torch.set_num_threads(before)
        code.tp_use_pool(cpu_linear._torch_threads())
