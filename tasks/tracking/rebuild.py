"""MLflow's database made again from the documents that runs left, when it is lost.

Runs keep their ids, so that what refers to them (folders, links, other documents) still does. MLflow gives new runs new ids;
they are exchanged for the old ones in the finished file, before it gets its name.
"""

from __future__ import annotations

import json
import logging
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from tensorpress.artifact import Store
from tensorpress.errors import InputError
from tensorpress.tasks.tracking import champions
from tensorpress.tasks.tracking.entries import (
    BENCHMARKS,
    benchmark_entries,
    chain_of,
    in_order,
    link_dataset,
    link_model,
    local_artifacts,
    step_params,
    step_tags,
    summary_metrics,
)

DATABASE, DOCUMENT, BENCHMARK = "mlflow.db", "run.json", "bench.json"
FACTS = "index.json"
"""File of a parent run with what its run document does not say; written at its start."""
SIDECARS = ("", "-journal", "-wal", "-shm")
RUN_ID = re.compile(r"\b[0-9a-f]{32}\b")
CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(frozen=True)
class Run:
    """One run as it ended. Times in milliseconds since the epoch."""

    id: str
    name: str
    status: str
    start: int
    end: int
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    params: list[Param] = field(default_factory=list)
    node: Mapping[str, str] | None = None
    """Of a step's run with an artifact: `step`, `use`, `digest`, `path`, `parent` (the digest)."""


@dataclass(frozen=True)
class Ended:
    """A flow run: its parent run and those of its steps; a benchmark has neither steps nor a run document."""

    experiment: str
    data: Mapping[str, str]
    document: Mapping[str, Any] | None
    parent: Run
    children: list[Run]


def is_lost(store: Path) -> bool:
    """Whether the store's own database is gone though runs left their documents."""
    database = store / DATABASE
    there = database.is_file() and database.stat().st_size > 0
    return not there and any(documents(store))


def documents(store: Path) -> Iterator[Path]:
    """What the runs that ended left."""
    return (path for name in (DOCUMENT, BENCHMARK) for path in (store / "artifacts").glob(f"*/artifacts/{name}"))


def check_whole(database: Path) -> None:
    """Refuse a database whose bytes are damaged. Raises InputError that says what to do; one that is locked is not judged."""
    if not database.is_file():
        return
    try:
        connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=0.1)
        try:
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in CORRUPT:
            return
        answer = str(error)
    if answer != "ok":
        reason = answer.splitlines()[-1]
        raise InputError(
            f"{database}: is damaged ({reason}); move it away (mv {database} {database}.damaged) and start again: "
            "it is made again from the runs' documents"
        )


def rebuild(store: Path) -> int:
    """Make the store's database again; returns the number of flow runs in it. The caller holds the database's lock."""
    part = store / f".part-{DATABASE}"
    _remove(part)
    found = [_read(path) for path in documents(store)]
    ended = sorted((run for run in found if run is not None), key=lambda run: run.parent.start)
    client = MlflowClient(f"sqlite:///{part}")
    ids: dict[str, str] = {}
    experiments: dict[str, str] = {}
    opened = Store(store).open()
    for run in ended:
        if run.experiment not in experiments:
            experiments[run.experiment] = client.create_experiment(run.experiment, local_artifacts(store))
        _restore(client, experiments[run.experiment], run, ids)
        _register(client, opened, run, ids)
    champions.restore(client, opened)
    _exchange_ids(part, ids)
    _remove(store / DATABASE)  # a journal of the lost file would be played back into the new one
    part.rename(store / DATABASE)
    lost = len(found) - len(ended)
    logging.getLogger("tensorpress").warning(
        "%s was lost; it was made again from the documents of %d runs%s",
        store / DATABASE,
        len(ended),
        f" (those of {lost} more cannot be read)" if lost else "",
    )
    return len(ended)


def _read(path: Path) -> Ended | None:
    """What a run left, or None where its document cannot be read."""
    folder = path.parent
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        end = int(path.stat().st_mtime * 1000)
        if path.name == BENCHMARK:
            return _benchmark(folder, document, end)
        facts = _facts(folder, document)
        start = int(facts.get("start_time") or end - 1000 * document["seconds"])
        children = [
            _step(folder.parents[1], document, artifact, start, end)
            for artifact in document["artifacts"]
            if artifact["run_id"]
        ]
        return Ended(facts["experiment"], facts["data"], document, _flow(folder, document, facts, start, end), children)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _benchmark(folder: Path, answer: Mapping[str, Any], end: int) -> Ended:
    name, tags, params = benchmark_entries(answer)
    run = Run(folder.parent.name, name, "FINISHED", end, end, tags, _numbers(answer["metrics"]), params)
    return Ended(BENCHMARKS, {}, None, run, [])


def _facts(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """What the run wrote down at its start; where that is missing, what follows from its document."""
    try:
        return dict(json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        source = document["recipe"].get("model", {}).get("source", "demo")
        tags = {"tensorpress.model": source, "tensorpress.model_digest": document["original_digest"]}
        name = f"{source} {document['original_digest'][:8]}".replace("/", " ")
        return {"experiment": name, "data": {}, "tags": tags}


def _flow(folder: Path, document: Mapping[str, Any], facts: Mapping[str, Any], start: int, end: int) -> Run:
    verdict = document["verdict"]
    metrics: dict[str, Any] = in_order(document["original"], "original.")
    metrics |= {"run_seconds": document["seconds"], "overhead_seconds": document["overhead_seconds"]}
    metrics |= {f"worst.{name}": gate["worst"] for name, gate in document["gates"].items()}
    tags = {
        **facts["tags"],
        "tensorpress.recipe": document["name"],
        "tensorpress.flow_run_id": document["flow_run_id"],
        "tensorpress.verdict": verdict,
    }
    errors = [document["original_error"], *(f"{a['node']}: {a['error']}" for a in document["artifacts"] if a["error"])]
    if error := next((error for error in errors if error), None):
        tags["tensorpress.error"] = error
    status = "FAILED" if verdict == "FAILED" else "FINISHED"
    return Run(folder.parent.name, document["name"], status, start, end, tags, _numbers(metrics))


def _step(runs: Path, document: Mapping[str, Any], artifact: Mapping[str, Any], start: int, end: int) -> Run:
    """The run of a step. It ended when the last of its files was written."""
    folder = runs / artifact["run_id"] / "artifacts"
    times = [int(path.stat().st_mtime * 1000) for path in folder.glob("*.json")] if folder.is_dir() else []
    digests = {a["node"]: a["digest"] for a in document["artifacts"]}
    parent = digests.get(artifact["parent"], document["original_digest"])
    ended = min(max(times, default=end), end)
    tags = {
        "tensorpress.node": artifact["node"],
        "tensorpress.digest": artifact["digest"],
        "tensorpress.parent_digest": parent,
        "tensorpress.parent_node": artifact["parent"],
        **step_tags(artifact["branch"], artifact["config"]),
    }
    node = None
    if artifact["path"]:
        tags |= {"tensorpress.path": artifact["path"], "tensorpress.cached": str(artifact["cached"])}
        node = {key: artifact[key] for key in ("step", "use", "digest", "path")} | {"parent": parent}
        if not Path(artifact["path"]).is_dir():
            tags["tensorpress.removed"] = "before the database was made again"
    if artifact["error"]:
        tags["tensorpress.error"] = artifact["error"]
    own = summary_metrics(artifact["use"], artifact["report"], artifact.get("config") or {})
    metrics = {**in_order(artifact["metrics"]), **own}
    chain, said = chain_of(document, artifact), document["recipe"]["steps"]
    params = step_params(artifact["step"], artifact["use"], chain, said)
    status = "FAILED" if artifact["error"] else "FINISHED"
    return Run(
        artifact["run_id"], artifact["node"], status, max(start, ended - int(1000 * (artifact["seconds"] or 0))), ended,
        tags, _numbers(metrics), params, node,
    )  # fmt: skip


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if value is not None}


def _restore(client: MlflowClient, experiment: str, ended: Ended, ids: dict[str, str]) -> None:
    """Write a flow run and its steps; `ids` gets the old id for each new one."""
    parent = _create(client, experiment, ended.parent, ended.data, {}, ids)
    for child in ended.children:
        _create(client, experiment, child, ended.data, {"mlflow.parentRunId": parent}, ids)


def _create(
    client: MlflowClient,
    experiment: str,
    run: Run,
    data: Mapping[str, str],
    more: Mapping[str, str],
    ids: dict[str, str],
) -> str:
    tags = {**run.tags, **more, "tensorpress.rebuilt": datetime.now(UTC).isoformat(timespec="seconds")}
    created = client.create_run(experiment, start_time=run.start, tags=tags, run_name=run.name).info.run_id
    ids[created] = run.id
    link_dataset(client, created, data)
    model_id = None
    if run.node:
        model_id = link_model(client, experiment, created, run.node, run.node["path"], run.node["parent"])
        client.set_tag(created, "tensorpress.model_id", model_id)
    metrics = [Metric(name, value, run.end, 0, model_id=model_id) for name, value in run.metrics.items()]
    client.log_batch(created, metrics=metrics, params=run.params)
    client.set_terminated(created, run.status, run.end)
    return str(created)


def _register(client: MlflowClient, store: Store, ended: Ended, ids: Mapping[str, str]) -> None:
    """Register the run's best leaf as it was then, if its artifact is still there."""
    if ended.document is None:
        return
    found = champions.candidate(ended.document)
    if found is None or not Path(found["path"]).is_dir():
        return
    new = {old: created for created, old in ids.items()}
    artifacts = [{**artifact, "run_id": new.get(artifact["run_id"])} for artifact in ended.document["artifacts"]]
    now = {**ended.document, "mlflow_run_id": new[ended.parent.id], "artifacts": artifacts}
    champions.register(client, store, now)


def _exchange_ids(database: Path, ids: Mapping[str, str]) -> None:
    """Give runs their old ids, wherever the new ones stand in a database."""
    connection = sqlite3.connect(database)
    connection.create_function(
        "exchanged", 1, lambda text: RUN_ID.sub(lambda match: ids.get(match[0], match[0]), text), deterministic=True
    )
    try:
        with connection:
            for table, column in _text_columns(connection):
                connection.execute(
                    f'UPDATE "{table}" SET "{column}" = exchanged("{column}") '
                    f'WHERE typeof("{column}") = \'text\' AND "{column}" <> exchanged("{column}")'
                )
    finally:
        connection.close()


def _text_columns(connection: sqlite3.Connection) -> Iterable[tuple[str, str]]:
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (table,) in tables:
        for _, column, kind, *_ in connection.execute(f'PRAGMA table_info("{table}")').fetchall():
            if "CHAR" in kind.upper() or "TEXT" in kind.upper():
                yield table, column


def _remove(database: Path) -> None:
    for suffix in SIDECARS:
        database.with_name(database.name + suffix).unlink(missing_ok=True)
