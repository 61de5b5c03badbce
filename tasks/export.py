"""Write an artifact in a format that others read; GPTQ: the standard checkpoint layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from tensorpress.artifact import CARRIED, plain_gptq, save_model
from tensorpress.errors import InputError
from tensorpress.loading import load
from tensorpress.structure import DENSE, find_structure
from tensorpress.tasks.planning import stored_dtype

FORMATS = ("gptq",)


def export(folder: Path, target: Path, layout: str = "gptq") -> Path:
    """Write the model of `folder` to the new folder `target`; returns it.

    Raises InputError for a format that is not known, a model that the format cannot hold, or a target that is there already.
    """
    if layout not in FORMATS:
        raise InputError(f"format: {layout!r} is not known; known: {', '.join(FORMATS)}")
    if target.exists():
        raise InputError(f"{target}: exists already; export writes a new folder")
    model = load(folder)
    if plain_gptq(model) is None:
        structure = find_structure(model)
        dense = [path for path in structure.linear_paths if isinstance(model.get_submodule(path), DENSE)]
        why = (
            f"{dense[0]} is not quantized"
            if dense
            else "it holds decomposed or removed layers, or several kinds of bits"
        )
        raise InputError(f"{folder}: cannot be written as plain GPTQ: {why}")
    part = target.with_name(f".part-{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        save_model(model, part, stored_dtype(folder))
        for pattern in CARRIED:
            for path in folder.glob(pattern):
                if not (part / path.name).exists():
                    shutil.copyfile(path, part / path.name)
        part.rename(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target
