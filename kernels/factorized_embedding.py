"""A token embedding whose table is a matrix product operator, a product of two matrices among them; and a head that is tied to it.

E [V, d], a row for each token, is the contraction of cores T_k [d_{k-1}, i_k, j_k, d_k] whose i_k multiply to V or a little more (rows that no token
has) and whose j_k multiply to d. The digits of a token's number to the bases i_k pick a slice of each core, and the slices are contracted for the
tokens asked for alone (Khrulkov et al. 2019, "Tensorized embedding layers", arXiv 1901.10787). Two sites (V, 1), (1, d) are a low rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tensorpress.kernels.mpo_linear import MPOLinear, mpo_to_matrix


class FactorizedEmbedding(nn.Module):
    """Rows of E [V, d] times `scale`: token ids [...] to [..., d]. `padding_idx`: the id whose lookups give no gradient."""

    def __init__(
        self,
        num_embeddings: int,
        out_factors: Sequence[int],
        in_factors: Sequence[int],
        bonds: Sequence[int],
        *,
        scale: float = 1.0,
        padding_idx: int | None = None,
    ):
        super().__init__()
        if not len(out_factors) == len(in_factors) == len(bonds) + 1:
            raise ValueError("an MPO of n sites has n row factors, n column factors and n - 1 bonds")
        if math.prod(out_factors) < num_embeddings:
            raise ValueError(f"the row factors make {math.prod(out_factors)} rows, fewer than {num_embeddings}")
        self.num_embeddings, self.embedding_dim = num_embeddings, math.prod(in_factors)
        self.out_factors, self.in_factors, self.bonds = tuple(out_factors), tuple(in_factors), tuple(bonds)
        self.scale, self.padding_idx = scale, padding_idx
        edges = (1, *bonds, 1)
        sites = zip(edges[:-1], out_factors, in_factors, edges[1:], strict=True)
        self.cores = nn.ParameterList(torch.zeros(site) for site in sites)

    @classmethod
    def from_cores(
        cls, cores: Sequence[torch.Tensor], num_embeddings: int, *, scale: float = 1.0, padding_idx: int | None = None
    ) -> FactorizedEmbedding:
        """Wrap cores [d_{k-1}, i_k, j_k, d_k]; they are copied. Raises ValueError for fewer rows than `num_embeddings`."""
        shapes = [core.shape for core in cores]
        rows, columns, bonds = [s[1] for s in shapes], [s[2] for s in shapes], [s[3] for s in shapes[:-1]]
        with torch.device("meta"):
            made = cls(num_embeddings, rows, columns, bonds, scale=scale, padding_idx=padding_idx)
        made.cores = nn.ParameterList(core.detach().clone(memory_format=torch.contiguous_format) for core in cores)
        return made

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rest = ids.reshape(-1)
        rest = rest.masked_fill(rest >= self.num_embeddings, -1)  # which the lookup refuses
        base, rows = math.prod(self.out_factors), rest.new_zeros(0)
        for place, core in enumerate(self.cores):
            base //= core.shape[1]
            digits = rest.div(base, rounding_mode="floor")
            rest = rest - base * digits
            rows = _joined(rows, core, digits) if place else _first(core, digits)
        rows = rows.reshape(*ids.shape, self.embedding_dim)
        if self.scale != 1:  # in the precision of the rows, as models do it
            rows = rows * torch.full((), self.scale, dtype=rows.dtype, device=rows.device)
        if self.padding_idx is not None and rows.requires_grad:
            rows = torch.where((ids == self.padding_idx)[..., None], rows.detach(), rows)
        return rows

    def dense_weight(self) -> torch.Tensor:
        """The table E [V, d] that the cores stand for, without the scale."""
        return mpo_to_matrix(list(self.cores))[: self.num_embeddings]

    def spec(self) -> dict[str, object]:
        """What rebuilds this embedding's empty form: the entry of the loading plug-in."""
        return {
            "form": "embedding",
            "num_embeddings": self.num_embeddings,
            "out_factors": list(self.out_factors),
            "in_factors": list(self.in_factors),
            "bonds": list(self.bonds),
            "scale": self.scale,
            "padding_idx": self.padding_idx,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> FactorizedEmbedding:
        """The embedding's empty form."""
        names = ("num_embeddings", "out_factors", "in_factors", "bonds", "scale", "padding_idx")
        return cls(**{name: spec[name] for name in names})

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bonds={self.bonds}"


def _first(core: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """What the first site [1, i, j, d] gives to tokens with these digits: [tokens, j, d]."""
    _, i, j, right = core.shape
    return nn.functional.embedding(digits, core.reshape(i, j * right)).reshape(-1, j, right)


def _joined(state: torch.Tensor, core: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """State [tokens, columns so far, d] contracted with the slices of a core [d, i, j, e] that the digits pick: [tokens, columns, e].

    One product for each digit that occurs, so that a slice is read once and never copied. Where the digits cannot be looked at, for graphs
    and outlines, each token gets a copy of its slice.
    """
    tokens, columns, left = state.shape
    _, i, j, right = core.shape
    hidden = torch.compiler.is_compiling() or torch.jit.is_tracing() or digits.is_meta
    if i == 1:
        found = state @ core.reshape(left, j * right)
    elif hidden or tokens == 0:
        found = state @ core.transpose(0, 1)[digits].reshape(tokens, left, j * right)
    else:
        order = digits.argsort()
        groups = state[order].split(digits.bincount(minlength=i).tolist())
        slices = zip(groups, core.unbind(1), strict=True)
        parts = [group @ one.reshape(left, j * right) for group, one in slices if len(group)]
        found = torch.cat(parts)[order.argsort()]
    return found.reshape(tokens, columns * j, right)


class TiedHead(nn.Module):
    """Logits h E^T + b with the table of the embedding at a path `of` the model: inputs [..., d], outputs [..., V].

    `table` has the embedding's own cores (`tie_heads`); rows of it that no token has are cut off.
    """

    _tied_weights_keys = {"table.cores": "table.cores"}  # noqa: RUF012 - by this transformers stores what is shared once

    def __init__(self, in_features: int, out_features: int, of: str, *, bias: bool):
        super().__init__()
        self.in_features, self.out_features, self.of = in_features, out_features, of
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.table = MPOLinear((1,), (1,), (), bias=False)

    @classmethod
    def from_embedding(cls, embedding: FactorizedEmbedding, of: str, bias: torch.Tensor | None) -> TiedHead:
        """A head for the embedding at `of`; the bias [V] is copied."""
        head = cls(embedding.embedding_dim, embedding.num_embeddings, of, bias=bias is not None)
        head.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        head.tie(embedding)
        return head

    def tie(self, embedding: FactorizedEmbedding) -> None:
        """Take the cores of an embedding as they are. Raises ValueError where its table has another shape."""
        shape = embedding.num_embeddings, embedding.embedding_dim
        if shape != (self.out_features, self.in_features):
            raise ValueError(f"has the shape {[self.out_features, self.in_features]}, its embedding {[*shape]}")
        kernel = self.table.kernel
        with torch.device("meta"):
            self.table = MPOLinear(embedding.out_factors, embedding.in_factors, embedding.bonds, bias=False)
        self.table.kernel, self.table.cores = kernel, embedding.cores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.table(x)[..., : self.out_features]
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> torch.Tensor:
        """The table [V, d] that the cores stand for."""
        return self.table.dense_weight()[: self.out_features]

    def spec(self) -> dict[str, object]:
        """What rebuilds this head's empty form: the entry of the loading plug-in."""
        return {
            "form": "tied_head",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "of": self.of,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TiedHead:
        """A head without a table, until `tie_heads`."""
        head = cls(spec["in_features"], spec["out_features"], spec["of"], bias=spec["bias"])
        head.table.kernel = "auto"
        return head

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, of={self.of}"


def untied_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without the tables of tied heads, whose cores are their embeddings'."""
    tables = {module.table for module in model.modules() if isinstance(module, TiedHead)}
    return ((path, module) for path, module in model.named_modules() if module not in tables)


def tie_heads(model: nn.Module) -> None:
    """Let each tied head have the cores of its embedding; `from_pretrained` then looks for them once, at the embedding.

    What the architecture itself would tie and is gone is no longer named for tying, neither in the model nor in its config. Raises ValueError
    for a head without its embedding.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for path, head in list(model.named_modules()):
        if not isinstance(head, TiedHead):
            continue
        try:
            embedding = model.get_submodule(head.of)
        except AttributeError:
            embedding = None
        if not isinstance(embedding, FactorizedEmbedding):
            raise ValueError(f"{path} is tied to {head.of[:200]}, which is no factorized embedding")
        try:
            head.tie(embedding)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
        tied |= {f"{path}.table.cores.{k}": f"{head.of}.cores.{k}" for k in range(len(embedding.cores))}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for target in [name for name, source in tied.items() if name.endswith(".weight") and not {name, source} <= names]:
        del tied[target]
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
