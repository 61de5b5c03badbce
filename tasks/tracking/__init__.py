"""All that knows MLflow: parent run = flow run, child run = step, the same metric names everywhere.

Everything goes through `MlflowClient` with explicit run ids; weights are recorded by reference, never copied.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import yaml
from filelock import FileLock
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException

from tensorpress import digest
from tensorpress.errors import InputError, StepError
from tensorpress.pictures.graph import save
from tensorpress.recipe import Recipe
from tensorpress.secrets import redact, redact_error, redact_logs
from tensorpress.tasks.alive import is_gone, own_mark
from tensorpress.tasks.planning import Job, Plan
from tensorpress.tasks.tracking.entries import (
    BENCHMARKS,
    LONGEST,
    benchmark_entries,
    in_order,
    link_dataset,
    link_model,
    local_artifacts,
    step_params,
    step_tags,
    summary_metrics,
)
from tensorpress.tasks.tracking.patient import open_patient
from tensorpress.tasks.tracking.rebuild import BENCHMARK, DATABASE, FACTS, check_whole, is_lost, rebuild
from tensorpress.text import read_text

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
redact_logs()  # Prefect keeps the logs of flows and tasks, with their tracebacks

MARK = "tensorpress."
"""Tags of a run begin so that say which process works on it."""


def tracking_uri(store: Path) -> str:
    """The address of the store's own database, absolute; `MLFLOW_TRACKING_URI` overrides it."""
    return os.environ.get("MLFLOW_TRACKING_URI") or own_database(store)


def own_database(store: Path) -> str:
    """The address of the database in a store."""
    return f"sqlite:///{store.absolute() / DATABASE}"


def has_runs(store: Path) -> bool:
    """Whether there is a database of a store's runs, or what it can be made from; a server is not asked."""
    uri = tracking_uri(store)
    there = not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()
    return there or (uri == own_database(store) and is_lost(store))


def open_client(store: Path) -> MlflowClient:
    """A client of the store's database, which is made first, under a lock, where it does not exist.

    One that is lost is made again from the documents of the runs. Raises InputError for one that is damaged.
    """
    os.environ.pop("MLFLOW_RUN_ID", None)
    uri = tracking_uri(store)
    if not uri.startswith("sqlite:"):
        return open_patient(uri)
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(store / "mlflow.lock"):
        if uri == own_database(store):
            check_whole(store.absolute() / DATABASE)
            if is_lost(store):
                rebuild(store.absolute())
        client = open_patient(uri)
        client.search_experiments(max_results=1)
    return client


class Tracker:
    """Writes to one flow run's MLflow run and its children. `tracking` is a handle: store, experiment_id, run_id."""

    def __init__(self, tracking: Mapping[str, str]):
        self.handle = dict(tracking)
        self.client = _client(Path(tracking["store"]))

    @classmethod
    def start(cls, plan: Plan, flow_run_id: str, asked: Mapping[str, str]) -> Tracker:
        """Open the parent run before anything works, with the recipe, and what else was `asked` for in tags."""
        store = plan.store.root
        client = _client(store)
        close_dead_runs(client)
        data = _measured_on(plan.recipe)
        on = f" on {data['name']} {data['digest'][:8]}" if data else ""
        name = f"{plan.recipe.model.source} {plan.root.digest[:8]}{on}".replace("/", " ")  # a path in MLflow's pages
        experiment = _experiment(client, name, store)
        tags = {
            "tensorpress.recipe": plan.recipe.name,
            "tensorpress.flow_run_id": flow_run_id,
            "tensorpress.model": plan.recipe.model.source,
            "tensorpress.model_digest": plan.root.digest,
            "mlflow.source.type": "JOB",
            "mlflow.source.name": "tensorpress run",
            **{f"{MARK}{name}": value for name, value in own_mark().items()},
            **{f"tensorpress.{name}": redact(value) for name, value in asked.items()},
        }
        run = client.create_run(experiment, tags=tags, run_name=plan.recipe.name)
        handle = {"store": str(store), "experiment_id": experiment, "run_id": run.info.run_id, "data": json.dumps(data)}
        tracker = cls(handle)
        link_dataset(client, run.info.run_id, data)
        tracker.text(plan.recipe_yaml, "recipe.yaml")
        facts = {"experiment": name, "data": data, "tags": tags, "start_time": run.info.start_time}
        tracker.text(json.dumps(facts, indent=1), FACTS)
        return tracker

    def start_step(self, job: Job) -> str:
        """Open the child run of a step; its parameters are what the recipe says of it."""
        tags = {
            "mlflow.parentRunId": self.handle["run_id"],
            "tensorpress.node": job.node,
            "tensorpress.digest": job.digest,
            "tensorpress.parent_digest": job.parent_digest,
            "tensorpress.parent_node": job.parent,
            **step_tags(job.branch, job.config),
        }
        run = self.client.create_run(self.handle["experiment_id"], tags=tags, run_name=job.node)
        link_dataset(self.client, run.info.run_id, json.loads(self.handle["data"]))
        said = yaml.safe_load(job.recipe_yaml)["steps"] if job.recipe_yaml else {}
        self.client.log_batch(run.info.run_id, params=step_params(job.step, job.use, job.chain, said))
        return str(run.info.run_id)

    def step_done(self, run_id: str, job: Job, result: dict[str, Any]) -> None:
        """Record the artifact of a step by reference, and its report."""
        self._tags(run_id, {"tensorpress.path": result["path"], "tensorpress.cached": result["cached"]})
        self.text(json.dumps(result["report"], indent=1), "report.json", run_id)
        node = {"step": job.step, "use": job.use, "digest": job.digest}
        experiment = self.handle["experiment_id"]
        model_id = link_model(self.client, experiment, run_id, node, result["path"], job.parent_digest)
        self._tags(run_id, {"tensorpress.model_id": model_id})

    def measured(self, run_id: str, result: dict[str, Any], prefix: str | None) -> None:
        """Record metrics of an artifact (on its step's run) or of the original (on the parent, with a prefix)."""
        metrics = in_order(result["metrics"], prefix or "")
        model_id = None if prefix else self.client.get_run(run_id).data.tags.get("tensorpress.model_id")
        self._metrics(run_id, metrics, model_id)
        for name, text in result["texts"].items():
            self.text(text, name, run_id)
        self.text(json.dumps(result["conditions"], indent=1, default=str), "conditions.json", run_id)

    def close_step(self, result: Mapping[str, Any], problem: str | None, measured: Iterable[str] = ()) -> None:
        """End the run of a step whose artifact was made; `problem` says why it could not be measured.

        Time, sizes and the method's own metrics come after what was `measured`: MLflow's comparison shows first what was logged first.
        """
        run_id = result["run_id"]
        sizes = {name: value for name, value in result["size"].items() if name not in set(measured)}
        own = summary_metrics(result["use"], result["report"], result["config"])
        self._metrics(run_id, {**sizes, **own, "step_seconds": result["seconds"]})
        if problem:
            self._tags(run_id, {"tensorpress.error": problem})
        self.client.set_terminated(run_id, "FAILED" if problem else "FINISHED")

    def fail(self, run_id: str, error: BaseException) -> None:
        """Keep a failed run, with its error; secrets are taken out of the error itself, which others keep and log.

        Where that cannot be written, a later run marks it as killed.
        """
        redact_error(error)
        state = "KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED"
        with contextlib.suppress(StepError, MlflowException):
            self._tags(run_id, {"tensorpress.error": f"{type(error).__name__}: {error}"})
            self.client.set_terminated(run_id, state)
            if run_id == self.handle["run_id"]:  # steps that were made, but not measured any more
                _kill(self.client, _running(self.client), [], "its run had failed", {run_id})

    def figure(self, figure: Figure, name: str, run_id: str | None = None) -> None:
        """Save a picture under the same path in every run."""
        self._file(run_id or self.handle["run_id"], name, lambda path: save(figure, path))

    def text(self, text: str, name: str, run_id: str | None = None) -> None:
        """Save a text, without secrets, under the same path in every run."""
        self.client.log_text(run_id or self.handle["run_id"], redact(text), name)

    def finish(self, verdict: str, error: str | None, metrics: dict[str, float]) -> None:
        """Close the parent run; it failed when a step failed."""
        self._metrics(self.handle["run_id"], metrics)
        tags = {"tensorpress.verdict": verdict} | ({"tensorpress.error": error} if error else {})
        self._tags(self.handle["run_id"], tags)
        self.client.set_terminated(self.handle["run_id"], "FAILED" if verdict == "FAILED" else "FINISHED")

    def _metrics(self, run_id: str, metrics: Mapping[str, float], model_id: str | None = None) -> None:
        now = int(time.time() * 1000)
        rows = [Metric(k, float(v), now, 0, model_id=model_id) for k, v in metrics.items() if v is not None]
        self.client.log_batch(run_id, metrics=rows)

    def _tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        self.client.log_batch(run_id, tags=[RunTag(k, redact(str(v))[:LONGEST]) for k, v in tags.items()])

    def _file(self, run_id: str, name: str, write: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            write(path)
            parent = str(Path(name).parent)
            self.client.log_artifact(run_id, str(path), None if parent == "." else parent)


def _measured_on(recipe: Recipe) -> dict[str, str]:
    """Name, digest and source of the text (or the sentence pairs) that a recipe's measures read; empty if they read none."""
    spec, used = recipe.data.evaluation, set(recipe.evaluate.use)
    if used - {"size", "sts"}:
        text = read_text(spec.source, spec.split, "data.evaluation.source")
        return {"name": text.name, "digest": text.digest[:16], "source": spec.source}
    if "sts" in used and spec.pairs:
        pairs = Path(spec.pairs).expanduser()
        return {"name": pairs.name, "digest": digest.of_file(pairs)[:16], "source": spec.pairs}
    return {}


def track_benchmark(store: Path, answer: Mapping[str, Any], flow_run_id: str) -> tuple[str, str]:
    """Keep what `bench` measured as a run of its own; returns the ids of its experiment and of the run."""
    client = _client(store)
    answer = {**answer, "flow_run_id": flow_run_id}
    experiment = _experiment(client, BENCHMARKS, store)
    name, tags, params = benchmark_entries(answer)
    tags |= {f"{MARK}{key}": value for key, value in own_mark().items()}
    run = client.create_run(experiment, tags=tags, run_name=name)
    now = int(time.time() * 1000)
    metrics = [Metric(key, float(value), now, 0) for key, value in answer["metrics"].items()]
    client.log_batch(run.info.run_id, metrics=metrics, params=params)
    client.log_text(run.info.run_id, json.dumps(answer, indent=1, default=str), BENCHMARK)
    client.set_terminated(run.info.run_id, "FINISHED")
    return experiment, str(run.info.run_id)


def close_dead_runs(client: MlflowClient) -> None:
    """Mark as killed the runs of this machine that are still called running though their process is gone, and what they began."""
    running = _running(client)
    dead = [run for run in running if is_gone(_mark(run))]
    _kill(client, running, dead, "its process was gone")
    alive = {run.info.run_id for run in running} - {run.info.run_id for run in dead}
    for run in running:  # children of a run that ended without them
        parent = run.data.tags.get("mlflow.parentRunId")
        if parent and parent not in alive and client.get_run(parent).info.status != "RUNNING":
            _kill(client, running, [run], "its run had ended")


def close_runs_of(store: Path, pid: int) -> None:
    """Mark as killed what process `pid` has running."""
    client = _client(store)
    running = _running(client)
    own = [run for run in running if (_mark(run).get("pid"), _mark(run).get("host")) == (str(pid), platform.node())]
    _kill(client, running, own, "it was stopped")


def _mark(run: Any) -> dict[str, str]:
    return {
        k.removeprefix(MARK): v for k, v in run.data.tags.items() if k in (f"{MARK}pid", f"{MARK}host", f"{MARK}born")
    }


def _running(client: MlflowClient) -> list[Any]:
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=1000))


def _kill(client: MlflowClient, running: list[Any], dead: list[Any], why: str, ended: Iterable[str] = ()) -> None:
    """End dead runs, and the children of these and of those that `ended`."""
    names = {run.info.run_id for run in dead} | set(ended)
    children = [run for run in running if run.data.tags.get("mlflow.parentRunId") in names]
    for run in (*children, *dead):
        client.set_tag(run.info.run_id, "tensorpress.error", why)
        client.set_terminated(run.info.run_id, "KILLED")


def read_run(store: Path, run_id: str) -> dict[str, Any]:
    """The run document of a parent run. Raises InputError when there is no such run or it has none."""
    client = _client(store)
    run = find_run(client, run_id)
    path = run.data.tags.get("mlflow.parentRunId")
    run_id = path or run.info.run_id
    try:
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(Path(client.download_artifacts(run_id, "run.json", folder)).read_text(encoding="utf-8"))
    except (MlflowException, OSError):
        raise InputError(f"run {run_id}: left no run.json; did it end?") from None


def find_run(client: MlflowClient, name: str) -> Any:
    """A run by its id, the beginning of its id, a flow run's id, or `latest`. Raises InputError."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    parents = client.search_runs(
        experiments, "tags.tensorpress.recipe != ''", order_by=["attributes.start_time DESC"], max_results=500
    )
    if name == "latest" and parents:
        return parents[0]
    matches = [
        run
        for run in parents
        if len(name) >= 4 and name in (run.info.run_id[: len(name)], run.data.tags.get("tensorpress.flow_run_id"))
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise InputError(f"run {name}: several begin so: {', '.join(run.info.run_id[:12] for run in matches)}")
    try:
        return client.get_run(name)
    except MlflowException:
        recent = ", ".join(run.info.run_id[:8] for run in parents[:5]) or "none"
        raise InputError(f"run {name}: no such run; `latest` or one of the last: {recent}") from None


_clients: dict[Path, MlflowClient] = {}


def _client(store: Path) -> MlflowClient:
    if store not in _clients:
        _clients[store] = open_client(store)
    return _clients[store]


def _experiment(client: MlflowClient, name: str, store: Path) -> str:
    local = tracking_uri(store).startswith("sqlite:")
    with FileLock(store / "mlflow.lock"):
        found = client.get_experiment_by_name(name)
        if found is not None and not local and found.artifact_location.startswith("file:"):
            name = f"{name} (by workers)"  # the folder that its files are in is another machine's
            found = client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":  # in MLflow's pages, say
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        location = local_artifacts(store) if local else None
        return str(client.create_experiment(name, artifact_location=location))
