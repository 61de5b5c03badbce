"""Verb that removes from a store what is not used any more: clean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorpress.cli.common import DEFAULT_STORE, JsonOption, StoreOption, check_json_target, console, write_json
from tensorpress.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from tensorpress.tasks.litter import Item
    from tensorpress.tasks.retention import Survey

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
BYTES = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
AGE = "as 30d, 12h or 2w"


def add_to(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("clean")(clean)


def clean(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help=f"Remove artifacts that were not used for so long, {AGE}.")
    ] = None,
    larger_than: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Bring the store below this size, as 20GB: what was not used longest goes first."
        ),
    ] = None,
    keep_last: Annotated[int, typer.Option(min=0, help="Keep the artifacts of so many last runs.")] = 0,
    runs_older_than: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="Also delete runs, with their metrics and pictures, that began so long ago."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, only say what would go.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json_file: JsonOption = None,
) -> None:
    """Remove what is not used: artifacts by age and size, what dead processes left. Champions and what they come from stay."""
    check_json_target(json_file)
    bounds = {
        "unused_seconds": _quantity(older_than, "--older-than", SECONDS, AGE),
        "store_bytes": _quantity(larger_than, "--larger-than", BYTES, "as 20GB or 500MiB"),
        "run_seconds": _quantity(runs_older_than, "--runs-older-than", SECONDS, AGE),
    }
    from tensorpress.artifact import Store
    from tensorpress.tasks import retention

    rule = retention.Rule(keep_last=keep_last, **bounds)
    place = Store(store)
    found = retention.survey(place, rule)
    gone = retention.clean(place, found) if yes else found.goes
    _show(found, gone, yes)
    left = found.bytes - sum(item.bytes for item in gone)
    if rule.store_bytes is not None and left > rule.store_bytes:
        console.print(f"[yellow]the store is still larger than {larger_than}[/]: what is left must stay")
    answer = {
        "store": str(place.root),
        "removed": yes,
        "rule": asdict(rule),
        "bytes_before": found.bytes,
        "bytes_after": left,
        "goes": [_plain(item) for item in gone],
        "stays": [_plain(item) for item in found.stays],
    }
    write_json(json_file, answer)


def _quantity(text: str | None, option: str, units: Mapping[str, int], example: str) -> float | None:
    """A number with its unit. Raises InputError."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]+)\s*", text, re.ASCII)
    known = {name.lower(): factor for name, factor in units.items()}
    if not match or match[2].lower() not in known:
        raise InputError(f"{option} {text}: write it {example}; units: {', '.join(units)}")
    return float(match[1]) * known[match[2].lower()]


def _show(found: Survey, gone: list[Item], done: bool) -> None:
    from tensorpress.pictures.tables import human_bytes

    artifacts = [item for item in gone if item.kind == "artifact"]
    if artifacts:
        console.print(_table("removed" if done else "would go", artifacts))
    if found.stays:
        console.print(_table("stays", found.stays))
    for kind, name in (("evaluation", "evaluations of these"), ("run", "old runs"), ("part", "half-written files"),
                       ("scratch", "checkpoints"), ("trash", "unfinished removals"), ("log", "old logs"),
                       ("lock", "lock files that nobody holds")):  # fmt: skip
        items = [item for item in gone if item.kind == kind]
        if items:
            console.print(f"{name}: {len(items)}, {human_bytes(sum(item.bytes for item in items))}")
    skipped = len(found.goes) - len(gone)
    if skipped:
        console.print(f"[yellow]taken up meanwhile, and kept:[/] {skipped}")
    freed = sum(item.bytes for item in gone)
    console.print(
        f"{human_bytes(freed)} of {human_bytes(found.bytes)} {'freed' if done else 'would be freed; --yes removes it'}"
    )


def _table(title: str, items: list[Item]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from tensorpress.pictures.tables import clean as printable
    from tensorpress.pictures.tables import human_bytes

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title=title, title_justify="left")
    for heading, side in (
        ("artifact", "left"),
        ("what", "left"),
        ("size", "right"),
        ("last used", "right"),
        ("why", "left"),
    ):
        table.add_column(heading, justify=side, overflow="fold")  # type: ignore[arg-type]
    for item in items:
        what = escape(printable(item.title, 50))
        table.add_row(item.name[:12], what, human_bytes(item.bytes), _ago(item.age), escape(printable(item.why)))
    return table


def _ago(seconds: float) -> str:
    from tensorpress.pictures.tables import human_seconds

    return f"{seconds / 86_400:.0f} days ago" if seconds >= 2 * 86_400 else f"{human_seconds(seconds)} ago"


def _plain(item: Item) -> dict[str, Any]:
    return {**asdict(item), "path": str(item.path), "age": round(item.age, 1)}
