"""Evaluation data: windows of the held-out texts, as causal models and as encoders see them."""

import pytest

from tensorpress.evaluators.data import evaluation_data
from tensorpress.text import marks_of


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_windows_have_marks_for_encoders_and_bytes_do_not_count_them(tmp_path, make_marking_tokenizer, kind):
    for name in ("text", "other"):
        (tmp_path / name).write_text("abcdefghij" * 20)
    spec = {"source": str(tmp_path / "text"), "split": "test", "other": str(tmp_path / "other"), "pairs": None}
    tokenizer = make_marking_tokenizer()
    marks = marks_of(tokenizer, kind)
    data = evaluation_data({**spec, "length": 13, "samples": 4}, ["fidelity"], False, tokenizer, marks)
    plain = evaluation_data({**spec, "length": 13 - marks.count, "samples": 4}, ["fidelity"], False, tokenizer)
    assert data.windows.shape == (4, 13) and data.other_windows.shape == (1, 13)
    assert data.windows.tolist() == marks.around(plain.windows).tolist()
    assert data.other_windows.tolist() == marks.around(plain.other_windows).tolist()
    assert (data.text_bytes, data.other_bytes) == (plain.text_bytes, plain.other_bytes)
