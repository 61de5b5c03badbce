"""A database that is lost is made again from what the runs left; one that is damaged is not touched."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tensorpress.artifact import Store
from tensorpress.errors import InputError
from tensorpress.tasks.tracking import champions, open_client, track_benchmark
from tensorpress.tasks.tracking.rebuild import check_whole, is_lost, rebuild

STEPS = {
    "prune": {"use": "finercut", "after": "model", "remove": 0.2, "samples": 1},
    "quantize": {"use": "gptq", "after": "prune", "group_size": 32},
}


@pytest.fixture
def address(prefect_api, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    return prefect_api


def contents(client: MlflowClient) -> dict[str, dict[str, object]]:
    """Everything that a person sees of the runs in a database, by id."""
    found = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            rebuilt = ("tensorpress.rebuilt", "tensorpress.model_id", "mlflow.user")
            found[run.info.run_id] = {
                "experiment": experiment.name,
                "name": run.info.run_name,
                "status": run.info.status,
                "artifacts": run.info.artifact_uri,
                "tags": {k: v for k, v in run.data.tags.items() if k not in rebuilt},
                "params": dict(run.data.params),
                "metrics": dict(run.data.metrics),
                "datasets": [(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs],
                "models": [client.get_logged_model(m.model_id).tags["path"] for m in run.outputs.model_outputs],
            }
    return found


def versions(client: MlflowClient) -> set[tuple[str, str, str]]:
    return {(v.name, str(v.version), v.run_id) for v in client.search_model_versions()}


def test_a_lost_database_is_made_again(address, recipe, place, tensorpress_run):
    path = recipe(steps=STEPS, evaluate=["perplexity", "size"], gates={"size_ratio": {"max": 10}})
    root, other = place / "mlruns", place / "other"
    for _ in range(2):
        assert tensorpress_run("run", path, "--json", "out.json").code == 0
        document = json.loads(Path("out.json").read_text())
        client = open_client(root)
        champions.register(client, Store(root), document)
    decision = champions.decide(client, Store(root), document)
    assert decision.verdict == "first"
    before, registered = contents(client), versions(client)
    assert len(before) == 6 and {run["status"] for run in before.values()} == {"FINISHED"}
    assert {run["datasets"][0][0] for run in before.values()} == {"test.txt"}

    shutil.copytree(root, other, ignore=shutil.ignore_patterns("mlflow.db", "prefect"))
    (other / "mlflow.db-journal").write_bytes(b"of the lost file")
    assert is_lost(other)
    assert tensorpress_run("compare", "latest", "--store", other, "--json", "compared.json").code == 0
    assert json.loads(Path("compared.json").read_text())["runs"] == [document["mlflow_run_id"]]
    assert not is_lost(other) and not list(other.glob(".part-*")) and not (other / "mlflow.db-journal").exists()

    client = open_client(other)
    after = contents(client)
    assert after.keys() == before.keys()
    for run_id, run in before.items():
        run["artifacts"] = run["artifacts"].replace(root.as_uri(), other.as_uri())
        assert after[run_id] == run
    assert versions(client) == registered
    champion = client.get_model_version_by_alias(decision.line, "champion")
    assert champion.tags["digest"] == decision.champion["digest"] and champion.run_id in before
    assert champions.decide(client, Store(other), document).verdict == "unchanged"
    assert tensorpress_run("report", document["mlflow_run_id"][:8], "--store", other, "--out", "page.html").code == 0


def test_a_benchmark_is_kept_and_a_document_that_cannot_be_read_left_out(tmp_path, caplog):
    for name, text in (("a" * 32, "{"), ("b" * 32, '{"recipe": 3}')):
        (tmp_path / "artifacts" / name / "artifacts").mkdir(parents=True)
        (tmp_path / "artifacts" / name / "artifacts/run.json").write_text(text)
    answer = {
        "model": "demo",
        "digest": "d",
        "metrics": {"decode_tokens_per_second": 5.0},
        "conditions": {"threads": 2},
    }
    _, run_id = track_benchmark(tmp_path / "other", answer, "flow")
    (tmp_path / "other/artifacts" / run_id).rename(tmp_path / "artifacts" / run_id)
    assert is_lost(tmp_path)
    assert rebuild(tmp_path) == 1
    bench, before = (
        MlflowClient(f"sqlite:///{root}/mlflow.db").get_run(run_id) for root in (tmp_path, tmp_path / "other")
    )
    assert (bench.info.run_name, bench.data.params, bench.data.metrics) == (
        before.info.run_name, before.data.params, before.data.metrics
    )  # fmt: skip
    assert "those of 2 more cannot be read" in caplog.text
    assert not is_lost(tmp_path)


def test_a_new_store_is_not_a_lost_one(tmp_path, caplog):
    assert not is_lost(tmp_path)
    open_client(tmp_path)
    assert not caplog.text


def test_a_damaged_database_is_one_line_that_says_what_to_do(tmp_path, tensorpress_run):
    open_client(tmp_path / "store")
    database = tmp_path / "store/mlflow.db"
    check_whole(database)
    data = bytearray(database.read_bytes())
    data[4096:200_000] = b"\xff" * (200_000 - 4096)
    database.write_bytes(data)
    with pytest.raises(InputError, match=r"is damaged .*move it away"):
        check_whole(database)
    database.write_bytes(b"no database at all" * 1000)
    ended = tensorpress_run("compare", "latest", "--store", tmp_path / "store")
    assert ended.code == 2 and ended.err.count("\n") == 1 and "mlflow.db.damaged" in ended.err
    assert database.read_bytes().startswith(b"no database")


def test_a_locked_database_is_not_called_damaged(tmp_path):
    open_client(tmp_path)
    other = sqlite3.connect(tmp_path / "mlflow.db")
    other.execute("BEGIN EXCLUSIVE")
    check_whole(tmp_path / "mlflow.db")
    other.close()
