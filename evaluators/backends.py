"""The speed of a causal model by every backend that can run it: prefill and decode at several batch sizes, in turns, beside its dense original."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tensorpress.evaluators.base import Progress, no_progress
from tensorpress.evaluators.reading import CompiledReader, Reader, TransformersReader, cache_bytes, compiled_reader
from tensorpress.evaluators.speed import resident_bytes
from tensorpress.kernels import cpu_linear, registry
from tensorpress.kernels.kernel_layer import KernelLayer, kernel_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLOW = ("unpacked", "dense", "reference")
"""Backends that are for measuring quality and not for serving: measured by name, or where there is no other."""


@dataclass
class Backend:
    """One way to run a model: kernels by name, through transformers or the compiled decoder."""

    name: str
    of: str
    """`model` or `original`."""
    model: PreTrainedModel
    reader: Reader
    batches: Sequence[int]

    def ready(self) -> None:
        """Let the model's layers use the kernel, without dropping what others keep."""
        for layer in kernel_layers(self.model):
            layer.kernel = self.name if self.name in registry.backends(layer.operation) else "auto"

    def weight_bytes(self, rows: int) -> int:
        """Bytes of linear layers that decoding a token of `rows` texts reads."""
        if isinstance(self.reader, CompiledReader):
            return self.reader.decoder.nbytes
        found = 0
        for module in self.model.modules():
            if isinstance(module, KernelLayer):
                found += module.read_bytes(rows)
            elif isinstance(module, (nn.Linear, Conv1D)):
                found += sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        return found

    def peak_bytes(self, batch: int, places: int) -> int:
        """Bytes of weights, the model's and what this backend keeps beside them, and of keys and values; activations are not counted."""
        layers = kernel_layers(self.model)
        own = resident_bytes(self.model) - sum(layer.kept_bytes() for layer in layers)
        if isinstance(self.reader, CompiledReader):
            return own + self.reader.kept_bytes
        return own + sum(layer.kept_bytes(_names(layer)) for layer in layers) + cache_bytes(self.model, batch, places)


def _names(layer: KernelLayer) -> set[str]:
    """The backends that compute a layer: the one that is named, or what was taken for sizes of batch."""
    backend = registry.named(layer.operation, layer)
    return {backend.name} if backend else set(layer.__dict__.get("taken", {}).values())


def backends_of(model: PreTrainedModel, of: str, kernels: str, batches: Sequence[int], places: int) -> list[Backend]:
    """What can run a model: every backend of its compressed layers, and the compiled decoder in both modes at batch 1.

    `kernels` other than `auto` leaves that backend alone.
    """
    layers = kernel_layers(model)
    found: dict[str, None] = {}
    for operation in registry.operations():
        of_it = [layer for layer in layers if layer.operation == operation]
        found |= {
            name: None
            for name, backend in registry.backends(operation).items()
            if of_it and all(map(backend.can_run, of_it)) and kernels in (name, "auto")
        }
    names = [name for name in found if name not in SLOW] or list(found) if layers else ["torch"]
    made = [Backend(name, of, model, TransformersReader(model), batches) for name in names]
    modes = list(cpu_linear.MODES) if layers else ["cpu"]  # bf16 is multiplied as it is in both
    for mode in modes if 1 in batches else []:
        reader = compiled_reader(model, mode, places) if kernels in ("auto", mode) else None
        if reader is not None:
            made.append(Backend(mode, of, model, reader, [1]))
    return made


def time_once(reader: Reader, prompts: torch.Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds to read prompts [rows, length], and to decode each of `new_tokens` greedily behind them."""
    wait = _waiter(prompts.device)
    reader.forget()
    began = time.perf_counter()
    tokens = reader.read(prompts).argmax(-1, keepdim=True)
    wait()
    moments = [time.perf_counter()]
    for _ in range(new_tokens):
        tokens = reader.read(tokens).argmax(-1, keepdim=True)
        wait()
        moments.append(time.perf_counter())
    reader.forget()
    return moments[0] - began, [after - before for before, after in pairwise(moments)]


def _waiter(device: torch.device) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def measure(
    backends: Sequence[Backend], prompts: torch.Tensor, new_tokens: int, repeats: int, progress: Progress = no_progress
) -> list[dict[str, Any]]:
    """A row for each backend and size of batch; `prompts` [rows, length] has as many rows as the largest batch.

    In a turn every backend runs once, `repeats` turns after one that warms up. Of a row: the rate of prefill in tokens/s by the median
    turn and milliseconds of the 50th and 90th percentile; the rate of decode (all texts of the batch together) and milliseconds a token
    likewise; GB/s of linear weights in decode, and their share of what the machine reads at, measured between the turns.
    """
    rows: list[dict[str, Any]] = []
    batches = sorted({batch for backend in backends for batch in backend.batches})
    turns = len(batches) * (repeats + 1)
    for place, batch in enumerate(batches):
        running = [backend for backend in backends if batch in backend.batches]
        seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in running]
        bandwidth: list[float] = []
        for turn in range(repeats + 1):
            for backend, (reads, decodes) in zip(running, seconds, strict=True):
                backend.ready()
                read, decode = time_once(backend.reader, prompts[:batch].to(backend.model.device), new_tokens)
                if turn:
                    reads.append(read)
                    decodes += decode
            if cpu_linear.compiled() is not None and prompts.device.type == "cpu":
                bandwidth.append(cpu_linear.read_bandwidth(128, 3))
            progress("bench", place * (repeats + 1) + turn + 1, turns)
        for backend, (reads, decodes) in zip(running, seconds, strict=True):
            backend.ready()
            rows.append(
                _row(
                    backend,
                    batch,
                    prompts.shape[1],
                    new_tokens,
                    (reads, decodes),
                    median(bandwidth) if bandwidth else None,
                )
            )
    return rows


def _row(
    backend: Backend,
    batch: int,
    length: int,
    new_tokens: int,
    seconds: tuple[list[float], list[float]],
    bandwidth: float | None,
) -> dict[str, Any]:
    reads, decodes = seconds
    rate = backend.weight_bytes(batch) / median(decodes)
    return {
        "of": backend.of,
        "backend": backend.name,
        "runner": backend.reader.runner,
        "kernels": backend.reader.kernels(),
        "batch": batch,
        "prefill_tokens_per_second": batch * length / median(reads),
        "prefill_ms_p50": 1e3 * median(reads),
        "prefill_ms_p90": 1e3 * _p90(reads),
        "decode_tokens_per_second": batch / median(decodes),
        "decode_ms_p50": 1e3 * median(decodes),
        "decode_ms_p90": 1e3 * _p90(decodes),
        "weight_gigabytes_per_second": rate / 1e9,
        "share_of_read_bandwidth": None if bandwidth is None else rate / bandwidth,
        "peak_memory_bytes": backend.peak_bytes(batch, length + new_tokens),
    }


def _p90(values: list[float]) -> float:
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]
