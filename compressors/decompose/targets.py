"""Which layers a decomposition takes, and what is said where calibration shows too little of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from tensorpress.compressors.base import Calibration, LayerReport
from tensorpress.errors import InputError
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.structure import DENSE, Structure


def dense_targets(model: nn.Module, structure: Structure, patterns: Sequence[str]) -> list[str]:
    """Paths of the dense layers of the blocks that match a pattern, in the order of execution."""
    return [path for path in matching(structure, patterns) if isinstance(model.get_submodule(path), DENSE)]


def check_targets(method: str, model: nn.Module, structure: Structure, patterns: Sequence[str]) -> list[str]:
    """The same. Raises InputError where there are none, and where one that matches is quantized."""
    refuse_quantized(method, model, matching(structure, patterns))
    found = dense_targets(model, structure, patterns)
    if not found:
        known = ", ".join(structure.blocks[0].linear_paths)
        raise InputError(f"layers: {', '.join(patterns)} matches no dense layer; the first block has {known}")
    return found


def refuse_quantized(method: str, model: nn.Module, paths: Iterable[str]) -> None:
    """Raises InputError for a layer that is quantized already, with the order that works."""
    for path in paths:
        if isinstance(model.get_submodule(path), QuantizedLinear):
            raise InputError(f"{method}: {path} is quantized; decompose first, then quantize what stays dense")


def few_tokens(rows: Iterable[LayerReport], calibration: Calibration) -> list[str]:
    """A note where the calibration windows have fewer tokens than the widest layer has inputs; else none."""
    widest, tokens = max(row.detail["shape"][1] for row in rows), calibration.windows.numel()
    if tokens >= widest:
        return []
    return [
        f"calibration has {tokens} tokens, fewer than the {widest} inputs of the widest layer: what they do not show "
        "counts by the damping alone; use more samples"
    ]


def clamped(bond: int | None, full_bonds: Iterable[int]) -> list[str]:
    """A note where a bond dimension is above the largest bond that layers can have, one for each; else none."""
    count = 0 if bond is None else sum(bond > full for full in full_bonds)
    return [f"the bond dimension of {count} layers is their full bond, below {bond}"] if count else []


def matching(structure: Structure, patterns: Sequence[str]) -> list[str]:
    """Paths of the layers of the blocks that match a pattern, in the order of execution."""
    return [path for path in structure.linear_paths if any(fnmatch.fnmatchcase(path, one) for one in patterns)]
