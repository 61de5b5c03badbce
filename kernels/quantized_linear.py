"""Weight-only quantized linear layer in the GPTQ checkpoint layout, with its plain PyTorch reference.

Layout (in = K, out = N, groups G, b bits): `qweight` int32 [K*b/32, N] packed along K; `qzeros` int32 [G, N*b/32]
packed along N; `scales` fp16 [G, N]; `g_idx` int32 [K], the group of each input. A weight is (q - z) * scale.
Format `gptq` (version 1) stores z - 1, `gptq_v2` stores z.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tensorpress.kernels import cpu_linear, registry
from tensorpress.kernels.kernel_layer import Kept, KernelLayer
from tensorpress.kernels.origin import Origin
from tensorpress.kernels.packing import pack, packed_rows, unpack

BITS = (2, 3, 4, 8)


def dequantize(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int, zero_offset: int
) -> torch.Tensor:
    """Weights [K, N] in fp32 from the packed layout; `zero_offset` is 1 for format `gptq`, 0 for `gptq_v2`."""
    values = unpack(qweight, bits, g_idx.shape[0])
    zeros = unpack(qzeros.T.contiguous(), bits, scales.shape[1]).T + zero_offset
    size = g_idx.shape[0] // scales.shape[0]
    even = (
        size * scales.shape[0] == g_idx.shape[0] and not torch.compiler.is_compiling()
    )  # a graph cannot ask for values
    if even and torch.equal(g_idx, torch.arange(len(g_idx), device=g_idx.device) // size):
        grouped = values.view(scales.shape[0], size, -1)
        return ((grouped - zeros[:, None]).float() * scales.float()[:, None]).view(values.shape)
    groups = g_idx.long()
    return (values - zeros[groups]).float() * scales.float()[groups]


class QuantizedLinear(KernelLayer):
    """y = x W^T + b with W stored in 2, 3, 4 or 8 bits; inputs [..., K], outputs [..., N]."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None
    operation = "quantized_linear"
    fields = ("in_features", "out_features", "bits", "group_size", "zero_offset", "bias")
    judged_by = "unpacked"

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int, *, bias: bool, zero_offset: int = 1
    ):
        super().__init__()
        if bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, not {bits}")
        self.in_features, self.out_features, self.bits, self.zero_offset = in_features, out_features, bits, zero_offset
        self.group_size = in_features if group_size == -1 else group_size
        groups = -(-in_features // self.group_size)
        self.register_buffer("qweight", torch.zeros(packed_rows(in_features, bits), out_features, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, packed_rows(out_features, bits), dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        of = torch.arange(groups, dtype=torch.int32)[:, None].expand(groups, self.group_size)
        self.register_buffer("g_idx", of.reshape(-1)[:in_features].clone())
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.kernel = "reference"
        """What computes it; `auto` in a model that was opened from a folder."""
        self.unpacked: tuple[Origin, torch.Tensor] | None = None
        """What the kernel `unpacked` keeps: what it was made of, and the dense weight."""
        self.packed: Any = None
        """What the compiled kernels keep: the weights in their own layout."""

    @classmethod
    def from_integers(
        cls,
        values: torch.Tensor,
        zeros: torch.Tensor,
        scales: torch.Tensor,
        g_idx: torch.Tensor,
        bits: int,
        group_size: int,
        bias: torch.Tensor | None,
        zero_offset: int = 1,
    ) -> QuantizedLinear:
        """Pack integers [K, N], zeros [G, N], scales [G, N] and the group of each input [K]."""
        inputs, outputs = values.shape
        layer = cls(inputs, outputs, bits, group_size, bias=bias is not None, zero_offset=zero_offset)
        layer.qweight = pack(values, bits)
        layer.qzeros = pack((zeros - zero_offset).T.contiguous(), bits).T.contiguous()
        layer.scales = scales.to(torch.float16)
        layer.g_idx = g_idx.to(torch.int32)
        layer.bias = None if bias is None else bias.detach().clone()
        return layer

    def dense_weight(self) -> torch.Tensor:
        """The weight [N, K] that the integers stand for, in fp32."""
        return dequantize(self.qweight, self.qzeros, self.scales, self.g_idx, self.bits, self.zero_offset).T

    def parameter_count(self) -> int:
        """Weights that the integers stand for, and biases."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.bias.numel())

    def check(self) -> None:
        """Refuse inputs that belong to no group. Raises ValueError."""
        cpu_linear.check_groups(self)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Move with the model, but keep the scales in fp16 when the model changes its dtype; what kernels keep is made anew."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float16:
            self.scales = scales.to(self.scales.device)
        return self

    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form: the entry of the loading plug-in."""
        return {
            "form": "gptq",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_offset": self.zero_offset,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> QuantizedLinear:
        layer = cls(
            spec["in_features"],
            spec["out_features"],
            spec["bits"],
            spec["group_size"],
            bias=spec["bias"],
            zero_offset=spec["zero_offset"],
        )
        layer.kernel = "auto"
        return layer

    def stored(self) -> list[torch.Tensor]:
        tensors = [self.qweight, self.qzeros, self.scales, self.g_idx]
        return tensors if self.bias is None else [*tensors, self.bias]

    def place(self, tensors: Sequence[torch.Tensor]) -> None:
        self.qweight, self.qzeros, self.scales, self.g_idx, *bias = tensors
        self.bias = bias[0] if bias else None

    def kept(self, names: Collection[str] | None = None) -> Iterator[Kept]:
        if self.packed is not None and (names is None or any(name in cpu_linear.MODES for name in names)):
            yield self.packed
        if self.unpacked is not None and (names is None or "unpacked" in names):
            yield self.unpacked[1]

    def release_own(self, names: Collection[str]) -> None:
        if not any(name in cpu_linear.MODES for name in names):
            self.packed = None
        if "unpacked" not in names:
            self.unpacked = None

    def kernel_key(self) -> str:
        """What the speed of its kernels depends on."""
        return f"{self.in_features}x{self.out_features}, {self.bits} bits, groups of {self.group_size}"

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


def quantized_linear_reference(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """Dequantize, then multiply: the oracle, in the dtype of the input."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return nn.functional.linear(x, layer.dense_weight().to(x.dtype), bias)


def quantized_linear_unpacked(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """The reference with the dequantized weight kept in memory: the same numbers, faster, at the memory of a dense layer."""
    kept, stored = layer.unpacked, layer.stored()
    if kept is None or not kept[0].holds(stored) or kept[1].dtype != x.dtype or kept[1].device != x.device:
        kept = layer.unpacked = (Origin(stored), layer.dense_weight().to(x.dtype).contiguous())
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return nn.functional.linear(x, kept[1], bias)


def quantized_linear_triton(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """By Triton on a GPU, from the layout as it is stored; by the reference where gradients or another precision are asked for."""
    if x.dtype not in cpu_linear.TYPES or (torch.is_grad_enabled() and x.requires_grad):
        return quantized_linear_reference(layer, x)
    from tensorpress.kernels import triton_linear

    return triton_linear.quantized_linear(layer, x)


def _dense_room(layer: QuantizedLinear) -> int:
    """Integers, weights and their products on the way to the dense weight."""
    return 12 * layer.in_features * layer.out_features


def _packed_room(layer: QuantizedLinear) -> int:
    """The weights in the compiled code's own layout, groups padded to 32 inputs."""
    groups, padded = layer.scales.shape[0], -(-layer.group_size // 32) * 32
    return groups * padded * layer.out_features * layer.bits // 8


# `auto` takes neither what rounds the inputs nor what keeps the dense weight.
registry.register("quantized_linear", "cpu", partial(cpu_linear.run, "cpu"), cpu_linear.can_run, room=_packed_room)
registry.register(
    "quantized_linear", "cpu_int8", partial(cpu_linear.run, "cpu_int8"), cpu_linear.can_run, automatic=False
)
registry.register(
    "quantized_linear",
    "triton",
    quantized_linear_triton,
    lambda layer: registry.triton_runs(layer.qweight),
    automatic=torch.cuda.is_available(),
)
registry.register("quantized_linear", "unpacked", quantized_linear_unpacked, automatic=False)
registry.register("quantized_linear", "reference", quantized_linear_reference, room=_dense_room)
