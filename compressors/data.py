"""The data that methods are calibrated on and trained with, cut from one text."""

from __future__ import annotations

from typing import Any

import torch

from tensorpress.errors import InputError, StepError
from tensorpress.text import random_windows, read_text, tokenise, windows

VALIDATION_SHARE = 0.1
"""Share of the calibration text, at its end, that is kept for guards and never trained on."""


def calibration_windows(
    key: dict[str, Any], tokenizer: Any, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(windows, validation windows, training stream) of a calibration key; the validation text is in neither of the others."""
    where = "data.calibration"
    text = read_text(key["source"], key["split"], where)
    if text.digest != key["text"]:
        raise StepError(f"{where}: the text {key['source']} was changed after the run began")
    ids = tokenise(text, tokenizer)
    cut = len(ids) - max(key["length"], int(len(ids) * VALIDATION_SHARE))
    if cut < key["length"]:
        raise InputError(f"{where}: the text has {len(ids)} tokens, fewer than two windows of {key['length']}")
    stream = ids[:cut]
    chosen = random_windows(stream, key["length"], key["samples"], seed, where)
    return chosen, windows(ids[cut:], key["length"], 32, where), stream
