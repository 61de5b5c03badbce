"""Verbs on the recipes that come with tensorpress: list, show, copy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tensorpress.cli.common import console
from tensorpress.errors import InputError, nearest

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A recipe that comes with tensorpress.")]

verbs = typer.Typer(name="recipes", help="The recipes that come with tensorpress.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.add_typer(verbs, name="recipes")


def packaged() -> dict[str, Path]:
    """Name -> file of the recipes that come along, sorted."""
    import importlib.resources

    folder = Path(str(importlib.resources.files("tensorpress.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


@verbs.command("list")
def list_recipes() -> None:
    """Name every recipe, and say what it does."""
    import yaml
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, path in packaged().items():
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        table.add_row(f"[bold]{escape(name)}[/]", escape(" ".join(str(recipe.get("description") or "").split())))
    console.print(table)


@verbs.command("show")
def show(name: NameArgument) -> None:
    """Print a recipe."""
    typer.echo(find(name).read_text(encoding="utf-8"), nl=False)


@verbs.command("copy")
def copy(
    name: NameArgument,
    target: Annotated[Path | None, typer.Argument(help="A file, or a folder; NAME.yaml here if not given.")] = None,
) -> None:
    """Copy a recipe, to change it. What is there already is never overwritten."""
    source = find(name)
    target = target or Path()
    if target.is_dir():
        target = target / source.name
    if not target.absolute().parent.is_dir():
        raise InputError(f"{target}: there is no folder {target.absolute().parent}")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise InputError(f"{target}: exists already; give another name") from None
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {os.strerror(error.errno or 0)}") from None
    console.print(str(target), markup=False, soft_wrap=True)


def find(name: str) -> Path:
    """The file of a recipe that comes along. Raises InputError."""
    known = packaged()
    if name.removesuffix(".yaml") not in known:
        raise InputError(f"{name}: no recipe of that name{nearest(name, known)}; known: {', '.join(known) or 'none'}")
    return known[name.removesuffix(".yaml")]
