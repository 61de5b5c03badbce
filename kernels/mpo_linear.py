"""Linear layer whose weight is a matrix product operator (MPO), with its plain PyTorch reference.

W [m, n] with m = prod(i_k) outputs and n = prod(j_k) inputs is the contraction of cores T_k [d_{k-1}, i_k, j_k, d_k]
along their bonds d_0 = d_n = 1 (Oseledets 2011; Gao et al. 2020, "Compressing deep neural networks by MPO").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from tensorpress.kernels import registry


def mpo_to_matrix(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Contract cores [d_{k-1}, i_k, j_k, d_k] to the matrix [prod i_k, prod j_k]."""
    rows, columns = 1, 1
    result = cores[0].new_ones(1, 1, 1)  # [rows, columns, bond]
    for core in cores:
        left, i, j, right = core.shape
        result = (result.reshape(-1, left) @ core.reshape(left, -1)).reshape(rows, columns, i, j, right)
        rows, columns = rows * i, columns * j
        result = result.transpose(1, 2).reshape(rows, columns, right)
    return result.reshape(rows, columns)


def mpo_apply(cores: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Y = W x by contracting the cores with the input one after the other; x [..., n], result [..., m].

    The tensor in hand is [batch, outputs so far, bond, inputs to come]; each site is one matrix product.
    """
    shape = x.shape[:-1]
    state = x.reshape(-1, 1, 1, x.shape[-1])
    batch, outputs = state.shape[0], 1
    for core in cores:
        left, i, j, right = core.shape
        rest = state.shape[-1] // j
        state = state.reshape(batch * outputs, left * j, rest).transpose(1, 2)  # [batch*outputs, rest, left*j]
        state = state @ core.permute(0, 2, 1, 3).reshape(left * j, i * right)
        state = state.reshape(batch, outputs, rest, i, right).permute(0, 1, 3, 4, 2)
        outputs *= i
        state = state.reshape(batch, outputs, right, rest)
    return state.reshape(*shape, outputs)


def apply_cost(cores: Sequence[torch.Tensor] | Sequence[torch.Size], tokens: int) -> int:
    """Multiply-adds of `mpo_apply` on `tokens` inputs."""
    shapes = [tuple(core.shape) if isinstance(core, torch.Tensor) else tuple(core) for core in cores]
    rest, outputs, cost = math.prod(s[2] for s in shapes), 1, 0
    for left, i, j, right in shapes:
        rest //= j
        cost += tokens * outputs * rest * left * j * i * right
        outputs *= i
    return cost


def matrix_cost(cores: Sequence[torch.Tensor] | Sequence[torch.Size], tokens: int) -> int:
    """Multiply-adds of contracting the cores to a matrix and multiplying `tokens` inputs with it."""
    shapes = [tuple(core.shape) if isinstance(core, torch.Tensor) else tuple(core) for core in cores]
    done, cost = 1, 0
    for left, i, j, right in shapes:
        cost += done * left * i * j * right
        done *= i * j
    return cost + tokens * done


class MPOLinear(nn.Module):
    """y = x W^T + b with W an MPO; inputs [..., prod(in_factors)], outputs [..., prod(out_factors)]."""

    def __init__(self, out_factors: Sequence[int], in_factors: Sequence[int], bonds: Sequence[int], *, bias: bool):
        super().__init__()
        if not len(out_factors) == len(in_factors) == len(bonds) + 1:
            raise ValueError("an MPO of n sites has n output factors, n input factors and n - 1 bonds")
        self.out_factors, self.in_factors, self.bonds = tuple(out_factors), tuple(in_factors), tuple(bonds)
        self.in_features, self.out_features = math.prod(in_factors), math.prod(out_factors)
        edges = (1, *bonds, 1)
        self.cores = nn.ParameterList(
            torch.zeros(edges[k], i, j, edges[k + 1])
            for k, (i, j) in enumerate(zip(out_factors, in_factors, strict=True))
        )
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None
        self.kernel = "auto"

    @classmethod
    def from_cores(cls, cores: Sequence[torch.Tensor], bias: torch.Tensor | None) -> MPOLinear:
        """Wrap cores [d_{k-1}, i_k, j_k, d_k]; they are copied."""
        shapes = [core.shape for core in cores]
        layer = cls([s[1] for s in shapes], [s[2] for s in shapes], [s[3] for s in shapes[:-1]], bias=bias is not None)
        layer.cores = nn.ParameterList(core.detach().clone() for core in cores)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    def dense_weight(self) -> torch.Tensor:
        """The weight [m, n] that the cores stand for."""
        return mpo_to_matrix(list(self.cores))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return registry.kernel_for("mpo_linear", self, x)(self, x)

    def kernel_key(self) -> str:
        """What the speed of its kernels depends on."""
        return f"{self.in_factors} to {self.out_factors}, bonds {self.bonds}"

    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form: the entry of the loading plug-in."""
        return {
            "form": "mpo",
            "out_factors": list(self.out_factors),
            "in_factors": list(self.in_factors),
            "bonds": list(self.bonds),
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> MPOLinear:
        return cls(spec["out_factors"], spec["in_factors"], spec["bonds"], bias=spec["bias"])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bonds={self.bonds}"


def mpo_linear_dense(layer: MPOLinear, x: torch.Tensor) -> torch.Tensor:
    """Contract the cores to the matrix, then multiply: the oracle."""
    return nn.functional.linear(x, layer.dense_weight(), layer.bias)


def mpo_linear_reference(layer: MPOLinear, x: torch.Tensor) -> torch.Tensor:
    """Whichever of the chain and the contracted matrix takes fewer multiply-adds for this many tokens."""
    cores = list(layer.cores)
    tokens = x.numel() // x.shape[-1]
    if apply_cost(cores, tokens) >= matrix_cost(cores, tokens):
        return mpo_linear_dense(layer, x)
    y = mpo_apply(cores, x)
    return y if layer.bias is None else y + layer.bias


registry.register("mpo_linear", "dense", mpo_linear_dense, automatic=False)
registry.register("mpo_linear", "reference", mpo_linear_reference)
