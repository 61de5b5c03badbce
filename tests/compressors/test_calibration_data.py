"""Calibration data: windows, validation and stream of one text, and the marks that encoders see around each window."""

import pytest
import torch

from tensorpress.compressors.data import calibration_windows
from tensorpress.text import NO_MARKS, marks_of, read_text


@pytest.fixture
def key(tmp_path, seed):
    file = tmp_path / "text.txt"
    letters = torch.randint(97, 123, (1000,)).tolist()
    file.write_text("".join(map(chr, letters)))
    text = read_text(str(file), "train", "x")
    return {"source": str(file), "split": "train", "text": text.digest, "samples": 20, "length": 16}


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_windows_are_of_the_stream_and_validation_is_not(key, make_marking_tokenizer, seed, kind):
    tokenizer = make_marking_tokenizer()
    marks = marks_of(tokenizer, kind)
    chosen, validation, stream = calibration_windows(key, tokenizer, seed, marks)
    ids = torch.tensor(tokenizer(read_text(key["source"], "train", "x").content, add_special_tokens=False)["input_ids"])
    assert chosen.shape == (20, 16) and validation.shape[1] == 16
    assert torch.equal(stream, ids[: len(stream)]) and len(stream) == 900
    inner = slice(len(marks.before), 16 - len(marks.after))
    grid = [stream[start : start + 16 - marks.count].tolist() for start in range(0, len(stream), 16 - marks.count)]
    for row in chosen.tolist():
        assert row == [*marks.before, *row[inner], *marks.after] and row[inner] in grid
    held = validation[:, inner].flatten()
    assert torch.equal(held, ids[len(stream) : len(stream) + len(held)])
    assert (kind == "causal") == (marks == NO_MARKS)
