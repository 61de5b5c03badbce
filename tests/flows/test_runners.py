"""The same recipe on threads, Dask and Ray: the same artifacts, and branches really side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tensorpress.errors import InputError, StepError
from tensorpress.flows.graph import Work, _next, task_runner, threads_for
from tensorpress.flows.parameters import Runner
from tensorpress.flows.serving import connected_client, worker_environment

HEAL = {"use": "distill", "after": "model", "tokens": 40_000, "batch_tokens": 256}
STEPS = {"heal": {**HEAL, "learning_rate": {"each": [1e-3, 5e-4]}}}


def digests(document: dict) -> dict[str, str]:
    assert all(Path(a["path"], "model.safetensors").is_file() for a in document["artifacts"])
    return {a["node"]: a["digest"] for a in document["artifacts"]}


def overlap(address: str, flow_run_id: str) -> bool:
    """Whether a task of one branch and one of the other were at work at the same moment, by Prefect's own clock."""
    from prefect.client.schemas.filters import FlowRunFilter

    with connected_client(address, None) as client:
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [flow_run_id]}}))
    branches: dict[str, list[Any]] = {}
    for task in tasks:
        if ": heal" in task.name:
            branches.setdefault(task.name.removeprefix("evaluate "), []).append(task)
    one, other = branches.values()
    spans = [(a.start_time, a.end_time, b.start_time, b.end_time) for a in one for b in other]
    print(spans)
    return any(begun < others_end and others_begun < end for begun, end, others_begun, others_end in spans)


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


@pytest.mark.timeout(600)
def test_workers_of_dask_with_a_store_on_s3(prefect_api, recipe, tensorpress_run, monkeypatch, s3):
    """What one machine's workers made, another's find behind the same digests: nothing is made twice."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    monkeypatch.setenv("TENSORPRESS_REMOTE", s3)
    quantize = {"use": "gptq", "after": "heal", "group_size": 32, "bits": {"each": [4, 8]}}
    path = recipe(steps={"heal": {**HEAL, "tokens": 2_000}, "quantize": quantize}, evaluate=["perplexity", "size"])
    documents = []
    for machine in ("a", "b"):
        options = ["--runner", "dask", "--parallel", 2, "--store", machine, "--json", f"{machine}.json"]
        ended = tensorpress_run("run", path, *options)
        assert ended.code == 0, ended.err + ended.out
        documents.append(json.loads(Path(f"{machine}.json").read_text()))
    made, found = documents
    assert [a["cached"] for a in made["artifacts"]] == [False] * 3 and [a["cached"] for a in found["artifacts"]] == [
        True
    ] * 3
    assert digests(made) == digests(found)
    assert made["original"] == found["original"]


def test_threads_are_shared_out(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert [threads_for(Runner(parallel=count)) for count in (1, 3, 8, 20)] == [8, 2, 1, 1]
    assert threads_for(Runner(kind="dask", parallel=3, address="tcp://far:8786")) == 0, (
        "the cluster's workers have their own"
    )
    given = [worker_environment("http://a/api", "t", "http://m", limit) for limit in (2, 16)]
    assert [environment["OMP_NUM_THREADS"] for environment in given] == ["4", "1"]


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
