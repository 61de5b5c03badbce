"""The Prefect server that the runs of a store share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tensorpress.flows import keeper
from tensorpress.flows import server as servers
from tensorpress.tasks.alive import is_gone

USER = """
import sys, time
from pathlib import Path
from tensorpress.flows.server import PrefectServer
server = PrefectServer(Path(sys.argv[1]))
print(server.mark["pid"], server.wait() if len(sys.argv) > 2 else server.address, flush=True)
time.sleep(600)
"""


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No server answers but those of the test; they meet below the test's folder."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(servers, "DEFAULT_ADDRESS", "http://127.0.0.1:9/api")
    meetings = tmp_path / "tmp"
    meetings.mkdir()
    monkeypatch.setattr(keeper.tempfile, "tempdir", str(meetings))
    monkeypatch.setenv("TMPDIR", str(meetings))
    return meetings


def another_run(store: Path, *wait: str) -> tuple[subprocess.Popen[str], int]:
    source = USER.replace("server = ", "import tensorpress.flows.server as s; s.DEFAULT_ADDRESS = ''; server = ")
    run = subprocess.Popen([sys.executable, "-c", source, str(store), *wait], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    return run, int(run.stdout.readline().split()[0])


def wait_until(holds, seconds=30.0):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


@pytest.mark.timeout(300)
def test_runs_share_a_server_that_outlives_the_first_is_revived_and_ends_with_the_last(alone, tmp_path):
    store = tmp_path / "store"
    first, pid = another_run(store, "wait")
    second = servers.PrefectServer(store)
    assert second.mark["pid"] == str(pid)
    address = second.wait()
    first.kill()
    first.wait()
    time.sleep(1.5)
    assert servers.answers(address, 5.0), "the first took the server away from the second"
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not servers.answers(address)) and wait_until(lambda: servers.answers(address), 60)
    store.mkdir()
    second.stop()
    assert not servers.answers(address) and not list(alone.iterdir())
    assert (store / "prefect/prefect.db").stat().st_size > 0 and (store / "prefect/server.log").exists()


def test_a_server_ends_when_its_only_run_was_killed(alone, tmp_path):
    run, pid = another_run(tmp_path / "store")
    run.kill()
    run.wait()
    assert wait_until(lambda: not psutil.pid_exists(pid)) and not list(alone.iterdir())


@pytest.fixture
def sleepers(monkeypatch):
    """Processes that sleep, in place of servers."""
    real, started = subprocess.Popen, []

    def start(command, **rest):
        started.append(real(["sleep", "600"], **rest))
        return started[-1]

    monkeypatch.setattr(keeper.subprocess, "Popen", start)
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_a_store_gets_the_database_only_in_the_end(alone, tmp_path, sleepers, monkeypatch):
    def meet(store):
        run = servers.PrefectServer(store)
        home, _ = keeper.home_of(next(alone.iterdir()), store)
        (home / "prefect.db").write_text("runs")
        return run

    refused = meet(tmp_path / "none")
    (tmp_path / "none").mkdir()
    refused.stop()
    assert not list((tmp_path / "none").iterdir()) and not list(alone.iterdir())
    run = meet(tmp_path / "store")
    assert not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(servers, "answers", lambda *a: True)
    run.wait()
    run.stop()
    assert (tmp_path / "store/prefect/prefect.db").read_text() == "runs" and not list(alone.iterdir())
    assert all(process.poll() is not None for process in sleepers)


def test_the_database_of_a_store_has_one_server_at_a_time(tmp_path):
    (tmp_path / "prefect").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    first, lock = keeper.home_of(tmp_path / "one", tmp_path)
    second, none = keeper.home_of(tmp_path / "two", tmp_path)  # `serve`, or a run on another machine, has it
    assert first == tmp_path / "prefect" and second == tmp_path / "two/home" and none is None
    lock.release()
    assert keeper.home_of(tmp_path / "three", tmp_path)[0] == first


def test_a_meeting_place_that_is_not_ours_alone_is_not_entered(alone, tmp_path, sleepers):
    name = keeper.Meeting(tmp_path / "store").folder
    name.rmdir()
    name.symlink_to(tmp_path)
    assert keeper.Meeting(tmp_path / "store").folder.name != name.name
    name.unlink()
    name.mkdir()
    name.chmod(0o777)
    assert keeper.Meeting(tmp_path / "store").folder.name != name.name


def test_eight_runs_that_begin_at_once_start_one_server(alone, tmp_path, sleepers):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: servers.PrefectServer(tmp_path), range(8)))
    assert len(sleepers) == 1 and len({run.address for run in runs}) == 1
    for run in runs:
        assert not is_gone(run.mark)
        run.stop()
    assert is_gone(runs[0].mark)


def test_nobody_else_is_shown_the_credentials(tmp_path, monkeypatch):
    from tensorpress.flows.access import make_token
    from tensorpress.flows.server import DEFAULT_ADDRESS, known_servers

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:mine")
    make_token(tmp_path)
    assert known_servers(tmp_path) == [(DEFAULT_ADDRESS, None)], "the store's servers do not run"
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere:4200/api")
    assert known_servers(tmp_path) == [("http://elsewhere:4200/api", "me:mine"), (DEFAULT_ADDRESS, None)]
