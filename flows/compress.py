"""Flow: run a recipe. Load the model, do every step on every branch, measure, judge, and leave everything tracked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml
from prefect import flow
from prefect.context import get_run_context
from prefect.exceptions import UnfinishedRun
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel, ConfigDict, Field

from tensorpress import recipe as recipes
from tensorpress.artifact import Store
from tensorpress.compressors.catalog import METHODS
from tensorpress.errors import StepError
from tensorpress.evaluators.catalog import MEASURES
from tensorpress.pictures.front import draw_front
from tensorpress.pictures.graph import draw_graph
from tensorpress.pictures.layers import draw_layer_map
from tensorpress.pictures.report import render
from tensorpress.tasks.evaluate import run_evaluation
from tensorpress.tasks.load import load_model
from tensorpress.tasks.planning import Plan, make_plan
from tensorpress.tasks.step import run_step
from tensorpress.tasks.tracking import Tracker
from tensorpress.versions import versions


class CompressParameters(BaseModel):
    """What a run of a recipe takes."""

    model_config = ConfigDict(extra="forbid")

    recipe: str = Field(title="Recipe", description="the recipe, as YAML text")
    folder: str = Field(
        ".",
        title="Folder",
        description="folder of the recipe file; paths outside it and the working folder are refused",
    )
    overrides: list[str] = Field([], title="Overrides", description="such as steps.quantize.bits=3")
    store: str = Field(
        "mlruns", title="Store", description="folder of artifacts, measurements and the tracking database"
    )
    kernels: str = Field("auto", title="Kernels", description="auto, or the name of one backend")


def prepare(parameters: CompressParameters) -> Plan:
    """Check a run's recipe, model and texts; nothing is written. Raises InputError."""
    recipe = recipes.parse_text(parameters.recipe, METHODS, MEASURES, parameters.overrides, Path(parameters.folder))
    return make_plan(recipe, Store(parameters.store), recipes.resolved(parameters.recipe, parameters.overrides))


@flow(name="compress", task_runner=ThreadPoolTaskRunner(max_workers=1), persist_result=False, validate_parameters=True)  # type: ignore[arg-type]
def compress(parameters: CompressParameters) -> dict[str, Any]:
    """Run a recipe and return its run document. One task at a time: at most one model and its original are in memory."""
    start = time.monotonic()
    plan = prepare(parameters)
    plan.store.open()
    context = get_run_context()
    flow_run_id = str(context.flow_run.id)  # type: ignore[union-attr]
    asked = {"overrides": ", ".join(parameters.overrides) or "-", "kernels": parameters.kernels}
    tracker = Tracker.start(plan, flow_run_id, asked)
    try:
        run = _run(plan, tracker, parameters.kernels)
        run |= {"flow_run_id": flow_run_id, "mlflow_run_id": tracker.handle["run_id"]}
        run["seconds"] = round(time.monotonic() - start, 3)
        run["overhead_seconds"] = round(run["seconds"] - run.pop("_inside"), 3)
        _leave(run, tracker)
    except BaseException as error:
        tracker.fail(tracker.handle["run_id"], error)
        raise
    return run


def _run(plan: Plan, tracker: Tracker, kernels: str) -> dict[str, Any]:
    began = time.monotonic()
    handle = tracker.handle
    root = load_model.submit(plan.recipe.model.source, plan.root.path, str(plan.store.root))
    asked = _evaluation_job(plan, kernels)
    original = run_evaluation.submit("original", asked, root, None, handle)  # type: ignore[call-overload]
    steps: dict[str, PrefectFuture[Any]] = {}
    measured: dict[str, PrefectFuture[Any]] = {}
    for name, job in plan.jobs.items():  # what is made is measured next: its MLflow run then ends
        parent, last = steps.get(job.parent, root), name not in plan.evaluated
        steps[name] = run_step.submit(name, job.to_dict(), parent, handle, last)  # type: ignore[call-overload]
        if not last:
            measured[name] = run_evaluation.submit(name, asked, steps[name], original, handle)  # type: ignore[call-overload]
    results = {name: _outcome(future) for name, future in steps.items()}
    figures = {name: _outcome(future) for name, future in measured.items()}
    first = _outcome(original)
    inside = sum(r.get("work_seconds", 0.0) for r in (*results.values(), *figures.values(), first))
    for name, figure in figures.items():
        if figure.get("error") and results[name].get("run_id"):
            tracker.close_step(results[name]["run_id"], figure["error"])
    run = _document(plan, results, figures, first)
    run["_inside"] = min(inside, time.monotonic() - began)
    return run


def _evaluation_job(plan: Plan, kernels: str) -> dict[str, Any]:
    spec = plan.recipe.data.evaluation
    return {
        "measures": list(plan.recipe.evaluate.use),
        "evaluation": spec.model_dump(mode="json"),
        "root": {"path": plan.root.path, "digest": plan.root.digest},
        "dtype": plan.recipe.model.dtype,
        "store": str(plan.store.root),
        "demo": plan.recipe.model.source == "demo" and spec.source == "demo",
        "kernels": kernels,
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


def _leave(run: dict[str, Any], tracker: Tracker) -> None:
    """Pictures, report and run document, under the same names in every run."""
    tracker.figure(draw_graph(run), "pictures/graph.png")
    if any(a["leaf"] and a["metrics"] for a in run["artifacts"]):
        tracker.figure(draw_front(run), "pictures/front.png")
    for artifact in run["artifacts"]:
        if artifact["run_id"] and artifact["report"]["layers"]:
            tracker.figure(
                draw_layer_map(artifact["report"], artifact["node"]), "pictures/layers.png", artifact["run_id"]
            )
    tracker.text(render(run), "report.html")
    tracker.text(json.dumps(run, indent=1, default=str), "run.json")
    worst = {f"worst.{name}": gate["worst"] for name, gate in run["gates"].items() if gate["worst"] is not None}
    errors = [run["original_error"], *(f"{a['node']}: {a['error']}" for a in run["artifacts"] if a["error"])]
    first = next((error for error in errors if error), None)
    tracker.finish(
        run["verdict"], first, {"run_seconds": run["seconds"], "overhead_seconds": run["overhead_seconds"], **worst}
    )
