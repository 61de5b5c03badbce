"""The same recipe on threads, Dask and Ray: the same artifacts, and branches really side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tensorpress.errors import InputError, StepError
from tensorpress.flows.graph import Work, _next, task_runner
from tensorpress.flows.parameters import Runner

HEAL = {"use": "distill", "after": "model", "tokens": 40_000, "batch_tokens": 256}
STEPS = {"heal": {**HEAL, "learning_rate": {"each": [1e-3, 5e-4]}}}


def digests(document: dict) -> dict[str, str]:
    assert all(Path(a["path"], "model.safetensors").is_file() for a in document["artifacts"])
    return {a["node"]: a["digest"] for a in document["artifacts"]}


def overlap(address: str, flow_run_id: str) -> bool:
    """Whether two branches (a step and its measurement) were at work at the same moment, by Prefect's own clock."""
    import httpx

    body = {"flow_runs": {"id": {"any_": [flow_run_id]}}}
    tasks = httpx.post(f"{address}/task_runs/filter", json=body, timeout=30).json()
    branches: dict[str, list[dict]] = {}
    for task in tasks:
        if ": heal" in task["name"]:
            branches.setdefault(task["name"].removeprefix("evaluate "), []).append(task)
    spans = sorted((min(t["start_time"] for t in b), max(t["end_time"] for t in b)) for b in branches.values())
    print(spans)
    return len(spans) == 2 and spans[1][0] < spans[0][1]


@pytest.mark.timeout(900)
def test_the_same_artifacts_side_by_side(prefect_api, recipe, tensorpress_run, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    path = recipe(steps=STEPS, evaluate=["perplexity", "size"])
    alone = tensorpress_run("run", path, "--store", "alone", "--json", "alone.json")
    assert alone.code == 0, alone.err
    for kind in ("threads", "dask", "ray"):
        options = ["--runner", kind, "--parallel", 3]  # the third measures the original meanwhile
        both = tensorpress_run("run", path, "--store", kind, "--json", f"{kind}.json", *options)
        assert both.code == 0, both.err + both.out
        document = json.loads(Path(f"{kind}.json").read_text())
        assert document["original"] == pytest.approx(json.loads(Path("alone.json").read_text())["original"])
        assert digests(document) == digests(json.loads(Path("alone.json").read_text()))
        assert overlap(prefect_api, document["flow_run_id"]), f"{kind}: one branch waited for the other"


def test_what_is_timed_runs_alone():
    def work(name: str, needs: tuple[str, ...] = (), alone: bool = False) -> Work:
        return Work(name, None, {}, {need: need for need in needs}, alone)  # type: ignore[arg-type]

    waiting = {w.name: w for w in (work("time", alone=True), work("a"), work("b", needs=("a",)))}
    assert _next(waiting, {}, [], 2).name == "a"
    assert _next({"time": waiting["time"]}, {}, [waiting["a"]], 2) is None
    assert _next({"time": waiting["time"], "b": waiting["b"]}, {}, [], 2).name == "time"
    assert _next({"b": waiting["b"]}, {"a": None}, [waiting["time"]], 2) is None
    assert _next(waiting, {}, [], 1).name == "time", "with one at a time the order stays"


def test_runners_that_are_not_there(monkeypatch):
    nobody = Runner(kind="dask", address="tcp://127.0.0.1:9")
    with pytest.raises(StepError, match=r"no dask cluster answers at tcp://127\.0\.0\.1:9"), task_runner(nobody):
        pass
    import builtins

    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("prefect_ray"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"tensorpress\[ray\]"), task_runner(Runner(kind="ray")):
        pass


def test_refused_on_the_command_line(recipe, tensorpress_run):
    path = recipe(steps=STEPS)
    for option, value in (("--parallel", 0), ("--parallel", 65), ("--runner", "slurm")):
        result = tensorpress_run("run", path, option, value)
        assert result.code == 2 and "Traceback" not in result.err
    assert not Path("mlruns").exists() and yaml.safe_load(Path(path).read_text())["name"] == "tiny"
