"""Distances between what two models give for the same tokens: logits of language models, last hidden states of encoders.

All take rows [tokens, width] and work through them in chunks, so that a vocabulary of 150,000 needs little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

CHUNK = 2**22
"""Numbers of one chunk: 16 MiB in float32."""


def row_chunks(rows: torch.Tensor) -> Iterator[slice]:
    """Slices over the rows [tokens, width] of at most `CHUNK` numbers each, and at least one row."""
    step = max(1, CHUNK // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


def jensen_shannon(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of two sets of logits [tokens, vocabulary] in nats: [tokens], between 0 and ln 2.

    0.5 KL(p || m) + 0.5 KL(q || m) with m = (p + q) / 2, summed over the vocabulary (Lin 1991).
    """
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return (0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1)).clamp(0, math.log(2))


def kullback_leibler(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) of two sets of logits [tokens, vocabulary] in nats: [tokens]."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def angular(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Angle between the rows, as a share of a half turn: [tokens], between 0 and 1.

    2 atan2(|a - b|, |a + b|) of the unit vectors (Kahan): exact also where arccos of the cosine has lost all digits.
    """
    a, b = torch.nn.functional.normalize(reference, dim=-1), torch.nn.functional.normalize(other, dim=-1)
    return torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) * (2 / math.pi)


def relative_norm(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """|other - reference| / |reference| of each row: [tokens], from 0."""
    return (other - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(torch.finfo(reference.dtype).tiny)


DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "js": jensen_shannon,
    "kl": kullback_leibler,
    "angular": angular,
    "norm": relative_norm,
}


def total_distance(name: str, reference: torch.Tensor, other: torch.Tensor) -> float:
    """Sum over the rows [tokens, width] of a distance of `DISTANCES`; at least in float32, summed in float64."""
    measure, exact = DISTANCES[name], _exact(reference)
    chunks = row_chunks(reference)
    return sum(measure(reference[c].to(exact), other[c].to(exact)).double().sum().item() for c in chunks)


class KLDivergence(torch.autograd.Function):
    """Sum over tokens of T^2 KL(teacher || student) at temperature T (Hinton et al. 2015), in nats: a scalar.

    `apply(student, teacher, T)` with logits [tokens, vocabulary]; the gradient, T (q - p), goes to the student only and is
    made chunk by chunk in the forward pass, so that no other tensor of this size is kept.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        exact = _exact(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for rows in row_chunks(student):
            q = (student[rows].to(exact) / temperature).log_softmax(-1)
            p = (teacher[rows].to(exact) / temperature).log_softmax(-1)
            weights = p.exp()
            total += (weights * (p - q)).sum(dtype=torch.float64)
            if gradient is not None:
                gradient[rows] = temperature * (q.exp() - weights)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return (temperature**2 * total).to(exact)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None


def _exact(rows: torch.Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)
