"""Running a recipe from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def compress(
    recipe: str | Path | dict[str, Any], *, overrides: Sequence[str] = (), store: str | Path = "mlruns"
) -> dict[str, Any]:
    """Run a recipe (a file, or a mapping) and return its run document (docs/architecture.md).

    The same as `tensorpress run`: the same graph, digests, store and tracking. Raises InputError for bad input, before
    anything has run; a step that fails does not raise: `verdict` is then `FAILED`, and the artifact's `error` says why.
    """
    from tensorpress.flows.place import working_in
    from tensorpress.flows.request import prepare, written
    from tensorpress.flows.server import connected, prefect_server
    from tensorpress.recipe_text import read

    folder = Path.cwd()
    if isinstance(recipe, dict):
        text = yaml.safe_dump(recipe, sort_keys=False)
    else:
        text, folder = read(recipe), Path(recipe).absolute().parent
    place = Path(store).absolute()
    parameters = written(text, list(overrides))
    with working_in(place, folder):
        prepare(parameters)
        with prefect_server(place) as server:
            from tensorpress.flows.compress import run_flow
            from tensorpress.tasks.tracking import open_client

            open_client(place)
            with connected(server.wait()):
                return run_flow(parameters)
