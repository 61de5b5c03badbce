"""Prefill and decode speed, the model and its dense original in turns on the same machine."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensorpress.evaluators.base import EvaluationData, Evaluator, Measurement, Progress, Subject, no_progress
from tensorpress.evaluators.generation import step
from tensorpress.evaluators.perplexity import position_limit
from tensorpress.kernels import registry
from tensorpress.kernels.kernel_layer import kernel_layers
from tensorpress.kernels.measured import device_name
from tensorpress.structure import model_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def time_once(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to read a prompt [1, length], and to decode `new_tokens` greedily after it (0 tokens: an encoder's pass)."""
    prompt = prompt.to(model.device)
    start = _now(model.device)
    if new_tokens == 0:
        model(input_ids=prompt)
        return _now(model.device) - start, 0.0
    token, cache = step(model, prompt)
    read = _now(model.device)
    for _ in range(new_tokens):
        token, cache = step(model, token, cache)
    return read - start, _now(model.device) - read


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once, and of what its kernels keep beside them."""
    kept = sum(layer.kept_bytes() for layer in kernel_layers(model))
    return kept + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def peak_bytes(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> int:
    """Bytes of the weights; on a GPU also what a run (which it makes) allocates on top of what is there already."""
    if model.device.type != "cuda":
        time_once(model, prompt, new_tokens)
        return resident_bytes(model)
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    time_once(model, prompt, new_tokens)
    return resident_bytes(model) + torch.cuda.max_memory_allocated(model.device) - before


class Speed(Evaluator):
    """Tokens a second of prefill and decode at batch 1, medians, and how they compare with the dense original.

    Model and original run in turns (A B A B), so that a change of the machine's pace meets both. After one warm-up run of
    each, `repeats` are made, or fewer (at least `FEWEST`) once a model has run for `budget` seconds. Encoders have no
    decode.
    """

    name = "speed"
    gives = (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "prefill_speedup",
        "decode_speedup",
        "peak_memory_bytes",
        "original_prefill_tokens_per_second",
        "original_decode_tokens_per_second",
    )
    kinds = ("causal", "encoder")
    timed = True
    PROMPT_TOKENS, NEW_TOKENS = 128, 32
    REPEATS, FEWEST, BUDGET = 5, 3, 4.0

    def __init__(
        self,
        prompt_tokens: int | None = None,
        new_tokens: int | None = None,
        repeats: int | None = None,
        budget: float | None = None,
    ):
        """Take the class's own figures where none are given."""
        self.prompt_tokens = self.PROMPT_TOKENS if prompt_tokens is None else prompt_tokens
        self.new_tokens = self.NEW_TOKENS if new_tokens is None else new_tokens
        self.repeats = self.REPEATS if repeats is None else repeats
        self.budget = self.BUDGET if budget is None else budget

    def evaluate(self, subject: Subject, data: EvaluationData, progress: Progress = no_progress) -> Measurement:
        model = subject.model
        limit = position_limit(model)
        new_tokens = min(self.new_tokens, limit // 2) if model_kind(model) == "causal" else 0
        prompt = data.windows.flatten()[: min(self.prompt_tokens, limit - new_tokens)].unsqueeze(0)
        models = [model] if subject.is_original else [model, subject.original()]
        peak = peak_bytes(model, prompt, new_tokens)  # the model's warm-up
        runs = self._runs(models, prompt, new_tokens, progress)
        metrics = {"peak_memory_bytes": float(peak)}
        metrics |= _metrics("prefill", prompt.shape[1], [[seconds for seconds, _ in times] for times in runs])
        if new_tokens:
            metrics |= _metrics("decode", new_tokens, [[seconds for _, seconds in times] for times in runs])
        return Measurement(metrics, self._conditions(models, prompt, new_tokens, len(runs[0])))

    def _runs(
        self, models: list[PreTrainedModel], prompt: torch.Tensor, new_tokens: int, progress: Progress
    ) -> list[list[tuple[float, float]]]:
        """Seconds (prefill, decode) of each repeat, for each model."""
        for other in models[1:]:
            time_once(other, prompt, new_tokens)
        runs: list[list[tuple[float, float]]] = [[] for _ in models]
        for repeat in range(self.repeats):
            slowest = max(sum(map(sum, times)) for times in runs)
            if repeat >= self.FEWEST and slowest > self.budget:
                break
            for model, times in zip(models, runs, strict=True):
                times.append(time_once(model, prompt, new_tokens))
            progress("speed", repeat + 1, self.repeats)
        return runs

    def _conditions(
        self, models: list[PreTrainedModel], prompt: torch.Tensor, new_tokens: int, repeats: int
    ) -> dict[str, Any]:
        model, original = models[0], models[-1]
        on_gpu = model.device.type == "cuda"
        return {
            "kernels": registry.names_in_use(model),
            "original_kernels": registry.names_in_use(original),
            "device": device_name(model.device),
            "threads": torch.get_num_threads(),
            "speed_dtype": str(model.dtype).removeprefix("torch."),
            "original_dtype": str(original.dtype).removeprefix("torch."),
            "batch": 1,
            "prompt_tokens": prompt.shape[1],
            "decode_tokens": new_tokens,
            "repeats": repeats,
            "peak_memory": "weights, cache and activations on the GPU"
            if on_gpu
            else "weights resident (parameters, buffers, what kernels keep)",
        }


def _metrics(phase: str, tokens: int, seconds: list[list[float]]) -> dict[str, float]:
    """Rates of the model (first) and the original (last), and their ratio; the original alone has a speedup of 1."""
    rates = [tokens / median(times) for times in seconds]
    return {
        f"{phase}_tokens_per_second": rates[0],
        f"original_{phase}_tokens_per_second": rates[-1],
        f"{phase}_speedup": rates[0] / rates[-1],
    }
