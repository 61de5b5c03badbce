"""What the flows take: one pydantic model each, which is the form in the Prefect UI and what the command line fills in.

Only light imports: a server's deployments are made from here, before torch is needed by anything.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tensorpress.recipe_text import load_yaml

WRITTEN = "the text below"


def recipe_folder() -> Path:
    """Folder of the recipes that come with tensorpress."""
    return Path(str(importlib.resources.files("tensorpress.recipes")))


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


if TYPE_CHECKING:
    RecipeName = str
else:
    RecipeName = Literal[(*recipe_names(), WRITTEN)]
"""The recipes that come along, as a drop-down list."""


class Form(BaseModel):
    """Parameters of a flow: unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")


class Runner(Form):
    """Where and how the steps of a run are worked on."""

    kind: Literal["threads", "dask", "ray"] = Field(
        "threads", title="Task runner", description="threads of this machine, or a cluster of Dask or Ray"
    )
    parallel: int = Field(1, ge=1, le=64, title="Branches at once", description="each needs the memory of its model")
    address: str = Field(
        "", title="Cluster", max_length=200, description="such as tcp://10.0.0.1:8786; empty: one is started here"
    )


class CompressParameters(Form):
    """What a run of a recipe takes."""

    recipe: RecipeName = Field("quickstart", title="Recipe", description=f"one that comes along, or `{WRITTEN}`")
    model: str = Field(
        "",
        title="Model",
        max_length=1000,
        description="`demo`, a model folder or a hub id, in place of the recipe's; empty: as in the recipe",
    )
    bits: Literal["as in the recipe", "2", "3", "4", "8"] = Field(
        "as in the recipe", title="Bits", description="of every step that quantizes"
    )
    keep: float | None = Field(
        None, gt=0, lt=1, title="Keep", description="share of the parameters that every decomposition keeps"
    )
    remove: float | None = Field(
        None, gt=0, lt=1, title="Remove", description="share of the sublayers that every pruning removes"
    )
    tokens: int | None = Field(
        None, ge=1, le=10**12, title="Healing tokens", description="budget of every healing step, in tokens"
    )
    minutes: float | None = Field(
        None,
        gt=0,
        le=10**5,
        title="Healing minutes",
        description="budget of every healing step as time instead; such a run is not reproducible",
    )
    samples: int | None = Field(
        None, ge=1, le=10**6, title="Calibration windows", description="windows of the calibration text"
    )
    text: str = Field(
        "", title="Text", max_length=100_000, description=f"a recipe as YAML; used when Recipe is `{WRITTEN}`"
    )
    overrides: list[str] = Field(
        [], title="Overrides", max_length=100, description="any other value, such as steps.quantize.group_size=64"
    )
    kernels: str = Field(
        "auto", title="Kernels", max_length=100, description="of the figures of speed: auto, or one backend's name"
    )
    runner: Runner = Field(Runner(), title="Runner", description="how the steps are worked on")

    @model_validator(mode="after")
    def _whole(self) -> CompressParameters:
        if (self.recipe == WRITTEN) != bool(self.text.strip()):
            raise ValueError(f"text: a recipe as YAML when recipe is `{WRITTEN}`, and nothing when a recipe is named")
        if self.tokens is not None and self.minutes is not None:
            raise ValueError("tokens or minutes, not both")
        return self

    @property
    def title(self) -> str:
        """The name of the recipe."""
        if self.recipe != WRITTEN:
            return self.recipe
        try:
            name = load_yaml(self.text)["name"]
        except (TypeError, KeyError, ValueError):
            name = None
        return name if isinstance(name, str) else "a recipe that cannot be read"

    def changes(self) -> dict[str, Any]:
        """Values that the form sets for every step whose method has such a parameter."""
        values = {key: getattr(self, key) for key in ("keep", "remove", "tokens", "minutes")}
        values["bits"] = None if self.bits == "as in the recipe" else int(self.bits)
        return {key: value for key, value in values.items() if value is not None}


class NightlyParameters(Form):
    """What a nightly run takes: recipes that are run one after the other, each held against its champion."""

    runs: list[CompressParameters] = Field(
        [CompressParameters()], min_length=1, max_length=100, title="Runs", description="one after the other"
    )
    promote: bool = Field(True, title="Promote", description="make what passes the gates and is not worse the champion")
    tolerance: float = Field(
        0.01, ge=0, le=1, title="Tolerance", description="relative change of quality and size that is no change"
    )
    speed_tolerance: float = Field(
        0.2, ge=0, le=10, title="Tolerance of speed", description="the same for figures of speed, which vary"
    )
    keep_days: float | None = Field(
        None,
        ge=0,
        le=36_500,
        title="Keep days",
        description="afterwards remove artifacts that were not used, and runs that began, longer ago",
    )
    keep_gigabytes: float | None = Field(
        None, gt=0, le=10**6, title="Keep gigabytes", description="afterwards bring the store below this size"
    )


class BenchmarkParameters(Form):
    """What a benchmark takes: a model, measured beside its original."""

    model: str = Field(
        "demo",
        title="Model",
        min_length=1,
        max_length=1000,
        description="`demo`, a model folder, a hub id, or the first digits of an artifact's digest",
    )
    against: str = Field("", title="Original", max_length=1000, description="the dense original; empty: none")
    prompt: int = Field(128, ge=1, le=131_072, title="Prompt", description="tokens of the prompt")
    tokens: int = Field(32, ge=1, le=131_072, title="Tokens", description="tokens that are decoded")
    repeats: int = Field(5, ge=1, le=1000, title="Repeats", description="runs that the median is taken of")
    dtype: Literal["float32", "bfloat16", "stored"] = Field(
        "float32", title="Arithmetic", description="precision of the arithmetic"
    )
    kernels: str = Field("auto", title="Kernels", max_length=100, description="auto, or one backend's name")
