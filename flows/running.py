"""The work of the flow `compress`: load the model, do every step on every branch, measure, judge, leave everything tracked."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from typing import Any, NoReturn

import yaml
from prefect import get_run_logger
from prefect.context import get_run_context
from prefect.exceptions import TerminationSignal, UnfinishedRun
from prefect.futures import PrefectFuture

from tensorpress.errors import StepError
from tensorpress.flows.compress import first_error
from tensorpress.flows.graph import Work, run_graph, task_runner, threads_for
from tensorpress.flows.parameters import CompressParameters
from tensorpress.flows.request import prepare
from tensorpress.pictures.front import draw_front
from tensorpress.pictures.graph import draw_graph
from tensorpress.pictures.markdown import table
from tensorpress.pictures.report import render, step_pictures
from tensorpress.secrets import redact_all
from tensorpress.tasks.evaluate import run_evaluation
from tensorpress.tasks.isolate import stop_isolated
from tensorpress.tasks.load import load_model
from tensorpress.tasks.planning import Plan, timed
from tensorpress.tasks.show import results_rows, show_link, show_table
from tensorpress.tasks.step import run_step
from tensorpress.tasks.tracking import Tracker, close_runs_of
from tensorpress.tasks.tracking.champions import register
from tensorpress.versions import versions


def run_recipe(parameters: CompressParameters) -> dict[str, Any]:
    """Run a recipe within a flow run and return its run document. Raises InputError before anything works."""
    start = time.monotonic()
    plan = prepare(parameters)
    plan.store.open()
    flow_run_id = str(get_run_context().flow_run.id)  # type: ignore[union-attr]
    asked = {"overrides": ", ".join(parameters.overrides) or "-", "kernels": parameters.kernels}
    tracker = Tracker.start(plan, flow_run_id, asked)
    link = show_link(tracker.handle["experiment_id"], tracker.handle["run_id"])
    if link:
        get_run_logger().info("tracked in MLflow: %s", link)
    try:
        run = _run(plan, tracker, parameters)
        run |= {"flow_run_id": flow_run_id, "mlflow_run_id": tracker.handle["run_id"]}
        run["seconds"] = round(time.monotonic() - start, 3)
        run["overhead_seconds"] = round(run["seconds"] - run.pop("_inside"), 3)
        _leave(plan, run, tracker)
    except BaseException as error:
        tracker.fail(tracker.handle["run_id"], error)
        raise
    return run


def _run(plan: Plan, tracker: Tracker, parameters: CompressParameters) -> dict[str, Any]:
    began = time.monotonic()
    with task_runner(parameters.runner) as runner:
        try:
            done = run_graph(runner, _works(plan, tracker, parameters), parameters.runner.parallel)
        except TerminationSignal:
            _stop_at_once(plan)
    results = {name: _outcome(done[f"step {name}"]) for name in plan.jobs}
    figures = {name: _outcome(done[f"evaluate {name}"]) for name in plan.evaluated}
    first = _outcome(done["evaluate original"])
    inside = sum(r.get("work_seconds", 0.0) for r in (*results.values(), *figures.values(), first))
    for name, figure in figures.items():
        if figure.get("error") and results[name].get("run_id"):
            tracker.close_step(results[name], figure["error"])
    run = _document(plan, results, figures, first)
    run["_inside"] = min(inside, time.monotonic() - began)
    return run


def _stop_at_once(plan: Plan) -> NoReturn:
    """End this process, which was cancelled: a task may wait for a lock that others hold for hours, and leaving would wait for it.

    Who sent the signal tells Prefect how the run ended.
    """
    stop_isolated()
    time.sleep(1.0)  # in which their unfinished folders go
    close_runs_of(plan.store.root, os.getpid())
    os._exit(128 + signal.SIGTERM)


def _works(plan: Plan, tracker: Tracker, parameters: CompressParameters) -> list[Work]:
    """The tasks of a plan. What is made is measured next: its MLflow run then ends, and memory is that of one branch."""
    handle, title = tracker.handle, plan.recipe.name
    threads = threads_for(parameters.runner)
    asked = _evaluation_job(plan, parameters.kernels)
    alone = timed(plan.recipe)
    asked["threads"] = threads_for(parameters.runner.model_copy(update={"parallel": 1})) if alone else threads
    root = {"source": plan.recipe.model.source, "folder": plan.root.path, "store": str(plan.store.root)}
    first = {"label": f"{title}: original", "job": asked, "original": None, "tracking": handle}
    works = [
        Work("load", load_model, root),
        Work("evaluate original", run_evaluation, first, {"subject": "load"}, alone),
    ]
    for name, job in plan.jobs.items():
        last = name not in plan.evaluated
        label = f"{title}: {name}"
        arguments = {"label": label, "job": replace(job, threads=threads).to_dict(), "tracking": handle, "last": last}
        parent = f"step {job.parent}" if job.parent in plan.jobs else "load"
        works.append(Work(f"step {name}", run_step, arguments, {"parent": parent}))
        if not last:
            given = {"label": label, "job": asked, "tracking": handle}
            needs = {"subject": f"step {name}", "original": "evaluate original"}
            works.append(Work(f"evaluate {name}", run_evaluation, given, needs, alone))
    return works


def _evaluation_job(plan: Plan, kernels: str) -> dict[str, Any]:
    spec = plan.recipe.data.evaluation
    return {
        "measures": list(plan.recipe.evaluate.use),
        "evaluation": spec.model_dump(mode="json"),
        "root": {"path": plan.root.path, "digest": plan.root.digest, "source": plan.recipe.model.source},
        "dtype": plan.recipe.model.dtype,
        "store": str(plan.store.root),
        "demo": plan.recipe.model.source == "demo" and spec.source == "demo",
        "kernels": kernels,
        "limits": plan.recipe.limits.model_dump(),
    }


def _outcome(future: PrefectFuture[Any]) -> dict[str, Any]:
    """The result of a task, or {"error": one line}; siblings of a failed task go on."""
    try:
        result = future.result(raise_on_failure=False)
    except UnfinishedRun:  # it never began
        result = None
    if isinstance(result, dict):
        return result
    if isinstance(result, BaseException):
        reason = str(result) if isinstance(result, StepError) else f"{type(result).__name__}: {result}"
        return {"error": reason.splitlines()[0] if reason else type(result).__name__}
    return {"error": "not done: a step before it failed"}


def _document(
    plan: Plan, results: dict[str, dict[str, Any]], figures: dict[str, dict[str, Any]], original: dict[str, Any]
) -> dict[str, Any]:
    artifacts = []
    for name, job in plan.jobs.items():
        result, measured = results[name], figures.get(name, {})
        metrics = {**result.get("size", {}), **measured.get("metrics", {})}
        if "seconds" in result:
            metrics["step_seconds"] = result["seconds"]
        artifacts.append(
            {
                "node": name,
                "step": job.step,
                "branch": job.branch,
                "use": job.use,
                "config": job.config,
                "parent": job.parent,
                "leaf": name in plan.leaves,
                "path": result.get("path"),
                "digest": job.digest,
                "cached": result.get("cached", False),
                "measured_before": measured.get("cached", False),
                "seconds": result.get("seconds"),
                "error": result.get("error") or measured.get("error"),
                "metrics": metrics,
                "conditions": measured.get("conditions", {}),
                "report": result.get("report", {"layers": [], "summary": {}}),
                "run_id": result.get("run_id"),
            }
        )
    gates = judge(plan, artifacts)
    failed = bool(original.get("error")) or any(a["error"] for a in artifacts)
    verdict = "FAILED" if failed else "ACCEPT" if all(g["holds"] for g in gates.values()) else "REJECT"
    texts = {
        name: "\n".join(f["texts"].values()) for name, f in {"original": original, **figures}.items() if f.get("texts")
    }
    return {
        "name": plan.recipe.name,
        "recipe": yaml.safe_load(plan.recipe.model_dump_json(exclude_defaults=True)),
        "verdict": verdict,
        "gates": gates,
        "original": original.get("metrics", {}),
        "original_error": original.get("error"),
        "original_path": plan.root.path,
        "original_digest": plan.root.digest,
        "artifacts": artifacts,
        "conditions": original.get("conditions", {}),
        "samples": texts,
        "versions": versions(),
    }


def judge(plan: Plan, artifacts: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Hold every leaf against every gate; a leaf that has not the metric does not hold."""
    gates: dict[str, dict[str, Any]] = {}
    for metric, gate in plan.recipe.gates.items():
        values = {a["node"]: a["metrics"].get(metric) for a in artifacts if a["leaf"]}
        branch = max(values, key=lambda node: _excess(values[node], gate.min, gate.max))
        gates[metric] = {
            "min": gate.min,
            "max": gate.max,
            "holds": _excess(values[branch], gate.min, gate.max) <= 0,
            "worst": values[branch],
            "branch": branch,
        }
    return gates


def _excess(value: float | None, low: float | None, high: float | None) -> float:
    """How far a value lies outside its bounds, infinite where there is none; within them 0 or below."""
    if value is None or value != value:
        return float("inf")
    return max(value - high if high is not None else -float("inf"), low - value if low is not None else -float("inf"))


def _leave(plan: Plan, run: dict[str, Any], tracker: Tracker) -> None:
    """Pictures, report and run document, under the same names in every run."""
    run = redact_all(run)
    tracker.figure(draw_graph(run), "pictures/graph.png")
    if any(a["leaf"] and a["metrics"] for a in run["artifacts"]):
        tracker.figure(draw_front(run), "pictures/front.png")
    for artifact in run["artifacts"]:
        if artifact["run_id"]:
            for name, (figure, _) in step_pictures(artifact["report"], artifact["node"]).items():
                tracker.figure(figure, f"pictures/{name}.png", artifact["run_id"])
    tracker.text(render(run), "report.html")
    tracker.text(json.dumps(run, indent=1, default=str), "run.json")
    register(tracker.client, plan.store, run)
    worst = {f"worst.{name}": gate["worst"] for name, gate in run["gates"].items() if gate["worst"] is not None}
    first = first_error(run)
    headers, rows = results_rows(run)
    show_table("results", table(headers, rows), f"{run['name']}: {run['verdict']}")
    tracker.finish(
        run["verdict"], first, {"run_seconds": run["seconds"], "overhead_seconds": run["overhead_seconds"], **worst}
    )
