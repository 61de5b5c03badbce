"""Texts and their windows; digests that are the same on any machine and change with any byte."""

import hashlib

import pytest
import torch

from tensorpress import digest
from tensorpress.errors import InputError, nearest
from tensorpress.text import NO_MARKS, Text, marks_of, random_windows, read_text, tokenise, windows


def test_windows_do_not_overlap_and_keep_the_order(seed):
    ids = torch.arange(103)
    found = windows(ids, 10, None, "x")
    assert torch.equal(found.flatten(), ids[:100]) and found.shape == (10, 10)
    assert torch.equal(windows(ids, 10, 3, "x"), found[:3]) and len(windows(ids, 10, 99, "x")) == 10
    assert windows(ids, 103, None, "x").shape == (1, 103)


def test_random_windows_are_drawn_once_each_and_alike_for_a_seed(seed):
    ids = torch.arange(100)
    first = random_windows(ids, 7, 9, seed, "x")
    assert torch.equal(first, random_windows(ids, 7, 9, seed, "x")) and first.shape == (9, 7)
    starts = first[:, 0].tolist()
    assert len(set(starts)) == 9 and all(start % 7 == 0 for start in starts)
    assert all(torch.equal(row, torch.arange(row[0], row[0] + 7)) for row in first)
    whole = random_windows(ids, 7, 1000, seed, "x")
    assert sorted(whole[:, 0].tolist()) == list(range(0, 98, 7))
    assert any(not torch.equal(first, random_windows(ids, 7, 9, seed + k, "x")) for k in range(1, 5))


def test_too_short(one_line):
    for cut in (windows, lambda *a: random_windows(*a[:2], 3, 0, a[3])):
        with pytest.raises(InputError) as caught:
            cut(torch.arange(9), 10, None, "data.calibration")
        one_line(caught, "data.calibration: the text has 9 tokens, fewer than one window of 10")


def test_files(tmp_path, one_line):
    path = tmp_path / "a.txt"
    path.write_bytes("Zürich\r\nzwei".encode())
    text = read_text(str(path), "train", "x")
    assert text.content == "Zürich\nzwei" and text.name == "a.txt"
    path.write_bytes(b"Zurich\nzwei")
    assert read_text(str(path), "train", "x").digest != text.digest
    cases = {"none": "no such file", "": "is a folder", "latin.txt": "cannot be read as UTF-8", "empty.txt": "is empty"}
    (tmp_path / "latin.txt").write_bytes(b"Z\xfcrich")
    (tmp_path / "empty.txt").write_text(" \n\t")
    for name, part in cases.items():
        with pytest.raises(InputError) as caught:
            read_text(str(tmp_path / name), "train", "data.calibration.source")
        one_line(caught, "data.calibration.source: ", part)
    for source in ("~nobody-has-this-name/x", "a\0b", "x" * 5000):
        with pytest.raises(InputError) as caught:
            read_text(source, "train", "x")
        assert len(caught.value.problems) == 1


def test_tokens_have_no_special_ones(make_tokenizer):
    ids = tokenise(Text("t", "abcba"), make_tokenizer())
    assert ids.dtype == torch.int64 and ids.tolist() == [2, 3, 4, 3, 2]


def test_encoders_have_the_marks_of_their_tokenizer(make_tokenizer, make_marking_tokenizer):
    tokenizer = make_marking_tokenizer()
    marks = marks_of(tokenizer, "encoder")
    assert tokenizer("ab")["input_ids"] == [*marks.before, 2, 3, *marks.after]
    assert (len(marks.before), len(marks.after), marks.count) == (1, 2, 3)
    assert marks_of(tokenizer, "causal") == marks_of(make_tokenizer(), "encoder") == NO_MARKS
    rows = torch.arange(6).view(2, 3)
    found = marks.around(rows)
    assert found.tolist() == [[*marks.before, *row, *marks.after] for row in rows.tolist()]
    assert torch.equal(NO_MARKS.around(rows), rows)


def test_json_digest_is_canonical():
    assert digest.of_json({"b": 1, "a": [1.5, None, "ü"]}) == digest.of_json({"a": [1.5, None, "ü"], "b": 1})
    expected = hashlib.sha256(b'{"a":[1.5,null,"\\u00fc"],"b":1}').hexdigest()
    assert digest.of_json({"b": 1, "a": [1.5, None, "ü"]}) == expected
    assert len({digest.of_json(value) for value in (1, "1", [1], {"1": 1}, None, True)}) == 6


def test_file_digests(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", 7)
    data = bytes(range(256)) * 3
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(b"")
    assert digest.of_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    paths = [tmp_path / "a", tmp_path / "b"]
    whole = digest.of_files(paths, tmp_path)
    assert whole == digest.of_files(paths[::-1], tmp_path) != digest.of_files(paths[:1], tmp_path)
    (tmp_path / "b").rename(tmp_path / "c")
    assert digest.of_files([tmp_path / "a", tmp_path / "c"], tmp_path) != whole


def test_code_digest_follows_the_code_of_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "sub" / "b.py").write_text("y = 1")
    (tmp_path / "notes.md").write_text("n")
    before = digest.of_code(tmp_path)
    (tmp_path / "sub" / "b.py").write_text("y = 2")
    (tmp_path / "notes.md").write_text("m")
    assert digest.of_code(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2")
    assert digest.of_code(tmp_path) != before == before
    assert digest.of_code(tmp_path, tmp_path / "sub" / "b.py") != digest.of_code(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"), [("gpqt", " (did you mean gptq?)"), ("zzz", ""), ("", ""), ("mop", " (did you mean mpo?)")]
)
def test_nearest(name, hint):
    assert nearest(name, ["gptq", "mpo", "finercut"]) == hint


def test_input_error_keeps_its_problems():
    error = InputError("one", "two")
    assert error.problems == ("one", "two") and str(error) == "one\ntwo"


def test_overlap_and_length_of_texts():
    from tensorpress.text import has_tokens, overlap

    def letters(content, **settings):
        return {"input_ids": [1] * (len(content) // 40)}  # a token is 40 characters

    text = Text("a", "".join(f"line {number}\n" for number in range(2000)))
    other = Text("b", "".join(f"row {number}\n" for number in range(2000)))
    assert overlap(text, text) == 1 and overlap(text, other) == 0
    assert overlap(text, Text("c", other.content + text.content)) == 1
    assert overlap(Text("d", text.content + other.content), text) == 0.5
    count = len(text.content) // 40
    assert has_tokens(text, letters, count) and not has_tokens(text, letters, count + 1)
