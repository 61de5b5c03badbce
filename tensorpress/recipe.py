"""The recipe: a model, its data and a graph of steps, read from YAML and checked before anything runs.

A step names what it comes after; `model` is the root. A parameter given as `{each: [a, b]}` branches the graph; what comes
after a branching step is done once for each branch, and branches share everything before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tensorpress.errors import InputError, nearest
from tensorpress.recipe_text import kind_of, load_yaml, override, shown
from tensorpress.secrets import redact

ROOT = "model"
MOST_BRANCHES = 1000
"""Nodes that `each` may make of one step; more is a mistake, and would take for ever."""


class Part(BaseModel):
    """Part of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(Part):
    """Which model is compressed, and in what precision it is worked on."""

    source: str = Field("demo", description="`demo`, a model folder, or a hub id")
    revision: str | None = Field(None, description="revision of a hub id")
    dtype: Literal["float32", "bfloat16", "stored"] = Field(
        "float32", description="precision of the arithmetic; artifacts keep the original's stored precision"
    )


class TextSpec(Part):
    """A text, and how much of it is read: `samples` windows of `length` tokens."""

    source: str = Field("demo", description="`demo` or a UTF-8 text file")
    split: Literal["train", "test", "other"] = Field("train", description="split of the demo text")
    samples: int = Field(64, ge=1, le=1_000_000)
    length: int = Field(256, ge=8, le=131_072)


class EvaluationSpec(TextSpec):
    """The text that quality is measured on; calibration never sees it."""

    split: Literal["train", "test", "other"] = "test"
    samples: int = Field(200, ge=1, le=1_000_000)
    other: str | None = Field(None, description="text of another domain: a file, or `demo` for the demo's English text")
    pairs: str | None = Field(None, description="CSV of sentence pairs with a score, for sentence encoders")


class DataSpec(Part):
    calibration: TextSpec = TextSpec()
    evaluation: EvaluationSpec = EvaluationSpec()


class Gate(Part):
    """Bounds that a metric of every leaf must keep."""

    min: float | None = Field(None, allow_inf_nan=False)
    max: float | None = Field(None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _bounds(self) -> Gate:
        if self.min is None and self.max is None:
            raise ValueError("min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("a min that is not above its max")
        return self


class EvaluateSpec(Part):
    use: tuple[str, ...] = Field(("perplexity", "fidelity", "size"), min_length=1)
    at: Literal["leaves", "steps"] = "leaves"


class Limits(Part):
    """Hard limits of each step and of each measurement: what goes over one is stopped, and fails. Not part of digests."""

    seconds: float | None = Field(None, ge=1, le=30 * 86_400, description="wall time in seconds")
    memory: float | None = Field(None, ge=0.1, le=65_536, description="memory of the process, in GiB")


class Method(BaseModel):
    """Configuration of a method; the methods themselves derive from it (`compressors.base.Compressor`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    use: str


@dataclass(frozen=True)
class Node:
    """One step on one branch of the graph."""

    step: str
    branch: str
    """The choices of `each` on the way here, as `quantize.bits=4, ...`; empty where nothing was chosen."""
    method: Method
    parent: str

    @property
    def id(self) -> str:
        return f"{self.step}[{self.branch}]" if self.branch else self.step


class Recipe(Part):
    """A checked recipe. `nodes` is its graph in an order in which parents come first."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")
    description: str = ""
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    seed: int = Field(0, ge=0, lt=2**31)
    steps: dict[str, dict[str, Any]] = Field(min_length=1)
    evaluate: EvaluateSpec = EvaluateSpec()
    gates: dict[str, Gate] = {}
    limits: Limits = Limits()

    @field_validator("evaluate", mode="before")
    @classmethod
    def _list_of_measures(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, list) else value

    @field_validator("description")
    @classmethod
    def _for_anyone(cls, value: str) -> str:
        return redact(value)  # it is kept with every run

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        raise RuntimeError("a recipe's nodes are known once `parse` has checked them")

    @property
    def leaves(self) -> tuple[Node, ...]:
        parents = {node.parent for node in self.nodes}
        return tuple(node for node in self.nodes if node.id not in parents)

    def node(self, node_id: str) -> Node:
        return next(node for node in self.nodes if node.id == node_id)

    def ancestors(self, node: Node) -> list[Node]:
        """The nodes from the root to `node`, without it."""
        chain: list[Node] = []
        while node.parent != ROOT:
            node = self.node(node.parent)
            chain.append(node)
        return chain[::-1]


def parse_text(
    text: str,
    methods: Mapping[str, type[Method]],
    measures: Mapping[str, Any],
    overrides: Any = (),
    folder: Path = Path(),
    name: str = "recipe",
) -> Recipe:
    """Check a recipe given as YAML text; paths in it must lie in `folder` or the working folder.

    `overrides` are strings like `steps.quantize.bits=3`. Raises InputError with one line for each problem.
    """
    try:
        data = load_yaml(text)
    except ValueError as error:
        raise InputError(f"{name}:{error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{name}: a recipe is a mapping with name, model, steps; found {kind_of(data)}")
    overrides = tuple(overrides)
    _refuse_paths_outside(data, folder, name, [override.partition("=")[0] for override in overrides])
    return parse(data, methods, measures, overrides)


def parse(
    data: dict[str, Any], methods: Mapping[str, type[Method]], measures: Mapping[str, Any], overrides: Any = ()
) -> Recipe:
    """Check a recipe given as a mapping; see `read`."""
    for change in overrides:
        override(data, change)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise InputError(*explain(error, "", Recipe)) from None
    problems = [
        f"evaluate: {shown(name)} is not a measure{nearest(name, measures)}; known: {', '.join(sorted(measures))}"
        for name in recipe.evaluate.use
        if name not in measures
    ]
    problems += _order_problems(recipe.steps)
    if problems:
        raise InputError(*problems)
    recipe.__dict__["nodes"] = _expand(recipe, methods)
    _check_order(recipe)
    return recipe


def _refuse_paths_outside(data: dict[str, Any], folder: Path, name: str, overridden: list[str]) -> None:
    """A recipe from elsewhere must not read any file of this machine: its paths stay in its folder or the working one.

    What the user overrides by name is the user's own.
    """
    model = data.get("model")
    sections = data.get("data")
    found: list[tuple[str, Any]] = [("model.source", model.get("source"))] if isinstance(model, dict) else []
    for key, section in sections.items() if isinstance(sections, dict) else []:
        if isinstance(section, dict):
            found += [(f"data.{key}.{field}", section.get(field)) for field in ("source", "other", "pairs")]
    allowed = [folder.resolve(), Path.cwd().resolve()]
    for where, value in found:
        if not isinstance(value, str) or any(f"{where}.".startswith(f"{key}.") for key in overridden):
            continue
        try:
            if not (value.startswith(("/", "~")) or ".." in Path(value).parts or Path(value).exists()):
                continue
            target = Path(value).expanduser().resolve()
        except (OSError, RuntimeError, ValueError):
            raise InputError(f"{where}: {shown(value)} cannot be a path") from None
        if not any(target.is_relative_to(place) for place in allowed):
            raise InputError(
                f"{where}: {value} lies outside the recipe's folder and the working folder; "
                f"name it yourself with --set {where}={value} if that is meant ({name})"
            )


def explain(error: ValidationError, prefix: str, model: type[BaseModel]) -> list[str]:
    """One line for each thing that pydantic found: the path after `prefix`, what was found, what is allowed."""
    lines = []
    for item in error.errors():
        path = ".".join(
            str(p) for p in ([prefix] if prefix else []) + [p for p in item["loc"] if p != "function-after"]
        )
        kind, found = item["type"], item.get("input")
        if kind == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            lines.append(f"{path}: unknown key{nearest(str(item['loc'][-1]), known)}; known: {', '.join(known)}")
        elif kind == "missing":
            lines.append(f"{path}: is missing")
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            lines.append(f"{path}: found {shown(found)}, expected {message}")
    return lines


def _fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    for key in location:
        field = getattr(model, "model_fields", {}).get(key)
        if field is None:
            continue
        kinds = [field.annotation, *get_args(field.annotation)]
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return list(getattr(model, "model_fields", {}))


def _order_problems(steps: dict[str, dict[str, Any]]) -> list[str]:
    problems = []
    for name, step in steps.items():
        if name == ROOT:
            problems.append(f"steps.{name}: the name {ROOT} stands for the model itself; choose another")
            continue
        if not name.replace("_", "").replace("-", "").isalnum():
            problems.append(f"steps.{name}: a step's name has letters, digits, - and _")
        after = step.get("after")
        if after is None:
            problems.append(f"steps.{name}.after: is missing; it names a step, or `{ROOT}`")
        elif not isinstance(after, str):
            problems.append(f"steps.{name}.after: found {shown(after)}, expected the name of one step, or `{ROOT}`")
        elif after not in steps and after != ROOT:
            hint = nearest(after, [*steps, ROOT])
            problems.append(f"steps.{name}.after: no step {shown(after)}{hint}; known: {', '.join([ROOT, *steps])}")
    if problems:
        return problems
    for name in steps:
        seen = [name]
        while (after := steps[seen[-1]]["after"]) != ROOT:
            if after in seen:
                return [f"steps.{name}: comes after itself: {' -> '.join([*seen, after])}"]
            seen.append(after)
    return []


def _expand(recipe: Recipe, methods: Mapping[str, type[Method]]) -> tuple[Node, ...]:
    problems: list[str] = []
    made: dict[str, list[Node]] = {}
    waiting = dict(recipe.steps)
    while waiting:
        name = next(n for n, step in waiting.items() if step["after"] == ROOT or step["after"] in made)
        step = waiting.pop(name)
        parents: list[Node | None] = [*made.get(step["after"], [])] or [None]
        made[name] = []
        _refuse_endless(name, step, len(parents))
        for choice, values in _choices(name, step):
            method = _method(name, values, methods, problems)
            if method is None:
                continue
            for parent in parents:
                branch = ", ".join(part for part in (parent.branch if parent else "", choice) if part)
                made[name].append(Node(name, branch, method, parent.id if parent else ROOT))
    if problems:
        raise InputError(*dict.fromkeys(problems))
    return tuple(node for nodes in made.values() for node in nodes)


def _refuse_endless(name: str, step: dict[str, Any], parents: int) -> None:
    lists = [v["each"] for v in step.values() if isinstance(v, dict) and isinstance(v.get("each"), list)]
    count = parents * math.prod(len(values) for values in lists)
    if count > MOST_BRANCHES:
        raise InputError(f"steps.{name}: `each` makes {count} branches of it; at most {MOST_BRANCHES} can be")


def _choices(name: str, step: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    fixed = {key: value for key, value in step.items() if key != "after"}
    branching: dict[str, list[Any]] = {}
    for key, value in fixed.items():
        if isinstance(value, dict) and "each" in value:
            if set(value) != {"each"} or not isinstance(value["each"], list) or not value["each"]:
                raise InputError(f"steps.{name}.{key}: `each` takes a list of values, and stands alone")
            if not all(_is_plain(choice) for choice in value["each"]):
                raise InputError(f"steps.{name}.{key}: `each` takes plain values, or lists of them")
            branching[key] = value["each"]
    result = []
    for combination in itertools.product(*branching.values()):
        chosen = dict(zip(branching, combination, strict=True))
        label = ", ".join(f"{name}.{key}={value}" for key, value in chosen.items())
        result.append((label, {**fixed, **chosen}))
    if len({label for label, _ in result}) < len(result):
        raise InputError(f"steps.{name}: `each` gives the same value twice")
    return result


def _is_plain(value: Any) -> bool:
    return all(v is None or isinstance(v, (str, int, float)) for v in (value if isinstance(value, list) else [value]))


def _method(
    name: str, values: dict[str, Any], methods: Mapping[str, type[Method]], problems: list[str]
) -> Method | None:
    use = values.get("use")
    if use is None:
        problems.append(f"steps.{name}.use: is missing; known methods: {', '.join(sorted(methods))}")
        return None
    if not isinstance(use, str) or use not in methods:
        hint = nearest(use, methods) if isinstance(use, str) else ""
        problems.append(f"steps.{name}.use: no method {shown(use)}{hint}; known: {', '.join(sorted(methods))}")
        return None
    try:
        return methods[use].model_validate(values)
    except ValidationError as error:
        problems += explain(error, f"steps.{name}", methods[use])
        return None


def _check_order(recipe: Recipe) -> None:
    """Refuse a step after one that it cannot follow, such as a decomposition of layers that are already quantized."""
    problems = []
    for node in recipe.nodes:
        refused = getattr(type(node.method), "may_not_follow", {})
        for before in recipe.ancestors(node):
            if before.method.use in refused:
                problems.append(
                    f"steps.{node.step}: {node.method.use} may not come after {before.step} ({before.method.use}): "
                    f"{refused[before.method.use]}"
                )
    if problems:
        raise InputError(*dict.fromkeys(problems))
