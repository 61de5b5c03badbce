"""What an artifact's tensorpress.json must be: input from outside where the folder was copied here, checked before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator

from tensorpress.recipe import explain

Name = Annotated[str, Field(max_length=10_000)]


class Link(BaseModel):
    """A step of the chain."""

    model_config = ConfigDict(extra="allow")

    step: Name
    use: Name = ""
    config: dict[str, Any] = {}
    digest: Name = ""
    seconds: float | None = None


class File(BaseModel):
    """Length and digest of a file."""

    bytes: Annotated[StrictInt, Field(ge=0)]
    sha256: str


class Record(BaseModel):
    """The fields that are used; others are let through."""

    model_config = ConfigDict(extra="allow")

    format_version: Annotated[StrictInt, Field(ge=1)] = 1
    digest: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")]
    root: Name | None = None
    base: Name | None = None
    parent: Name | None = None
    seconds: float | None = None
    chain: list[Link] = []
    files: Annotated[dict[str, File], Field(min_length=1)]

    @field_validator("files")
    @classmethod
    def _beside(cls, files: dict[str, File]) -> dict[str, File]:
        for name in files:
            if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
                raise ValueError(f"names of files beside the record, not {name[:80]!r}")
        return files


def record_problem(record: Any) -> str | None:
    """What is wrong with a record, in one line; None for one that can be used."""
    try:
        Record.model_validate(record)
    except ValidationError as error:
        return explain(error, "", Record)[0]
    return None
