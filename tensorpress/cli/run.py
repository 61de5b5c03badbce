"""Verbs on recipes: run, plan, validate."""

from __future__ import annotations

import contextvars
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tensorpress.cli.common import (
    DEFAULT_STORE,
    FAILED,
    GATE,
    JsonOption,
    StoreOption,
    check_json_target,
    console,
    progress_bars,
    say_problem,
    write_json,
)
from tensorpress.errors import InputError
from tensorpress.secrets import redact_all
from tensorpress.starting import starting

if TYPE_CHECKING:
    from tensorpress.flows.server import PrefectServer
    from tensorpress.tasks.planning import Plan

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a recipe that comes with tensorpress.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Change a value, as steps.quantize.bits=3.")]


def add_to(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("run")(run)
    app.command("plan")(plan)
    app.command("validate")(validate)


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes along. Raises InputError."""
    import importlib.resources

    from tensorpress.errors import nearest

    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    folder = Path(str(importlib.resources.files("tensorpress.recipes")))
    if (folder / f"{name}.yaml").is_file():
        return folder / f"{name}.yaml"
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    raise InputError(
        f"{name}: no such recipe file, and no recipe of that name{nearest(name, known)}; known: {', '.join(known)}"
    )


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    kernels: Annotated[
        str, typer.Option(help="Kernels that figures of speed are measured with: auto, or a backend's name.")
    ] = "auto",
    runner: Annotated[
        Literal["threads", "dask", "ray"], typer.Option(help="What works on the steps: this process, Dask or Ray.")
    ] = "threads",
    parallel: Annotated[
        int, typer.Option(min=1, max=64, help="Branches worked on at once; each needs the memory of its model.")
    ] = 1,
    address: Annotated[
        str, typer.Option(help="Address of a Dask or Ray cluster; one is started here if not given.")
    ] = "",
    json_file: JsonOption = None,
) -> int:
    """Run a recipe: every step on every branch, measured, judged and tracked."""
    from tensorpress.flows.server import connected, prefect_server

    start = time.monotonic()
    check_json_target(json_file)
    text, folder, overrides = recipe_text(recipe, overrides)
    with (
        starting() as started,
        _terminable(),
        prefect_server(store.absolute()) as server,
    ):  # comes up while our own libraries do
        from tensorpress.flows.place import working_in
        from tensorpress.flows.request import prepare, written

        wanted = {"kind": runner, "parallel": parallel, "address": address}
        parameters = written(text, overrides, kernels=kernels, runner=wanted)
        with working_in(store, folder):
            prepare(parameters)
            import tensorpress.flows.running  # noqa: F401 - what the flow will import
            from tensorpress.flows.compress import run_flow
            from tensorpress.tasks.tracking import open_client

            open_client(store.absolute())
            started()
            with connected(server.wait()), _stoppable(server, store.absolute()), progress_bars():
                document = _in_thread(lambda: run_flow(parameters))
    document = redact_all(document)
    document["wall_seconds"] = round(time.monotonic() - start, 3)
    write_json(json_file, contract(document))
    _show(document, store)
    return {"ACCEPT": 0, "REJECT": GATE}.get(document["verdict"], FAILED)


def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    json_file: JsonOption = None,
) -> None:
    """Draw a recipe's graph: what is cached, what would be done, and what it needs. Runs nothing."""
    from tensorpress.pictures.tables import plan_tree
    from tensorpress.tasks.estimate import estimate

    check_json_target(json_file)
    made = _prepare(recipe, overrides, store)
    expected = estimate(made)
    console.print(plan_tree(expected["nodes"]))
    console.print(expected["summary"], soft_wrap=True)
    write_json(json_file, expected)


def validate(recipe: RecipeArgument, overrides: SetOption = None, store: StoreOption = DEFAULT_STORE) -> None:
    """Check a recipe, its model and its texts; says how many steps and branches it has."""
    made = _prepare(recipe, overrides, store)
    console.print(f"{made.recipe.name}: {len(made.jobs)} steps, {len(made.leaves)} branches, model of kind {made.kind}")


def contract(document: dict[str, Any]) -> dict[str, Any]:
    """The part of a run document that `--json` promises, and the rest behind it."""
    first = ("flow_run_id", "mlflow_run_id", "verdict", "gates", "original", "artifacts")
    return {**{key: document[key] for key in first}, **{k: v for k, v in document.items() if k not in first}}


def recipe_text(recipe: str, overrides: list[str] | None) -> tuple[str, Path, list[str]]:
    """The text of a recipe without secrets, the folder that its paths belong to, and the overrides."""
    from tensorpress.recipe_text import read, without_secrets

    path = recipe_path(recipe)
    text, safe = without_secrets(read(path), overrides or [])
    return text, path.absolute().parent, safe


def _prepare(recipe: str, overrides: list[str] | None, store: Path) -> Plan:
    """Check everything without Prefect or MLflow: bad input is refused in seconds, and nothing is written."""
    text, folder, overrides = recipe_text(recipe, overrides)
    from tensorpress.flows.place import working_in
    from tensorpress.flows.request import prepare, written

    with working_in(store, folder):
        return prepare(written(text, overrides))


def _in_thread(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run the flow beside the main thread, which stays free for signals: a long step must not hold up Ctrl-C."""
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(context.run, work).result()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what is before the flow as Ctrl-C does, so that the server and its folder go."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _stoppable(server: PrefectServer, store: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run at once: the server goes, MLflow hears of it, a half-written artifact never had its name."""
    from tensorpress.tasks.isolate import stop_isolated
    from tensorpress.tasks.tracking import close_runs_of

    def stop(number: int, frame: Any) -> None:
        try:
            stop_isolated()
            server.stop()
            close_runs_of(store, os.getpid())
            say_problem("stopped; what was finished is kept, run the same command again to go on")
        finally:
            os._exit(130)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(document: dict[str, Any], store: Path) -> None:
    from rich.markup import escape

    from tensorpress.pictures.front import beaten
    from tensorpress.pictures.tables import metrics_table

    console.print(metrics_table(document))
    if document["original_error"]:
        console.print(f"[bold red]failed[/] original: {escape(document['original_error'])}")
    for artifact in document["artifacts"]:
        note = artifact["report"]["summary"].get("note")
        if note:
            console.print(f"[yellow]note[/] {escape(artifact['node'])}: {escape(note)}")
        if artifact["error"]:
            console.print(f"[bold red]failed[/] {escape(artifact['node'])}: {escape(artifact['error'])}")
    for node, name in beaten(document).items():
        console.print(f"[yellow]note[/] {escape(node)}: is beaten by {escape(name)}, which is no larger and no worse")
    for name, gate in document["gates"].items():
        bound = ", ".join(f"{side} {gate[side]}" for side in ("min", "max") if gate[side] is not None)
        mark = "[green]holds[/]" if gate["holds"] else "[bold red]does not hold[/]"
        worst = "not measured" if gate["worst"] is None else f"worst {gate['worst']:.4g}"
        console.print(f"gate {name} ({bound}): {mark}, {worst} ({escape(gate['branch'])})")
    cached = sum(a["cached"] for a in document["artifacts"])
    colour = {"ACCEPT": "green"}.get(document["verdict"], "red")
    console.print(
        f"[bold {colour}]{document['verdict']}[/]  {len(document['artifacts'])} steps ({cached} cached) in "
        f"{document['wall_seconds']:.1f} s, {document['wall_seconds'] - document['seconds'] + document['overhead_seconds']:.1f} s of it outside steps"
    )
    short = document["mlflow_run_id"][:8]
    home = f"{Path(sys.executable).parent}/" if shutil.which("tensorpress") is None else ""
    console.print(f"report:     {home}tensorpress report {short}")
    console.print(f"dashboard:  {_dashboard(store.absolute(), home)}")
    console.print(f"artifacts:  {store.absolute() / 'models'}")


def _dashboard(store: Path, home: str) -> str:
    """Where the runs are looked at: the MLflow server that runs, or the command that starts one."""
    from tensorpress.flows.access import read_state
    from tensorpress.secrets import redact
    from tensorpress.tasks.tracking import tracking_uri

    served, uri = read_state(store), tracking_uri(store)
    if not uri.startswith("sqlite:"):
        return redact(uri)
    return served.mlflow if served else f"{home}mlflow ui --backend-store-uri {uri}"
