"""Malformed recipes and parameters, by hand and generated: refused in a clear line, soon, and nothing is left behind."""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

RECIPE = {
    "name": "tiny",
    "description": "a recipe with every key",
    "model": {"source": "llama", "revision": "main", "dtype": "float32"},
    "data": {
        "calibration": {"source": "train.txt", "split": "train", "samples": 6, "length": 32},
        "evaluation": {
            "source": "test.txt", "split": "test", "samples": 8, "length": 32, "other": "demo", "pairs": "pairs.csv",
        },
    },
    "seed": 0,
    "steps": {
        "decompose": {"use": "mpo", "after": "model", "keep": 0.7, "layers": ["*q_proj"]},
        "prune": {"use": "finercut", "after": "decompose", "remove": 0.2},
        "heal": {"use": "distill", "after": "prune", "tokens": 1000},
        "quantize": {"use": "gptq", "after": "prune", "bits": {"each": [4, 3]}, "group_size": 32},
    },
    "evaluate": {"use": ["perplexity", "fidelity", "size"], "at": "leaves"},
    "gates": {"perplexity_ratio": {"max": 1.25}},
    "limits": {"seconds": 600, "memory": 8},
}  # fmt: skip
WRONG = {
    "nothing": None, "list": [[]], "mapping": {"a": 1}, "empty": "", "long": "x" * 10_000, "huge": 10**400, "negative": -1,
    "nan": math.nan, "infinite": math.inf, "control": "\0\x1b[31m\x07", "unicode": "\u202eשלום😀", "outside": "../../etc/passwd",
    "device": "/dev/zero", "home": "~nobody-here/x", "date": datetime.date(2020, 1, 1), "bytes": b"\xff", "keys": {None: 1, 2: 3},
    "each": {"each": [{}]}, "truth": True,
}  # fmt: skip
HERE = settings(
    max_examples=50, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def paths(value, path=()):
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from paths(value[index], (*path, index))


def changed(path, value):
    """The recipe with another value at a path."""
    data = copy.deepcopy(RECIPE)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


PATHS = [path for path in paths(RECIPE) if path]


def test_there_are_many():
    """The bar is 200 of recipes, parameters and checkpoints together; test_malformed_models.py has the checkpoints."""
    assert len(PATHS) * len(WRONG) + len(TEXTS) + len(OVERRIDES) + len(OPTIONS) > 900


def test_the_recipe_itself_is_in_order(told):
    data = copy.deepcopy(RECIPE)
    Path("recipe.yaml").write_text(yaml.safe_dump(data))
    assert told("validate", "recipe.yaml").code == 0


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_every_key_with_every_wrong_value(told, path):
    refused = 0
    for value in WRONG.values():
        Path("recipe.yaml").write_text(yaml.safe_dump(changed(path, value)))
        refused += told("validate", "recipe.yaml").code == 2
    assert refused >= (8 if path in (("description",), ("model", "revision")) else 14)


DEEP, WIDE = "[" * 5000, "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
TEXTS = {
    "empty": "", "nothing": "null", "a list": "- 1", "a word": "word", "a number": "9" * 5000, "unclosed": "a: [", "tabs": "a:\n\t- b",
    "nested": f"name: {DEEP}", "nested mappings": "{a: " * 3000, "an alias of nothing": "name: *nobody", "a byte": "name: \0",
    "an anchor that holds itself": "name: &a [*a]", "steps that hold themselves": "name: a\nsteps: &a\n  x: *a\n",
    "a billion values": f"name: tiny\na0: &a0 [1]\n{WIDE}\nsteps: *a11", "twice": "name: a\nname: b\nsteps: {}",
    "python object": "name: !!python/object/apply:os.system ['touch owned']", "python name": "name: !!python/name:os.system",
    "a tag": "name: !secret x", "two documents": "name: a\n---\nname: b", "a merge": "name: a\n<<: [1]\nsteps: {}",
    "a directive": "%YAML 9.9\n---\nname: a", "a date": "name: 2001-99-99", "sixty": "name: a\nseed: 190:20:30\nsteps: {}",
    "a set": "name: a\nsteps: !!set {a, b}", "pairs": "name: a\nsteps: !!pairs [a: b]", "binary": "name: !!binary '='",
    "many branches": yaml.safe_dump(changed(("steps", "quantize"), {
        "use": "gptq", "after": "model", "bits": {"each": [*range(100)]}, "group_size": {"each": [*range(100)]}})),
    "many steps": yaml.safe_dump(changed(("steps",), {
        f"s{i}": {"use": "gptq", "after": f"s{i - 1}" if i else "model", "bits": {"each": [2, 3, 4, 8]}} for i in range(40)})),
    "a long circle": yaml.safe_dump(changed(("steps",), {
        f"s{i}": {"use": "gptq", "after": f"s{(i + 1) % 500}"} for i in range(500)})),
    "a name of markup": yaml.safe_dump(changed(("name",), "<script>alert(1)</script>")),
    "a step of markup": yaml.safe_dump(changed(("steps",), {"[red]x[/red]\n": {"use": "gptq", "after": "model"}})),
    "more than a recipe": "#" * 1_100_000,
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_recipe(told, name):
    Path("recipe.yaml").write_text(TEXTS[name])
    for verb in ("validate", "plan"):
        assert told(verb, "recipe.yaml").code == 2


OVERRIDES = [
    "", "=", "a", ".=1", "..=1", "steps=", "steps=3", "steps.=1", "x.y=1", "steps.quantize.bits=[[[", "name=", "name=&a [*a]",
    "steps.quantize.bits=!!python/object/apply:os.system [x]", "steps.quantize.bits={each: [4, 4]}", "model.source=/dev/zero",
    "model.source=/etc", "model.source=pipe", "model.source=~nobody-here/x", "data.calibration.source=/dev/zero",
    "data.calibration.source=pipe", "data.calibration.source=/", "data.calibration.samples=1e30", "seed=-1", "seed=.nan",
    "data.evaluation.pairs=pipe", "data.evaluation.pairs=/dev/zero", "data.evaluation.other=pipe", "gates.size_ratio.max=.nan",
    "limits.seconds=-1", "limits.memory=.inf", "steps.quantize=null", "steps.quantize.after=quantize", "evaluate=[]", "evaluate=[[]]",
    "a" * 5000 + "=1", "steps.quantize." + "a." * 3000 + "b=1",
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: text[:40])
def test_overrides(told, override):
    os.mkfifo("pipe")
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert told("validate", "recipe.yaml", "--set", override).code == 2


NUMBERS = ("-1", "x", "1.5", "nan", "", "9" * 30)
FILES = ("pipe", "/nope/x", "llama", "/proc/x", "x" * 300, "")
OPTIONS = [
    *(("eval", "llama", option, number) for option in ("--samples", "--length") for number in NUMBERS),
    *(("bench", "llama", option, number) for option in ("--prompt", "--tokens", "--repeats", "--threads") for number in NUMBERS),
    *(("generate", "llama", "the", option, number) for option in ("--tokens", "--seed") for number in NUMBERS),
    *(("generate", "llama", "the", "--temperature", number) for number in ("-1", "x", "nan", "inf", "9" * 30)),
    *((verb, name) for verb in ("validate", "plan", "run") for name in ("", "pipe", "/dev/zero", "/", "x" * 5000, "~nobody-here/x.yaml", "llama/model.safetensors")),
    *((verb, name) for verb in ("inspect", "eval", "bench") for name in ("", "pipe", "/dev/zero", "recipe.yaml", "/etc", "a/b/c", "x" * 5000, "abcdef", "\x1b[31m", "demo/..")),
    *(("export", "llama", target) for target in ("", "pipe", "llama", "/proc/x", "x" * 300, "recipe.yaml/x")),
    *(("export", "llama", "out", "--format", name) for name in ("", "gguf", "x" * 1000, "../x")),
    *((verb, "recipe.yaml", "--json", file) for verb in ("plan", "run") for file in FILES),
    *((verb, "llama", "--json", file) for verb in ("inspect", "eval", "bench") for file in FILES),
    *(("report", "latest", "--out", file) for file in FILES), *(("compare", "latest", "--csv", file) for file in FILES),
    *((verb, name, "--store", "nothing") for verb in ("compare", "report") for name in ("", "latest", "x" * 5000, "'; drop table runs", "\x1b[31m")),
    *((verb, "recipe.yaml", "--store", store) for verb in ("validate", "run") for store in ("pipe", "recipe.yaml", "/dev/null", "/proc/x", "x" * 300, "recipe.yaml/x")),
    *(("eval", "llama", "--text", text) for text in ("", "pipe", "/dev/zero", "/", "nope", "x" * 5000)),
    *(("eval", "llama", option, value) for option in ("--pairs", "--other", "--against", "--measure") for value in ("pipe", "nope", "/dev/zero", "")),
    *(("run", "recipe.yaml", "--kernels", name) for name in ("", "\x1b[31m", "x" * 5000)),
    *(("run", "recipe.yaml", "--parallel", number) for number in ("0", "65", "x")), ("run", "recipe.yaml", "--runner", "x"),
    *(("recipes", "show", name) for name in ("", "../recipe", "x" * 5000)), ("recipes", "copy", "quickstart", "recipe.yaml"),
    ("validate", "recipe.yaml", "--no-such"), ("nothing",), ("validate",), ("validate", "recipe.yaml", "more"),
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("arguments", OPTIONS, ids=lambda a: " ".join(part[:20] for part in a))
def test_parameters(told, arguments):
    os.mkfifo("pipe")
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert told(*arguments).code == 2


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40) | st.dates() | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=8,
)


@HERE
@given(path=st.sampled_from(PATHS), value=VALUES)
def test_any_value_anywhere(told, path, value):
    try:
        text = yaml.safe_dump(changed(path, value))
        Path("recipe.yaml").write_text(text)
    except (UnicodeEncodeError, yaml.YAMLError):  # not every text can be in a file
        return
    told("validate", "recipe.yaml")


@HERE
@given(data=st.data())
def test_any_edit_of_the_text(told, data):
    text = yaml.safe_dump(RECIPE)
    start = data.draw(st.integers(0, len(text)))
    end = start + data.draw(st.integers(0, 40))
    put = data.draw(st.text("{}[]&*!|>%@`'\":-,#\n\t \0éa0", max_size=12))
    Path("recipe.yaml").write_text(text[:start] + put + text[end:])
    told("validate", "recipe.yaml")


@HERE
@given(path=st.sampled_from(PATHS), value=VALUES)
def test_any_override(told, path, value):
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    try:
        shown = json.dumps(value)
    except (TypeError, ValueError):
        shown = str(value)
    told("validate", "recipe.yaml", "--set", f"{'.'.join(map(str, path))}={shown}")


@HERE
@given(text=st.text(max_size=60))
def test_any_override_at_all(told, text):
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    told("validate", "recipe.yaml", "--set", text)
