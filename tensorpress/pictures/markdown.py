"""Tables in Markdown, for pages that render it."""

from __future__ import annotations

import html
from collections.abc import Sequence

from tensorpress.pictures.tables import clean

LONGEST = 1000
"""Characters of a cell that are shown."""


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what is in the cells is shown as it is, never read as markup."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(
        "| " + " | ".join(cell if index == 1 else escaped(cell) for cell in line) + " |"
        for index, line in enumerate(lines)
    )


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line; an address in it does not become a link."""
    shown = html.escape(" ".join(clean(text, LONGEST).split()), quote=True).replace("://", "&#58;//")
    shown = shown.replace("www.", "www&#46;")
    return "".join(f"\\{char}" if char in "\\`*_[]()!|~" else char for char in shown)
