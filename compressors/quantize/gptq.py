"""GPTQ: quantization of linear layers with second-order error compensation (Frantar et al. 2022, arXiv 2210.17323)."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.compressors.calibration import BlockInputs, walk
from tensorpress.compressors.moments import SecondMoment
from tensorpress.compressors.quantize.factors import INNER, OUTER, Contracted, prepare, refitted
from tensorpress.errors import InputError, StepError
from tensorpress.kernels.factorized_embedding import untied_modules
from tensorpress.kernels.kernel_layer import kernel_layers
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.mpoe import SharedMatrices
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.kernels.shared_mpo_linear import SharedMPOLinear
from tensorpress.structure import DENSE, Block, Structure, find_structure, linear_shape, linear_weight, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 128
"""Columns that are compensated at once; the result does not depend on it."""
SHRINKS = 40
"""Steps of the search for the grid, down to a shrink of 60 %."""


@dataclass(frozen=True)
class Grid:
    """Integers q in 0 .. 2^bits - 1 stand for (q - zero) * scale; scale and zero are [rows, 1] or broadcast to it."""

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int

    def integers(self, w: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(w / self.scale) + self.zero, 0, 2**self.bits - 1)

    def round(self, w: torch.Tensor) -> torch.Tensor:
        return (self.integers(w) - self.zero) * self.scale


def fit_grid(w: torch.Tensor, importance: torch.Tensor, bits: int, symmetric: bool) -> Grid:
    """Fit one scale and zero to each row of w [rows, columns], by a search over shrunken ranges.

    The range that gives the smallest sum over columns of importance * error^2 is taken (`importance` [columns], the
    diagonal of the Hessian). Scales are rounded to fp16, as they will be stored. An all-zero row gets the scale 1.
    """
    levels = 2**bits - 1
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best: Grid | None = None
    best_error = torch.full_like(low, torch.inf)
    for step in range(SHRINKS):
        shrink = 1 - 0.6 * step / SHRINKS
        scale = ((high - low) * shrink / levels).to(torch.float16).to(w.dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = (
            torch.full_like(scale, 2 ** (bits - 1))
            if symmetric
            else torch.round(-low * shrink / scale).clamp(0, levels)
        )
        grid = Grid(scale, zero, bits)
        error = ((grid.round(w) - w).square() * importance).sum(1, keepdim=True)
        better = error < best_error
        if best is None:
            best = grid
        else:
            best = Grid(torch.where(better, scale, best.scale), torch.where(better, zero, best.zero), bits)
        best_error = torch.minimum(error, best_error)
    assert best is not None
    return best


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor U of the inverse of the damped Hessian [K, K], H^-1 = U^T U; and the damping that was needed.

    Computed in float64. Damping is a share of the mean diagonal; it is raised tenfold while the matrix is not positive
    definite. Raises StepError when not even a damping of 10 helps (the Hessian is not finite).
    """
    h = hessian.to(torch.float64, copy=True)
    diagonal = h.diagonal().clone()
    mean = diagonal.mean()
    while damping <= 10:
        h.diagonal().copy_(diagonal + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(h)
        if not int(failed) and bool(torch.isfinite(factor).all()):
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
            if not int(failed) and bool(torch.isfinite(factor).all()):
                return factor, damping
        damping *= 10
    raise StepError("gptq: the inputs of a layer are not finite, its Hessian cannot be inverted")


def quantize_matrix(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    act_order: bool = True,
    damping: float = 0.01,
    block: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize weight [N, K] against the Hessian of its inputs [K, K] (GPTQ, algorithm 1).

    Returns integers [N, K], scales [N, G] and zeros [N, G]; group g holds the columns g * group_size and following.
    With `act_order` columns are taken by falling diagonal of the Hessian and all grids are fitted beforehand, so that
    groups stay contiguous in memory; without, each grid is fitted on the compensated columns when they are reached.
    """
    w = weight.to(torch.float64, copy=True)
    h = hessian.to(torch.float64, copy=True)
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    rows, columns = w.shape
    groups = columns // group_size
    importance = h.diagonal().clone()
    scales, zeros = w.new_empty(rows, groups), w.new_empty(rows, groups)

    def fit(group: int, values: torch.Tensor) -> None:
        part = slice(group * group_size, (group + 1) * group_size)
        grid = fit_grid(values, importance[part], bits, symmetric)
        scales[:, group : group + 1], zeros[:, group : group + 1] = grid.scale, grid.zero

    order = torch.arange(columns, device=w.device)
    if act_order:
        for group in range(groups):
            fit(group, w[:, group * group_size : (group + 1) * group_size])
        order = torch.argsort(importance, descending=True, stable=True)
        w, h = w[:, order], h[order[:, None], order]
    upper, _ = inverse_factor(h, damping)
    del h
    groups_in_order = (order // group_size).tolist()
    integers = torch.empty_like(w)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = w.new_zeros(rows, end - start)
        for i in range(start, end):
            group = groups_in_order[i]
            if not act_order and i % group_size == 0:
                ready = w[:, i : i + group_size].clone()
                if i + group_size > end:  # the group reaches beyond the block: bring what is pending up to date
                    beyond = slice(end, i + group_size)
                    ready[:, end - i :] -= errors[:, : i - start] @ upper[start:i, beyond]
                fit(group, ready)
            grid = Grid(scales[:, group], zeros[:, group], bits)
            integers[:, i] = grid.integers(w[:, i])
            error = (w[:, i] - (integers[:, i] - grid.zero) * grid.scale) / upper[i, i]
            w[:, i + 1 : end] -= error[:, None] * upper[i, i + 1 : end]
            errors[:, i - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    restored = torch.empty_like(integers)
    restored[:, order] = integers
    return restored, scales, zeros


def dequantized(integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int) -> torch.Tensor:
    """Weights [N, K] that integers [N, K], scales and zeros [N, G] stand for."""
    return (integers - zeros.repeat_interleave(group_size, 1)) * scales.repeat_interleave(group_size, 1)


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """Relative error of the layer's output on the calibration set: sqrt(tr(D H D^T) / tr(W H W^T)), D = W - Q."""
    h, w = hessian.double(), weight.double()
    difference = w - quantized.double()
    signal = ((w @ h) * w).sum()
    return float((((difference @ h) * difference).sum().clamp(min=0) / signal.clamp(min=1e-30)).sqrt())


LEAST = 16
"""Inputs of a factor's group, at least; where no divisor of the rank is as large, a whole row is one."""


def _dense(model: nn.Module, structure: Structure) -> list[str]:
    """Paths of the layers of the blocks that are not quantized or decomposed, factors included."""
    return [path for path in structure.linear_paths if isinstance(model.get_submodule(path), DENSE)]


class GPTQ(Compressor):
    """Quantize every dense linear layer of the blocks; embeddings and the head stay as they are.

    Of a layer of low rank both factors are quantized. They are first brought to the gauge in which that harms least, where pivots are given up,
    and the outer factor is fitted anew to what the inner one has become. Where the factors would then be no smaller than their product, that is quantized.
    The cores of other matrix product operators stay as they are, which is said.

    Report: `error_before` is the relative output error of rounding to nearest on the same grid, `error_after` that of GPTQ.
    """

    use: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8] = Field(4, description="bits of a weight")
    bits_for: dict[str, Literal[2, 3, 4, 8, 16]] = Field(
        {},
        description="other bits for layers by patterns on their paths, such as {'*.outer': 8}; 16 leaves a layer as it is",
    )
    group_size: int = Field(128, description="inputs that share a scale; -1: the whole row")
    symmetric: bool = Field(True, description="grid symmetric around zero")
    act_order: bool = Field(True, description="quantize the columns with the largest inputs first")
    damping: float = Field(0.01, gt=0, le=1, description="share of the Hessian's mean diagonal that is added to it")

    may_not_follow: ClassVar[Mapping[str, str]] = {"gptq": "its layers are quantized already"}
    works_on: ClassVar[tuple[str, ...]] = ("mpo", "factorize", "lpa", "pela")

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        if self.group_size != -1 and self.group_size < 1:
            raise InputError(f"group_size: found {self.group_size}, expected -1 (whole row) or a positive number")
        dense = _dense(model, structure)
        if not dense and all(isinstance(layer, QuantizedLinear) for layer in kernel_layers(model)):
            raise InputError("gptq: the model has no dense linear layers left in its blocks")
        for path in self._targets(model, structure):
            inputs = linear_shape(model.get_submodule(path))[1]
            if self._is_factor(model, path):
                continue
            if self.group_size != -1 and inputs % self.group_size:
                allowed = [size for size in (16, 32, 64, 128, 256) if inputs % size == 0]
                raise InputError(
                    f"group_size: {self.group_size} does not divide the {inputs} inputs of {path}; "
                    f"use {', '.join(str(s) for s in allowed) or 'no group'}, or -1 for the whole row"
                )

    def check_layers(self, model: PreTrainedModel, structure: Structure) -> None:
        for pattern in self.bits_for:
            if not any(fnmatch.fnmatchcase(path, pattern) for path in structure.linear_paths):
                known = ", ".join(structure.blocks[0].linear_paths)
                raise InputError(f"bits_for: {pattern} matches no layer; the first block has {known}")
        dense = _dense(model, structure)
        if dense and not self._targets(model, structure):
            raise InputError("bits_for: every dense layer is left at 16 bits; nothing would be quantized")

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        structure = find_structure(model)
        self.check(model, structure)
        self.check_layers(model, structure)
        notes = _left_alone(model)
        if not self._targets(model, structure):
            notes.insert(
                0, "nothing was quantized: every layer is decomposed; leave some dense with `layers` of the step before"
            )
            summary = {"bits": self.bits, "group_size": self.group_size, "layers": 0, "note": "; ".join(notes)}
            return model, Report([], summary)
        targets = self._targets(model, structure)
        numbers = {path: linear_weight(model.get_submodule(path)).numel() for path in targets}
        prepare(model, {path: self.bits_of(path) for path in targets})
        structure = find_structure(model)
        rows = walk(
            model,
            structure,
            calibration.windows,
            lambda block, inputs: self._visit(model, block, inputs),
            what="gptq",
            progress=calibration.progress,
            scratch=calibration.scratch,
        )
        for row in rows:  # of factors, with the pivots that they had
            pair = (row.layer + INNER, row.layer + OUTER)
            before = numbers.get(row.layer) or sum(numbers[part] for part in pair)
            row.parameters_before, row.bytes_before = before, 2 * before
        summary = {"bits": self.bits, "group_size": self.group_size, "layers": len(rows)}
        return model, Report(rows, summary | ({"note": "; ".join(notes)} if notes else {}))

    def _targets(self, model: PreTrainedModel, structure: Structure) -> list[str]:
        return [path for path in structure.linear_paths if self._is_target(model, path)]

    def _is_target(self, model: PreTrainedModel, path: str) -> bool:
        layer = model.get_submodule(path)
        return isinstance(layer, Contracted) or (isinstance(layer, DENSE) and self.bits_of(path) != 16)

    def bits_of(self, path: str) -> int:
        """The bits of a layer: those of the first pattern that matches its path, else `bits`."""
        return next((bits for pattern, bits in self.bits_for.items() if fnmatch.fnmatchcase(path, pattern)), self.bits)

    @staticmethod
    def _is_factor(model: PreTrainedModel, path: str) -> bool:
        """Whether a layer is one of the two that a layer of low rank is made of: groups are then as large as its width allows."""
        return isinstance(model.get_submodule(path.rpartition(".")[0]), LowRankLinear)

    def _visit(self, model: PreTrainedModel, block: Block, inputs: BlockInputs) -> list[LayerReport]:
        rows = []
        inner: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for group in block.linear_groups:
            paths = [path for path in group if self._is_target(model, path)]
            if not paths:
                continue
            first = model.get_submodule(paths[0])
            hessian = SecondMoment(linear_shape(first)[1], linear_weight(first).device, scale=2.0)
            inputs.observe(first, hessian.add)
            for path in paths:
                whole = path.rpartition(".")[0]
                if path.endswith(INNER) and self._is_factor(model, path):
                    inner[whole] = linear_weight(model.get_submodule(path)).detach(), hessian.matrix
                elif path.endswith(OUTER) and whole in inner:
                    self._refit(model, whole, *inner.pop(whole))
                rows.append(self._quantize(model, path, hessian.matrix))
        return rows

    def _refit(self, model: PreTrainedModel, path: str, inner: torch.Tensor, hessian: torch.Tensor) -> None:
        """Let the outer factor of a low rank make up for what rounding has done to the inner one."""
        layer = model.get_submodule(path)
        assert isinstance(layer, LowRankLinear) and isinstance(layer.inner, QuantizedLinear)
        outer = linear_weight(layer.outer)
        outer.data = refitted(outer.detach(), inner, layer.inner.dense_weight(), hessian, self.damping)

    def _quantize(self, model: PreTrainedModel, path: str, hessian: torch.Tensor) -> LayerReport:
        start = time.monotonic()
        layer = model.get_submodule(path)
        bits = layer.bits if isinstance(layer, Contracted) else self.bits_of(path)
        weight = linear_weight(layer).detach().float()
        size = weight.shape[1] if self.group_size == -1 else self.group_size
        if weight.shape[1] % size:  # a factor, whose width is a rank, or a product of factors
            size = next((part for part in range(size, LEAST - 1, -1) if weight.shape[1] % part == 0), weight.shape[1])
        integers, scales, zeros = quantize_matrix(
            weight, hessian, bits, size, symmetric=self.symmetric, act_order=self.act_order, damping=self.damping
        )
        packed = self._packed(layer, integers, scales, zeros, size, bits)
        set_module(model, path, packed)
        nearest = Grid(scales.repeat_interleave(size, 1), zeros.repeat_interleave(size, 1), bits).round(weight.double())
        return LayerReport(
            layer=path,
            action=f"gptq {bits} bits",
            parameters_before=weight.numel(),
            parameters_after=weight.numel(),
            bytes_before=2 * weight.numel(),
            bytes_after=sum(b.numel() * b.element_size() for n, b in packed.named_buffers() if n != "bias"),
            error_before=output_error(weight, nearest, hessian),
            error_after=output_error(weight, packed.dense_weight(), hessian),
            seconds=round(time.monotonic() - start, 3),
        )

    def _packed(
        self, layer: nn.Module, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, size: int, bits: int
    ) -> QuantizedLinear:
        bias = getattr(layer, "bias", None)
        return QuantizedLinear.from_integers(
            integers.T.to(torch.int32).contiguous(),
            zeros.T.to(torch.int32).contiguous(),
            scales.T.contiguous(),
            torch.arange(integers.shape[1], device=integers.device) // size,
            bits,
            self.group_size if self.group_size == -1 else size,
            bias,
            zero_offset=1 if self.symmetric else 0,
        )


def _left_alone(model: nn.Module) -> list[str]:
    """A note where layers are made of cores, which are not quantized; else none."""
    modules = [module for _, module in untied_modules(model)]
    own = sum(isinstance(module, (MPOLinear, PivotedMPOLinear)) for module in modules)
    shared = sum(isinstance(module, (SharedMPOLinear, SharedMatrices)) for module in modules)
    way = "; mpo with plans: low_rank makes factors that are quantized" if own else ""
    return [f"the cores of {own + shared} layers stay at 16 bits{way}"] * (own + shared > 0)
