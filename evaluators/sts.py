"""Semantic textual similarity: do a sentence encoder's cosines rank pairs of sentences as people do?"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from tensorpress.errors import InputError
from tensorpress.evaluators.base import EvaluationData, Evaluator, Measurement, Progress, Subject, no_progress
from tensorpress.evaluators.fidelity import mean_pooled
from tensorpress.text import check_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLUMNS = ("score", "sentence1", "sentence2")
BENCHMARK = (4, 5, 6)
"""Where they stand in the STS benchmark's own files: tabs, no header, no quotes."""


def read_pairs(path: Path) -> tuple[list[float], list[str], list[str]]:
    """Scores and the two sentences of each pair, from a CSV with the columns score, sentence1 and sentence2 (any case).

    Separated by commas or by tabs (then without quotes), or in the layout of the STS benchmark. Raises InputError.
    """
    try:
        check_plain(path, "data.evaluation.pairs")
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise InputError(f"data.evaluation.pairs: {path}: {reason}") from None
    tabs = "\t" in content.partition("\n")[0]
    quoting: Any = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    rows = csv.reader(io.StringIO(content, newline=""), delimiter="\t" if tabs else ",", quoting=quoting)
    first = next(rows, [])
    names = [cell.strip().lower() for cell in first]
    places: tuple[int, ...] = BENCHMARK
    if all(column in names for column in COLUMNS):
        places = tuple(names.index(column) for column in COLUMNS)
    elif tabs and len(first) > max(BENCHMARK) and _number(first[BENCHMARK[0]]) is not None:
        rows = csv.reader(io.StringIO(content, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        missing = [column for column in COLUMNS if column not in names]
        found = ", ".join(cell.strip()[:30] for cell in first) or "nothing"
        raise InputError(
            f"data.evaluation.pairs: {path}: has no column {', '.join(missing)}; its first line has: {found}"
        )
    pairs: list[tuple[float, str, str]] = []
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        score = _number(row[places[0]]) if len(row) > max(places) else None
        if score is None:
            raise InputError(f"data.evaluation.pairs: {path}: line {rows.line_num} has no score and two sentences")
        pairs.append((score, row[places[1]], row[places[2]]))
    if len(pairs) < 2:
        raise InputError(f"data.evaluation.pairs: {path}: has {len(pairs)} pairs; a rank correlation needs two")
    return [p[0] for p in pairs], [p[1] for p in pairs], [p[2] for p in pairs]


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def embed(
    model: PreTrainedModel,
    tokenizer: Any,
    sentences: list[str],
    length: int,
    batch: int,
    progress: Progress = no_progress,
) -> torch.Tensor:
    """Mean-pooled embeddings float32 [sentences, hidden], on the CPU; sentences are cut after `length` tokens.

    Sentences of like length share a batch, so that little is padded.
    """
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    parts = []
    for start in range(0, len(order), batch):
        texts = [sentences[i] for i in order[start : start + batch]]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        parts.append(mean_pooled(model, encoded["input_ids"], encoded["attention_mask"]).cpu())
        progress("sts", min(start + batch, len(order)), len(order))
    return torch.cat(parts)[torch.tensor(order).argsort()]


class STS(Evaluator):
    """`sts_spearman`: Spearman's rank correlation between cosines and scores, times 100."""

    name = "sts"
    gives = ("sts_spearman",)
    kinds = ("encoder",)
    LENGTH, BATCH = 64, 64

    def evaluate(self, subject: Subject, data: EvaluationData, progress: Progress = no_progress) -> Measurement:
        """Measure. Raises InputError where there are no pairs or they cannot be read."""
        if data.pairs is None:
            raise InputError(
                "evaluate: sts needs data.evaluation.pairs: a CSV with the columns score, sentence1, sentence2"
            )
        from scipy.stats import spearmanr  # a third of a second that only this measure is to pay

        scores, left, right = read_pairs(data.pairs)
        vectors = embed(subject.model, data.tokenizer, left + right, self.LENGTH, self.BATCH, progress)
        cosines = functional.cosine_similarity(vectors[: len(left)], vectors[len(left) :])
        correlation: Any = spearmanr(cosines.double().numpy(), scores)
        return Measurement(
            {"sts_spearman": 100 * float(correlation.statistic)},
            {"pairs": len(scores), "pairs_file": data.pairs.name, "sts_pooling": "mean", "sts_tokens": self.LENGTH},
        )
