"""The data that measures are taken on: texts, read and cut into windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tensorpress.evaluators.base import EvaluationData
from tensorpress.text import NO_MARKS, Marks, read_text, tokenise, windows


def evaluation_data(
    spec: Mapping[str, Any], measures: Sequence[str], demo: bool, tokenizer: Any, marks: Marks = NO_MARKS
) -> EvaluationData:
    """Read and cut the texts of evaluation settings (`recipe.EvaluationSpec` as a mapping), as far as `measures` read them.

    Windows are of the settings' length with `marks` around their text.
    """
    if not set(measures) - {"size", "sts"}:  # neither reads a text
        data = EvaluationData(torch.zeros(0, spec["length"], dtype=torch.int64), 0, tokenizer, "none")
        data.pairs = Path(spec["pairs"]).expanduser() if spec["pairs"] else None
        return data
    text = read_text(spec["source"], spec["split"], "data.evaluation.source")
    ids = tokenise(text, tokenizer)
    length = spec["length"] - marks.count
    rows = windows(ids, length, spec["samples"], "data.evaluation")
    data = EvaluationData(marks.around(rows), _bytes(rows, tokenizer), tokenizer, text.name, demo=demo)
    if spec["other"]:
        other = read_text(spec["other"], "other", "data.evaluation.other")
        count = max(1, spec["samples"] // 4)
        rows = windows(tokenise(other, tokenizer), length, count, "data.evaluation.other")
        data.other_windows = marks.around(rows)
        data.other_bytes, data.other_name = _bytes(rows, tokenizer), other.name
    if spec["pairs"]:
        data.pairs = Path(spec["pairs"]).expanduser()
    return data


def _bytes(rows: torch.Tensor, tokenizer: Any) -> int:
    """UTF-8 bytes of the text that windows of ids decode to."""
    return len(tokenizer.decode(rows.flatten().tolist(), clean_up_tokenization_spaces=False).encode())
