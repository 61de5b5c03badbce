"""The Prefect server of a run."""

from __future__ import annotations

from pathlib import Path

from tensorpress.flows import server as servers


def test_two_runs_of_one_store_have_a_database_each(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(servers, "DEFAULT_ADDRESS", "http://127.0.0.1:9/api")
    homes = []
    started = []

    def start(command, env, **rest):
        homes.append(Path(env["PREFECT_HOME"]))
        assert homes[-1].is_dir() and command[-2:] == ["--port", command[-1]] and "127.0.0.1" in command
        process = real(["sleep", "60"], **rest)
        started.append(process)
        return process

    real = servers.subprocess.Popen
    monkeypatch.setattr(servers.subprocess, "Popen", start)
    (tmp_path / "prefect").mkdir()
    first, second = servers.PrefectServer(tmp_path), servers.PrefectServer(tmp_path)
    assert homes[0] == tmp_path / "prefect" != homes[1]
    second.stop()
    assert not homes[1].exists()
    first.stop()
    third = servers.PrefectServer(tmp_path)
    assert homes[2] == homes[0]
    third.stop()
    assert all(process.poll() is not None for process in started)


def test_a_store_gets_the_database_only_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setattr(servers, "DEFAULT_ADDRESS", "http://127.0.0.1:9/api")
    homes = []

    def start(command, env, **rest):
        homes.append(Path(env["PREFECT_HOME"]))
        (homes[-1] / "prefect.db").write_text("runs")
        return real(["sleep", "60"], **rest)

    real = servers.subprocess.Popen
    monkeypatch.setattr(servers.subprocess, "Popen", start)
    refused = servers.PrefectServer(tmp_path / "none")
    (tmp_path / "none").mkdir()
    refused.stop()
    assert not list((tmp_path / "none").iterdir()) and not homes[0].exists()
    run = servers.PrefectServer(tmp_path / "store")
    assert not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(servers, "answers", lambda *a: True)
    run.wait()
    run.stop()
    assert (tmp_path / "store/prefect/prefect.db").read_text() == "runs" and not homes[1].exists()
