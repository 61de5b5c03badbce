"""How near a compressed model stays to its original: distributions of the next token, or sentence embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from tensorpress.evaluators.base import EvaluationData, Evaluator, Measurement, Progress, Subject, no_progress
from tensorpress.evaluators.perplexity import batches, check_window, row_chunks
from tensorpress.structure import model_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def divergence(
    original: PreTrainedModel, model: PreTrainedModel, windows: torch.Tensor, progress: Progress = no_progress
) -> tuple[float, float]:
    """KL(original || model) in nats and the share of equal argmaxes, means over all positions of windows [n, length].

    In float32, sums in float64. A NaN among the logits reaches the divergence; a token that the original gives
    probability and the model none makes it infinite.
    """
    vocabulary = model.config.get_text_config().vocab_size
    total, agreed, done = 0.0, 0, 0
    for batch in batches(windows, vocabulary):
        target = original(input_ids=batch.to(original.device), use_cache=False).logits.flatten(0, 1).to(model.device)
        logits = model(input_ids=batch.to(model.device), use_cache=False).logits.flatten(0, 1)
        for rows in row_chunks(len(logits), logits.shape[1], copies=6):
            log_p = functional.log_softmax(target[rows].float(), dim=-1)
            log_q = functional.log_softmax(logits[rows].float(), dim=-1)
            p = log_p.exp()
            terms = torch.where(p == 0, 0.0, p * (log_p - log_q))  # 0 log 0 = 0
            total += float(terms.sum(-1).double().sum())
            agreed += int((target[rows].argmax(-1) == logits[rows].argmax(-1)).sum())
        done += len(batch)
        progress("fidelity", done, len(windows))
    return total / windows.numel(), agreed / windows.numel()


@torch.no_grad()
def mean_pooled(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the last hidden states over the tokens that `mask` keeps: ids and mask [b, length] -> float32 [b, hidden]."""
    ids, mask = ids.to(model.device), mask.to(model.device)
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    weights = mask.unsqueeze(-1).float()
    return (hidden * weights).sum(1) / weights.sum(1)


def embedding_cosine(
    original: PreTrainedModel, model: PreTrainedModel, windows: torch.Tensor, progress: Progress = no_progress
) -> float:
    """Mean cosine between the mean-pooled last hidden states of two encoders on windows [n, length]."""
    total, done = 0.0, 0
    for batch in batches(windows, 1):
        mask = torch.ones_like(batch)
        target = mean_pooled(original, batch, mask).to(model.device)
        total += float(functional.cosine_similarity(target, mean_pooled(model, batch, mask)).double().sum())
        done += len(batch)
        progress("fidelity", done, len(windows))
    return total / len(windows)


class Fidelity(Evaluator):
    """`kl_divergence` and `top1_agreement` of causal models, `embedding_cosine` of encoders.

    On the first windows that hold at most `TOKENS` tokens. The original is its own measure: exactly 0 and 1.
    """

    name = "fidelity"
    gives = (
        "kl_divergence",
        "top1_agreement",
        "embedding_cosine",
    )
    kinds = ("causal", "encoder")
    TOKENS = 16_384

    def evaluate(self, subject: Subject, data: EvaluationData, progress: Progress = no_progress) -> Measurement:
        """Measure. Raises InputError where the windows are longer than what the model takes."""
        check_window(subject.model, data.windows.shape[1])
        windows = data.windows[: max(1, self.TOKENS // data.windows.shape[1])]
        conditions = {"fidelity_tokens": windows.numel(), "fidelity_dataset": data.name}
        if model_kind(subject.model) == "encoder":
            cosine = 1.0
            if not subject.is_original:
                cosine = embedding_cosine(subject.original(), subject.model, windows, progress)
            return Measurement({"embedding_cosine": cosine}, conditions)
        kl, agreement = 0.0, 1.0
        if not subject.is_original:
            kl, agreement = divergence(subject.original(), subject.model, windows, progress)
        return Measurement({"kl_divergence": kl, "top1_agreement": agreement}, conditions)
