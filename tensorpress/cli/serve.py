"""Verbs that stay: serve, worker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tensorpress.cli.common import DEFAULT_STORE, StoreOption, console
from tensorpress.errors import InputError, StepError

LimitOption = Annotated[
    int, typer.Option(min=1, max=64, help="Flow runs worked on at once; each needs the memory of its models.")
]
NamesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--name",
        help="Name or address by which others reach this machine; requests for others are refused. Repeatable.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("serve")(serve)
    app.command("worker")(worker)


def serve(
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine only with the token.")
    ] = "127.0.0.1",
    names: NamesOption = None,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the Prefect UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow.")] = 5000,
    limit: LimitOption = 1,
    with_worker: Annotated[
        bool, typer.Option("--worker/--no-worker", help="Let this machine work on the runs itself.")
    ] = True,
) -> None:
    """Start the Prefect server, MLflow, the deployments and a worker, until Ctrl-C."""
    from tensorpress.flows.access import read_state
    from tensorpress.flows.serving import Options, Servers, check, check_place

    place = store.expanduser().absolute()
    options = Options(place, host, prefect_port, mlflow_port, limit, with_worker, tuple(names or ()))
    state = read_state(place)
    if state is not None:
        console.print(f"already served by process {state.pid}:", markup=False)
        _say_addresses(state.prefect, state.mlflow)
        return
    check(options)
    check_place(place)
    with _stop_on_signals() as stopped, ExitStack() as started:
        with console.status("starting the servers"):
            servers = started.enter_context(Servers(options))
        _say_addresses(options.prefect, options.mlflow)
        _say_token(servers.token, servers.is_new, place)
        console.print("ready; Ctrl-C stops all of it", markup=False)
        servers.watch(lambda line: console.print(line, markup=False), stopped)
    console.print("stopped")


def worker(
    url: Annotated[str, typer.Argument(metavar="URL", help="The Prefect server, as http://name:4200.")],
    mlflow: Annotated[str, typer.Option(help="The MLflow server, as http://name:5000.")],
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token; TENSORPRESS_TOKEN in the environment if not given.")
    ] = None,
    limit: LimitOption = 1,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Join a server on another machine: run what is started or scheduled there. Ctrl-C leaves."""
    from tensorpress.flows.joining import check_servers, joined
    from tensorpress.flows.serving import check_place

    token = _token(token_file)
    place = store.expanduser().absolute()
    check_place(place)
    api = f"{url.rstrip('/').removesuffix('/api')}/api"
    check_servers(api, mlflow.rstrip("/"), token)
    with _stop_on_signals() as stopped, joined(api, mlflow.rstrip("/"), token, limit, place) as child:
        console.print(f"works on runs of {api}, {limit} at once; Ctrl-C leaves", markup=False)
        while not stopped():
            if not child.revive():
                raise StepError(f"the worker dies again and again; its log: {child.log}")
            time.sleep(0.5)
    console.print("left")


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask to stop; while the servers start they interrupt."""
    asked = False

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            return
        asked = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    except KeyboardInterrupt:
        if not asked:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_addresses(prefect: str, mlflow: str) -> None:
    console.print(f"Prefect: {prefect}", markup=False)
    console.print(f"MLflow:  {mlflow}", markup=False)


def _say_token(token: str, is_new: bool, store: Path) -> None:
    from tensorpress.flows.access import USER

    if is_new:
        console.print(f"Both ask for user and password, once a browser: {USER} and", markup=False)
        console.print(f"  {token}", markup=False)
        console.print(
            f"(Prefect takes them as one, {USER}:PASSWORD.) Shown this once; kept in {store}/serve/token",
            markup=False,
            soft_wrap=True,
        )
    else:
        console.print(f"token:   as before, in {store}/serve/token", markup=False, soft_wrap=True)


def _token(path: Path | None) -> str:
    token = os.environ.get("TENSORPRESS_TOKEN", "")
    if path is not None:
        try:
            token = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--token-file {path}: cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}"
            ) from None
    if not token:
        raise InputError("token: is missing; `serve` showed it and keeps it in STORE/serve/token; give --token-file")
    return token
