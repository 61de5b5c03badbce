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
    from tensorpress.artifact import Store
    from tensorpress.compressors.catalog import METHODS
    from tensorpress.evaluators.catalog import MEASURES
    from tensorpress.flows.server import connected, prefect_server
    from tensorpress.recipe import parse_text, read
    from tensorpress.tasks.planning import make_plan

    folder = Path.cwd()
    if isinstance(recipe, dict):
        text = yaml.safe_dump(recipe, sort_keys=False)
    else:
        text, folder = read(recipe), Path(recipe).absolute().parent
    place = Path(store).absolute()
    arguments: dict[str, Any] = {
        "recipe": text,
        "folder": str(folder),
        "overrides": list(overrides),
        "store": str(place),
    }
    make_plan(parse_text(text, METHODS, MEASURES, overrides, folder), Store(place))
    with prefect_server(place) as server:
        from tensorpress.flows.compress import CompressParameters
        from tensorpress.flows.compress import compress as flow
        from tensorpress.tasks.tracking import open_client

        parameters = CompressParameters(**arguments)
        open_client(place)
        with connected(server.wait()):
            return flow(parameters)
