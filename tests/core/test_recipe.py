"""Recipes: every mistake is one line with the path, what was found and what is allowed; nothing else ever comes out."""

import copy
import itertools
import random
import textwrap

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorpress.compressors.catalog import METHODS
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.errors import InputError
from tensorpress.evaluators.catalog import MEASURES
from tensorpress.recipe import parse, parse_text
from tensorpress.recipe_text import read

GOOD = """
name: quickstart
model: {source: demo}
data:
  calibration: {source: demo, samples: 64, length: 256}
  evaluation: {source: demo, split: test}
seed: 0
steps:
  decompose: {use: mpo, after: model, keep: 0.7}
  quantize: {use: gptq, after: decompose, bits: 4, group_size: 64}
evaluate: [perplexity, fidelity, size]
gates:
  perplexity_ratio: {max: 1.25}
  size_ratio: {max: 0.3}
"""


def checked(text, overrides=(), **where):
    return parse_text(textwrap.dedent(text), METHODS, MEASURES, overrides, **where)


def problems(text, overrides=(), **where):
    with pytest.raises(InputError) as caught:
        checked(text, overrides, **where)
    for line in caught.value.problems:
        assert line and "\n" not in line and len(line) < 600, line
        assert "pydantic" not in line and "Traceback" not in line and "errors.dev" not in line
    return caught.value.problems


def steps(text, **more):
    lines = "\n".join(f"{key}: {value}" for key, value in more.items())
    return f"name: t\n{lines}\nsteps:\n{textwrap.indent(textwrap.dedent(text), '  ')}"


def test_a_good_recipe_is_read():
    recipe = checked(GOOD)
    assert recipe.name == "quickstart" and recipe.model.dtype == "float32" and recipe.seed == 0
    assert [node.id for node in recipe.nodes] == ["decompose", "quantize"]
    assert recipe.nodes[0].method == MPO(keep=0.7) and recipe.nodes[1].method == GPTQ(bits=4, group_size=64)
    assert [node.parent for node in recipe.nodes] == ["model", "decompose"] and recipe.leaves == recipe.nodes[1:]
    assert recipe.ancestors(recipe.nodes[1]) == [recipe.nodes[0]] and recipe.ancestors(recipe.nodes[0]) == []
    assert recipe.evaluate.use == ("perplexity", "fidelity", "size") and recipe.evaluate.at == "leaves"
    assert recipe.gates["perplexity_ratio"].max == 1.25 and recipe.gates["size_ratio"].min is None


def test_defaults_are_a_whole_recipe():
    recipe = checked("name: t\nsteps: {q: {use: gptq, after: model}}")
    assert recipe.model.source == recipe.data.calibration.source == "demo" and recipe.data.evaluation.split == "test"


def test_steps_may_stand_in_any_order():
    recipe = checked(
        steps(
            "c: {use: gptq, after: b}\nb: {use: mpo, after: a, keep: 0.5}\na: {use: finercut, after: model, remove: 0.1}"
        )
    )
    assert [node.step for node in recipe.nodes] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("seed: 0", "sede: 0", [r"sede: unknown key (did you mean seed?); known: name, description, model,"]),
        ("{source: demo}", "{sorce: demo}", ["model.sorce: unknown key (did you mean source?); known: source, revision, dtype"]),
        ("{source: demo, samples: 64, length: 256}", "{smaples: 64}", ["data.calibration.smaples: unknown key (did you mean samples?)"]),
        ("{max: 1.25}", "{maximum: 1.25}", ["gates.perplexity_ratio.maximum: unknown key (did you mean max?); known: min, max"]),
        ("group_size: 64", "groupsize: 64", ["steps.quantize.groupsize: unknown key (did you mean group_size?); known: use, bits,"]),
        ("samples: 64", "samples: lots", ["data.calibration.samples: found 'lots', expected a valid integer"]),
        ("samples: 64", "samples: 0", ["data.calibration.samples: found 0, expected greater than or equal to 1"]),
        ("seed: 0", "seed: -1", ["seed: found -1"]),
        ("seed: 0", "seed: [1]", ["seed: found a list, expected a valid integer"]),
        ("name: quickstart", "name: ../up", ["name: found '../up', expected"]),
        ("name: quickstart", "name: 17", ["name: found 17, expected a valid string"]),
        ("name: quickstart", "description: none", ["name: is missing"]),
        ("split: test", "split: tets", ["data.evaluation.split: found 'tets', expected 'train', 'test' or 'other'"]),
        ("{max: 1.25}", "1.25", ["gates.perplexity_ratio: found 1.25, expected a"]),
        ("bits: 4", "bits: 5", ["steps.quantize.bits: found 5, expected 2, 3, 4 or 8"]),
        ("keep: 0.7", "keep: 0", ["steps.decompose.keep: found 0, expected greater than 0"]),
        ("keep: 0.7", "keep: 2", ["steps.decompose.keep: found 2, expected less than 1"]),
        ("keep: 0.7", "keep: much", ["steps.decompose.keep: found 'much', expected a valid number"]),
        ("keep: 0.7", "sites: 3", ["steps.decompose: found a mapping, expected one of keep"]),
        ("use: gptq", "use: gpqt", ["steps.quantize.use: no method 'gpqt' (did you mean gptq?); known: "]),
        ("use: gptq", "use: [gptq]", ["steps.quantize.use: no method a list; known: "]),
        ("use: gptq, ", "", ["steps.quantize.use: is missing; known methods: "]),
        ("after: decompose", "after: decompse", ["steps.quantize.after: no step 'decompse' (did you mean decompose?); known: model, "]),
        ("after: decompose, ", "", ["steps.quantize.after: is missing; it names a step, or `model`"]),
        ("after: decompose", "after: [decompose]", ["steps.quantize.after: "]),
        ("after: decompose", "after: {each: [model, decompose]}", ["steps.quantize.after: "]),
        ("after: decompose", "after: 3", ["steps.quantize.after: found 3, expected the name of one step"]),
        ("after: decompose", "after: quantize", ["steps.quantize: comes after itself: quantize -> quantize"]),
        ("after: model", "after: quantize", ["steps.decompose: comes after itself: decompose -> quantize -> decompose"]),
        ("  decompose: {", "  model: {", ["steps.model: the name model stands for the model itself"]),
        ("  decompose: {", "  de/compose: {", ["steps.de/compose: a step's name has letters, digits, - and _"]),
        ("[perplexity, fidelity, size]", "[perplexty]", ["evaluate: 'perplexty' is not a measure (did you mean perplexity?); known: "]),
        ("[perplexity, fidelity, size]", "{use: [size], at: leafs}", ["evaluate.at: found 'leafs', expected 'leaves' or 'steps'"]),
        ("bits: 4", "bits: {each: []}", ["steps.quantize.bits: `each` takes a list of values, and stands alone"]),
        ("bits: 4", "bits: {each: 4}", ["steps.quantize.bits: `each` takes a list"]),
        ("bits: 4", "bits: {each: [4], all: 3}", ["steps.quantize.bits: `each` takes a list"]),
        ("bits: 4", "bits: {each: [4, 3, 4]}", ["steps.quantize: `each` gives the same value twice"]),
        ("bits: 4", "bits: {each: [4, 5]}", ["steps.quantize.bits: found 5, expected 2, 3, 4 or 8"]),
        ("bits: 4", "bits: {ech: [4, 5]}", ["steps.quantize.bits: found a mapping, expected 2, 3, 4 or 8"]),
    ],
)  # fmt: skip
def test_one_line_for_each_mistake(old, new, lines):
    assert old in GOOD
    found = problems(GOOD.replace(old, new, 1))
    cut = " decompose: {" in old  # a step that lost its name takes its follower along
    assert len(found) >= len(lines) if cut else len(found) == len(lines), found
    for wanted in lines:
        assert any(line.startswith(wanted) for line in found), found


def test_all_mistakes_are_told_at_once():
    found = problems(
        GOOD.replace("seed: 0", "sede: 0").replace("samples: 64", "samples: x").replace("split: test", "split: y")
    )
    assert len(found) == 3
    found = problems(GOOD.replace("bits: 4", "bits: 5").replace("keep: 0.7", "keep: 7").replace("size]", "size]"))
    assert len(found) == 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "recipe: a recipe is a mapping with name, model, steps; found nothing"),
        ("- a\n- b", "recipe: a recipe is a mapping with name, model, steps; found a list"),
        ("just words", "found text"),
        ("17", "found int 17"),
        ("name: [", "recipe: line 1 is not YAML"),
        ("name: t\nsteps:\n\t- a", "recipe: line 3 is not YAML"),
        (
            "name: t\nname: u\nsteps: {q: {use: gptq, after: model}}",
            "recipe: line 2 is not YAML: key 'name' is given twice",
        ),
        (
            "name: t\nsteps:\n  q: {use: gptq, after: model, bits: 4, bits: 3}",
            "recipe: line 3 is not YAML: key 'bits' is given twice",
        ),
        ("name: !!python/object/apply:os.system [ls]", "not YAML"),
        ("a: b\n---\nc: d", "not YAML"),
        ("name: *nobody", "not YAML"),
        ("? [a, b]\n: c", "not YAML"),
        ("name: \x00", "not YAML"),
        ("name: t\nsteps: {}", "steps: "),
        ("name: t\nsteps: []", "steps: found a list"),
        ("name: t\nsteps: {q: gptq}", "steps.q: found 'gptq'"),
        ("name: t\nsteps: {1: {use: gptq, after: model}}", "steps.1"),
        ("name: t\nsteps: {null: {use: gptq, after: model}}", "steps."),
        # what PyYAML's own constructors stumble over
        ("name: 2001-99-99", "not YAML"),
        ("name: !!int x", "not YAML"),
        ("name: !!float x", "not YAML"),
        ("name: !!map [a, b]", "not YAML"),
        ("name: !!map text", "not YAML"),
        ("name: !!timestamp x", "not YAML"),
        ("seed: " + "9" * 5000, "not YAML"),
        ("name: " + "[" * 3000, "not YAML"),
        ("name: " + "{a: " * 3000, "not YAML"),
    ],
)
def test_what_is_no_recipe(text, line):
    (found,) = problems(text)
    assert line in found


def test_merge_keys_and_anchors_work():
    recipe = checked(
        """
        name: t
        steps:
          a: &base {use: gptq, after: model, bits: 4}
          b: {<<: *base, bits: 3}
        """
    )
    assert [node.method.bits for node in recipe.nodes] == [4, 3]


def test_anchors_that_refer_to_themselves():
    assert problems("name: t\nsteps: &s {x: *s}")
    assert problems("name: t\ndata: &d {calibration: *d}\nsteps: {q: {use: gptq, after: model}}")
    assert problems("name: t\nsteps: {q: {use: gptq, after: model, bits: {each: &e [*e]}}}")
    assert problems("name: t\nsteps: {q: &q {use: mpo, after: model, keep: *q}}")


@pytest.mark.parametrize("where", ["name: *l", "description: *l", "seed: *l", "evaluate: [*l]", "gates: {a: *l}"])
def test_a_bomb_of_anchors_is_one_short_line(where):
    bomb = "\n".join(
        [
            "a: &a [x]",
            *(
                f"b{i}: &{n} [{', '.join([f'*{p}'] * 9)}]"
                for i, (p, n) in enumerate(itertools.pairwise("abcdefghijkl"))
            ),
        ]
    )
    found = problems(f"{bomb}\n{where}\nsteps: {{q: {{use: gptq, after: model}}}}")
    assert all(len(line) < 300 for line in found)


def test_a_bomb_inside_each_is_refused_before_it_is_written_out():
    bomb = "\n".join(
        [
            "a: &a [x]",
            *(f"b{i}: &{n} [{', '.join([f'*{p}'] * 9)}]" for i, (p, n) in enumerate(itertools.pairwise("abcdef"))),
        ]
    )
    text = f"name: t\ndescription: {{{bomb.replace(chr(10), ', ')}}}\nsteps: {{q: {{use: gptq, after: model, bits: {{each: *f}}}}}}"
    for line in problems(text):
        assert len(line) < 300


def test_branches_that_nobody_could_run_are_refused():
    values = ", ".join(str(0.1 + i / 1000) for i in range(100))
    text = "\n".join(
        f"s{i}: {{use: finercut, after: {f's{i - 1}' if i else 'model'}, remove: {{each: [{values}]}}}}"
        for i in range(4)
    )
    (line,) = problems(steps(text))
    assert "branches" in line or "each" in line


# --- the graph


def test_two_each_in_a_chain_share_their_prefixes():
    recipe = checked(
        steps(
            """
            prune: {use: finercut, after: model, remove: {each: [0.1, 0.2]}}
            heal: {use: distill, after: prune, tokens: 1000}
            quantize: {use: gptq, after: heal, bits: {each: [4, 3]}, group_size: {each: [32, -1]}}
            baseline: {use: gptq, after: model}
            """
        )
    )
    ids = [node.id for node in recipe.nodes]
    prunes = [f"prune[prune.remove={r}]" for r in (0.1, 0.2)]
    heals = [f"heal[prune.remove={r}]" for r in (0.1, 0.2)]
    assert ids[:4] == [*prunes, *heals] and len(ids) == len(set(ids)) == 2 + 2 + 8 + 1
    leaves = {
        f"quantize[prune.remove={r}, quantize.bits={b}, quantize.group_size={g}]"
        for r in (0.1, 0.2)
        for b in (4, 3)
        for g in (32, -1)
    }
    assert {node.id for node in recipe.leaves} == leaves | {"baseline"}
    for node in recipe.nodes:
        if node.parent != "model":
            assert ids.index(node.parent) < ids.index(node.id)
            assert recipe.node(node.parent).branch in node.branch
    deep = recipe.node("quantize[prune.remove=0.2, quantize.bits=3, quantize.group_size=-1]")
    assert [n.id for n in recipe.ancestors(deep)] == [prunes[1], heals[1]]
    assert deep.method == GPTQ(bits=3, group_size=-1)


def test_each_may_choose_methods_and_lists():
    data = {"name": "t", "steps": {"a": {"use": {"each": ["gptq", "gpt"]}, "after": "model"}}}
    with pytest.raises(InputError, match="no method 'gpt'"):
        parse(data, METHODS, MEASURES)
    data["steps"]["a"] = {"use": {"each": ["gptq", "finercut"]}, "after": "model", "bits": 4}
    with pytest.raises(InputError, match="bits: unknown key"):
        parse(data, METHODS, MEASURES)
    recipe = checked(steps("a: {use: mpo, after: model, keep: 0.5, layers: {each: [['*mlp*'], ['*attn*', '*q*']]}}"))
    assert [node.method.layers for node in recipe.nodes] == [("*mlp*",), ("*attn*", "*q*")]


def test_order_that_cannot_be_is_refused():
    (line,) = problems(steps("q: {use: gptq, after: model}\nd: {use: mpo, after: q, keep: 0.5}"))
    assert line.startswith("steps.d: mpo may not come after q (gptq): ") and "decompose first" in line
    (line,) = problems(
        steps("q: {use: gptq, after: model}\nh: {use: finercut, after: q, remove: 0.1}\nr: {use: gptq, after: h}")
    )
    assert line.startswith("steps.r: gptq may not come after q (gptq)")
    (line,) = problems(
        steps("q: {use: gptq, after: model, bits: {each: [4, 3]}}\nd: {use: mpo, after: q, keep: {each: [0.5, 0.6]}}")
    )
    assert line.startswith("steps.d")
    assert checked(steps("q: {use: gptq, after: model}\nd: {use: mpo, after: model, keep: 0.5}"))


# --- overrides


def test_overrides():
    recipe = checked(GOOD, ["steps.quantize.bits=3", "seed=7", "model.dtype=bfloat16", "evaluate=[size]"])
    assert recipe.node("quantize").method.bits == 3 and recipe.seed == 7
    assert recipe.model.dtype == "bfloat16" and recipe.evaluate.use == ("size",)
    recipe = checked(GOOD, ["steps.quantize.bits={each: [2, 8]}", "steps.new={use: gptq, after: model}"])
    assert len(recipe.leaves) == 3
    assert checked(GOOD, ["description=a=b"]).description == "a=b"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("steps.quantize.bits=5", "steps.quantize.bits: found 5"),
        ("steps.quantize.bit=4", "steps.quantize.bit: unknown key (did you mean bits?)"),
        ("steps.quantize.bits", "--set steps.quantize.bits: write it as steps.quantize.bits=3"),
        ("=4", "--set =4: write it as"),
        ("steps..bits=4", "--set steps..bits=4: write it as"),
        ("seed.x=4", "--set seed.x: seed is not a mapping"),
        ("seed=[", "--set seed: '[' is not a YAML value"),
        ("name=2001-99-99", "--set name: '2001-99-99' is not a YAML value"),
        ("model=demo", "model: found 'demo'"),
        ("steps=", "steps: found nothing"),
        ("nonsense=1", "nonsense: unknown key"),
        ("steps.new.bits=4", "steps.new.after: is missing"),
    ],
)
def test_bad_overrides(override, line):
    (found,) = problems(GOOD, [override])
    assert found.startswith(line)


# --- paths


@pytest.mark.parametrize(
    "where",
    [
        "model.source",
        "data.calibration.source",
        "data.evaluation.source",
        "data.evaluation.other",
        "data.evaluation.pairs",
    ],
)
def test_paths_outside_are_refused_unless_named_by_the_user(tmp_path, where):
    inside, outside = tmp_path / "recipes", tmp_path / "secret.txt"
    inside.mkdir()
    outside.write_text("secret")
    (inside / "own.txt").write_text("own")
    *sections, field = where.split(".")

    def text(value):
        nested = {field: value}
        for section in reversed(sections):
            nested = {section: nested}
        return yaml.safe_dump({"name": "t", "steps": {"q": {"use": "gptq", "after": "model"}}, **nested})

    for value in (
        str(outside),
        str(inside / ".." / "secret.txt"),
        "../../../../../../../../etc/passwd",
        "~/.netrc",
        "/",
    ):
        (line,) = problems(text(value), folder=inside)
        assert line.startswith(f"{where}: {value} lies outside") and f"--set {where}=" in line
    link = inside / "link.txt"
    link.symlink_to(outside)
    assert problems(text(str(link)), folder=inside)
    recipe = checked(text(str(inside / "own.txt")), folder=inside)
    assert recipe.nodes
    # What the message tells the user to do helps, with the same recipe.
    section = checked(text(str(outside)), [f"{where}={outside}"], folder=inside)
    for name in sections:
        section = getattr(section, name)
    assert getattr(section, field) == str(outside)
    assert checked(text("demo"), [f"{where}={outside}"], folder=inside)


@pytest.mark.parametrize("value", ["x" * 5000, "~nobody-of-that-name/x", "/a\0b", "a\0b", "/" + "y" * 5000, "..\0"])
def test_paths_that_are_none_do_not_crash(value, tmp_path):
    text = yaml.safe_dump({"name": "t", "model": {"source": value}, "steps": {"q": {"use": "gptq", "after": "model"}}})
    try:
        checked(text, folder=tmp_path)
    except InputError as error:
        assert len(error.problems) == 1


def test_files(tmp_path, one_line):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD, encoding="utf-8")
    assert read(path) == GOOD
    for name, content, part in [
        ("none.yaml", None, "no such recipe file"),
        ("latin.yaml", b"name: \xe9", "cannot be read"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            read(tmp_path / name)
        one_line(caught, part, name)
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    one_line(caught, "cannot be read")


# --- anything at all

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(),
    st.sampled_from(["model", "gptq", "mpo", "each", "after", "use", "quantize", "decompose", "~x", "..", "\0", "x" * 5000]),
)  # fmt: skip
KEYS = st.one_of(
    st.sampled_from(["each", "use", "after", "bits", "keep", "source"]), st.text(max_size=5), st.integers(), st.none()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


def places(value, here=()):
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*here, key))


def replaced(data, place, value):
    if not place:
        return value
    data = copy.deepcopy(data)
    target = data
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return data


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=st.lists(VALUES, min_size=1, max_size=3), pick=st.randoms(use_true_random=False))
def test_mutated_recipes_parse_or_are_refused(values, pick):
    data = yaml.safe_load(GOOD)
    for value in values:
        data = replaced(data, pick.choice(list(places(data))), value)
    for run in (
        lambda: parse(copy.deepcopy(data), METHODS, MEASURES) if isinstance(data, dict) else None,
        lambda: checked(yaml.dump(data)),
    ):
        try:
            run()
        except InputError as error:
            assert error.problems and all(line and len(line) < 1500 for line in error.problems)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cuts=st.lists(st.tuples(st.integers(0, len(GOOD)), st.text(max_size=4), st.integers(0, 6)), min_size=1, max_size=4)
)
def test_mutated_text_parses_or_is_refused(cuts):
    text = GOOD
    for at, inserted, removed in cuts:
        text = text[:at] + inserted + text[at + removed :]
    try:
        checked(text)
    except InputError as error:
        assert error.problems


def test_random_yaml_is_refused(seed):
    draw = random.Random(seed)
    for _ in range(300):
        text = "".join(draw.choice("ab:- \n{}[],&*!|>'\"%@`?#01.~<=\t") for _ in range(draw.randint(0, 40)))
        with pytest.raises(InputError):
            checked(text)
