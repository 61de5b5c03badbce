"""The data that methods are calibrated on and trained with, cut from one text."""

from __future__ import annotations

from typing import Any

import torch

from tensorpress.errors import InputError, StepError
from tensorpress.text import NO_MARKS, Marks, random_windows, read_text, tokenise, windows

VALIDATION_SHARE = 0.1
"""Share of the calibration text, at its end, that is kept for guards and never trained on."""


def calibration_windows(
    key: dict[str, Any], tokenizer: Any, seed: int, marks: Marks = NO_MARKS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(windows, validation windows, training stream) of a calibration key; the validation text is in neither of the others.

    Windows are of the key's length with `marks` around their text; the stream has none.
    """
    where = "data.calibration"
    text = read_text(key["source"], key["split"], where)
    if text.digest != key["text"]:
        raise StepError(f"{where}: the text {key['source']} was changed after the run began")
    ids = tokenise(text, tokenizer)
    length = key["length"] - marks.count
    cut = len(ids) - max(length, int(len(ids) * VALIDATION_SHARE))
    if cut < length:
        raise InputError(f"{where}: the text has {len(ids)} tokens, fewer than two windows of {key['length']}")
    stream = ids[:cut]
    chosen = random_windows(stream, length, key["samples"], seed, where)
    return marks.around(chosen), marks.around(windows(ids[cut:], length, 32, where)), stream
