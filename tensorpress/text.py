"""Texts for calibration and evaluation: read, tokenised once, cut into windows without overlap."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tensorpress import digest
from tensorpress.errors import InputError

LARGEST = 2_000_000_000
"""Bytes of a text that is read whole."""
DEMO_TEXTS = {"train": "train.txt", "test": "test.txt", "other": "other.txt"}


def demo_folder() -> Path:
    """Folder of the demo model and its texts, as installed."""
    return Path(str(importlib.resources.files("tensorpress.demo")))


@dataclass(frozen=True)
class Text:
    """A text and where it came from. Line ends are \\n whatever the file has."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        return digest.of_text(self.content)


def check_plain(path: Path, where: str) -> None:
    """Refuse what would be read without end: pipes, devices, files of more than 2 GB. Raises InputError, or FileNotFoundError."""
    state = path.stat()
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{where}: {path} is no plain file")
    if state.st_size > LARGEST:
        raise InputError(f"{where}: {path} has {state.st_size:,} bytes; at most {LARGEST:,} are read")


def read_text(source: str, split: str, where: str) -> Text:
    """Read a text: `demo` with a split, or a UTF-8 file. `where` names the recipe's key in errors. Raises InputError."""
    name = f"demo/{split}" if source == "demo" else Path(source).name
    try:
        path = demo_folder() / DEMO_TEXTS[split] if source == "demo" else Path(source).expanduser()
        check_plain(path, where)
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{where}: no such file: {source}; a text is `demo` or a UTF-8 file") from None
    except IsADirectoryError:
        raise InputError(f"{where}: {source} is a folder; a text is `demo` or a UTF-8 file") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{where}: {source} cannot be read as UTF-8 text: {error}") from None
    if not content.strip():
        raise InputError(f"{where}: the text {source} is empty")
    return Text(name, content)


def tokenise(text: Text, tokenizer: Any) -> torch.Tensor:
    """Ids of the whole text, tokenised once, without special tokens: int64 [tokens]."""
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


@dataclass(frozen=True)
class Marks:
    """Ids that stand before and after the text in every window of an encoder, as in all that it was trained on; decoders have none."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, rows: torch.Tensor) -> torch.Tensor:
        """Windows [n, length] of text, as [n, length + count] with the marks."""
        before = torch.tensor(self.before, dtype=rows.dtype).expand(len(rows), -1)
        after = torch.tensor(self.after, dtype=rows.dtype).expand(len(rows), -1)
        return torch.cat((before, rows, after), 1)


NO_MARKS = Marks()


def marks_of(tokenizer: Any, kind: str) -> Marks:
    """The marks that a tokenizer puts around a text, such as [CLS] and [SEP]; none for models that are not encoders.

    They are what stands around the ids of a word; none, too, where a tokenizer has no ids for it, or others with marks than without.
    """
    if kind != "encoder":
        return NO_MARKS
    plain, whole = (tokenizer("one", add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(len(whole) - len(plain) + 1) if plain else ():
        if whole[start : start + len(plain)] == plain:
            return Marks(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
    return NO_MARKS


def has_tokens(text: Text, tokenizer: Any, count: int) -> bool:
    """Whether a text has at least `count` tokens; no more of it is tokenised than that takes."""
    return any(
        len(tokenise(Text(text.name, text.content[:length]), tokenizer)) >= count
        for length in (16 * count, len(text.content))
    )


def overlap(text: Text, other: Text, chunks: int = 20, length: int = 200) -> float:
    """Share of `chunks` pieces of `length` characters, spread over a text, that stand in another text too."""
    last = max(0, len(text.content) - length)
    starts = {round(i * last / max(1, chunks - 1)) for i in range(chunks)}
    return sum(text.content[start : start + length] in other.content for start in starts) / len(starts)


def windows(ids: torch.Tensor, length: int, count: int | None, where: str) -> torch.Tensor:
    """The first `count` windows (all if None) of `length` tokens, without overlap: int64 [windows, length].

    Raises InputError when the text has not one whole window.
    """
    whole = len(ids) // length
    if whole == 0:
        raise InputError(f"{where}: the text has {len(ids)} tokens, fewer than one window of {length}")
    rows = ids[: whole * length].view(whole, length)
    return rows if count is None else rows[:count]


def random_windows(ids: torch.Tensor, length: int, count: int, seed: int, where: str) -> torch.Tensor:
    """`count` windows of `length` tokens, drawn without replacement from the text's grid of windows.

    The same seed draws the same windows. A text with fewer windows gives all of them. Raises InputError as `windows`.
    """
    rows = windows(ids, length, None, where)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:count]]
