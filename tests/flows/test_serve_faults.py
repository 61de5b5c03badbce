"""`serve` while something breaks: its servers, its runs, itself; and a worker that joins from elsewhere."""

from __future__ import annotations

import contextlib
import json
import platform
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tensorpress.flows.children import answers_at

HEAL = {"use": "distill", "after": "model", "batch_tokens": 128}
FOR_EVER, A_WHILE = 50_000_000, 200_000


def start(served: Any, text: str, **parameters: Any) -> str:
    answer = served.start("compress/compress", recipe="the text below", text=text, **parameters)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def all_completed(served: Any, run_id: str) -> None:
    """Prefect hears of tasks by events, a little later."""
    end = time.monotonic() + 30
    while set(states := served.tasks_of(run_id).values()) != {"COMPLETED"}:
        assert time.monotonic() < end, states
        time.sleep(0.5)


def child(served: Any, name: str) -> psutil.Process:
    children = psutil.Process(served.process.pid).children()
    return next(process for process in children if name in " ".join(process.cmdline()))


def unfinished(served: Any) -> list[str]:
    """Flow runs, tasks and MLflow runs that are said to be at work."""
    from tensorpress.tasks.tracking import open_client

    body = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    flows = served.api("POST", "/flow_runs/filter", flow_runs=body).json()
    tasks = served.api("POST", "/task_runs/filter", task_runs=body).json()
    client = open_client(served.store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "attributes.status = 'RUNNING'")
    return [each["name"] for each in (*flows, *tasks)] + [run.info.run_name for run in runs]


@pytest.mark.timeout(600)
def test_servers_that_die_while_a_run_works(served, recipe_text):
    """Prefect's, then MLflow's: the run goes on, ends as it would have, and its artifact is the one that nobody disturbed."""
    text = recipe_text(name="broken", steps={"heal": {**HEAL, "tokens": A_WHILE}})
    run_id = start(served, text)
    served.at_work(run_id, "broken: heal")
    for name in ("prefect_app", "mlflow"):
        victim = child(served, name)
        victim.kill()
        victim.wait(10)
        time.sleep(3)
    end = time.monotonic() + 120
    while not all(answers_at(f"{address}/health")() for address in (f"{served.prefect}/api", served.mlflow)):
        assert time.monotonic() < end, served.output.read_text()
        time.sleep(0.5)
    assert served.ended(run_id, 300)["state_type"] == "COMPLETED"
    all_completed(served, run_id)
    (served.folder / "broken.yaml").write_text(text)
    line = served.command("run", "broken.yaml", "--store", "undisturbed", "--json", "undisturbed.json")
    assert line.returncode == 0, line.stderr
    (made,) = json.loads((served.folder / "undisturbed.json").read_text())["artifacts"]
    weights = [
        store / "models" / made["digest"] / "model.safetensors"
        for store in (served.store, Path(made["path"]).parents[1])
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not unfinished(served)


@pytest.mark.timeout(600)
def test_a_database_that_another_program_holds_for_half_a_minute(served, recipe_text):
    """Prefect's: its server waits, the run goes on."""
    run_id = start(served, recipe_text(name="locked", steps={"heal": {**HEAL, "tokens": 20_000}}))
    served.at_work(run_id, "locked: heal")
    with contextlib.closing(sqlite3.connect(served.store / "prefect/prefect.db", timeout=30)) as database:
        database.isolation_level = None
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(31)
        database.execute("COMMIT")
    assert served.ended(run_id, 300)["state_type"] == "COMPLETED"
    all_completed(served, run_id)


@pytest.mark.timeout(600)
def test_a_run_that_is_killed_leaves_nothing_at_work(served, recipe_text):
    """kill -9 of a night's process: the next run tells of the night, of the run below it and of their tasks."""
    steps = {"heal": {**HEAL, "tokens": FOR_EVER}}
    runs = [{"recipe": "the text below", "text": recipe_text(name="killed", steps=steps)}]
    night = served.started("nightly/nightly", runs=runs)
    end = time.monotonic() + 90
    below: list[dict] = []
    while not below or served.tasks_of(below[0]["id"]).get("killed: heal") != "RUNNING":
        below = served.api("POST", "/flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [night]}}).json()
        assert time.monotonic() < end
        time.sleep(0.3)
    process = served.process_of(night)
    process.kill()
    assert served.ended(night)["state_type"] == "CRASHED"
    after = start(served, recipe_text(name="after"))
    assert served.ended(after)["state_type"] == "COMPLETED"
    assert not unfinished(served)
    assert served.flow_run(below[0]["id"])["state_type"] == "CRASHED"
    assert served.tasks_of(below[0]["id"])["killed: heal"] == "CRASHED"
    assert not list((served.store / "running").glob("*.json"))
    _done_once_more(served, night)


def _done_once_more(served: Any, run_id: str) -> None:
    """*Retry* in Prefect's page: the run works again, and does not take itself for the one that was killed."""
    (served.store / "running" / f"{run_id}.json").write_text(
        json.dumps({"host": platform.node(), "pid": str(2**22 - 1), "born": "", "flow_run_id": run_id, "tag": None})
    )
    again = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    assert served.api("POST", f"/flow_runs/{run_id}/set_state", state=again, force=True).json()["status"] == "ACCEPT"
    end = time.monotonic() + 90
    while served.flow_run(run_id)["state_type"] != "RUNNING" or not list((served.store / "running").glob("*.json")):
        assert time.monotonic() < end, served.flow_run(run_id)["state"]
        time.sleep(0.3)
    time.sleep(8)
    assert served.flow_run(run_id)["state_type"] == "RUNNING"
    state = {"type": "CANCELLING", "name": "Cancelling"}
    served.api("POST", f"/flow_runs/{run_id}/set_state", state=state, force=False)
    assert served.ended(run_id, 60)["state_type"] == "CANCELLED"


@pytest.mark.timeout(600)
def test_a_step_that_fails_is_told_once(served, recipe_text):
    """A limit that is reached: the flow fails with its line, others go on, and no log has a traceback."""
    steps = {"heal": {**HEAL, "tokens": FOR_EVER}, "quantize": {"use": "gptq", "after": "model", "group_size": 32}}
    run_id = start(served, recipe_text(name="late", steps=steps, limits={"seconds": 20}))
    run = served.ended(run_id, 300)
    assert run["state_type"] == "FAILED" and "heal" in run["state"]["message"]
    states = served.tasks_of(run_id)
    assert states["late: heal"] == "FAILED" and states["evaluate late: quantize"] == "COMPLETED"
    said = served.said_by(run_id, "20 s")
    assert not [message for message in said if "Traceback" in message or "\n" in message.strip()]


@pytest.mark.timeout(600)
def test_the_deployment_that_measures_speed(served):
    run_id = served.started("benchmark/benchmark", model="llama", prompt=16, tokens=4, repeats=1)
    assert served.ended(run_id)["state_type"] == "COMPLETED"
    found = served.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [run_id]}}).json()
    pages = {artifact["key"]: artifact["data"] for artifact in found}
    assert "decode_tokens_per_second" in pages["speed"].replace("\\", "") and served.mlflow in pages["mlflow-run"]


def test_nothing_is_told_to_anybody(served):
    """Prefect's and MLflow's telemetry are off in each process that runs for long."""
    for process in psutil.Process(served.process.pid).children():
        given = process.environ()
        assert given["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false", process
        assert given["MLFLOW_DISABLE_TELEMETRY"] == given["DO_NOT_TRACK"] == "true", process


@pytest.mark.timeout(900)
def test_a_worker_joins_and_servers_end_however_they_are_ended(serve, small_folder, recipe_text):
    """Servers without a worker; one joins with a store of its own, works, leaves. kill -9 of `serve` frees its ports; Ctrl-C ends it."""
    folder = small_folder("joined")
    with serve(folder, "--no-worker", end=signal.SIGKILL) as served:
        run_id = start(served, recipe_text(name="afar"))
        options = ["--mlflow", served.mlflow, "--store", "elsewhere", "--token-file", served.store / "serve/token"]
        worker = served.begin("worker", served.prefect, *options)
        try:
            assert served.ended(run_id)["state_type"] == "COMPLETED"
            family = psutil.Process(worker.pid).children(recursive=True)
        finally:
            worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
        assert not psutil.wait_procs(family, timeout=5)[1]
        assert list((folder / "elsewhere/models").glob("[0-9a-f]*/model.safetensors"))
        assert not (folder / "mlruns/models").exists() or not list((folder / "mlruns/models").glob("[0-9a-f]*"))
        _is_tracked(served, run_id)
    with serve(folder, "--no-worker", end=signal.SIGINT, ports=served.ports) as again:
        assert again.flow_run(run_id)["state_type"] == "COMPLETED", "the database was lost"
        assert "token:   as before" in again.output.read_text()
    assert "stopped" in again.output.read_text()


def _is_tracked(served: Any, run_id: str) -> None:
    """MLflow has the run."""
    import httpx

    def ask(what: str, **body: Any) -> Any:
        address = f"{served.mlflow}/api/2.0/mlflow/{what}/search"
        return httpx.post(
            address, json={"max_results": 50, **body}, auth=served.auth, timeout=30, trust_env=False
        ).json()

    experiments = ask("experiments")["experiments"]
    ids = [experiment["experiment_id"] for experiment in experiments]
    runs = ask("runs", experiment_ids=ids, filter=f"tags.`tensorpress.flow_run_id` = '{run_id}'")["runs"]
    assert [run["info"]["status"] for run in runs] == ["FINISHED"]
