"""Faults that are injected for real: what was finished is kept, what went wrong is one line, and the next run goes on from there."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tensorpress.digest import of_file
from tensorpress.tasks.alive import own_mark

LONG = {"use": "distill", "after": "model", "tokens": 10_000_000, "batch_tokens": 256}
QUICK = {"use": "gptq", "after": "model", "group_size": 32}
TWO = {"first": QUICK, "second": {**QUICK, "bits": 3}}


@pytest.fixture
def address(prefect_api, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    return prefect_api


begun: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_runs_afterwards():
    """A test that fails leaves no run behind that works on beside the others."""
    yield
    while begun:
        begun.pop().kill()


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    run = subprocess.Popen(
        [sys.executable, "-m", "tensorpress", "run", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
        start_new_session=True,
    )
    begun.append(run)
    return run


def wait_until(holds, seconds=180.0):
    end = time.monotonic() + seconds
    while not (value := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    assert value, "it did not come to that"
    return value


def statuses(store: Path) -> dict[str, list[str]]:
    client = MlflowClient(f"sqlite:///{store.absolute() / 'mlflow.db'}")
    found: dict[str, list[str]] = {}
    for run in client.search_runs([e.experiment_id for e in client.search_experiments()]):
        found.setdefault(run.info.run_name, []).append(run.info.status)
    return found


def none_runs(store: Path) -> bool:
    return not any("RUNNING" in each for each in statuses(store).values())


def weights(store: Path) -> dict[str, tuple[str, int]]:
    """Bytes and file of each artifact: a file that is written again is another one."""
    files = store.glob("models/[0-9a-f]*/model.safetensors")
    return {file.parent.name: (of_file(file), file.stat().st_ino) for file in files}


def child_of(run: subprocess.Popen[str], module: str = "tensorpress.tasks.child") -> psutil.Process | None:
    """The process of the step that a run works on, or another that a run has started."""
    try:
        family = psutil.Process(run.pid).children(recursive=True)
        return next((p for p in family if module in p.cmdline()), None)
    except psutil.Error:
        return None


def prefect_runs(store: Path, note: dict[str, str]) -> list[str]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"tags": {"all_": [note["tag"]]}}))
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter.model_validate({"tags": {"all_": [note["tag"]]}}))
    return [str(run.state_type.value) for run in (*runs, *tasks)]


@pytest.mark.timeout(300)
def test_killed_in_a_step(address, recipe, place):
    """Everything at once: the flow is killed; nothing says Running afterwards, and nothing half-written is left."""
    from tensorpress.flows.server import connected

    store = place / "store"
    path = recipe(steps={"first": QUICK, "second": LONG}, evaluate=["size"])
    quick = recipe(steps={"first": QUICK}, evaluate=["size"]).rename(place / "quick.yaml")
    recipe(steps={"first": QUICK, "second": LONG}, evaluate=["size"])
    run = start(path, "--store", store, TENSORPRESS_ISOLATE="1")
    child = wait_until(lambda: len(weights(store)) == 1 and "second" in statuses(store) and child_of(run))
    made = weights(store)
    (store / "models/.part-0123456789abcdef0123456789abcdef").mkdir()
    (note,) = (store / "running").glob("*.json")
    known = json.loads(note.read_text())
    run.kill()
    run.communicate()
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    with connected(address):
        assert "RUNNING" in prefect_runs(store, known)
    again = start(quick, "--store", store)
    assert again.wait() == 0, again.communicate()
    assert weights(store) == made, "a finished artifact was made again"
    found = statuses(store)
    assert found["second"] == ["KILLED"] and none_runs(store)
    assert not list((store / "running").iterdir()) and not list((store / "models").glob(".part*"))
    with connected(address):
        assert set(prefect_runs(store, known)) <= {"CRASHED", "COMPLETED"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", ["killed", "hangs"])
def test_a_step_that_dies_or_hangs_fails_alone(address, recipe, place, fault):
    limits = {"seconds": 15} if fault == "hangs" else {"memory": 64}
    path = recipe(steps={"endless": LONG, "after": {**QUICK, "after": "endless"}, "other": QUICK}, limits=limits)
    run = start(path, "--store", "store", "--json", "out.json", "--set", "evaluate=[size]")
    child = wait_until(lambda: child_of(run, "tensorpress.fresh") and child_of(run))  # not that of a measurement
    if fault == "killed":
        wait_until(lambda: child.memory_info().rss > 2e8)
        child.kill()
    out, err = run.communicate()
    assert run.returncode == 1, out + err
    nodes = {a["node"]: a for a in json.loads(Path("out.json").read_text())["artifacts"]}
    wanted = "took longer than 15 s and was stopped (limits.seconds)" if fault == "hangs" else "was killed by signal 9"
    assert nodes["endless"]["error"].startswith(wanted)
    assert nodes["after"]["error"] and not nodes["other"]["error"] and Path(nodes["other"]["path"]).is_dir()
    found = statuses(Path("store"))
    assert found["endless"] == ["FAILED"] and found["other"] == ["FINISHED"]
    assert not list(Path("store/models").glob(".part*"))


@pytest.mark.timeout(300)
def test_the_server_of_the_run_is_killed(recipe, place, monkeypatch):
    """It is started again with what it knew, and the work goes on."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    run = start(recipe(steps=TWO, evaluate=["size"]), "--store", "store", "--json", "out.json")
    wait_until(lambda: weights(Path("store")))
    family = psutil.Process(run.pid).children(recursive=True)
    (server,) = [p for p in family if "tensorpress.flows.keeper" in p.cmdline()]
    server.kill()
    out, err = run.communicate()
    assert run.returncode == 0, out + err
    assert not [a for a in json.loads(Path("out.json").read_text())["artifacts"] if a["error"]]


@pytest.mark.timeout(300)
def test_a_server_of_others_goes_for_good(recipe, place, monkeypatch, tmp_path):
    """One line and exit code 1, not a hang; what was finished is kept."""
    from tensorpress.flows.server import PrefectServer

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    server = PrefectServer(tmp_path / "elsewhere")
    address = server.wait()
    path = recipe(steps=TWO, evaluate=["size"])
    run = start(path, "--store", "store", PREFECT_API_URL=address, PREFECT_CLIENT_MAX_RETRIES="2")
    wait_until(lambda: weights(Path("store")))
    server.stop()
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1, out + err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert f"the Prefect server at {address} failed" in line and "run the same command again" in line
    assert len(weights(Path("store"))) >= 1
    assert none_runs(Path("store"))


@pytest.mark.timeout(300)
def test_mlflow_goes_in_mid_run(address, recipe, place, monkeypatch):
    port = 20_000 + os.getpid() % 20_000
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{place / 'm.db'}", "--artifacts-destination", str(place / "files")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(
        command,
        env={**os.environ, **quiet},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        import httpx

        def answers():
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(answers)
        tracking = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        run = start(recipe(steps=TWO, evaluate=["size"]), "--store", "store", **tracking)
        wait_until(lambda: weights(Path("store")))
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1, out + err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert f"tracking: http://127.0.0.1:{port} does not answer; what was finished is kept" in line
    made = weights(Path("store"))
    again = start(recipe(steps=TWO, evaluate=["size"]), "--store", "store")
    assert again.wait() == 0
    assert made.items() <= weights(Path("store")).items()


def test_the_database_is_locked_by_another_program(address, recipe, place, tensorpress_run, monkeypatch):
    from tensorpress.tasks.tracking import patient

    path = recipe(steps={"first": QUICK}, evaluate=["size"])
    assert tensorpress_run("run", path, "--store", "store").code == 0
    hold = "import sqlite3, time; c = sqlite3.connect('store/mlflow.db', isolation_level=None); c.execute('BEGIN EXCLUSIVE'); "
    other = subprocess.Popen(
        [sys.executable, "-c", hold + "print(1, flush=True); time.sleep(30)"], stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline()
    assert tensorpress_run("run", path, "--store", "store").code == 0  # it waits
    assert other.wait() == 0
    monkeypatch.setattr(patient, "LOCKED_SECONDS", 0.0)
    other = subprocess.Popen(
        [sys.executable, "-c", hold + "print(1, flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdout.readline()
        refused = tensorpress_run("run", path, "--store", "store")
    finally:
        other.kill()
        other.wait()
    assert refused.code == 1 and "is locked by another program" in refused.err and len(refused.err.splitlines()) == 1


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(folder, kilobytes)`: a file system of that size at a folder."""
    mounted = []

    def mount(folder: Path, kilobytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        size = ["-o", f"size={kilobytes}k"]
        done = subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"NOT TESTED: a disk that is full; no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("full", ["weights", "database", "report"])
def test_the_disk_is_full(address, recipe, place, tensorpress_run, small_disk, full):
    store = place / "store"
    path = recipe(steps=TWO, evaluate=["size"])
    if full == "weights":
        small_disk(store / "models", 140)  # room for one
    else:
        if full == "database":
            small_disk(store, 16_384)
        one = recipe(steps={"first": QUICK}, evaluate=["size"])
        assert tensorpress_run("run", one, "--store", "store").code == 0
        recipe(steps=TWO, evaluate=["size"])
        if full == "report":
            small_disk(store / "artifacts", 16)
        else:
            room = os.statvfs(store)
            (store / "ballast").write_bytes(b"x" * (room.f_bavail * room.f_frsize - 20_000))
    before = weights(store)
    failed = tensorpress_run("run", path, "--store", "store")
    assert failed.code == 1, failed.out + failed.err
    said = failed.out + failed.err
    assert "Traceback" not in said and ("No space left" in said.replace("\n", " ") or "disk is full" in said)
    assert before.items() <= weights(store).items() and not list(store.glob("models/.part*"))
    if full == "weights":
        assert len(weights(store)) == 1
        subprocess.run(["mount", "-o", "remount,size=8192k", str(store / "models")], check=True)
    elif full == "report":
        subprocess.run(["mount", "-o", "remount,size=8192k", str(store / "artifacts")], check=True)
    else:
        (store / "ballast").unlink()
    before = weights(store)
    from tensorpress.tasks import tracking

    tracking._clients.clear()  # the next run is a process of its own
    assert tensorpress_run("run", path, "--store", "store").code == 0
    assert before.items() <= weights(store).items()


def test_a_clock_that_is_set_back_and_files_from_the_future(address, recipe, place, tensorpress_run, monkeypatch):
    path = recipe(steps={"first": QUICK}, evaluate=["size"])
    assert tensorpress_run("run", path, "--store", "store").code == 0
    made = weights(Path("store"))
    later = time.time() + 10 * 365 * 86400
    for file in Path("store").rglob("*"):
        os.utime(file, (later, later))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3 * 365 * 86400)
    assert tensorpress_run("run", path, "--store", "store", "--json", "out.json").code == 0
    assert json.loads(Path("out.json").read_text())["artifacts"][0]["cached"] and weights(Path("store")) == made


def test_runs_of_processes_that_are_gone_are_told_from_those_of_others(place):
    """By when the process began, too: its number may have been given again."""
    from tensorpress.tasks.tracking import MARK, close_dead_runs, open_client

    client = open_client(place / "store")
    mine = own_mark()
    marks = {
        "alive": mine,
        "another machine": {**mine, "host": "elsewhere", "pid": "999999"},
        "ended": {**mine, "pid": "999999"},
        "number given again": {**mine, "born": "0123abcd-17"},
        "of an older version": {"host": mine["host"], "pid": mine["pid"]},
    }
    ids = {
        n: client.create_run("0", tags={f"{MARK}{k}": v for k, v in m.items()}).info.run_id for n, m in marks.items()
    }
    for name in ("alive", "ended"):
        ids[f"child of {name}"] = client.create_run("0", tags={"mlflow.parentRunId": ids[name]}).info.run_id
    ids["child of none"] = client.create_run("0", tags={"mlflow.parentRunId": ids["child of alive"]}).info.run_id
    client.set_terminated(ids["child of alive"])
    close_dead_runs(client)
    killed = {name for name, run in ids.items() if client.get_run(run).info.status == "KILLED"}
    assert killed == {"ended", "number given again", "child of ended", "child of none"}


@pytest.mark.timeout(300)
def test_two_runs_at_once_make_each_artifact_once(address, recipe, place):
    path = recipe(steps=TWO, evaluate=["size", "perplexity"])
    runs = [start(path, "--store", "store", "--json", f"{name}.json") for name in "ab"]
    outs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outs
    made = [{a["node"]: a["cached"] for a in json.loads(Path(f"{n}.json").read_text())["artifacts"]} for n in "ab"]
    assert all(a != b for a, b in zip(made[0].values(), made[1].values(), strict=True)), "made twice, or by nobody"
    assert none_runs(Path("store"))


def test_which_errors_are_faults_of_the_tracking_store():
    """What is a fault of the tracking store is a StepError of one line; what the caller asked wrongly stays what it is."""
    from mlflow.exceptions import MlflowException

    from tensorpress.errors import StepError
    from tensorpress.tasks.tracking.patient import _problem

    assert _problem(MlflowException("Run 'x' not found"), False, "db") is None
    assert _problem(FileNotFoundError(2, "no", "run.json"), False, "db") is None
    full = OSError(28, "No space left on device", "/store/x")
    assert str(_problem(full, False, "db")) == "tracking: /store/x cannot be written: No space left on device"
    locked = _problem(sqlite3.OperationalError("database is locked"), True, "db")
    assert isinstance(locked, StepError) and "locked by another program" in str(locked)
