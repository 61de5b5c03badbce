"""Perplexity and bits per byte on held-out text, in windows without overlap."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from tensorpress.errors import InputError
from tensorpress.evaluators.base import EvaluationData, Evaluator, Measurement, Progress, Subject, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_PER_FORWARD = 4096
LOGITS_BYTES = 256 << 20
"""Largest block of float32 logits that one forward pass is let make, unless a single window makes more."""
SCRATCH_BYTES = 64 << 20
"""Memory for what is computed from the logits."""


def position_limit(model: PreTrainedModel) -> int:
    """Most tokens that the model takes at once; very many where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_window(model: PreTrainedModel, length: int) -> None:
    """Refuse windows of more tokens than the model has positions for. Raises InputError."""
    limit = position_limit(model)
    if length > limit:
        raise InputError(
            f"data.evaluation.length: windows of {length} tokens; {type(model).__name__} takes {limit} at most"
        )


def batches(windows: torch.Tensor, vocabulary: int) -> Iterator[torch.Tensor]:
    """Cut windows [n, length] into batches [b, length] of about 4096 tokens, fewer where the vocabulary is large."""
    tokens = min(TOKENS_PER_FORWARD, LOGITS_BYTES // (4 * vocabulary))
    yield from windows.split(max(1, tokens // windows.shape[1]))


def row_chunks(rows: int, vocabulary: int, copies: int) -> Iterator[slice]:
    """Slices of `rows` rows of logits such that `copies` float32 copies of one stay within the scratch memory."""
    step = max(1, SCRATCH_BYTES // (4 * vocabulary * copies))
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@torch.no_grad()
def nll(model: PreTrainedModel, windows: torch.Tensor, progress: Progress = no_progress) -> tuple[float, int]:
    """Negative log-likelihood of the windows [n, length]: (total in nats, tokens scored).

    The first token of each window has no context and is not scored. Log-softmax in float32, sums in float64; a NaN or
    infinity among the logits reaches the result. Raises ValueError when there is no token to score.
    """
    count, length = windows.shape
    if count == 0 or length < 2:
        raise ValueError(f"windows of shape {list(windows.shape)} have no token with a context")
    vocabulary = model.config.get_text_config().vocab_size
    total, done = 0.0, 0
    for batch in batches(windows, vocabulary):
        ids = batch.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)  # [b * length, vocabulary]
        targets = ids.roll(-1, dims=1)
        scored = torch.ones_like(ids, dtype=torch.bool)
        scored[:, -1] = False
        for rows in row_chunks(len(logits), logits.shape[1], copies=2):
            losses = functional.cross_entropy(logits[rows].float(), targets.flatten()[rows], reduction="none")
            total += float(losses[scored.flatten()[rows]].double().sum())
        done += len(batch)
        progress("perplexity", done, count)
    return total, count * (length - 1)


def perplexity(nats: float, tokens: int) -> float:
    """exp(nats / tokens); infinity where a float cannot hold it."""
    mean = nats / tokens
    return math.inf if mean > 709 else math.exp(mean)


def bits_per_byte(nats: float, windows: torch.Tensor, text_bytes: int) -> float:
    """Bits for each byte of the scored tokens.

    All windows hold `text_bytes` bytes; the scored tokens' share of them is taken to be their share of the tokens.
    """
    _, length = windows.shape
    return nats / math.log(2) / (text_bytes * (length - 1) / length)


class Perplexity(Evaluator):
    """`perplexity` and `bits_per_byte`, and both with `_other` on the text of another domain."""

    name = "perplexity"
    gives = (
        "perplexity",
        "perplexity_ratio",
        "bits_per_byte",
        "perplexity_other",
        "perplexity_ratio_other",
        "bits_per_byte_other",
    )

    def evaluate(self, subject: Subject, data: EvaluationData, progress: Progress = no_progress) -> Measurement:
        """Measure the model alone; `catalog.relative_metrics` sets it beside the original.

        Raises InputError where the windows are longer than what the model takes.
        """
        check_window(subject.model, data.windows.shape[1])
        nats, tokens = nll(subject.model, data.windows, progress)
        result = Measurement(
            {
                "perplexity": perplexity(nats, tokens),
                "bits_per_byte": bits_per_byte(nats, data.windows, data.text_bytes),
            },
            {
                "dataset": data.name,
                "tokens": tokens,
                "window": data.windows.shape[1],
                "dtype": str(subject.model.dtype).removeprefix("torch."),
            },
        )
        if data.other_windows is not None:
            nats, tokens = nll(subject.model, data.other_windows, progress)
            result.metrics["perplexity_other"] = perplexity(nats, tokens)
            result.metrics["bits_per_byte_other"] = bits_per_byte(nats, data.other_windows, data.other_bytes)
            result.conditions |= {"dataset_other": data.other_name, "tokens_other": tokens}
        return result
