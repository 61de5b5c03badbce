"""Sharing across blocks: layers of the same kind are MPOs with one central core for all of them and auxiliary cores of their own.

Source: MPOBERT, Liu et al. 2023, arXiv 2303.16753. There the shared core is trained from an ALBERT, which shares all; here it is fitted to
the layers of a model that shares nothing, all together, by alternating least squares.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.compressors.decompose.alternating import conjugate_gradients
from tensorpress.compressors.decompose.mpo_rows import dense_row
from tensorpress.compressors.decompose.site_plans import WORD, check_sites
from tensorpress.compressors.decompose.targets import clamped, matching, refuse_quantized
from tensorpress.compressors.decompose.tensor_train import (
    canonical,
    capped_bonds,
    decompose,
    factors,
    full_bond,
    parameters,
)
from tensorpress.errors import InputError
from tensorpress.kernels.mpo_contraction import merge
from tensorpress.kernels.mpo_linear import mpo_to_matrix
from tensorpress.kernels.shared_mpo_linear import SharedCore, SharedMPOLinear
from tensorpress.structure import Structure, find_structure, is_whole, linear_shape, linear_weight, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Cores = list[torch.Tensor]
ROUNDS = 20
"""Of turning the gauges of the layers towards each other before the first sweep."""
STARTS = 8
"""From so many signs of the gauges."""
STEPS = 20
"""Of conjugate gradients for the shared core in each sweep."""


class Share(Compressor):
    """Let layers of the same kind and shape share the central core of their MPOs over `blocks` consecutive blocks.

    A group is made of MPOs only where that takes fewer bytes than its dense layers; else these stay. Sharing costs much where layers are
    as unlike as those of a trained model mostly are: follow it with `distill`, which trains the shared core by the gradients of all its layers.

    Report: a row for each layer; the first of a group has the bytes of the shared core. `error_after` is the relative Frobenius error of
    the weight, `error_before` that of an MPO of the same bonds with a central core of its own.
    """

    use: Literal["share"] = "share"
    blocks: int | None = Field(None, ge=2, description="consecutive blocks that share; all if not given")
    sites: int = Field(3, ge=3, le=7, description="number of cores, odd")
    bond_dimension: int | None = Field(None, ge=1, description="largest bond dimension; the full bonds if not given")
    layers: tuple[str, ...] = Field(("*",), description="which layers: patterns on their paths, such as *mlp*")
    sweeps: int = Field(4, ge=0, le=50, description="of alternating least squares over all cores of a group")

    needs_calibration: ClassVar[bool] = False
    may_not_follow: ClassVar[Mapping[str, str]] = {
        "gptq": "its layers are quantized; share first",
        "mpo": "its layers are decomposed, each with bonds of its own",
        "share": "its layers share already",
    }

    @field_validator("sites")
    @classmethod
    def _has_a_middle(cls, sites: int) -> int:
        if sites % 2 == 0:
            raise ValueError("an odd number: the core in the middle is what is shared")
        return sites

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        refuse_quantized(self.use, model, matching(structure, self.layers))
        groups = self._groups(model, structure)
        if not groups:
            raise InputError(
                f"layers: {', '.join(self.layers)} matches no dense layers of one kind and shape in several blocks"
            )
        for paths in groups:
            check_sites(self.sites, paths[0], *linear_shape(model.get_submodule(paths[0])))

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        structure = find_structure(model)
        self.check(model, structure)
        groups = self._groups(model, structure)
        rows: list[LayerReport] = []
        for done, paths in enumerate(groups):
            calibration.progress("share", done, len(groups))
            rows += self._share(model, paths)
        calibration.progress("share", len(groups), len(groups))
        shared = [row for row in rows if row.action == "shared"]
        summary: dict[str, Any] = {
            "kept": sum(row.parameters_after for row in rows) / sum(row.parameters_before for row in rows),
            "layers": len(rows),
            "groups": len({row.detail["group"] for row in shared}),
            "left_dense": len(rows) - len(shared),
        }
        notes = clamped(self.bond_dimension, (full_bond(self.sites, *row.detail["shape"]) for row in rows))
        if not shared:
            notes.append("every layer stays dense: no group takes fewer bytes with a shared core at this size")
        if notes:
            summary["note"] = "; ".join(notes)
        rows.sort(key=lambda row: structure.linear_paths.index(row.layer))
        return model, Report(rows, summary)

    def _groups(self, model: PreTrainedModel, structure: Structure) -> list[list[str]]:
        """Paths of the layers that are to share: the same path within their block and the same shape, `blocks` blocks in a row."""
        found: dict[tuple[str, tuple[int, int], int], list[str]] = {}
        chosen = set(matching(structure, self.layers))
        for block in structure.blocks:
            for path in block.linear_paths:
                if path in chosen and is_whole(model, path):
                    shape = linear_shape(model.get_submodule(path))
                    span = block.index // self.blocks if self.blocks else 0
                    role = path.removeprefix(block.path + ".")
                    found.setdefault((role, shape, span), []).append(path)
        return [paths for paths in found.values() if len(paths) > 1]

    def _share(self, model: PreTrainedModel, paths: list[str]) -> list[LayerReport]:
        start = time.monotonic()
        layers = [model.get_submodule(path) for path in paths]
        outputs, inputs = linear_shape(layers[0])
        rows, columns = factors(outputs, self.sites), factors(inputs, self.sites)
        bonds = capped_bonds(rows, columns, self.bond_dimension or outputs * inputs)
        reports = [dense_row(path, outputs, inputs) for path in paths]
        middle, edges = self.sites // 2, (1, *bonds, 1)
        center = edges[middle] * rows[middle] * columns[middle] * edges[middle + 1]
        own = parameters(rows, columns, bonds) - center
        if center + len(paths) * own >= len(paths) * outputs * inputs:
            return reports
        weights = [linear_weight(layer).detach() for layer in layers]
        separate = [[core.to(w.device) for core in decompose(w, rows, columns, bonds)] for w in weights]
        errors_before = [_relative_error(cores, weight) for cores, weight in zip(separate, weights, strict=True)]
        fitted = fit_shared(weights, separate, self.sweeps)
        shared = SharedCore(fitted[0][middle].to(weights[0]))
        for place, (path, layer, cores) in enumerate(zip(paths, layers, fitted, strict=True)):
            auxiliary = [core.to(weights[place]) for core in (*cores[:middle], *cores[middle + 1 :])]
            bias = cast("torch.Tensor | None", getattr(layer, "bias", None))
            set_module(model, path, SharedMPOLinear.from_cores(auxiliary, shared, paths[0], bias))
            report = reports[place]
            report.action = "shared"
            report.parameters_after = own + (center if place == 0 else 0)
            report.bytes_after = WORD * report.parameters_after
            stored = [*auxiliary[:middle], shared.core.detach(), *auxiliary[middle:]]
            report.error_before, report.error_after = errors_before[place], _relative_error(stored, weights[place])
            report.detail |= {"group": paths[0], "out_factors": rows, "in_factors": columns, "bonds": bonds}
            report.seconds = round((time.monotonic() - start) / len(paths), 3)
        return reports


def fit_shared(weights: Sequence[torch.Tensor], separate: Sequence[Cores], sweeps: int) -> list[Cores]:
    """Cores [d_{k-1}, i_k, j_k, d_k] of each weight [m, n], the middle one the same tensor for all, in float64.

    `separate` are MPOs of the weights by themselves, of an odd number of sites and the same bonds. Their gauges are turned towards each other,
    the shared core is the mean of the middle ones, and each sweep then solves for every core in turn, the shared one against all weights. What falls
    is the sum of the squared relative errors; it never rises. One weight without sweeps keeps its MPO.
    """
    norms = [max(float(weight.double().norm()), 1e-300) for weight in weights]
    middle = len(separate[0]) // 2
    fitted = _aligned([canonical(cores, middle) for cores in separate], norms)
    for _ in range(sweeps):
        for cores, weight, norm in zip(fitted, weights, norms, strict=True):
            target = weight.double() / norm  # of one layer at a time
            for k in range(len(cores)):
                if k != middle:
                    _solve_core(cores, target, k)
        _descend_center(fitted, weights, norms)
    logs = [math.log(norm) for norm, weight in zip(norms, weights, strict=True) if bool(weight.any())]
    scale = math.exp(sum(logs) / max(1, len(logs)))
    center = fitted[0][middle] * scale  # with numbers of the size of the weights', so that one learning rate suits all
    others = [(cores[0] * (norm / scale), cores) for cores, norm in zip(fitted, norms, strict=True)]
    return [[first, *cores[1:middle], center, *cores[middle + 1 :]] for first, cores in others]


def shared_error(fitted: Sequence[Cores], weights: Sequence[torch.Tensor]) -> float:
    """Sum over the layers of the squared relative Frobenius error."""
    return sum(_relative_error(cores, weight) ** 2 for cores, weight in zip(fitted, weights, strict=True))


def _relative_error(cores: Cores, weight: torch.Tensor) -> float:
    w = weight.double()
    return float((mpo_to_matrix([core.to(w) for core in cores]) - w).norm() / w.norm().clamp(min=1e-300))


def _aligned(layers: list[Cores], norms: Sequence[float]) -> list[Cores]:
    """Canonical cores around the middle, that of each layer rotated towards the mean on both bonds; the mean in all of them. Zero layers do not count.

    Alternating Procrustes problems, from the gauges of the decomposition and from some with other signs, of which those leave it free.
    """
    middle = len(layers[0]) // 2
    centers = [cores[middle] / norm for cores, norm in zip(layers, norms, strict=True)]
    generator = torch.Generator().manual_seed(0)
    counted = [place for place, center in enumerate(centers) if bool(center.any())] or [0]
    turning = [centers[place] for place in counted]
    tried = [_rotations(turning, generator if start else None) for start in range(STARTS if len(turning) > 1 else 1)]
    mean, lefts, rights = max(tried, key=lambda found: float(found[0].norm()))
    rotations = dict(zip(counted, zip(lefts, rights, strict=True), strict=True))
    found = []
    for place, cores in enumerate(layers):
        left, right = rotations.get(place, (lefts[0], rights[0]))
        before = torch.tensordot(cores[middle - 1], left, 1)
        after = torch.tensordot(right.T, cores[middle + 1], 1)
        found.append([*cores[: middle - 1], before, mean, after, *cores[middle + 2 :]])
    return found


def _rotations(centers: list[torch.Tensor], generator: torch.Generator | None) -> tuple[torch.Tensor, Cores, Cores]:
    """The mean [d, i, j, e] of the rotated cores, and the rotations of the left and the right bond of each; signs at random to begin with, or none."""
    first, _, _, last = centers[0].shape
    lefts = [torch.eye(first).to(center) for center in centers]
    rights = [torch.eye(last).to(center) for center in centers]
    if generator is not None:
        rights = [right * (2 * torch.randint(2, (last,), generator=generator) - 1).to(right) for right in rights]
    mean = centers[0]
    for _ in range(ROUNDS if len(centers) > 1 else 0):
        for place, center in enumerate(centers):
            turned = torch.tensordot(center, rights[place], 1)
            lefts[place] = _polar(torch.tensordot(turned, mean, ([1, 2, 3], [1, 2, 3])))
            turned = torch.tensordot(lefts[place].T, center, 1)
            rights[place] = _polar(torch.tensordot(turned, mean, ([0, 1, 2], [0, 1, 2])))
        turned_all = [_turned(c, left, right) for c, left, right in zip(centers, lefts, rights, strict=True)]
        mean = torch.stack(turned_all).mean(0)
    return mean, lefts, rights


def _turned(center: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.tensordot(torch.tensordot(left.T, center, 1), right, 1)


def _polar(matrix: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix that is nearest to a square one."""
    u, _, vt = torch.linalg.svd(matrix)
    return u @ vt


def _around(cores: Cores, k: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """What stands left of core k [i j before, d] and right of it [d, i j after], and the outputs that each has."""
    left, right = cores[k].shape[0], cores[k].shape[3]
    before = merge(cores[:k]) if k else cores[k].new_ones(1, 1, 1, 1)
    after = merge(cores[k + 1 :]) if k + 1 < len(cores) else cores[k].new_ones(1, 1, 1, 1)
    return before.reshape(-1, left), after.reshape(right, -1), before.shape[1], after.shape[1]


def _unfolded(target: torch.Tensor, cores: Cores, k: int, rows_before: int, rows_after: int) -> torch.Tensor:
    """The weight [m, n] as [i j before, i_k, j_k, i j after]."""
    _, i, j, _ = cores[k].shape
    before, after = math.prod(c.shape[2] for c in cores[:k]), math.prod(c.shape[2] for c in cores[k + 1 :])
    split = target.reshape(rows_before, i, rows_after, before, j, after).permute(0, 3, 1, 4, 2, 5)
    return split.reshape(rows_before * before, i, j, rows_after * after)


def _projected(target: torch.Tensor, cores: Cores, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X^T X, Y Y^T and X^T W Y^T for the surroundings X and Y of core k: the normal equations of the least squares for it."""
    left, right, rows_before, rows_after = _around(cores, k)
    unfolded = _unfolded(target, cores, k, rows_before, rows_after)
    moved = torch.tensordot(torch.tensordot(left.T, unfolded, 1), right.T, 1)
    return left.T @ left, right @ right.T, moved


def _solve_core(cores: Cores, target: torch.Tensor, k: int) -> None:
    """Least squares for core k of one layer, all others fixed."""
    left, right, moved = _projected(target, cores, k)
    solved = torch.tensordot(torch.linalg.pinv(left, hermitian=True), moved, 1)
    solved = torch.tensordot(solved, torch.linalg.pinv(right, hermitian=True), 1)
    if _energy(left, right, moved, solved) < _energy(left, right, moved, cores[k]):
        cores[k] = solved


def _energy(left: torch.Tensor, right: torch.Tensor, moved: torch.Tensor, core: torch.Tensor) -> float:
    """|W - X core Y|^2 up to the norm of W."""
    applied = torch.tensordot(torch.tensordot(left, core, 1), right, 1)
    return float((core * (applied - 2 * moved)).sum())


def _descend_center(layers: list[Cores], weights: Sequence[torch.Tensor], norms: Sequence[float]) -> None:
    """Conjugate gradients for the core that all layers share: sum over the layers of X^T X C Y Y^T = X^T W Y^T."""
    middle = len(layers[0]) // 2
    systems, wanted = [], torch.zeros_like(layers[0][middle])
    for cores, weight, norm in zip(layers, weights, norms, strict=True):
        left, right, moved = _projected(weight.double() / norm, cores, middle)
        systems.append((left, right))
        wanted += moved

    def apply(core: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(core)
        for left, right in systems:
            total += torch.tensordot(torch.tensordot(left, core, 1), right, 1)
        return total

    core = conjugate_gradients(apply, wanted, layers[0][middle], STEPS)
    for cores in layers:
        cores[middle] = core
