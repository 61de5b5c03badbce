"""Low-dimensional projected attention: the projections of every attention go through a narrow space, the feed-forwards stay as they are.

Source: LPA, Lv et al. 2024, arXiv 2411.02063 ("Scalable efficient training of large language models with low-dimensional projected
attention"): low rank costs the attention next to nothing, and the feed-forward much. There it is trained from scratch; here it starts from a model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.compressors.calibration import BlockInputs, walk
from tensorpress.compressors.decompose.mpo_rows import dense_row
from tensorpress.compressors.decompose.site_plans import WORD
from tensorpress.compressors.decompose.targets import few_tokens, refuse_quantized
from tensorpress.compressors.decompose.weighted_low_rank import damped, low_rank_layer, weighted_error, weighted_svd
from tensorpress.compressors.moments import SecondMoment
from tensorpress.errors import InputError
from tensorpress.kernels.low_rank_linear import low_rank_numbers
from tensorpress.structure import Block, Structure, find_structure, is_whole, linear_shape, linear_weight, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARE = 320 / 1024
"""Of the width: the rank of the paper's models."""


class LPA(Compressor):
    """Make each linear layer of the attentions (q, k, v, o, or what an architecture has joined of them) two: to the rank, and from there.

    Block by block, each with the inputs that the blocks before it give now: the layers are the best of their rank for their outputs on the
    calibration windows. A layer that would not get smaller stays dense, so a rank of the full width changes nothing. Follow it with `distill`.

    Report: a row for each layer of the attentions; `error_after` is the relative error of the output on the calibration inputs, `error_before` that of
    the truncated SVD of the weight at the same rank.
    """

    use: Literal["lpa"] = "lpa"
    rank: int | None = Field(None, ge=1, description="inner dimension, instead of `share`")
    share: float | None = Field(
        None, gt=0, le=1, description=f"inner dimension as a share of the model's width; {SHARE} if neither is given"
    )

    damping: float = Field(1e-3, gt=0, le=1, description="share of the mean diagonal that is added to the moments")

    needs_calibration: ClassVar[bool] = True
    may_not_follow: ClassVar[Mapping[str, str]] = {
        "gptq": "its layers are quantized; project first, then quantize the factors",
    }

    @model_validator(mode="after")
    def _one_size(self) -> LPA:
        if self.rank is not None and self.share is not None:
            raise ValueError("one of rank and share")
        return self

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        attentions = [block.attention for block in structure.blocks if block.attention is not None]
        refuse_quantized(self.use, model, (path for attention in attentions for path in attention.paths))
        if not any(_groups(model, block) for block in structure.blocks):
            raise InputError("lpa: no attention of the model has a dense layer left")
        if self.rank is not None and self.rank > structure.hidden_size:
            raise InputError(f"rank: {self.rank} is more than the model's width of {structure.hidden_size}")

    def inner(self, width: int) -> int:
        """The rank for a model of this width."""
        return self.rank or max(1, round((self.share or SHARE) * width))

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        structure = find_structure(model)
        self.check(model, structure)
        rank = self.inner(structure.hidden_size)

        def visit(block: Block, inputs: BlockInputs) -> list[LayerReport]:
            rows = []
            for group in _groups(model, block):
                first = model.get_submodule(group[0])
                moment = SecondMoment(linear_shape(first)[1], linear_weight(first).device)
                inputs.observe(first, moment.add)
                metric = damped(moment.matrix, self.damping)
                rows += [_project(model, path, rank, moment.matrix, metric) for path in group]
            return rows

        rows = walk(
            model,
            structure,
            calibration.windows,
            visit,
            what="lpa",
            progress=calibration.progress,
            scratch=calibration.scratch,
        )
        before, after = sum(row.parameters_before for row in rows), sum(row.parameters_after for row in rows)
        dense = sum(row.action == "dense" for row in rows)
        summary: dict[str, Any] = {"rank": rank, "kept": after / before, "layers": len(rows), "left_dense": dense}
        notes = few_tokens(rows, calibration)
        if dense == len(rows):
            notes.append(f"every layer stays dense: none gets smaller at a rank of {rank}")
        if notes:
            summary["note"] = "; ".join(notes)
        return model, Report(rows, summary)


def _groups(model: PreTrainedModel, block: Block) -> list[list[str]]:
    """Dense layers of a block's attention, those that read the same input together."""
    if block.attention is None:
        return []
    groups = [[path for path in group if is_whole(model, path)] for group in block.attention.linears]
    return [group for group in groups if group]


def _project(model: PreTrainedModel, path: str, rank: int, inputs: torch.Tensor, metric: torch.Tensor) -> LayerReport:
    """Put the best layer of a rank by a metric [n, n] at a path, and say how good it is for inputs of a second moment [n, n]."""
    start = time.monotonic()
    layer = model.get_submodule(path)
    weight = linear_weight(layer).detach()
    outputs, width = weight.shape
    row = dense_row(path, outputs, width)
    numbers = low_rank_numbers(outputs, width, rank, pivoted=False)
    if rank < min(outputs, width) and numbers < outputs * width:
        svd, plain = weighted_svd(weight, metric), weighted_svd(weight)
        bias = cast("torch.Tensor | None", getattr(layer, "bias", None))
        found = low_rank_layer(svd.left[:, :rank], svd.right[:rank], bias, weight.dtype, pivoted=False)
        set_module(model, path, found)
        whole = max(weighted_error(weight, inputs), 1e-300)
        lost = weighted_error(weight.double() - found.dense_weight().detach().double(), inputs)
        lost_plain = weighted_error(weight.double() - plain.left[:, :rank] @ plain.right[:rank], inputs)
        row.action, row.parameters_after, row.bytes_after = "low rank", numbers, WORD * numbers
        row.error_before, row.error_after = math.sqrt(lost_plain / whole), math.sqrt(lost / whole)
        row.detail["rank"] = rank
    row.seconds = round(time.monotonic() - start, 3)
    return row
