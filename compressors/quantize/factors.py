"""Low ranks made ready for quantization: a gauge in which rounding costs little, and one factor that makes up for the rounding of the other.

A product of two matrices stays the same when an invertible one is put between them. With a step of rounding in proportion to the size of a row, an outer
factor U S^p and an inner one S^(1-p) V lose the least together at p = 1/2 (Cauchy and Schwarz), and less still once a rotation between them has made
all rows and columns alike (as QuIP does for weights, Chee et al. 2023, arXiv 2307.13304): (sum of s)^2 / r each instead of the sum of s^2.
With pivots the error of the inner factor would be added once more by every row that is made of the pivots.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.sum_linear import SumLinear
from tensorpress.structure import set_module

OUTER, INNER = ".outer", ".inner"
"""How the paths of the factors end."""


def factor_pairs(model: nn.Module) -> dict[str, LowRankLinear]:
    """The layers of low rank whose factors are both plain linear layers, by path."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, LowRankLinear) and type(layer.inner) is type(layer.outer) is nn.Linear
    }


def spread(layer: LowRankLinear) -> LowRankLinear:
    """The same weight U S V as (U S^1/2 Q) (Q^T S^1/2 V), Q a rotation drawn from a fixed seed; without pivots."""
    inner, outer = layer.inner.weight.detach(), layer.outer.weight.detach()
    q, r = torch.linalg.qr(layer.whole_outer().detach().double())
    u, s, v = torch.linalg.svd(r @ inner.double(), full_matrices=False)
    drawn = torch.randn(len(s), len(s), dtype=s.dtype, generator=torch.Generator().manual_seed(0)).to(s.device)
    rotation, root = torch.linalg.qr(drawn).Q, s.sqrt()
    left, right = q @ (u * root) @ rotation, rotation.T @ (root[:, None] * v)
    return LowRankLinear.from_factors(right.to(inner.dtype), left.to(outer.dtype), None, layer.bias)


class Contracted(nn.Linear):
    """The weight of a layer of low rank as one matrix, which is to have so many bits."""

    bits: int


def contracted(layer: LowRankLinear, bits: int) -> Contracted:
    """The layer that multiplies with the product of the factors."""
    weight = layer.dense_weight().detach()
    made = Contracted(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    made.weight, made.bits = nn.Parameter(weight), bits
    if layer.bias is not None:
        made.bias = layer.bias
    return made


def prepare(model: nn.Module, bits: Mapping[str, int]) -> None:
    """`spread` for the layers of low rank of which both factors are in `bits`; or their matrix, where that is no larger.

    A part of a sum stays two factors. Without pivots the factors of a rank above mn / (m + n) have more numbers than the matrix [m, n], and rounding them costs more, too.
    """
    parts = {part for module in model.modules() if isinstance(module, SumLinear) for part in module.parts}
    for path, layer in factor_pairs(model).items():
        if {path + INNER, path + OUTER} <= bits.keys():
            inner, outer = bits[path + INNER], bits[path + OUTER]
            most, (m, n) = max(inner, outer), (layer.out_features, layer.in_features)
            smaller = layer not in parts and most * m * n <= layer.rank * (inner * n + outer * m)
            set_module(model, path, contracted(layer, most) if smaller else spread(layer))


def refitted(
    outer: torch.Tensor, inner: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor, damping: float
) -> torch.Tensor:
    """The outer factor [m, r] with which the `rounded` inner one [r, n] comes nearest to outer @ inner.

    Least squares in the metric of the inputs' moments [n, n], damped by a share of the mean diagonal:
    A B H B'^T (B' H B'^T)^-1. Nothing changes where nothing was rounded.
    """
    h = hessian.double()
    h = h + damping * h.diagonal().mean().clamp(min=1e-30) * torch.eye(len(h), dtype=h.dtype, device=h.device)
    a, b, seen = outer.double(), inner.double(), rounded.double() @ h
    gram = seen @ rounded.double().T
    gram.diagonal().add_(1e-12 * gram.diagonal().mean().clamp(min=1e-300))
    return torch.linalg.solve(gram, (a @ (b @ seen.T)).T).T.to(outer.dtype)
