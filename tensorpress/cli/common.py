"""What all verbs share: consoles, progress bars, and how errors become exit codes."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from tensorpress.errors import InputError
from tensorpress.secrets import redact

WIDTH = 132
"""Columns of what goes into a file or a pipe; a terminal has its own."""
LONGEST, MOST_PROBLEMS = 480, 12
"""Characters of a problem's line, and problems, that are shown."""


def _console(stderr: bool = False) -> Console:
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=WIDTH)


console = _console()
problems = _console(stderr=True)

FAILED, BAD_INPUT, GATE = 1, 2, 3

StoreOption = Annotated[
    Path,
    typer.Option(
        "--store", envvar="TENSORPRESS_STORE", help="Folder of artifacts, measurements and the tracking database."
    ),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON.")]
DEFAULT_STORE = Path("mlruns")


def say_problem(text: str) -> None:
    """One line for each problem, on standard error, without secrets and not endless."""
    lines = redact(text).splitlines()
    for line in lines[:MOST_PROBLEMS]:
        problems.print(f"[bold red]error:[/] {_plain(line)}", soft_wrap=True)
    if len(lines) > MOST_PROBLEMS:
        problems.print(f"[bold red]error:[/] and {len(lines) - MOST_PROBLEMS} more", soft_wrap=True)


def _plain(text: str) -> str:
    from rich.markup import escape

    text = re.sub(r"\S{161,}", lambda word: f"{word[0][:80]}...{word[0][-60:]}", text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return escape("".join(c if c.isprintable() else "?" for c in text))


def check_json_target(path: Path | None) -> None:
    """Refuse, before any work, a --json file that cannot be written. Raises InputError."""
    if path is not None:
        check_target(path, "--json")


def check_target(path: Path, option: str) -> None:
    """Refuse, before any work, a file that cannot be written whole; a device is never replaced. Raises InputError."""
    parent = path.absolute().parent
    try:
        if path.is_dir():
            raise InputError(f"{option} {path}: is a folder; give a file")
        if path.exists() and not path.is_file():
            raise InputError(f"{option} {path}: is no plain file; give a file")
        if not _can_be_written(parent):
            raise InputError(f"{option} {path}: its folder {parent} does not exist or cannot be written")
    except (OSError, ValueError) as error:  # too long, a null character
        raise InputError(f"{option} {path}: cannot be a file: {getattr(error, 'strerror', None) or error}") from None


def _can_be_written(folder: Path) -> bool:
    """Whether a file can be made in a folder; its mode alone does not tell: root, /proc, a disk that is read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def write_json(path: Path | None, value: Any) -> None:
    """Write a result for machines, whole or not at all."""
    if path is None:
        return
    from tensorpress.artifact import write_whole

    write_whole(path.absolute(), json.dumps(finite(value), indent=1, default=str, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: they become text."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress_bars() -> Iterator[None]:
    """Show what the tasks report: a bar for each node that is at work."""
    from tensorpress.tasks.progress import set_sink

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=problems,
        transient=True,
        disable=not problems.is_terminal,  # it would leave an empty line in a file or a pipe
    ) as progress:
        bars: dict[tuple[str, str], TaskID] = {}

        def show(node: str, what: str, done: int, total: int) -> None:
            key = (node, what)
            if key not in bars:
                for other in bars.values():
                    progress.update(other, visible=False)
                bars[key] = progress.add_task(f"{node}: {what}", total=total)
            progress.update(bars[key], completed=done, total=total, visible=done < total)

        set_sink(show)
        try:
            yield
        finally:
            set_sink(None)
