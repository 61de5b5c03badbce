"""Verb: schedule recipes to be run by the clock."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo

import typer

from tensorpress.cli.common import DEFAULT_STORE, JsonOption, StoreOption, check_json_target, console, write_json
from tensorpress.errors import InputError

if TYPE_CHECKING:
    from tensorpress.flows.schedules import Scheduled


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("schedule")(schedule)


def schedule(
    recipes: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", help="Run one after the other.")] = None,
    cron: Annotated[str | None, typer.Option(help='When, as "0 2 * * *": minute, hour, day, month, weekday.')] = None,
    timezone: Annotated[str, typer.Option(help="Time zone of the cron line, as Europe/Zurich.")] = "UTC",
    slug: Annotated[str | None, typer.Option(help="Name of the schedule; the recipe's if not given.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change a value of the recipes.")] = None,
    promote: Annotated[bool, typer.Option(help="Make what passes the gates and is not worse the champion.")] = True,
    keep_days: Annotated[
        float | None, typer.Option(min=0, help="Then remove what was not used for so many days.")
    ] = None,
    keep_gigabytes: Annotated[
        float | None, typer.Option(min=0.001, help="Then bring the store below this size.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show every schedule with its next and last runs.")] = False,
    pause: Annotated[str | None, typer.Option(metavar="SLUG", help="Start no more runs of this schedule.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="SLUG", help="Go on with a paused schedule.")] = None,
    remove: Annotated[str | None, typer.Option(metavar="SLUG", help="Remove a schedule.")] = None,
    store: StoreOption = DEFAULT_STORE,
    json_file: JsonOption = None,
) -> None:
    """Let the server that `serve` started run recipes by the clock; list, pause, resume or remove schedules."""
    asked = [bool(recipes), show, pause is not None, resume is not None, remove is not None]
    if sum(asked) != 1:
        raise InputError("schedule: give recipes with --cron, or one of --list, --pause, --resume, --remove")
    check_json_target(json_file)
    if recipes:
        if cron is None:
            raise InputError('--cron: is missing; when the recipes run, as --cron "0 2 * * *"')
        name = slug or _slug(Path(recipes[0]).stem)
        from tensorpress.flows.schedules import add, cron_schedule

        when = cron_schedule(cron, timezone)
        parameters = _parameters(recipes, overrides or [], promote, keep_days, keep_gigabytes, store)
        with _client(store) as client:
            add(client, name, when, parameters)
        console.print(f"scheduled {name}: {cron} in {timezone}", markup=False)
        return
    from tensorpress.flows import schedules

    with _client(store) as client:
        if pause is not None or resume is not None:
            schedules.pause(client, pause or resume or "", paused=pause is not None)
            console.print(f"{'paused' if pause is not None else 'goes on'}: {pause or resume}", markup=False)
        elif remove is not None:
            schedules.remove(client, remove)
            console.print(f"removed {remove}", markup=False)
        else:
            found = schedules.all_of(client)
            _show(found)
            write_json(json_file, {"schedules": [_as_json(item) for item in found]})


def _parameters(
    recipes: list[str], overrides: list[str], promote: bool, days: float | None, gigabytes: float | None, store: Path
) -> Any:
    """What the nightly flow gets: recipe texts, with paths that hold wherever it runs. Every recipe is checked now."""
    from tensorpress.cli.run import recipe_text
    from tensorpress.flows.parameters import NightlyParameters
    from tensorpress.flows.place import working_in
    from tensorpress.flows.request import absolute_paths, prepare, written

    runs = []
    for recipe in recipes:
        text, folder, safe = recipe_text(recipe, overrides)
        with working_in(store, folder):
            plan = prepare(written(text, safe))
            runs.append(written(text, [*safe, *absolute_paths(plan.recipe)]))
    return NightlyParameters(runs=runs, promote=promote, keep_days=days, keep_gigabytes=gigabytes)


@contextmanager
def _client(store: Path) -> Iterator[Any]:
    """A client of the server that runs for a store. Raises InputError when none does."""
    from tensorpress.flows.server import find_server
    from tensorpress.flows.serving import connected_client

    found = find_server(store.expanduser().absolute())
    if found is None:
        raise InputError(f"no Prefect server answers for the store {store}; start one with `tensorpress serve`")
    with connected_client(*found) as client:
        yield client


def _show(found: list[Scheduled]) -> None:
    from rich.table import Table

    table = Table("schedule", "recipes", "when", "next runs", "last runs", box=None, pad_edge=False)
    for item in found:
        ahead = [f"{_local(when, item.timezone)} {state}" for when, state in item.next_runs]
        before = [f"{_local(when, item.timezone)} {state}" for when, state in item.last_runs]
        none_ahead = "none yet" if item.active else "paused"
        cells = [item.slug, ", ".join(item.recipes), f"{item.cron} {item.timezone}", "\n".join(ahead) or none_ahead]
        table.add_row(*cells, "\n".join(before) or "none")
    console.print(table if found else "no schedules; make one with `tensorpress schedule RECIPE --cron ...`")


def _local(when: datetime | None, timezone: str) -> str:
    return when.astimezone(ZoneInfo(timezone)).strftime("%Y-%m-%d %H:%M") if when else "-"


def _as_json(item: Scheduled) -> dict[str, Any]:
    def runs(pairs: Any) -> list[dict[str, Any]]:
        return [{"start": when.isoformat() if when else None, "state": state} for when, state in pairs]

    plain = {key: getattr(item, key) for key in ("slug", "cron", "timezone", "active", "recipes")}
    return {**plain, "next_runs": runs(item.next_runs), "last_runs": runs(item.last_runs)}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63] or "nightly"
