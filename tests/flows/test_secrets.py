"""A secret in the environment, the recipe, an override or an exception reaches nothing that a run leaves behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

SECRET, OTHER = "correct-horse-battery", "hf_staplestaplestaplestaple"


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("OUR_API_TOKEN", SECRET)


@pytest.fixture
def server(prefect_api, monkeypatch, tmp_path_factory):
    """The folder of a running server's database."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    (folder,) = tmp_path_factory.getbasetemp().glob("prefect[0-9]*")
    return folder


def holds_none(*folders):
    """No file below the folders, database or other, holds a secret; nor does its name."""
    seen = 0
    for folder in folders:
        for path in Path(folder).rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            seen += 1
            for value in (SECRET, OTHER):
                assert value.encode() not in content and value not in path.name, path
    assert seen


def test_a_run_and_all_that_it_leaves(server, recipe, place, tensorpress_run, tmp_path_factory):
    path = recipe(description=f"made with {OTHER}")
    path.write_text(f"# my token is {SECRET}\n{path.read_text()}")
    outside = tmp_path_factory.mktemp("out")
    plain = tensorpress_run(
        "run", recipe_copy(path, place), "--store", place / "plain", "--json", outside / "plain.json"
    )
    assert plain.code == 0, plain.err
    ended = tensorpress_run(
        "run", path, "--store", place / "store", "--json", outside / "run.json",
        "--set", f"description=more of {SECRET}",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    report = tensorpress_run("report", "latest", "--store", place / "store", "--out", outside / "report.html")
    assert report.code == 0, report.err
    holds_none(place / "store", outside, server)
    assert not re.search(f"{SECRET}|{OTHER}", ended.out + ended.err)
    assert "***" in json.loads((outside / "run.json").read_text())["recipe"]["description"]
    digests = [
        [a["digest"] for a in json.loads((outside / f"{n}.json").read_text())["artifacts"]] for n in ("plain", "run")
    ]
    assert digests[0] == digests[1]  # redaction is no part of what an artifact is named by


def recipe_copy(path, place):
    data = yaml.safe_load(path.read_text())
    del data["description"]
    copied = place / "plain.yaml"
    copied.write_text(yaml.safe_dump(data))
    return copied


def test_a_step_that_raises_one(server, recipe, place, tensorpress_run, monkeypatch, tmp_path_factory):
    from tensorpress.compressors.quantize.gptq import GPTQ

    def fail(*arguments, **named):
        raise RuntimeError(f"the server said: wrong token {SECRET}, tried https://me:{OTHER}@host/x")

    monkeypatch.setattr(GPTQ, "compress", fail)
    outside = tmp_path_factory.mktemp("out")
    ended = tensorpress_run("run", recipe(), "--store", place / "store", "--json", outside / "run.json")
    assert ended.code == 1
    assert "wrong token ***" in ended.out + ended.err
    assert not re.search(f"{SECRET}|{OTHER}", ended.out + ended.err)
    holds_none(place / "store", outside, server)
    assert "wrong token ***" in json.loads((outside / "run.json").read_text())["artifacts"][0]["error"]


@pytest.mark.parametrize(
    "override",
    ["model.source=https://me:hunter22@host/model", f"data.calibration.source={SECRET}.txt", f"name={OTHER}"],
)
def test_a_value_that_does_something_is_refused(recipe, told, override):
    path = recipe()
    ended = told("validate", path, "--set", override)
    assert ended.code == 2 and "holds a secret" in ended.err
    assert not re.search(f"{SECRET}|{OTHER}|hunter22", ended.err)


def test_error_lines(told):
    ended = told("inspect", f"/no/{SECRET}/model")
    assert ended.code == 2 and "/no/***/model" in ended.err
