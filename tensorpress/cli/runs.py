"""Verbs on runs that are tracked: compare, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tensorpress.cli.common import (
    DEFAULT_STORE,
    JsonOption,
    StoreOption,
    check_json_target,
    check_target,
    console,
    write_json,
)
from tensorpress.errors import InputError

WHICH = "`latest`, a run's id or the first digits of it, or a flow run's id."
SAME = ("dataset", "dataset_other", "tokens", "window", "dtype", "threads", "device")
"""Conditions that figures must share to be set side by side."""


def add_to(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("compare")(compare)
    app.command("report")(report)


def read_runs(names: Sequence[str], store: Path) -> list[dict[str, Any]]:
    """The run documents of runs. Raises InputError; a store that has no database is not given one."""
    from tensorpress.tasks.tracking import has_runs, read_run

    if not has_runs(store):
        raise InputError(
            f"store: {store} has no tracking database: no recipe was run with it; name another with --store"
        )
    return [read_run(store.absolute(), name) for name in names]


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help=WHICH)],
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write the table as CSV, a row for each original and branch."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    json_file: JsonOption = None,
) -> None:
    """Set the originals and the leaves of runs side by side."""
    from rich.markup import escape

    from tensorpress.artifact import write_whole
    from tensorpress.pictures.tables import compare_table

    check_json_target(json_file)
    if csv_file is not None:
        check_target(csv_file, "--csv")
    documents = list({run["mlflow_run_id"]: run for run in read_runs(runs, store)}.values())
    rows = comparison(documents)
    console.print(compare_table(rows))
    different = differing_conditions(documents)
    if different:
        console.print(f"[yellow]measured under different conditions:[/] {escape('; '.join(different))}")
    if csv_file is not None:
        write_whole(csv_file.absolute(), frame(rows).to_csv(index=False))
    write_json(
        json_file, {"runs": [d["mlflow_run_id"] for d in documents], "rows": rows, "differing_conditions": different}
    )


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help=WHICH)],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page's file; report-ID.html here if not given.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write the report of a run as one HTML page that needs nothing else."""
    from tensorpress.artifact import write_whole
    from tensorpress.pictures.report import render

    check_target(out or Path("report.html"), "--out")
    document = read_runs([run], store)[0]
    target = out or Path(f"report-{document['mlflow_run_id'][:8]}.html")
    write_whole(target.absolute(), render(document))
    console.print(str(target), markup=False, soft_wrap=True)


def comparison(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a comparison: each original once, then the leaves of all runs, with the settings on the way to them in which these differ.

    Settings have MLflow's names: `gptq.bits`.
    """
    from tensorpress.tasks.tracking.entries import chain_of

    originals: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for document in documents:
        short = document["mlflow_run_id"][:8]
        original = {"run": document["mlflow_run_id"], "branch": "", "params": {}, "metrics": document["original"]}
        folder = Path(str(document.get("original_path") or "")).name
        originals.setdefault(str(document.get("original_digest")), {"name": f"original {folder}".strip(), **original})
        for leaf in (a for a in document["artifacts"] if a["leaf"]):
            row = {
                "name": f"{document['name']} {short} {leaf['step']}" if len(documents) > 1 else leaf["step"],
                "run": document["mlflow_run_id"],
                "branch": leaf["branch"],
                "params": {
                    "method": leaf["use"],
                    **{
                        f"{link['use']}.{key}": value
                        for link in chain_of(document, leaf)
                        for key, value in (link.get("config") or {}).items()
                        if key != "use"
                    },
                },
                "metrics": leaf["metrics"],
                "error": leaf.get("error"),
            }
            rows.append(row)
    keys = dict.fromkeys(key for row in rows for key in row["params"])
    shown = [key for key in keys if len({repr(row["params"].get(key)) for row in rows}) > 1]
    for row in rows:
        row["params"] = {key: row["params"][key] for key in shown if row["params"].get(key) is not None}
    return [*originals.values(), *rows]


def frame(rows: Sequence[dict[str, Any]]) -> Any:
    """A comparison as a pandas DataFrame: name, run, branch, a column for each setting that differs and for each metric."""
    import pandas

    flat = [
        {**{k: row.get(k) for k in ("name", "run", "branch", "error")}, **row["params"], **row["metrics"]}
        for row in rows
    ]
    return pandas.DataFrame(flat)


def differing_conditions(documents: Sequence[dict[str, Any]]) -> list[str]:
    """`window: 256, 128` for every condition that the runs do not share."""
    found = []
    for key in SAME:
        values = list(
            dict.fromkeys(str((document.get("conditions") or {}).get(key, "not measured")) for document in documents)
        )
        if len(values) > 1:
            found.append(f"{key}: {', '.join(values)}")
    return found
