"""Linear layers of a group whose weights are matrix product operators with one central core for all of them.

Source: MPOBERT, Liu et al. 2023, arXiv 2303.16753 ("Scaling pre-trained language models to deeper via parameter-efficient architecture"): most
of the numbers of an MPO of an odd number of sites lie in its central core, which layers of the same kind share; the others are each layer's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tensorpress.kernels import registry
from tensorpress.kernels.kernel_layer import Kept, KernelLayer
from tensorpress.kernels.matrix import Matrix, matrix_linear
from tensorpress.kernels.mpo_linear import apply_cost, matrix_cost, mpo_apply, mpo_to_matrix


class SharedCore(nn.Module):
    """A central core [d_{c-1}, i_c, j_c, d_c]. One module stands in all layers of a group, so that it is one tensor wherever the model goes."""

    def __init__(self, core: torch.Tensor):
        super().__init__()
        self.core = nn.Parameter(core)


class SharedMPOLinear(KernelLayer):
    """y = x W^T + b with W an MPO of an odd number of sites; inputs [..., prod(in_factors)], outputs [..., prod(out_factors)].

    `center` belongs to the whole `group` (`tie_cores`), `auxiliary` to this layer: the other cores, from the first to the last site.
    """

    operation = "shared_mpo_linear"
    fields = ("out_factors", "in_factors", "bonds", "bias")
    lists = ("out_factors", "in_factors", "bonds")
    judged_by = "matrix"
    _tied_weights_keys = {"center.core": "center.core"}  # noqa: RUF012 - by this transformers stores what is shared once

    def __init__(
        self, out_factors: Sequence[int], in_factors: Sequence[int], bonds: Sequence[int], group: str, *, bias: bool
    ):
        super().__init__()
        sites = len(bonds) + 1
        if not len(out_factors) == len(in_factors) == sites or sites % 2 == 0:
            raise ValueError("an odd number n of output factors, as many input factors, and n - 1 bonds")
        self.out_factors, self.in_factors, self.bonds = tuple(out_factors), tuple(in_factors), tuple(bonds)
        self.in_features, self.out_features = math.prod(in_factors), math.prod(out_factors)
        self.group, self.middle = group, sites // 2
        cores = [torch.zeros(shape) for shape in self.shapes()]
        self.center = SharedCore(cores.pop(self.middle))
        self.auxiliary = nn.ParameterList(cores)
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None
        self.kernel = "reference"
        """What computes it; `auto` in a model that was opened from a folder."""
        self.matrix: Matrix | None = None
        """What the kernel `matrix` keeps."""

    @classmethod
    def from_cores(
        cls, auxiliary: Sequence[torch.Tensor], center: SharedCore, group: str, bias: torch.Tensor | None
    ) -> SharedMPOLinear:
        """Wrap the cores of a layer; its own are copied, the `center` is taken as it is."""
        middle = len(auxiliary) // 2
        shapes = [core.shape for core in (*auxiliary[:middle], center.core, *auxiliary[middle:])]
        rows, columns, bonds = [s[1] for s in shapes], [s[2] for s in shapes], [s[3] for s in shapes[:-1]]
        layer = cls(rows, columns, bonds, group, bias=bias is not None)
        layer.auxiliary = nn.ParameterList(core.detach().clone() for core in auxiliary)
        layer.center = center
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer

    @property
    def cores(self) -> list[torch.Tensor]:
        """All cores [d_{k-1}, i_k, j_k, d_k] in their order."""
        own = list(self.auxiliary)
        return [*own[: self.middle], self.center.core, *own[self.middle :]]

    def shapes(self) -> list[tuple[int, int, int, int]]:
        """The shapes of the cores."""
        edges = (1, *self.bonds, 1)
        return list(zip(edges[:-1], self.out_factors, self.in_factors, edges[1:], strict=True))

    def dense_weight(self) -> torch.Tensor:
        """The weight [m, n] that the cores stand for."""
        return mpo_to_matrix(self.cores)

    def stored(self) -> list[torch.Tensor]:
        """An own core first, by which graphs know the layer; the shared one is the last of the cores."""
        own = [*self.auxiliary, self.center.core]
        return own if self.bias is None else [*own, self.bias]

    def place(self, tensors: Sequence[torch.Tensor]) -> None:
        parameters = [nn.Parameter(tensor, requires_grad=False) for tensor in tensors]
        own = len(self.bonds)
        self.auxiliary = nn.ParameterList(parameters[:own])
        self.center = SharedCore(parameters[own])
        self.bias = parameters[own + 1] if len(parameters) > own + 1 else None

    def kept(self, names: Collection[str] | None = None) -> Iterator[Kept]:
        if self.matrix is not None and (names is None or "matrix" in names):
            yield self.matrix

    def release_own(self, names: Collection[str]) -> None:
        if "matrix" not in names:
            self.matrix = None

    def kernel_key(self) -> str:
        """What the speed of its kernels depends on."""
        return f"{self.in_factors} to {self.out_factors}, bonds {self.bonds}"

    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form: the entry of the loading plug-in."""
        return {
            "form": "shared_mpo",
            "out_factors": list(self.out_factors),
            "in_factors": list(self.in_factors),
            "bonds": list(self.bonds),
            "group": self.group,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> SharedMPOLinear:
        """An empty layer with a core of its own, until `tie_cores`."""
        layer = cls(spec["out_factors"], spec["in_factors"], spec["bonds"], spec.get("group", ""), bias=spec["bias"])
        layer.kernel = "auto"
        return layer

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bonds={self.bonds}, group={self.group}"


def tie_cores(model: nn.Module) -> None:
    """Let the layers of each group have one central core; `from_pretrained` then looks for it once.

    It is looked for where transformers stores it: under the last name in the order of the alphabet. Raises ValueError where the cores of a
    group differ in shape.
    """
    groups: dict[str, dict[str, SharedMPOLinear]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, SharedMPOLinear):
            groups.setdefault(layer.group, {})[f"{path}.center.core"] = layer
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for group, members in groups.items():
        source = max(members)
        center = members[source].center
        for name, layer in members.items():
            if layer.center.core.shape != center.core.shape:
                shapes = [[*core.shape] for core in (layer.center.core, center.core)]
                raise ValueError(f"{name} has the shape {shapes[0]}, others of its group {group} have {shapes[1]}")
            layer.center = center
            if name != source:
                tied[name] = source


def shared_mpo_linear_matrix(layer: SharedMPOLinear, x: torch.Tensor) -> torch.Tensor:
    """The matrix, contracted once and kept in memory; by `reference` where gradients are asked for."""
    return matrix_linear(layer, x, [*layer.auxiliary, layer.center.core])  # type: ignore[arg-type]


def shared_mpo_linear_reference(layer: SharedMPOLinear, x: torch.Tensor) -> torch.Tensor:
    """The chain of the cores or the contracted matrix, whichever takes fewer multiply-adds for this many tokens: the oracle."""
    cores, tokens = layer.cores, x.numel() // x.shape[-1]
    if matrix_cost(cores, tokens) <= apply_cost(cores, tokens):
        return nn.functional.linear(x, mpo_to_matrix(cores), layer.bias)
    y = mpo_apply(cores, x)
    return y if layer.bias is None else y + layer.bias


def _room(layer: SharedMPOLinear) -> int:
    return layer.in_features * layer.out_features * layer.center.core.element_size()


registry.register("shared_mpo_linear", "matrix", shared_mpo_linear_matrix, room=_room)
registry.register("shared_mpo_linear", "reference", shared_mpo_linear_reference)
