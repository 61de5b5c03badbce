"""`compare` and `report`, on runs whose documents no run made."""

from __future__ import annotations

import json

import pytest


def document(name, run_id, bits, **more):
    leaf = {
        "node": "quantize", "step": "quantize", "branch": f"quantize.bits={bits}", "use": "gptq", "leaf": True,
        "config": {"use": "gptq", "bits": bits, "group_size": 128}, "parent": "prune", "cached": False, "seconds": 1.0,
        "metrics": {"perplexity": 10.0 + bits, "bytes": 1000.0 * bits}, "error": None, "conditions": {}, "digest": "ab",
        "path": None, "report": {"layers": [], "summary": {}},
    }  # fmt: skip
    inner = {**leaf, "node": "prune", "step": "prune", "use": "finercut", "branch": ""}
    inner |= {"parent": "model", "leaf": False, "config": {"use": "finercut", "remove": bits / 10, "samples": 1}}
    return {
        "name": name, "mlflow_run_id": run_id, "flow_run_id": f"flow-{name}", "verdict": "ACCEPT", "gates": {},
        "original": {"perplexity": 9.0, "bytes": 16000.0}, "original_digest": "feed", "original_path": "models/tiny",
        "artifacts": [inner, leaf], "conditions": {"window": 256}, "seconds": 3.0, "overhead_seconds": 1.0,
        "recipe": {"name": name, "steps": {}}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A store with two runs in its database, and their ids."""
    from tensorpress.tasks.tracking import open_client

    store = tmp_path_factory.mktemp("tracked")
    client = open_client(store)
    experiment = client.create_experiment("tiny", artifact_location=(store / "artifacts").as_uri())
    ids = []
    for name, bits, window in (("first", 4, 256), ("second", 3, 128)):
        tags = {"tensorpress.recipe": name, "tensorpress.flow_run_id": f"flow-{name}"}
        run_id = client.create_run(experiment, tags=tags).info.run_id
        run = document(name, run_id, bits, conditions={"window": window})
        client.log_text(run_id, json.dumps(run), "run.json")
        ids.append(run_id)
    return store, ids


def test_compare(call, tracked, work):
    store, (first, second) = tracked
    code, out, _ = call("compare", first, "flow-second", first[:10], "--store", store, "--json", "c.json")
    assert code == 0
    answer = json.loads((work / "c.json").read_text())
    rows = answer["rows"]
    assert answer["runs"] == [first, second]
    assert [row["metrics"]["perplexity"] for row in rows] == [9.0, 14.0, 13.0]  # the original once, and first
    assert [row["params"] for row in rows] == [
        {},
        {"finercut.remove": 0.4, "gptq.bits": 4},
        {"finercut.remove": 0.3, "gptq.bits": 3},
    ]
    assert answer["differing_conditions"] == ["window: 256, 128"]
    assert "original tiny" in " ".join(out.split()) and "different conditions" in out


def test_compare_as_csv(call, tracked, work, refused, tmp_path):
    import pandas

    store, _ = tracked
    assert call("compare", "latest", "--store", store, "--json", "c.json", "--csv", "c.csv")[0] == 0
    rows = json.loads((work / "c.json").read_text())["rows"]
    table = pandas.read_csv(work / "c.csv")
    assert list(table["name"]) == [row["name"] for row in rows]
    for row, line in zip(rows, table.to_dict("records"), strict=True):
        assert all(line[key] == pytest.approx(value) for key, value in row["metrics"].items())
    assert "--csv" in refused("compare", "latest", "--store", store, "--csv", tmp_path)


def test_compare_one_run(call, tracked, work):
    store, (_, second) = tracked
    code, out, _ = call("compare", "latest", "--store", store, "--json", "c.json")
    assert json.loads((work / "c.json").read_text())["runs"] == [second]
    assert code == 0 and "different conditions" not in out and second[:8] not in out


def test_report(call, tracked, work):
    store, (first, _) = tracked
    code, out, _ = call("report", first[:8], "--store", store)
    assert code == 0 and out == f"report-{first[:8]}.html\n"
    page = (work / f"report-{first[:8]}.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "first" in page
    assert call("report", "latest", "--out", "page.html", "--store", store)[0] == 0
    assert (work / "page.html").is_file()


def test_runs_that_are_none(refused, tracked, tmp_path):
    store, _ = tracked
    for verb in ("compare", "report"):
        assert "no such run" in refused(verb, "0123456789", "--store", store)
        assert "no tracking database" in refused(verb, "latest", "--store", tmp_path / "none")
        (tmp_path / verb).mkdir()
        assert "no tracking database" in refused(verb, "latest", "--store", tmp_path / verb)
    assert "--out" in refused("report", "latest", "--store", store, "--out", "no/such/page.html")
    assert "is a folder" in refused("report", "latest", "--store", store, "--out", tmp_path)
    assert "--json" in refused("compare", "latest", "--store", store, "--json", tmp_path)
