"""Decomposition of linear layers into matrix product operators by TT-SVD.

Sources: Oseledets 2011 (TT-SVD); Gao et al. 2020 and MPOP, Liu et al. 2021, arXiv 2106.02205 (MPO for layers);
CompactifAI, Tomut et al. 2024, arXiv 2401.14109 (MPO of attention and feed-forward matrices of language models).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tensorpress.compressors.base import Calibration, Compressor, LayerReport, Report
from tensorpress.compressors.calibration import clear
from tensorpress.compressors.decompose.embeddings import check_embeddings, decompose_embeddings
from tensorpress.compressors.decompose.mpo_rows import dense_row, spectra_of
from tensorpress.compressors.decompose.mpo_walk import Walk
from tensorpress.compressors.decompose.permutations import arrange_blocks
from tensorpress.compressors.decompose.site_plans import WORD, SitePlan, check_sites, fit, most_sites, plans
from tensorpress.compressors.decompose.targets import check_targets, clamped, dense_targets, few_tokens
from tensorpress.compressors.decompose.tensor_train import capped_bonds, largest_bond
from tensorpress.errors import InputError
from tensorpress.structure import Structure, find_structure, linear_shape, linear_weight, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MPO(Compressor):
    """Replace linear layers of the blocks by matrix product operators; a layer that would not shrink stays dense.

    What is minimised is set by `metric`: the error of the `weights` (plain TT-SVD), of the layer's output on calibration `inputs`, or the expected
    `loss` of the model, which is the error of the output weighted with the Fisher information of the outputs. The last two work block by block,
    each with the inputs that the compressed blocks before it give, and choose among site plans by that error at equal bytes.
    With `train_steps` the cores of a block are then trained together towards the output that it had, before the next block is looked at.

    Report: `error_after` is the relative Frobenius error of the weight for `weights`, else the relative error of the output (root of the
    share of tr(W H W^T) that is lost, W with its compensation), before any training; `error_before` is 0. The first row of a block has what training
    did in `detail.block_training`: relative squared errors of the block's output on windows that were not trained on.
    """

    use: Literal["mpo"] = "mpo"
    keep: float | None = Field(None, gt=0, lt=1, description="share of the layers' 16-bit bytes that is kept")
    bond_dimension: int | None = Field(None, ge=1, description="largest bond dimension, instead of `keep`")
    bytes: int | None = Field(None, ge=1, description="bytes of the layers at 16 bits, instead of `keep`")
    perplexity_ratio: float | None = Field(
        None, gt=1, description="largest ratio on the validation windows, instead of `keep`; causal models"
    )
    sites: int = Field(2, ge=2, le=7, description="number of cores; the largest that is tried for plans: auto")
    layers: tuple[str, ...] = Field(("*",), description="which layers: patterns on their paths, such as *mlp*")
    metric: Literal["loss", "inputs", "weights"] = Field("loss", description="what is minimised")
    plans: Literal["auto", "low_rank", "balanced"] | None = Field(
        None, description="splits into sites that are tried; auto, for metric: weights balanced"
    )
    allocation: Literal["uniform", "predicted", "measured"] | None = Field(
        None, description="how the budget is shared: alike, by the expected loss, by a measured sensitivity profile"
    )
    probes: tuple[float, ...] = Field((0.1, 0.3, 0.5, 0.8), description="shares kept at which the profile is measured")
    pivots: bool = Field(True, description="store low ranks in the fewest numbers; not for metric: weights")
    multiple: int = Field(
        16, ge=1, description="low ranks are multiples of it where they can be; not for metric: weights"
    )
    sweeps: int = Field(2, ge=0, le=20, description="of alternating least squares, for plans that need it")
    compensation: float = Field(
        0.5, ge=0, le=1, description="how far a layer makes up for what those before it have changed; 0 saves memory"
    )
    damping: float = Field(1e-3, gt=0, le=1, description="share of the mean diagonal that is added to the moments")
    arrange: bool = Field(
        False, description="first order heads and neurons, and scale neurons, which no output shows but site plans do"
    )
    train_steps: int = Field(
        0, ge=0, description="steps of training of each block's cores towards its output; not for metric: weights"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak of that training")
    embeddings: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the token embedding's parameters, and of the head's, that is kept; dense if not given",
    )

    needs_calibration: ClassVar[bool] = True
    may_not_follow: ClassVar[Mapping[str, str]] = {
        "gptq": "its layers are quantized; decompose first, then quantize what stays dense",
        "mpo": "its layers are decomposed already",
        "factorize": "its layers are factorized already",
    }

    @model_validator(mode="after")
    def _one_size(self) -> MPO:
        sizes = (self.keep, self.bond_dimension, self.bytes, self.perplexity_ratio)
        if sum(size is not None for size in sizes) != 1:
            raise ValueError("one of keep (a share between 0 and 1) and bond_dimension (or bytes, or perplexity_ratio)")
        if self.perplexity_ratio is not None and self.embeddings is not None:
            raise ValueError(
                "perplexity_ratio is measured on the blocks' layers alone; with embeddings use keep or bytes"
            )
        if self.metric == "weights":
            for name, value in (("bytes", self.bytes), ("perplexity_ratio", self.perplexity_ratio)):
                if value is not None:
                    raise ValueError(f"{name} needs metric: loss or inputs")
            if self.train_steps:
                raise ValueError("train_steps needs metric: loss or inputs")
            if self.plans not in (None, "balanced") or self.allocation not in (None, "uniform"):
                raise ValueError("metric: weights has balanced plans and the uniform allocation alone")
        elif self.bond_dimension is not None and self.allocation not in (None, "uniform"):
            raise ValueError(
                "a bond_dimension is the same for all layers; the allocation needs keep, bytes or perplexity_ratio"
            )
        if not all(0 < share < 1 for share in self.probes) or not self.probes:
            raise ValueError("probes: shares between 0 and 1")
        return self

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        targets = check_targets(self.use, model, structure, self.layers)
        if self.embeddings is not None:
            check_embeddings(self, model)
        if self.perplexity_ratio is not None and structure.kind != "causal":
            raise InputError("perplexity_ratio: the model predicts no tokens; use keep or bytes")
        shapes = {path: linear_shape(model.get_submodule(path)) for path in targets}
        if self._plans == "balanced":
            path, shape = min(shapes.items(), key=lambda item: most_sites(*item[1]))
            check_sites(self.sites, path, *shape)
        if self.keep is not None or self.bytes is not None:
            self._check_budget(shapes)

    def _check_budget(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse a budget that bonds of 1 exceed: of all layers together, or of one layer where all are kept alike. Raises InputError."""
        dense = sum(WORD * m * n for m, n in shapes.values())
        cheapest = {path: self.cheapest(*shape) for path, shape in shapes.items()}
        least, whose = float(sum(cheapest.values())), ""
        if self.way == "uniform":
            alike = {path: cheapest[path] * dense / (WORD * math.prod(shape)) for path, shape in shapes.items()}
            path = max(alike, key=lambda one: alike[one])
            least, whose = alike[path], f", for {path}"
        if self.budget(dense) < least:
            share = f"{math.ceil(1e4 * least / dense) / 1e4:g}"
            field, smallest = ("keep", share) if self.keep else ("bytes", f"{math.ceil(least):,}")
            raise InputError(f"{field}: {self.keep or self.bytes:,} cannot be met; the smallest is {smallest}{whose}")

    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        structure = find_structure(model)
        self.check(model, structure)
        targets = dense_targets(model, structure, self.layers)
        found: dict[str, Any] = {}
        arranged = arrange_blocks(model, structure) if self.arrange else None
        if self.metric == "weights":
            rows = self._by_weights(model, targets, calibration)
        else:
            rows, found = Walk(self, model, structure, targets, calibration).run()
        before, after = sum(r.parameters_before for r in rows), sum(r.parameters_after for r in rows)
        dense = sum(r.action == "dense" for r in rows)
        summary: dict[str, Any] = {"kept": after / before, "layers": len(rows), "left_dense": dense, **found}
        if arranged is not None:
            summary["arranged"] = arranged
        notes = self._notes(rows, calibration)
        if notes:
            summary["note"] = "; ".join(notes)
        if self.embeddings is not None:
            tables = decompose_embeddings(self, model, structure, calibration)
            clear(calibration.scratch)  # which the walk has left, for this may take long
            kept = sum(row.parameters_after for row in tables)
            summary["embeddings_kept"] = kept / sum(row.parameters_before for row in tables)
            rows += tables
        return model, Report(rows, summary)

    @property
    def _plans(self) -> Literal["auto", "low_rank", "balanced"]:
        return self.plans or ("balanced" if self.metric == "weights" else "auto")

    @property
    def way(self) -> Literal["uniform", "predicted", "measured"]:
        """The allocation, its default resolved."""
        plain = self.metric == "weights" or self.bond_dimension is not None
        return self.allocation or ("uniform" if plain else "predicted")

    def candidates(self, outputs: int, inputs: int) -> list[SitePlan]:
        """The site plans that are tried for a shape."""
        return plans(outputs, inputs, self.sites, self._plans)

    def budget(self, dense: int) -> float:
        """Bytes of all layers together, from `keep` or `bytes`; no more than the `dense` ones'."""
        return min(float(dense), (self.keep or 1.0) * dense if self.bytes is None else float(self.bytes))

    def cheapest(self, outputs: int, inputs: int) -> int:
        """The fewest bytes that a layer can be shared out: of any plan, and where low ranks stand for all plans, of those."""
        pivoted = self.pivots and self.metric != "weights"
        least = min(plan.bytes(1, pivoted) for plan in self.candidates(outputs, inputs))
        if self.way != "uniform":
            (low_rank,) = plans(outputs, inputs, self.sites, "low_rank")
            least = max(least, low_rank.bytes(1, pivoted))
        return min(least, WORD * outputs * inputs)

    def _plain(self, outputs: int, inputs: int) -> SitePlan:
        """The one plan of `metric: weights`."""
        (plan,) = self.candidates(outputs, inputs)
        return plan

    def _by_weights(self, model: PreTrainedModel, targets: list[str], calibration: Calibration) -> list[LayerReport]:
        rows = []
        for done, path in enumerate(targets):
            calibration.progress("mpo", done, len(targets))
            rows.append(self._decompose(model, path))
        calibration.progress("mpo", len(targets), len(targets))
        return rows

    def _decompose(self, model: PreTrainedModel, path: str) -> LayerReport:
        start = time.monotonic()
        layer = model.get_submodule(path)
        outputs, inputs = linear_shape(layer)
        plan = self._plain(outputs, inputs)
        bond = self.bond_dimension or largest_bond(plan.rows, plan.columns, (self.keep or 0) * outputs * inputs)
        bonds = capped_bonds(plan.rows, plan.columns, bond)
        report = dense_row(path, outputs, inputs)
        report.detail |= {"plan": plan.name, "out_factors": plan.rows, "in_factors": plan.columns, "bonds": bonds}
        weight = linear_weight(layer).detach()
        if bond > 0 and plan.bytes(bond, pivoted=False) < report.bytes_before:
            bias = getattr(layer, "bias", None)
            found = fit(plan, bond, weight, bias, None, None, pivoted=False, sweeps=0, damping=self.damping)
            set_module(model, path, found.layer)
            report.action, report.bytes_after = "mpo", found.bytes
            report.parameters_after = found.bytes // WORD
            report.error_after = math.sqrt(found.loss) / max(float(weight.double().norm()), 1e-300)
        report.detail |= spectra_of(weight, plan)
        report.seconds = round(time.monotonic() - start, 3)
        return report

    def _notes(self, rows: list[LayerReport], calibration: Calibration) -> list[str]:
        found = []
        if all(row.action == "dense" for row in rows):
            found.append("every layer stays dense: none has a bond dimension that saves at this size")
        found += clamped(self.bond_dimension, (self.candidates(*row.detail["shape"])[0].full_bond for row in rows))
        if self.metric == "weights":
            return found
        few = sum(self.sites > most_sites(*row.detail["shape"]) for row in rows)
        if few and self._plans == "auto":
            found.append(f"{few} layers carry fewer than {self.sites} sites; no plan of so many was tried for them")
        return found + few_tokens(rows, calibration)
