"""The specs of an artifact's layers: input from outside, checked before any module is made of them."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from torch import nn

from tensorpress.errors import InputError
from tensorpress.kernels.block_diagonal_linear import BlockDiagonalLinear
from tensorpress.kernels.factorized_embedding import FactorizedEmbedding, TiedHead
from tensorpress.kernels.kernel_layer import KernelLayer
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.mpoe import SharedExperts, SharedMixture
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.kernels.semi_structured_linear import SemiStructuredLinear
from tensorpress.kernels.shared_mpo_linear import SharedMPOLinear
from tensorpress.kernels.sum_linear import SumLinear
from tensorpress.recipe import explain
from tensorpress.structure import LINEAR, linear_shape, stub_from_spec

FORMS = (
    "mpo",
    "pivoted_mpo",
    "shared_mpo",
    "shared_experts",
    "shared_mixture",
    "low_rank",
    "gptq",
    "block_diagonal",
    "semi_structured",
    "sum",
    "embedding",
    "tied_head",
    "removed",
    "removed_attention",
    "removed_norm",
)
Width = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=32)]


class Spec(BaseModel):
    """What stands at a path; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class MPOSpec(Spec):
    """`MPOLinear`, `PivotedMPOLinear`."""

    form: Literal["mpo", "pivoted_mpo"]
    out_factors: Widths
    in_factors: Widths
    bonds: Annotated[list[Width], Field(max_length=31)]
    bias: StrictBool

    @model_validator(mode="after")
    def _sites(self) -> MPOSpec:
        if not len(self.out_factors) == len(self.in_factors) == len(self.bonds) + 1:
            raise ValueError("n output factors, n input factors and n - 1 bonds")
        if self.form == "pivoted_mpo":
            edges = (1, *self.bonds)
            sites = list(zip(edges, self.out_factors, self.in_factors, strict=True))[:-1]
            if not sites or any(bond > math.prod(site) for bond, site in zip(self.bonds, sites, strict=True)):
                raise ValueError("two sites or more, and no bond above the rows of its core")
        return self


class SharedMPOSpec(Spec):
    """`SharedMPOLinear`."""

    form: Literal["shared_mpo"]
    out_factors: Widths
    in_factors: Widths
    bonds: Annotated[list[Width], Field(min_length=2, max_length=30)]
    group: Annotated[str, Field(min_length=1, max_length=200)]
    bias: StrictBool

    @model_validator(mode="after")
    def _sites(self) -> SharedMPOSpec:
        _check_odd(self.out_factors, self.in_factors, self.bonds)
        return self


class MatricesSpec(Spec):
    """`SharedMatrices`."""

    out_factors: Widths
    in_factors: Widths
    bonds: Annotated[list[Width], Field(min_length=2, max_length=30)]

    @model_validator(mode="after")
    def _sites(self) -> MatricesSpec:
        _check_odd(self.out_factors, self.in_factors, self.bonds)
        return self


def _check_odd(out_factors: list[int], in_factors: list[int], bonds: list[int]) -> None:
    if not len(out_factors) == len(in_factors) == len(bonds) + 1 or len(bonds) % 2:
        raise ValueError("an odd number n of output factors, n input factors and n - 1 bonds")


class SharedExpertsSpec(Spec):
    """`SharedExperts`."""

    form: Literal["shared_experts"]
    experts: Annotated[StrictInt, Field(ge=1, le=4096)]
    gate_up: MatricesSpec
    down: MatricesSpec
    activation: Literal["silu", "swish", "gelu", "gelu_pytorch_tanh", "relu"]


class SharedMixtureSpec(SharedExpertsSpec):
    """`SharedMixture`."""

    form: Literal["shared_mixture"]  # type: ignore[assignment]
    active: Annotated[StrictInt, Field(ge=1)]
    core_updates: Annotated[StrictFloat, Field(gt=0, le=1)]
    seed: StrictInt

    @model_validator(mode="after")
    def _active(self) -> SharedMixtureSpec:
        if self.active > self.experts:
            raise ValueError("no more active experts than there are")
        return self


class LowRankSpec(Spec):
    """`LowRankLinear`."""

    form: Literal["low_rank"]
    in_features: Width
    out_features: Width
    rank: Width
    pivoted: StrictBool
    bias: StrictBool

    @model_validator(mode="after")
    def _rank(self) -> LowRankSpec:
        if self.rank >= self.out_features:
            raise ValueError("a rank below the number of outputs")
        return self


class GPTQSpec(Spec):
    """`QuantizedLinear`."""

    form: Literal["gptq"]
    in_features: Width
    out_features: Width
    bits: Literal[2, 3, 4, 8]
    group_size: Width | Literal[-1]
    zero_offset: Literal[0, 1]
    bias: StrictBool


class BlockDiagonalSpec(Spec):
    """`BlockDiagonalLinear`."""

    form: Literal["block_diagonal"]
    in_features: Width
    out_features: Width
    block_count: Width
    bias: StrictBool

    @model_validator(mode="after")
    def _blocks(self) -> BlockDiagonalSpec:
        if self.in_features % self.block_count or self.out_features % self.block_count:
            raise ValueError("inputs and outputs that are multiples of the number of blocks")
        return self


class SemiStructuredSpec(Spec):
    """`SemiStructuredLinear`."""

    form: Literal["semi_structured"]
    in_features: Width
    out_features: Width
    bias: StrictBool


class SparseSpec(Spec):
    """`SparseLinear`, a part of a sum."""

    form: Literal["sparse"]
    in_features: Width
    out_features: Width
    count: Width
    bias: StrictBool

    @model_validator(mode="after")
    def _count(self) -> SparseSpec:
        if self.count > self.in_features * self.out_features:
            raise ValueError("no more values than a dense weight has")
        return self


class ChannelSpec(Spec):
    """`ChannelLinear`, a part of a sum."""

    form: Literal["channels"]
    in_features: Width
    out_features: Width
    count: Width
    bias: StrictBool

    @model_validator(mode="after")
    def _count(self) -> ChannelSpec:
        if self.count > self.in_features:
            raise ValueError("no more channels than inputs")
        return self


PartSpec = Annotated[MPOSpec | LowRankSpec | BlockDiagonalSpec | SparseSpec | ChannelSpec, Field(discriminator="form")]


class SumSpec(Spec):
    """`SumLinear`, whose parts have its shape and no bias."""

    form: Literal["sum"]
    in_features: Width
    out_features: Width
    parts: Annotated[list[PartSpec], Field(min_length=1, max_length=8)]
    bias: StrictBool

    @model_validator(mode="after")
    def _parts(self) -> SumSpec:
        for part in self.parts:
            shape = (
                (math.prod(part.out_factors), math.prod(part.in_factors))
                if isinstance(part, MPOSpec)
                else (part.out_features, part.in_features)
            )
            if shape != (self.out_features, self.in_features) or part.bias:
                raise ValueError("parts of the shape of the sum, without a bias")
        return self


class EmbeddingSpec(Spec):
    """`FactorizedEmbedding`."""

    form: Literal["embedding"]
    num_embeddings: Width
    out_factors: Widths
    in_factors: Widths
    bonds: Annotated[list[Width], Field(max_length=31)]
    scale: Annotated[StrictFloat, Field(allow_inf_nan=False)]
    padding_idx: Annotated[StrictInt, Field(ge=0)] | None

    @model_validator(mode="after")
    def _sites(self) -> EmbeddingSpec:
        if not len(self.out_factors) == len(self.in_factors) == len(self.bonds) + 1:
            raise ValueError("n row factors, n column factors and n - 1 bonds")
        if not self.num_embeddings <= math.prod(self.out_factors) < 2 * self.num_embeddings:
            raise ValueError("row factors that make as many rows as there are tokens, or less than twice as many")
        if self.padding_idx is not None and self.padding_idx >= self.num_embeddings:
            raise ValueError("a padding_idx among the tokens")
        return self


class TiedHeadSpec(Spec):
    """`TiedHead`."""

    form: Literal["tied_head"]
    in_features: Width
    out_features: Width
    of: Annotated[str, Field(min_length=1, max_length=200)]
    bias: StrictBool


class RemovedSpec(Spec):
    """`RemovedLinear`."""

    form: Literal["removed"]
    out_features: Width


class RemovedAttentionSpec(Spec):
    """`RemovedAttention`."""

    form: Literal["removed_attention"]
    out_features: Width
    values: Annotated[StrictInt, Field(ge=1, le=16)]


class RemovedNormSpec(Spec):
    """`RemovedNorm`."""

    form: Literal["removed_norm"]


LAYERS: dict[str, type[KernelLayer | LowRankLinear | SumLinear | TiedHead]] = {
    "mpo": MPOLinear,
    "pivoted_mpo": PivotedMPOLinear,
    "shared_mpo": SharedMPOLinear,
    "low_rank": LowRankLinear,
    "gptq": QuantizedLinear,
    "block_diagonal": BlockDiagonalLinear,
    "semi_structured": SemiStructuredLinear,
    "sum": SumLinear,
    "tied_head": TiedHead,
}
"""What the forms of a linear layer are made of."""
_checked: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        MPOSpec
        | SharedMPOSpec
        | SharedExpertsSpec
        | SharedMixtureSpec
        | LowRankSpec
        | GPTQSpec
        | BlockDiagonalSpec
        | SemiStructuredSpec
        | SumSpec
        | EmbeddingSpec
        | TiedHeadSpec
        | RemovedSpec
        | RemovedAttentionSpec
        | RemovedNormSpec,
        Field(discriminator="form"),
    ]
)


def module_from_spec(spec: Any, path: str = "", replaced: nn.Module | None = None) -> nn.Module:
    """Build the empty module that a spec describes, with parameters that need no gradient.

    Raises InputError for a spec that cannot be, and for a layer that has not the shape of the one that it stands for.
    """
    where = f"artifact: layer {path[:200]}" if path else "artifact: a layer"
    try:
        _checked.validate_python(spec)
    except ValidationError as error:
        if error.errors()[0]["type"].startswith("union_tag") and not error.errors()[0]["loc"]:
            form = spec.get("form") if isinstance(spec, dict) else spec
            raise InputError(f"{where}: unknown form {str(form)[:80]!r}; known: {', '.join(FORMS)}") from None
        raise InputError(explain(error, where, Spec)[0]) from None
    if isinstance(replaced, (KernelLayer, LowRankLinear, SumLinear, SharedExperts, FactorizedEmbedding, TiedHead)):
        replaced = None if replaced.spec() == spec else replaced  # it stands there already: a walk that goes on
    if spec["form"] == "shared_experts":
        return _experts(spec, where, replaced)
    if spec["form"] == "shared_mixture":
        return _mixture(spec, where, replaced)
    if spec["form"] == "embedding":
        return _embedding(spec, where, replaced)
    layer = LAYERS.get(spec["form"])
    if layer is None:
        return stub_from_spec(spec)
    if replaced is not None:
        _check_shape(where, spec, replaced)
    return layer.from_spec(spec)


def _experts(spec: dict[str, Any], where: str, replaced: nn.Module | None) -> nn.Module:
    """Experts with a shared core, in the place of the stacks of matrices that they have the shapes of. Raises InputError."""
    module = SharedExperts.from_spec(spec)
    if replaced is not None:
        stacks = [getattr(replaced, name, None) for name in ("gate_up_proj", "down_proj")]
        found = tuple(tuple(stack.shape) if isinstance(stack, torch.Tensor) else None for stack in stacks)
        if found != module.shapes():
            raise InputError(f"{where}: stands for experts of the shapes {found}; has {module.shapes()}")
    return module


def _embedding(spec: dict[str, Any], where: str, replaced: nn.Module | None) -> nn.Module:
    """An embedding in the place of one of as many rows and columns. Raises InputError."""
    if replaced is not None:
        if not isinstance(replaced, nn.Embedding):
            raise InputError(f"{where}: stands for a {type(replaced).__name__}, which is no embedding")
        shape = [spec["num_embeddings"], math.prod(spec["in_factors"])]
        wanted = [replaced.num_embeddings, replaced.embedding_dim]
        if shape != wanted:
            raise InputError(f"{where}: has the shape {shape}; the model's is {wanted}")
    return FactorizedEmbedding.from_spec(spec)


def _mixture(spec: dict[str, Any], where: str, replaced: nn.Module | None) -> nn.Module:
    """A mixture, in the place of a feed-forward whose layers have the shapes of its experts'. Raises InputError."""
    (joined, width), down = (
        (math.prod(spec[name]["out_factors"]), math.prod(spec[name]["in_factors"])) for name in ("gate_up", "down")
    )
    layers = [linear_shape(layer) for layer in (replaced.modules() if replaced else ()) if isinstance(layer, LINEAR)]
    fits = down == (width, joined // 2) and down in layers and sum(map(math.prod, layers)) == 3 * math.prod(down)
    if joined != 2 * down[1] or (replaced is not None and not fits):
        raise InputError(f"{where}: stands for layers {layers}; its experts have {(joined, width)} and {down}")
    return SharedMixture.from_spec(spec)


def _check_shape(where: str, spec: dict[str, Any], replaced: nn.Module) -> None:
    if not isinstance(replaced, LINEAR):
        raise InputError(f"{where}: stands for a {type(replaced).__name__}, which is no linear layer")
    if "out_factors" in spec:
        shape = math.prod(spec["out_factors"]), math.prod(spec["in_factors"])
    else:
        shape = spec["out_features"], spec["in_features"]
    if shape != linear_shape(replaced):
        wanted = linear_shape(replaced)
        raise InputError(f"{where}: has the shape {[*shape]}; the model's is {[*wanted]}")
