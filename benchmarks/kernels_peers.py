"""What `benchmarks/kernels.py` stands beside ours: dense bf16 and fp32, torch's int4pack, torchao where it is installed."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

GROUP = 128
ROOM = 256e6
"""Bytes of copies of a layer, so that none comes from a cache."""
DENSE, FLOATS, INT4PACK = "dense bf16", "dense fp32", "torch int4pack"
TORCHAO, TORCHAO_INT8 = "torchao int4", "torchao int4, int8 inputs"
PEERS = (DENSE, FLOATS, INT4PACK, TORCHAO, TORCHAO_INT8)
ABOUT_TORCHAO = "without torch.compile; int4 runs torch's int4pack; with int8 inputs its wheel multiplies dequantized weights (in 8-bit storage)"
Run = Callable[[torch.Tensor], torch.Tensor]


def copies(inputs: int, outputs: int, bits: float) -> int:
    """How many layers fill the room."""
    return max(2, round(ROOM / (inputs * outputs * bits / 8)))


def peers(inputs: int, outputs: int, all_of_them: bool) -> dict[str, list[Run]]:
    """Products of each peer's copies of a layer, by name."""
    made = {
        DENSE: dense(inputs, outputs, copies(inputs, outputs, 16), torch.bfloat16),
        FLOATS: dense(inputs, outputs, copies(inputs, outputs, 32), torch.float32),
        INT4PACK: int4pack(inputs, outputs, copies(inputs, outputs, 4)),
    }
    if torchao_version() is not None:
        made[TORCHAO] = torchao(inputs, outputs, copies(inputs, outputs, 4), int8=False)
        if all_of_them:  # one layer of 50 MB, which takes most of the time
            made[TORCHAO_INT8] = torchao(inputs, outputs, 1, int8=True)
    return made


def dense(inputs: int, outputs: int, count: int, dtype: torch.dtype) -> list[Run]:
    made = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(count)]
    return [lambda x, one=one: torch.nn.functional.linear(x.to(dtype), one) for one in made]  # type: ignore[misc]


def int4pack(inputs: int, outputs: int, count: int) -> list[Run]:
    integers = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 2)
    scales = torch.rand(inputs // GROUP, outputs, 2).bfloat16()
    made = [packed.clone() for _ in range(count)]
    return [lambda x, one=one: torch.ops.aten._weight_int4pack_mm_for_cpu(x, one, GROUP, scales) for one in made]  # type: ignore[misc]


def torchao_version() -> str | None:
    """The version of torchao that is installed; None where it is not."""
    return importlib.metadata.version("torchao") if importlib.util.find_spec("torchao") else None


def torchao(inputs: int, outputs: int, count: int, int8: bool) -> list[Run]:
    """A layer that torchao's `quantize_` quantized, and copies of it."""
    quantize, configs = _torchao()
    layer = nn.Sequential(nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16))
    quantize(layer, configs["int8" if int8 else "int4"])
    return [copy.deepcopy(layer) for _ in range(count)]


def _torchao() -> tuple[Any, dict[str, Any]]:
    """`quantize_` and its configs that run on x86: int4 weights alone, and with inputs rounded to 8 bits.

    Its own kernel for the second (`da8w4_linear_cpu`) is not in its wheel: it then multiplies dequantized numbers.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # about its kernels for GPUs
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    finally:
        logging.disable(before)
    return quantize_, {
        "int4": PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False),
        "int8": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP)),  # type: ignore[attr-defined]
    }
