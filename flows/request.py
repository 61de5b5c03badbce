"""From what a run was asked for (the form, or the command line) to its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tensorpress import recipe as recipes
from tensorpress.artifact import Store
from tensorpress.compressors.catalog import METHODS
from tensorpress.errors import InputError
from tensorpress.evaluators.catalog import MEASURES
from tensorpress.flows.parameters import WRITTEN, CompressParameters, recipe_folder
from tensorpress.flows.place import here
from tensorpress.recipe import Recipe
from tensorpress.recipe_text import read, resolved, without_secrets
from tensorpress.tasks.planning import Plan, check_kernels, make_plan

INSTEAD = {"tokens": "minutes", "minutes": "tokens", "keep": "bond_dimension"}
"""Values that a method takes instead of another."""


def written(text: str, overrides: list[str], **more: Any) -> CompressParameters:
    """Parameters of a run of a recipe given as text. Raises InputError."""
    if not text.strip():
        raise InputError("recipe: is empty; it needs at least name, model and steps")
    try:
        return CompressParameters(recipe=WRITTEN, text=text, overrides=overrides, **more)
    except ValidationError as error:
        problems = ((".".join(map(str, item["loc"])) or "parameters", item["msg"]) for item in error.errors())
        raise InputError(
            *(f"{place}: {message.removeprefix('Value error, ')}" for place, message in problems)
        ) from None


def prepare(parameters: CompressParameters) -> Plan:
    """Check a run's recipe, model and texts; nothing is written. Raises InputError."""
    check_kernels(parameters.kernels)
    place = here()
    text, folder = parameters.text, place.folder
    if parameters.recipe != WRITTEN:
        folder = recipe_folder()
        text = read(folder / f"{parameters.recipe}.yaml")
    overrides = [*_form_overrides(parameters, text, folder), *parameters.overrides]
    text, overrides = without_secrets(text, overrides)
    recipe = recipes.parse_text(text, METHODS, MEASURES, overrides, folder)
    return make_plan(recipe, Store(place.store), resolved(text, overrides))


def _form_overrides(parameters: CompressParameters, text: str, folder: Path) -> list[str]:
    """What the form changes, as the overrides that say the same on the command line."""
    overrides = [f"model.source={parameters.model}"] if parameters.model else []
    if parameters.samples is not None:
        overrides.append(f"data.calibration.samples={parameters.samples}")
    changes = parameters.changes()
    if not changes:
        return overrides
    recipe = recipes.parse_text(text, METHODS, MEASURES, [*overrides, *parameters.overrides], folder)
    for name, value in changes.items():
        taking = [step for step, spec in recipe.steps.items() if name in METHODS[spec["use"]].model_fields]
        if not taking:
            raise InputError(f"{name}: no step of the recipe {recipe.name} takes it")
        for step in taking:
            overrides.append(f"steps.{step}.{name}={value}")
            if INSTEAD.get(name) in recipe.steps[step]:
                overrides.append(f"steps.{step}.{INSTEAD[name]}=null")
    return overrides


def absolute_paths(recipe: Recipe) -> list[str]:
    """Overrides that give every file and folder of a checked recipe its absolute path, for a run that begins elsewhere."""
    evaluation = recipe.data.evaluation
    named = {
        "model.source": recipe.model.source,
        "data.calibration.source": recipe.data.calibration.source,
        "data.evaluation.source": evaluation.source,
        "data.evaluation.other": evaluation.other,
        "data.evaluation.pairs": evaluation.pairs,
    }
    paths = {key: Path(value).expanduser() for key, value in named.items() if value and value != "demo"}
    return [f"{key}={path.absolute()}" for key, path in paths.items() if path.exists()]
