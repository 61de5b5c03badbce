"""What a plan is expected to cost, from earlier artifacts."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from tensorpress.artifact import RECORD, Store
from tensorpress.checks import shapes_of
from tensorpress.compressors.catalog import METHODS
from tensorpress.evaluators.catalog import MEASURES
from tensorpress.evaluators.size import original_parameters
from tensorpress.recipe import parse
from tensorpress.tasks.estimate import estimate, short_config
from tensorpress.tasks.planning import make_plan

HESSIANS = 36 * 64**2
"""Of the widest layer: one in float32, and in float64 the copies that GPTQ works on."""


@pytest.fixture
def plan_of(original, text):
    """`plan_of(store, evaluate=["size"])`: the plan of two steps, or of what is given in place of the defaults."""
    held = text.with_name("held.txt")
    held.write_text(text.read_text()[::-1])

    def make(store, **changes):
        data = {
            "name": "tiny",
            "model": {"source": str(original)},
            "data": {
                "calibration": {"source": str(text), "samples": 4, "length": 32},
                "evaluation": {"source": str(held), "length": 32},
            },
            "steps": {
                "prune": {"use": "finercut", "after": "model", "remove": 0.2},
                "quantize": {"use": "gptq", "after": "prune", "bits": {"each": [4, 3]}, "group_size": 16},
            },
            "evaluate": ["size"],
            **changes,
        }
        return make_plan(parse(data, METHODS, MEASURES), Store(store))

    return make


def test_estimate_of_what_was_never_done(plan_of, original, tmp_path):
    plan = plan_of(tmp_path / "none")
    expected = estimate(plan)
    assert [node["node"] for node in expected["nodes"]] == list(plan.jobs)
    notes = [node["note"].rpartition(", about ") for node in expected["nodes"]]
    assert [note[0] for note in notes] == ["remove 0.2", "4 bits, g16", "3 bits, g16"]
    assert all(note[2].endswith("kB") for note in notes)
    assert expected["seconds"] is None and "not measured before for finercut, gptq" in expected["summary"]
    model = 4 * original_parameters(original)
    assert expected["memory_bytes"] == model + 2 * 4 * 32 * 32 * 4 + HESSIANS
    assert not (tmp_path / "none").exists()
    assert json.loads(json.dumps(expected)) == expected


def test_estimate_from_earlier_artifacts(plan_of, tmp_path):
    root = tmp_path / "store"
    plan = plan_of(root)

    def leave(name, node, seconds, root_digest=plan.root.digest):
        folder = root / "models" / name
        folder.mkdir(parents=True)
        job = plan.jobs[node]
        link = {"use": job.use, "config": job.config}
        (folder / RECORD).write_text(json.dumps({"root": root_digest, "chain": [link], "seconds": seconds}))

    quantize4, quantize3 = (name for name in plan.jobs if name.startswith("quantize"))
    leave("a", "prune", 10.0)
    leave("b", quantize4, 3.0)
    leave("c", quantize4, 5.0)
    leave("d", quantize4, 500.0, "another model")
    (root / "models" / "e").mkdir()
    (root / "models" / "e" / RECORD).write_text("{half")
    expected = estimate(plan)
    seconds = {node["node"]: node["seconds"] for node in expected["nodes"]}
    assert seconds == {"prune": 10.0, quantize4: 4.0, quantize3: 4.0}  # the same settings first, else the same method
    assert expected["seconds"] == 18.0 and "18 s" in expected["summary"]


def test_estimate_of_what_is_cached(plan_of, write_artifact, make_model, tmp_path):
    root = tmp_path / "store"
    plan = plan_of(root)
    write_artifact(make_model(), root, plan.jobs["prune"].digest)
    again = plan_of(root)
    first = estimate(again)["nodes"][0]
    assert first["cached"] and first["seconds"] == 0 and "kB" in first["note"]
    assert "2 of 3 steps to do, 1 cached" in estimate(again)["summary"]


def test_memory_counts_the_models_of_a_search(plan_of, original, tmp_path):
    model = 4 * original_parameters(original)

    def needed(**size):
        step = {"use": "mpo", "after": "model", **size}
        return estimate(plan_of(tmp_path / "none", steps={"half": step}))

    plain, searched = needed(keep=0.5), needed(perplexity_ratio=1.1)
    assert searched["memory_bytes"] == plain["memory_bytes"] + 2 * model
    assert "its original and a trial" in searched["summary"] and "trial" not in plain["summary"]


def test_memory_counts_the_original_and_training(plan_of, original, tmp_path):
    model = 4 * original_parameters(original)
    steps = {"prune": {"use": "finercut", "after": "model", "remove": 0.2}}
    beside = estimate(plan_of(tmp_path / "a", steps=steps, evaluate=["size", "speed"]))
    assert beside["memory_bytes"] == 2 * model
    half = estimate(plan_of(tmp_path / "a", model={"source": str(original), "dtype": "bfloat16"}))
    assert half["memory_bytes"] == model / 2 + 2 * 4 * 32 * 32 * 2 + HESSIANS
    steps = {"heal": {"use": "distill", "after": "model", "tokens": 1_000}}
    trained = estimate(plan_of(tmp_path / "a", steps=steps))
    assert trained["memory_bytes"] > 5 * model and "training" in trained["summary"]
    assert trained["nodes"][0]["note"].startswith("1,000 tokens, about ")


GPTQ_BITS = 4 + (16 + 4) / 16
"""Of a weight at 4 bits in groups of 16."""


TABLES = 260 * 32 * 2
"""Numbers of the embedding and the head."""


@pytest.mark.parametrize(
    ("steps", "rest"),
    [
        ({"a": {"use": "mpo", "keep": 0.5}}, lambda n: 4 * n * 0.5),
        ({"a": {"use": "mpo", "keep": 0.5, "embeddings": 0.25}}, lambda n: 4 * n * 0.5 - 4 * TABLES * 0.75),
        ({"a": {"use": "mpo", "bytes": 40_000}}, lambda n: 4 * 20_000),
        ({"a": {"use": "mpo", "bytes": 10**9}}, lambda n: 4 * n),
        ({"a": {"use": "mpo", "bond_dimension": 4}}, lambda n: 4 * n),  # its settings do not tell
        ({"a": {"use": "mpo", "keep": 0.5}, "b": {"use": "squeeze", "keep": 0.5}}, lambda n: 4 * n * 0.25),
        ({"a": {"use": "factorize", "form": "kronecker", "keep": 0.25}}, lambda n: 4 * n * 0.25),
        (
            {"a": {"use": "mpo", "keep": 0.5, "pivots": False}, "b": {"use": "gptq", "group_size": 16}},
            lambda n: n * 0.5 * GPTQ_BITS / 8,
        ),
        ({"a": {"use": "gptq", "group_size": 16, "bits_for": {"*": 8}}}, lambda n: n * (8 + 24 / 16) / 8),
        (
            {
                "a": {"use": "mpo", "keep": 0.5},  # of which one factor stays, so its pivots do
                "b": {"use": "gptq", "group_size": 16, "bits_for": {"*.outer": 16}},
            },
            lambda n: n * 0.25 * GPTQ_BITS / 8 + 4 * n * 0.25,
        ),
        (
            {"a": {"use": "mpo", "keep": 0.5, "plans": "balanced"}, "b": {"use": "gptq", "group_size": 16}},
            lambda n: 4 * n * 0.5,
        ),
        (
            {"a": {"use": "factorize", "form": "svd", "keep": 0.5}, "b": {"use": "gptq", "group_size": 16}},
            lambda n: n * 0.5 * GPTQ_BITS / 8,
        ),
    ],
)
def test_bytes_by_the_settings(plan_of, original, tmp_path, steps, rest):
    names = list(steps)
    chained = {name: {**step, "after": "model"} for name, step in steps.items()}
    for before, name in itertools.pairwise(names):
        chained[name]["after"] = before
    plan = plan_of(tmp_path / "a", steps=chained)
    numbers = sum(plan.layers.values())
    whole = sum(path.stat().st_size for path in original.glob("*.safetensors"))
    assert estimate(plan)["nodes"][-1]["bytes"] == pytest.approx(whole - 4 * numbers + rest(numbers), abs=1)


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_quantization_gives_pivots_up(plan_of, original, tmp_path, keep):
    steps = {"a": {"use": "mpo", "after": "model", "keep": keep}, "b": {"use": "gptq", "after": "a", "group_size": 16}}
    plan = plan_of(tmp_path / "a", steps=steps)
    shapes = {path: shapes_of(original)[f"{path}.weight"] for path in plan.layers}
    ranks = {path: min(np.roots([-1, m + n, -keep * m * n])) for path, (m, n) in shapes.items()}
    numbers = sum(min(ranks[path] * (m + n), m * n) for path, (m, n) in shapes.items())
    assert numbers > 1.05 * keep * sum(plan.layers.values())
    fixed = sum(path.stat().st_size for path in original.glob("*.safetensors")) - 4 * sum(plan.layers.values())
    assert estimate(plan)["nodes"][-1]["bytes"] == pytest.approx(fixed + numbers * GPTQ_BITS / 8, abs=1)


def test_short_config():
    assert short_config("gptq", {"use": "gptq", "bits": 4, "group_size": -1}) == "4 bits, whole rows"
    assert short_config("mpo", {"use": "mpo", "keep": 0.7, "bond_dimension": None, "sites": 2}) == "keep 0.7, 2 sites"
    assert short_config("new", {"use": "new", "share": 0.5}) == "share 0.5"
