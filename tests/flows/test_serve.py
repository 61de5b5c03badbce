"""`serve`: what a user and a stranger get, the form, the same digests as the command line, cancelling, dying servers."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from prefect.flows import load_flow_from_entrypoint

from tensorpress.files import umask
from tensorpress.flows import deployments
from tensorpress.flows.parameters import CompressParameters
from tensorpress.flows.serving import Options, check


def status(address: str, **options) -> int:
    return httpx.get(address, timeout=10, trust_env=False, **options).status_code


def test_what_it_says(served):
    said = served.output.read_text()
    assert served.prefect in said and served.mlflow in said
    assert said.count(served.token) == 1
    assert stat.S_IMODE((served.store / "serve/token").stat().st_mode) == 0o600
    assert stat.S_IMODE((served.store / "serve").stat().st_mode) == 0o700


def test_started_twice(served):
    again = served.command("serve")
    assert again.returncode == 0, again.stderr
    assert served.prefect in again.stdout and served.mlflow in again.stdout and served.token not in again.stdout
    assert served.process.poll() is None


def test_a_port_that_is_taken_and_hosts_that_are_refused(served, tensorpress_run, tmp_path):
    port = served.prefect.rsplit(":", 1)[1]
    result = tensorpress_run("serve", "--store", tmp_path / "other", "--prefect-port", port)
    assert result.code == 2 and f"--prefect-port {port}: is taken" in result.err
    result = tensorpress_run("serve", "--store", tmp_path / "other", "--host", "0.0.0.0")
    assert result.code == 2 and "--name" in result.err
    result = tensorpress_run("serve", "--store", tmp_path / "other", "--host", "192.0.2.1")
    assert result.code == 2 and "192.0.2.1" in result.err
    result = tensorpress_run("serve", "--store", tmp_path / "other", "--prefect-port", 5000)
    assert result.code == 2 and "--mlflow-port 5000" in result.err
    assert not (tmp_path / "other").exists()


def test_strangers_are_refused_by_prefect(served):
    api = f"{served.prefect}/api"
    assert status(f"{api}/admin/version") == 401
    assert status(f"{api}/admin/version", auth=("tensorpress", "wrong")) == 401
    assert status(f"{api}/admin/version", auth=served.auth) == 200
    assert status(f"{api}/admin/version", auth=served.auth, headers={"Host": "evil.example"}) == 400
    assert status(served.prefect, headers={"Host": "evil.example:4200"}) == 400
    answer = httpx.get(f"{api}/admin/version", auth=served.auth, headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    wish = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{api}/flow_runs/filter", headers=wish).status_code == 400
    # what a form on a foreign page could send: the browser adds the credentials, not the CSRF token
    sent = httpx.post(f"{api}/flow_runs/filter", auth=served.auth, json={}, timeout=10)
    assert sent.status_code == 403


def test_strangers_are_refused_by_mlflow(served):
    search = f"{served.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    assert status(search) == 401
    assert status(search, auth=("tensorpress", "wrong")) == 401
    assert status(search, auth=served.auth) == 200
    assert status(search, auth=served.auth, headers={"Host": "evil.example"}) == 403
    foreign = {"Origin": "http://evil.example"}
    create = f"{served.mlflow}/api/2.0/mlflow/experiments/create"
    assert httpx.post(create, auth=served.auth, headers=foreign, json={"name": "x"}, timeout=10).status_code == 403


def test_servers_listen_on_this_machine_alone(served):
    family = psutil.Process(served.process.pid).children(recursive=True)
    heard = {c.laddr.ip for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert heard == {"127.0.0.1"}


def test_the_forms(served):
    for name, flow in deployments.FLOWS.items():
        assert load_flow_from_entrypoint(f"tensorpress.flows.{name}.{name}").name == name
        deployed = served.deployment(f"{name}/{name}")
        assert deployed["enforce_parameter_schema"]
        assert deployed["parameter_openapi_schema"] == json.loads(json.dumps(flow.parameters.model_dump_for_openapi()))
    fields = CompressParameters.model_json_schema()["properties"]
    for name in ("recipe", "model", "bits", "keep", "tokens", "minutes"):
        assert fields[name]["title"] and fields[name]["description"], name
    assert {"quickstart", "the text below"} <= set(fields["recipe"]["enum"]) and "4" in fields["bits"]["enum"]


def test_the_flows_are_light_to_import():
    """Servers need their forms, and Prefect imports the flow again for the hooks of a cancelled run, which must not take long."""
    code = "import sys, tensorpress.flows.deployments; print({'torch', 'mlflow', 'transformers', 'matplotlib'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"bits": "5"}, "bits"),
        ({"keep": 1.5}, "keep"),
        ({"tokens": 0}, "tokens"),
        ({"recipe": "nothing"}, "recipe"),
        ({"runner": {"parallel": 65}}, "parallel"),
        ({"bitz": 4}, "bitz"),
    ],
)
def test_a_bad_value_is_refused_with_its_field(served, parameters, place):
    answer = served.start("compress/compress", **parameters)
    assert answer.status_code == 409 and place in answer.text, answer.text


def test_a_run_from_the_form_does_what_the_command_line_does(served, recipe_text):
    text = recipe_text(
        steps={"quantize": {"use": "gptq", "after": "model", "group_size": 32, "bits": {"each": [4, 8]}}}
    )
    (served.folder / "recipe.yaml").write_text(text)
    answer = served.start("compress/compress", recipe="the text below", text=text, bits="3")
    assert answer.status_code == 201, answer.text
    run = served.ended(answer.json()["id"])
    assert run["state_type"] == "COMPLETED" and "small" in run["name"] and "bits 3" in run["name"], run["state"]
    options = ["--set", "steps.quantize.bits=3", "--json", "out.json"]
    line = served.command("run", "recipe.yaml", *options)
    assert line.returncode == 0, line.stderr
    assert f"dashboard:  {served.mlflow}\n" in line.stdout
    document = json.loads((served.folder / "out.json").read_text())
    assert [a["cached"] for a in document["artifacts"]] == [True], "the digests differ"
    assert served.flow_run(document["flow_run_id"])["state_type"] == "COMPLETED", "it used another server"

    shown = _shown(served, run["id"])
    assert "quantize" in shown["results"] and "perplexity ratio" in shown["results"]
    assert f"{served.mlflow}/#/experiments/" in shown["mlflow-run"]
    assert {"small: quantize", "evaluate small: quantize", "evaluate small: original"} <= served.tasks_of(
        run["id"]
    ).keys()
    link = rf"{re.escape(served.mlflow)}/#/experiments/\d+/runs/{document['mlflow_run_id']}"
    assert re.search(link, _shown(served, document["flow_run_id"])["mlflow-run"]), "the command line's run has none"


def _shown(served, run_id: str) -> dict[str, str]:
    """What a flow run left to be shown, by key."""
    found = served.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [run_id]}}).json()
    return {artifact["key"]: artifact["data"] for artifact in found}


def test_a_recipe_that_cannot_be_used_fails_with_its_line(served):
    answer = served.start("compress/compress", recipe="the text below", text="name: [")
    run = served.ended(answer.json()["id"])
    assert run["state_type"] == "FAILED" and "not YAML" in run["state"]["message"]
    logs = served.api("POST", "/logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}}).json()
    assert not [entry["message"] for entry in logs if "Traceback" in entry["message"]]


def test_cancel(served, recipe_text):
    steps = {"heal": {"use": "distill", "after": "model", "tokens": 50_000_000, "batch_tokens": 128}}
    text = recipe_text(name="long", steps=steps)
    run_id = served.started("compress/compress", recipe="the text below", text=text)
    end = time.monotonic() + 90
    while not list((served.store / "models").glob(".part-*")) and not _tasks(served, run_id, "long: heal"):
        assert time.monotonic() < end
        time.sleep(0.3)
    while not _bars(served, run_id):
        assert time.monotonic() < end, "no bar for a step that takes long"
        time.sleep(0.5)
    working = _below(served)
    start = time.monotonic()
    state = {"type": "CANCELLING", "name": "Cancelling"}
    assert served.api("POST", f"/flow_runs/{run_id}/set_state", state=state, force=False).json()["status"] == "ACCEPT"
    assert served.ended(run_id, 30)["state_type"] == "CANCELLED"
    took = time.monotonic() - start
    print(f"cancelled after {took:.1f} s")  # the bar is that of benchmarks/operations.py
    _gone, alive = psutil.wait_procs(working - _below(served), timeout=10)
    assert not alive and not list((served.store / "models").glob(".part-*"))
    from tensorpress.tasks.tracking import open_client

    client = open_client(served.store)
    experiments = [e.experiment_id for e in client.search_experiments()]
    mine = client.search_runs(experiments, f"tags.tensorpress.flow_run_id = '{run_id}'")
    assert [run.info.status for run in mine] == ["KILLED"]


def test_a_server_that_is_killed_is_started_again(served):
    for name, address in (("prefect_app", f"{served.prefect}/api/health"), ("mlflow", f"{served.mlflow}/health")):
        children = psutil.Process(served.process.pid).children()
        (victim,) = [child for child in children if name in " ".join(child.cmdline())]
        victim.send_signal(signal.SIGKILL)
        victim.wait(10)
        end = time.monotonic() + 60
        while True:
            try:
                if (
                    victim.pid not in {c.pid for c in psutil.Process(served.process.pid).children()}
                    and status(address) == 200
                ):
                    break
            except httpx.HTTPError:
                pass
            assert time.monotonic() < end
            time.sleep(0.3)
    assert "died; it is started again" in served.output.read_text()


def test_worker_refuses_what_it_cannot_join(served, tensorpress_run, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORPRESS_TOKEN", served.token)
    join = ["worker", served.prefect, "--mlflow", served.mlflow, "--store", tmp_path / "w"]
    wrong = tmp_path / "token"
    wrong.write_text("wrong")
    for arguments, part in (
        ([*join, "--token-file", wrong], "does not take this token"),
        ([*join, "--token-file", tmp_path / "none"], "cannot be read"),
        (["worker", "http://127.0.0.1:9", *join[2:]], "no Prefect server answers"),
        (["worker", served.prefect, "--mlflow", "http://127.0.0.1:9", *join[4:]], "no MLflow server answers"),
    ):
        result = tensorpress_run(*arguments)
        assert result.code == 2 and part in result.err, result.err
    monkeypatch.delenv("TENSORPRESS_TOKEN")
    assert "token: is missing" in tensorpress_run(*join).err


def test_hosts_by_name():
    assert Options(Path("s"), "127.0.0.1").prefect == "http://127.0.0.1:4200"
    named = Options(Path("s"), "0.0.0.0", allowed_hosts=("farm.example",), prefect_port=0, mlflow_port=1)
    assert named.mlflow == "http://farm.example:1"
    with pytest.raises(Exception, match="one each"):
        check(Options(Path("s"), prefect_port=4200, mlflow_port=4200))


def _tasks(served, run_id: str, name: str) -> list[dict]:
    found = served.api("POST", "/task_runs/filter", flow_runs={"id": {"any_": [run_id]}}).json()
    return [task for task in found if task["name"] == name and task["state_type"] == "RUNNING"]


def _bars(served, run_id: str) -> list[dict]:
    shown = served.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [run_id]}}).json()
    return [artifact for artifact in shown if artifact["type"] == "progress"]


def _below(served) -> set[psutil.Process]:
    """The processes of flow runs and their steps."""
    family = psutil.Process(served.process.pid).children(recursive=True)
    return {
        p
        for p in family
        if any(part in " ".join(p.cmdline()) for part in ("prefect.engine", "tensorpress.tasks", "flow-run"))
    }


def test_umask_of_the_store_is_the_users(served):
    assert stat.S_IMODE((served.store / "models").stat().st_mode) == 0o777 & ~umask()
