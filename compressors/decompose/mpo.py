"""Decomposition of linear layers into matrix product operators by TT-SVD.

Sources: Oseledets 2011 (TT-SVD); Gao et al. 2020 and MPOP, Liu et al. 2021, arXiv 2106.02205 (MPO for layers);
CompactifAI, Tomut et al. 2024, arXiv 2401.14109 (MPO of attention and feed-forward matrices of language models).
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.errors import InputError
from tensorpress.kernels.mpo_linear import MPOLinear, mpo_to_matrix
from tensorpress.structure import DENSE, Structure, find_structure, linear_shape, linear_weight, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def factors(size: int, sites: int) -> tuple[int, ...]:
    """Split `size` into `sites` factors, as even as its primes allow, the largest in the middle.

    Prime factors are dealt out from the largest, each to the smallest product so far.
    """
    primes, rest, divisor = [], size, 2
    while rest > 1:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1 if divisor * divisor <= rest else max(rest - divisor, 1)
    parts = [1] * sites
    for prime in sorted(primes, reverse=True):
        parts[parts.index(min(parts))] *= prime
    parts.sort()
    return tuple(parts[::2] + parts[1::2][::-1])


def full_bonds(rows: Sequence[int], columns: Sequence[int]) -> tuple[int, ...]:
    """Bond dimensions at which the decomposition is exact: d_k = min(prod_{l<=k} i_l j_l, prod_{l>k} i_l j_l)."""
    sizes = [i * j for i, j in zip(rows, columns, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def parameters(rows: Sequence[int], columns: Sequence[int], bonds: Sequence[int]) -> int:
    """Numbers stored by the cores: sum of d_{k-1} i_k j_k d_k."""
    edges = (1, *bonds, 1)
    return sum(edges[k] * i * j * edges[k + 1] for k, (i, j) in enumerate(zip(rows, columns, strict=True)))


def capped_bonds(rows: Sequence[int], columns: Sequence[int], bond_dimension: int) -> tuple[int, ...]:
    """Bonds min(bond_dimension, full bond)."""
    return tuple(min(bond_dimension, full) for full in full_bonds(rows, columns))


def largest_bond(rows: Sequence[int], columns: Sequence[int], budget: float) -> int:
    """The largest bond dimension whose cores hold at most `budget` numbers; 0 when not even 1 does."""
    low, high = 0, max(full_bonds(rows, columns), default=1)
    while low < high:
        middle = (low + high + 1) // 2
        if parameters(rows, columns, capped_bonds(rows, columns, middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def decompose(
    weight: torch.Tensor, rows: Sequence[int], columns: Sequence[int], bonds: Sequence[int]
) -> list[torch.Tensor]:
    """TT-SVD of weight [prod rows, prod columns] into cores [d_{k-1}, i_k, j_k, d_k], in float64.

    At full bonds the product of the cores is the weight; below, its Frobenius error is the root of the sum of squares of
    the singular values that each cut drops.
    """
    if len(rows) == 1:
        return [weight.double().reshape(1, rows[0], columns[0], 1)]
    from tensorly.decomposition import tensor_train_matrix  # half a second, only where a step decomposes

    tensor = np.asarray(weight.detach().double().cpu().numpy()).reshape(*rows, *columns)
    cores = tensor_train_matrix(tensor, [1, *bonds, 1])
    return [torch.from_numpy(np.array(core)) for core in cores]


class MPO(Compressor):
    """Replace linear layers of the blocks by matrix product operators; a layer that would not shrink stays dense.

    Report: `error_after` is the relative Frobenius error of the weight.
    """

    use: Literal["mpo"] = "mpo"
    keep: float | None = Field(None, gt=0, lt=1, description="share of each layer's parameters that is kept")
    bond_dimension: int | None = Field(None, ge=1, description="largest bond dimension, instead of `keep`")
    sites: int = Field(2, ge=2, le=7, description="number of cores")
    layers: tuple[str, ...] = Field(("*",), description="which layers: patterns on their paths, such as *mlp*")

    needs_calibration: ClassVar[bool] = False
    may_not_follow: ClassVar[Mapping[str, str]] = {
        "gptq": "its layers are quantized; decompose first, then quantize what stays dense",
        "mpo": "its layers are decomposed already",
    }

    @model_validator(mode="after")
    def _one_size(self) -> MPO:
        if (self.keep is None) == (self.bond_dimension is None):
            raise ValueError("one of keep (a share between 0 and 1) and bond_dimension")
        return self

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        if not self._targets(model, structure):
            known = ", ".join(structure.blocks[0].linear_paths)
            raise InputError(f"layers: {', '.join(self.layers)} matches no dense layer; the first block has {known}")

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        structure = find_structure(model)
        self.check(model, structure)
        targets = self._targets(model, structure)
        rows = []
        for done, path in enumerate(targets):
            calibration.progress("mpo", done, len(targets))
            rows.append(self._decompose(model, path))
        calibration.progress("mpo", len(targets), len(targets))
        before, after = sum(r.parameters_before for r in rows), sum(r.parameters_after for r in rows)
        dense = sum(r.action == "dense" for r in rows)
        summary: dict[str, Any] = {"kept": after / before, "layers": len(rows), "left_dense": dense}
        if dense == len(rows):
            summary["note"] = "every layer stays dense: none has a bond dimension that saves at this `keep`"
        return model, Report(rows, summary)

    def _targets(self, model: PreTrainedModel, structure: Structure) -> list[str]:
        dense = [path for path in structure.linear_paths if isinstance(model.get_submodule(path), DENSE)]
        return [path for path in dense if any(fnmatch.fnmatchcase(path, pattern) for pattern in self.layers)]

    def _decompose(self, model: PreTrainedModel, path: str) -> LayerReport:
        start = time.monotonic()
        layer = model.get_submodule(path)
        outputs, inputs = linear_shape(layer)
        rows, columns = factors(outputs, self.sites), factors(inputs, self.sites)
        if self.bond_dimension is not None:
            bond = self.bond_dimension
        else:
            bond = largest_bond(rows, columns, (self.keep or 0) * outputs * inputs)
        bonds = capped_bonds(rows, columns, bond)
        count = parameters(rows, columns, bonds)
        report = LayerReport(
            path, "dense", outputs * inputs, outputs * inputs, 2 * outputs * inputs, 2 * outputs * inputs
        )
        report.detail = {"out_factors": rows, "in_factors": columns, "bonds": bonds}
        if bond == 0 or count >= outputs * inputs:
            report.error_after, report.seconds = 0.0, round(time.monotonic() - start, 3)
            return report
        weight = linear_weight(layer).detach()
        cores = decompose(weight, rows, columns, bonds)
        bias = getattr(layer, "bias", None)
        set_module(model, path, MPOLinear.from_cores([core.to(weight.dtype) for core in cores], bias).to(weight.device))
        lost = (mpo_to_matrix(cores).to(weight.device) - weight.double()).norm() / weight.double().norm()
        report.action, report.parameters_after, report.bytes_after = "mpo", count, 2 * count
        report.error_before, report.error_after = 0.0, float(lost)
        report.seconds = round(time.monotonic() - start, 3)
        return report
