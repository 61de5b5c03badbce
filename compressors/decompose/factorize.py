"""Dense layers replaced by structured ones: low rank, Kronecker products, blocks or single weights beside a low rank, and their rivals.

What the published forms promise, on one footing: the same bytes, the same moments, the same walk. Sources in `forms`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.compressors.calibration import BlockInputs, walk
from tensorpress.compressors.decompose.form_parts import Metric
from tensorpress.compressors.decompose.forms import PUBLISHED, Form, Kind, fit
from tensorpress.compressors.decompose.mpo_rows import dense_row
from tensorpress.compressors.decompose.site_plans import WORD, check_sites
from tensorpress.compressors.decompose.targets import check_targets, dense_targets, few_tokens
from tensorpress.compressors.decompose.weighted_low_rank import damped, weighted_error
from tensorpress.compressors.moments import SecondMoment
from tensorpress.errors import InputError
from tensorpress.structure import Block, Structure, find_structure, linear_shape, linear_weight, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHOICES: dict[str, tuple[Kind, ...]] = {
    "alpha": ("asvd",),
    "blocks": ("block_low_rank",),
    "sparse": ("low_rank_sparse", "mpo_sparse"),
    "channels": ("low_rank_sparse",),
    "sites": ("mpo_sparse",),
    "sweeps": ("kronecker", "block_low_rank", "low_rank_sparse", "mpo_sparse"),
}
"""Fields that only some forms have."""


class Factorize(Compressor):
    """Replace linear layers of the blocks by structured ones of a form, each at the same share of its bytes; one that would not shrink stays dense.

    All forms but `svd` and `asvd` minimise the error of the layer's output on calibration inputs, each layer with the inputs that the
    compressed blocks before it give.

    Report: `error_after` is the relative error of the output, root of the share of tr(W H W^T) that is lost, whatever the form minimises.
    `detail.losses`: what the form minimises, after each step of its fit, before rounding to the model's precision.
    """

    use: Literal["factorize"] = "factorize"
    form: Kind = Field("whitened_svd", description="what the layers become")
    keep: float = Field(gt=0, lt=1, description="share of each layer's bytes at 16 bits that is kept")
    layers: tuple[str, ...] = Field(("*",), description="which layers: patterns on their paths, such as *mlp*")
    pivots: bool | None = Field(
        None, description="store ranks and bonds in the fewest numbers; by default not where two factors were published"
    )
    alpha: float = Field(0.5, gt=0, le=2, description="asvd: power of the inputs' mean size")
    blocks: int = Field(8, ge=2, description="block_low_rank: blocks on the diagonal")
    sparse: float = Field(
        0.03, ge=0, lt=1, description="low_rank_sparse, mpo_sparse: share of the weights that are kept apart"
    )
    channels: bool = Field(False, description="low_rank_sparse: keep that share of the inputs, with all their weights")
    sites: int = Field(2, ge=2, le=7, description="mpo_sparse: number of cores")
    sweeps: int = Field(3, ge=0, le=50, description="of alternating least squares, for forms that need it")
    damping: float = Field(1e-3, gt=0, le=1, description="share of the mean diagonal that is added to the moments")

    needs_calibration: ClassVar[bool] = True
    may_not_follow: ClassVar[Mapping[str, str]] = {
        "gptq": "its layers are quantized; factorize first, then quantize what is dense",
        "mpo": "its layers are decomposed already",
        "factorize": "its layers are factorized already",
    }

    @model_validator(mode="after")
    def _only_of_the_form(self) -> Factorize:
        for name, kinds in CHOICES.items():
            if self.form not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for form: {' or '.join(kinds)}; found form: {self.form}")
        return self

    @property
    def chosen(self) -> Form:
        """The form with its choices, defaults resolved."""
        pivoted = self.form not in PUBLISHED if self.pivots is None else self.pivots
        return Form(self.form, pivoted, self.blocks, self.sparse, self.channels, self.sites, self.sweeps)

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        targets = check_targets(self.use, model, structure, self.layers)
        shapes = {path: linear_shape(model.get_submodule(path)) for path in targets}
        for path, (outputs, inputs) in shapes.items():
            if self.form == "block_low_rank" and (outputs % self.blocks or inputs % self.blocks):
                most = math.gcd(outputs, inputs)
                raise InputError(
                    f"blocks: {self.blocks} does not divide {path} of {outputs} x {inputs}; use a divisor of {most}"
                )
            if self.form in ("kronecker", "mpo_sparse"):
                check_sites(self.sites, path, outputs, inputs, "sites" if self.form == "mpo_sparse" else "form")
        form = self.chosen
        least = {path: form.smallest(*shape) for path, shape in shapes.items()}
        shares = {path: b / (WORD * math.prod(shapes[path])) for path, b in least.items() if b is not None}
        path = max(shares, key=lambda one: shares[one], default="")
        if path and self.keep < shares[path]:
            raise InputError(
                f"keep: {self.keep:g} cannot be met by {self.form}; the smallest is {math.ceil(1e4 * shares[path]) / 1e4:g}, for {path}"
            )

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        structure = find_structure(model)
        self.check(model, structure)
        targets = set(dense_targets(model, structure, self.layers))
        rows = walk(
            model,
            structure,
            calibration.windows,
            lambda block, inputs: self._visit(model, block, inputs, targets),
            what="factorize",
            progress=calibration.progress,
            scratch=calibration.scratch,
        )
        summary: dict[str, Any] = {"form": self.form, "layers": len(rows)}
        for name, unit in (("kept", "parameters"), ("kept_bytes", "bytes")):
            before, after = (sum(getattr(row, f"{unit}_{when}") for row in rows) for when in ("before", "after"))
            summary[name] = after / before
        summary["left_dense"] = sum(row.action == "dense" for row in rows)
        notes = self._notes(rows, calibration)
        if notes:
            summary["note"] = "; ".join(notes)
        return model, Report(rows, summary)

    def _visit(self, model: PreTrainedModel, block: Block, inputs: BlockInputs, targets: set[str]) -> list[LayerReport]:
        rows = []
        for group in block.linear_groups:
            paths = [path for path in group if path in targets]
            if not paths:
                continue
            first = model.get_submodule(paths[0])
            moments = InputMoments(linear_shape(first)[1], model.device)
            inputs.observe(first, moments.add)
            rows += [self._replace(model, path, moments) for path in paths]
        return rows

    def _replace(self, model: PreTrainedModel, path: str, moments: InputMoments) -> LayerReport:
        start = time.monotonic()
        layer = model.get_submodule(path)
        weight, row = linear_weight(layer).detach(), dense_row(path, *linear_shape(layer))
        metric = damped(moments.second.matrix, self.damping)
        found = fit(
            self.chosen,
            self.keep * row.bytes_before,
            weight,
            getattr(layer, "bias", None),
            self._minimised(metric, moments.mean),
        )
        if found is not None and found.bytes < row.bytes_before:
            set_module(model, path, found.layer)
            row.action, row.bytes_after = f"factorize {self.form}", found.bytes
            row.parameters_after = sum(p.numel() for name, p in found.layer.named_parameters() if name != "bias")
            stored = found.layer.dense_weight().detach()  # type: ignore[operator]
            whole = max(weighted_error(weight, metric), 1e-300)
            row.error_after = math.sqrt(weighted_error(stored - weight, metric) / whole)
            row.detail |= {"parts": found.detail, "losses": found.losses}
        row.seconds = round(time.monotonic() - start, 3)
        return row

    def _minimised(self, metric: torch.Tensor, mean: torch.Tensor) -> Metric:
        """What the form weights the inputs' errors with: nothing, their mean size to a power, or their second moment."""
        if self.form == "svd":
            return None
        return mean.double().pow(2 * self.alpha) if self.form == "asvd" else metric

    def _notes(self, rows: list[LayerReport], calibration: Calibration) -> list[str]:
        found = []
        if all(row.action == "dense" for row in rows):
            found.append(f"every layer stays dense: none is smaller as {self.form}")
        return found if self.form in ("svd", "asvd") else found + few_tokens(rows, calibration)


class InputMoments:
    """Of all inputs x [K] seen: the second moment [K, K], and the mean size of each [K]."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.second = SecondMoment(features, device)
        self.mean = torch.zeros(features, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add inputs [tokens, K]."""
        self.second.add(x)
        self.mean += (x.float().abs().sum(0) - len(x) * self.mean) / self.second.vectors
