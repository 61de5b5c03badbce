"""Whole runs of recipes on small models: graph, cache, tracking, verdicts, failures."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, PreTrainedModel

from tensorpress.artifact import Artifact
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.tasks.planning import Job

ALL_STEPS = {
    "decompose": {"use": "mpo", "after": "model", "keep": 0.7, "layers": ["*mlp*"]},
    "prune": {"use": "finercut", "after": "decompose", "remove": 0.17, "samples": 2},
    "heal": {"use": "distill", "after": "prune", "tokens": 1024, "batch_tokens": 256},
    "quantize": {"use": "gptq", "after": "heal", "group_size": 32, "bits": {"each": [4, 3]}},
    "baseline": {"use": "gptq", "after": "model", "group_size": 32},
}
CONTRACT = {"flow_run_id", "mlflow_run_id", "verdict", "gates", "original", "artifacts"}


@pytest.fixture
def address(prefect_api, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    return prefect_api


def test_a_recipe_with_every_step_runs_is_tracked_and_then_cached(address, recipe, place, tensorpress_run):
    path = recipe(steps=ALL_STEPS, evaluate=["perplexity", "fidelity", "size", "speed", "generation"])
    before = set(psutil.Process().children(recursive=True))
    first = tensorpress_run("run", path, "--json", "first.json")
    assert first.code == 0, first.err
    assert "ACCEPT" in first.out
    document = json.loads(Path("first.json").read_text())
    assert set(document) >= CONTRACT
    nodes = {a["node"]: a for a in document["artifacts"]}
    four, three = "quantize[quantize.bits=4]", "quantize[quantize.bits=3]"
    assert set(nodes) == {"decompose", "prune", "heal", four, three, "baseline"}
    assert nodes[four]["parent"] == nodes[three]["parent"] == "heal"
    assert nodes[three]["metrics"]["weight_bytes"] < nodes[four]["metrics"]["weight_bytes"]
    for leaf in (four, three, "baseline"):
        metrics = nodes[leaf]["metrics"]
        assert metrics["perplexity_ratio"] == pytest.approx(metrics["perplexity"] / document["original"]["perplexity"])
        assert 0 < metrics["size_ratio"] < 2 and metrics["decode_speedup"] > 0 and metrics["kl_divergence"] >= 0
        assert any("quantized_linear:" in name for name in nodes[leaf]["conditions"]["kernels"])
    assert document["original"]["perplexity_ratio"] == 1

    for node in nodes.values():
        artifact = Artifact(Path(node["path"]))
        assert artifact.problem() is None and artifact.folder.name == node["digest"]
        assert not list(artifact.folder.glob("*.bin")) and (artifact.folder / "README.md").is_file()
    measured = Artifact(Path(nodes[four]["path"]))
    assert measured.record["metrics"]["kl_divergence"] == nodes[four]["metrics"]["kl_divergence"]
    assert "| perplexity ratio |" in (measured.folder / "README.md").read_text()
    assert not list((place / "mlruns/models").glob(".part*"))
    mixed = AutoModelForCausalLM.from_pretrained(nodes[three]["path"])
    assert mixed.dtype == torch.bfloat16
    baseline = json.loads((Path(nodes["baseline"]["path"]) / "config.json").read_text())["quantization_config"]
    assert baseline["quant_method"] == "gptq"

    client = MlflowClient(f"sqlite:///{place / 'mlruns/mlflow.db'}")
    parent = client.get_run(document["mlflow_run_id"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{document['mlflow_run_id']}'"
    )
    assert {c.info.run_name for c in children} == set(nodes)
    assert {c.info.status for c in children} == {"FINISHED"} and parent.info.status == "FINISHED"
    assert all(run.inputs.dataset_inputs[0].dataset.name == "test.txt" for run in (parent, *children))
    ended = {c.info.run_name: (c.info.start_time, c.info.end_time) for c in children}
    assert ended["decompose"][1] <= ended["baseline"][0]  # each run ends with what it is about
    assert all(c.data.metrics["size_ratio"] > 0 for c in children)
    child = next(c for c in children if c.info.run_name == four)
    assert child.outputs.model_outputs[0].model_id == child.data.tags["tensorpress.model_id"]
    assert child.data.metrics["perplexity_ratio"] == pytest.approx(nodes[four]["metrics"]["perplexity_ratio"])
    assert child.data.params["gptq.bits"] == "4"
    model = client.get_logged_model(child.data.tags["tensorpress.model_id"])
    assert len(client.get_metric_history(child.info.run_id, "perplexity_ratio")) == 1
    assert "perplexity_ratio" in {metric.key for metric in model.metrics}
    assert model.tags["path"] == nodes[four]["path"] and model.tags["weights"] == "by reference"
    files = {f.path for f in client.list_artifacts(document["mlflow_run_id"])}
    assert files >= {"report.html", "run.json", "recipe.yaml", "pictures"}
    assert not list((place / "mlruns/artifacts").rglob("*.safetensors"))

    second = tensorpress_run("run", path, "--json", "second.json")
    assert second.code == 0
    again = json.loads(Path("second.json").read_text())
    assert all(a["cached"] for a in again["artifacts"])
    assert {a["node"]: a["digest"] for a in again["artifacts"]} == {n: a["digest"] for n, a in nodes.items()}
    assert [a["metrics"] for a in again["artifacts"]] == [a["metrics"] for a in document["artifacts"]]
    assert again["mlflow_run_id"] != document["mlflow_run_id"]
    assert len(client.search_logged_models([parent.info.experiment_id])) == len(nodes)
    assert set(psutil.Process().children(recursive=True)) <= before

    report = tensorpress_run("report", "latest", "--out", "page.html")
    assert report.code == 0 and "<script" not in Path("page.html").read_text()
    assert tensorpress_run("compare", "latest", document["mlflow_run_id"]).code == 0
    plan = tensorpress_run("plan", path)
    assert plan.code == 0 and plan.out.count("cached") >= len(nodes)


def test_changed_setting_remakes_only_what_depends_on_it(address, recipe, tensorpress_run):
    steps = {
        "quantize": {"use": "gptq", "after": "model", "group_size": 32},
        "cut": {"use": "finercut", "after": "model", "remove": 0.2, "samples": 1},
    }
    path = recipe(steps=steps, evaluate=["size"])
    tensorpress_run("run", path, "--json", "a.json")
    tensorpress_run("run", path, "--set", "steps.cut.samples=2", "--json", "b.json")
    a, b = ({x["node"]: x for x in json.loads(Path(f).read_text())["artifacts"]} for f in ("a.json", "b.json"))
    assert b["quantize"]["cached"] and a["quantize"]["digest"] == b["quantize"]["digest"]
    assert "samples: 2" in (Path(b["cut"]["path"]) / "README.md").read_text()
    assert not b["cut"]["cached"] and a["cut"]["digest"] != b["cut"]["digest"]


def test_a_changed_byte_on_disk_is_noticed_and_the_artifact_made_again(address, recipe, tensorpress_run):
    path = recipe(evaluate=["size"])
    tensorpress_run("run", path, "--json", "a.json")
    artifact = json.loads(Path("a.json").read_text())["artifacts"][0]
    weights = Path(artifact["path"]) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    tensorpress_run("run", path, "--json", "b.json")
    again = json.loads(Path("b.json").read_text())["artifacts"][0]
    assert not again["cached"] and again["digest"] == artifact["digest"]
    assert Artifact(Path(again["path"])).problem() is None


def test_failing_step_fails_the_run_and_keeps_the_others(address, recipe, place, tensorpress_run, monkeypatch):
    steps = {
        "bad": {"use": "gptq", "after": "model", "group_size": 32, "bits": 3},
        "after_bad": {"use": "finercut", "after": "bad", "remove": 0.2, "samples": 1},
        "good": {"use": "gptq", "after": "model", "group_size": 32, "bits": 4},
    }
    path = recipe(steps=steps, evaluate=["size"])
    work = GPTQ.compress

    def compress(self, model, calibration):
        if self.bits == 3:
            raise RuntimeError("no memory left <b>")
        return work(self, model, calibration)

    monkeypatch.setattr(GPTQ, "compress", compress)
    result = tensorpress_run("run", path, "--json", "out.json")
    assert result.code == 1 and "no memory left" in result.out and "Traceback" not in result.out + result.err
    document = json.loads(Path("out.json").read_text())
    nodes = {a["node"]: a for a in document["artifacts"]}
    assert document["verdict"] == "FAILED"
    assert "no memory left" in nodes["bad"]["error"] and "before it failed" in nodes["after_bad"]["error"]
    assert nodes["good"]["error"] is None and Path(nodes["good"]["path"]).is_dir()
    client = MlflowClient(f"sqlite:///{place / 'mlruns/mlflow.db'}")
    parent = client.get_run(document["mlflow_run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    failed = next(c for c in children if c.info.run_name == "bad")
    assert failed.info.status == "FAILED" and "no memory left" in failed.data.tags["tensorpress.error"]
    assert parent.info.status == "FAILED"

    monkeypatch.setattr(GPTQ, "compress", work)
    assert tensorpress_run("run", path).code == 0


def test_the_worst_branch_of_a_gate():
    from types import SimpleNamespace

    from tensorpress.flows.running import judge
    from tensorpress.recipe import Gate

    def leaf(node, **metrics):
        return {"node": node, "leaf": True, "metrics": metrics}

    plan = SimpleNamespace(recipe=SimpleNamespace(gates={"perplexity_ratio": Gate(max=1.1)}))
    unmeasured, good, bad = leaf("a"), leaf("b", perplexity_ratio=1.01), leaf("c", perplexity_ratio=1.2)
    (gate,) = judge(plan, [unmeasured, good]).values()
    assert (gate["holds"], gate["worst"], gate["branch"]) == (False, None, "a")
    (gate,) = judge(plan, [good, bad]).values()
    assert (gate["holds"], gate["worst"], gate["branch"]) == (False, 1.2, "c")
    (gate,) = judge(plan, [leaf("n", perplexity_ratio=float("nan"))]).values()
    assert not gate["holds"]
    assert judge(plan, [good])["perplexity_ratio"]["holds"]


def test_gate_that_does_not_hold_gives_exit_code_3(address, recipe, tensorpress_run):
    path = recipe(gates={"size_ratio": {"max": 0.01}, "perplexity_ratio": {"max": 100}})
    result = tensorpress_run("run", path, "--json", "out.json")
    document = json.loads(Path("out.json").read_text())
    assert result.code == 3 and document["verdict"] == "REJECT"
    assert document["gates"]["perplexity_ratio"]["holds"] and not document["gates"]["size_ratio"]["holds"]


def test_gate_on_a_metric_that_is_not_measured_is_refused(recipe, tensorpress_run):
    result = tensorpress_run("run", recipe(evaluate=["size"], gates={"perplexity": {"max": 9}}))
    assert result.code == 2 and "gates.perplexity" in result.err and not Path("mlruns").exists()


def test_encoders_go_through_every_step(address, recipe, tensorpress_run):
    steps = {
        "decompose": {"use": "mpo", "after": "model", "keep": 0.8, "layers": ["*intermediate*"]},
        "prune": {"use": "finercut", "after": "decompose", "remove": 0.17, "samples": 2},
        "heal": {"use": "distill", "after": "prune", "tokens": 512, "batch_tokens": 128},
        "quantize": {"use": "gptq", "after": "heal", "group_size": 32},
    }
    data = yaml.safe_load(recipe().read_text())["data"]
    data["evaluation"]["pairs"] = "pairs.csv"
    path = recipe(
        model={"source": "bert"},
        steps=steps,
        data=data,
        evaluate={"use": ["sts", "fidelity", "size", "speed"], "at": "steps"},
    )
    result = tensorpress_run("run", path, "--json", "out.json")
    assert result.code == 0, result.err + result.out
    for artifact in json.loads(Path("out.json").read_text())["artifacts"]:
        assert {"sts_spearman", "embedding_cosine", "size_ratio", "prefill_speedup"} <= set(artifact["metrics"])


def test_a_task_takes_and_gives_handles_and_leaves_no_model_behind(recipe, place):
    from tensorpress.flows.place import working_in
    from tensorpress.flows.request import prepare, written
    from tensorpress.tasks.making import make_artifact

    with working_in(place / "store", place):
        plan = prepare(written(recipe().read_text(), []))
    assert not (place / "store").exists()
    (job,) = plan.jobs.values()
    again = Job(**json.loads(json.dumps(job.to_dict())))
    gc.collect()
    models = sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects())
    result = make_artifact(again, Path(plan.root.path))
    gc.collect()
    assert json.loads(json.dumps(result))["digest"] == job.digest
    assert sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects()) == models


def test_a_quote_in_the_path_of_the_store(address, recipe, tensorpress_run):
    assert tensorpress_run("run", recipe(evaluate=["size"]), "--store", "o'brien").code == 0


def test_running_from_python(address, recipe, place):
    import tensorpress

    document = tensorpress.compress(recipe(evaluate=["size"]), store=place / "elsewhere")
    assert document["verdict"] == "ACCEPT" and Path(document["artifacts"][0]["path"]).is_relative_to(
        place / "elsewhere"
    )
