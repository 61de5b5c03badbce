"""Steps and measurements on a machine that did not make what they start from: folders come from the shared store."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tensorpress.artifact import Artifact, Store
from tensorpress.errors import StepError
from tensorpress.tasks.folders import artifact_folder, located, root_folder
from tensorpress.tasks.making import make_artifact
from tensorpress.tasks.measuring import measure

STEPS = {
    "first": {"use": "mpo", "after": "model", "keep": 0.5, "layers": ["*mlp*"]},
    "second": {"use": "gptq", "after": "first", "group_size": 32},
}


@pytest.fixture
def jobs(recipe, place, monkeypatch):
    """The two jobs of a recipe for a store on a machine `a`, with a shared folder as its remote."""
    from tensorpress.flows.place import working_in
    from tensorpress.flows.request import prepare, written

    monkeypatch.setenv("TENSORPRESS_REMOTE", f"file://{place}/share")
    monkeypatch.setenv("TENSORPRESS_LEASE", "2")
    with working_in(place / "a", place):
        plan = prepare(written(recipe(steps=STEPS, evaluate=["size"]).read_text(), []))
    return list(plan.jobs.values())


def test_a_step_on_another_machine_than_its_parent(jobs, place, monkeypatch):
    first, second = jobs
    made = make_artifact(first, place / "llama")
    assert not made["cached"] and Path(made["path"]).is_relative_to(place / "a")
    on_b = replace(second, store=str(place / "b"))
    (place / "a").rename(place / "elsewhere")  # the paths of machine a are not there on b
    result = make_artifact(on_b, Path(made["path"]))
    assert not result["cached"] and Path(result["path"]).is_relative_to(place / "b")
    chain = Artifact(Path(result["path"])).record["chain"]
    assert [link["digest"] for link in chain] == [first.digest, second.digest]
    assert chain[0]["seconds"] == made["seconds"], "what the parent's record says is there as well"
    on_c = replace(second, store=str(place / "c"))
    assert make_artifact(on_c, Path(made["path"]))["cached"]
    monkeypatch.setenv("TENSORPRESS_REMOTE", f"file://{place}/empty")
    with pytest.raises(StepError, match=f"artifact {first.digest[:12]} is neither in .*/d nor in file://"):
        make_artifact(replace(second, store=str(place / "d")), Path(made["path"]))
    monkeypatch.delenv("TENSORPRESS_REMOTE")
    with pytest.raises(StepError, match=r"is not there; .* both need TENSORPRESS_REMOTE"):
        make_artifact(replace(second, store=str(place / "d")), Path(made["path"]))


def test_the_original_is_found_on_each_machine_and_must_be_the_same(jobs, place):
    store, root = Store(place / "b").open(), jobs[0].root
    assert root_folder(store, root) == place / "llama"
    shutil.copytree(place / "llama", place / "copy")
    (place / "llama").rename(place / "gone")
    assert root_folder(store, {**root, "source": str(place / "copy")}) == place / "copy"
    with pytest.raises(StepError, match=r"the original is not on this machine: model\.source: no such folder"):
        root_folder(store, {**root, "source": str(place / "nowhere")})
    with pytest.raises(StepError, match="the original is not on this machine"):
        root_folder(store, {"path": root["path"], "digest": root["digest"]})
    (place / "bert").rename(place / "llama")
    with pytest.raises(StepError, match="is another model on this machine"):
        root_folder(store, root)


def test_a_measurement_on_another_machine_and_what_it_remembers(jobs, place):
    made = make_artifact(jobs[0], place / "llama")
    root = {"path": str(place / "llama"), "digest": jobs[0].root["digest"], "source": "llama"}
    evaluation = {"source": "test.txt", "split": "test", "other": None, "pairs": None, "samples": 4, "length": 32}
    asked = {"measures": ["size"], "evaluation": evaluation, "root": root, "dtype": "float32", "demo": False}
    asked |= {"store": str(place / "b"), "kernels": "auto"}
    (place / "a").rename(place / "elsewhere")
    b, c = Store(place / "b").open(), Store(place / "c").open()
    job, subject = located(b, asked, made, is_original=False)
    assert Path(subject["path"]) == b.folder(made["digest"]) and job["root"]["path"] == str(place / "llama")
    original = measure(job, {"path": root["path"], "digest": root["digest"]}, None, "original")
    here = measure(job, subject, original, "first")
    assert not here["cached"] and here["metrics"]["bytes"] > 0
    job, subject = located(c, {**asked, "store": str(place / "c")}, made, is_original=False)
    there = measure(job, subject, original, "first")
    assert there["cached"] and there["metrics"] == here["metrics"]
    assert located(c, asked, {"path": "of another machine", "digest": "x"}, is_original=True)[1]["path"] == root["path"]
    assert artifact_folder(c, made["digest"], made["path"]) == c.folder(made["digest"])
