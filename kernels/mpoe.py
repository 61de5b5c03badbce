"""Experts of a mixture whose weights are matrix product operators with one central core for all experts of a block, and such a mixture.

Source: MPOE, Gao et al. 2022, arXiv 2203.01104 ("Parameter-efficient mixture-of-experts architecture for pre-trained language models").
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tensorpress.kernels.mpo_linear import mpo_to_matrix

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "swish": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_pytorch_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "relu": nn.functional.relu,
}


class SharedMatrices(nn.Module):
    """Matrices W_e [m, n] of E experts: `center` [d_{c-1}, i_c, j_c, d_c] is that of all, `auxiliary` [E, d_{k-1}, i_k, j_k, d_k] has the other cores."""

    def __init__(self, experts: int, out_factors: Sequence[int], in_factors: Sequence[int], bonds: Sequence[int]):
        super().__init__()
        sites = len(bonds) + 1
        if not len(out_factors) == len(in_factors) == sites or sites % 2 == 0:
            raise ValueError("an odd number n of output factors, as many input factors, and n - 1 bonds")
        self.experts, self.bonds, self.middle = experts, tuple(bonds), sites // 2
        self.out_factors, self.in_factors = tuple(out_factors), tuple(in_factors)
        edges = (1, *bonds, 1)
        shapes = [(edges[k], out_factors[k], in_factors[k], edges[k + 1]) for k in range(sites)]
        self.center = nn.Parameter(torch.zeros(shapes.pop(self.middle)))
        self.auxiliary = nn.ParameterList(torch.zeros(experts, *shape) for shape in shapes)

    @classmethod
    def from_cores(cls, experts: Sequence[Sequence[torch.Tensor]]) -> SharedMatrices:
        """Wrap the cores of every expert, of which the middle ones are one tensor; they are copied."""
        shapes, middle = [core.shape for core in experts[0]], len(experts[0]) // 2
        rows, columns, bonds = [s[1] for s in shapes], [s[2] for s in shapes], [s[3] for s in shapes[:-1]]
        found = cls(len(experts), rows, columns, bonds)
        others = [k for k in range(len(shapes)) if k != middle]
        found.center = nn.Parameter(experts[0][middle].detach().clone())
        found.auxiliary = nn.ParameterList(torch.stack([cores[k].detach() for cores in experts]) for k in others)
        return found

    def cores(self, expert: int, center_learns: bool = True) -> list[torch.Tensor]:
        """All cores of one expert in their order; the central one without gradients where it is not to learn."""
        own = [stack[expert] for stack in self.auxiliary]
        center = self.center if center_learns else self.center.detach()
        return [*own[: self.middle], center, *own[self.middle :]]

    def matrix(self, expert: int, center_learns: bool = True) -> torch.Tensor:
        """W_e [m, n]."""
        return mpo_to_matrix(self.cores(expert, center_learns))

    def form(self) -> dict[str, list[int]]:
        """What rebuilds the empty form, besides the number of experts."""
        return {
            "out_factors": list(self.out_factors),
            "in_factors": list(self.in_factors),
            "bonds": list(self.bonds),
        }


class SharedExperts(nn.Module):
    """Gated feed-forwards W_down (act(W_gate x) * W_up x) of all experts; stands for the fused experts of transformers' mixtures.

    `gate_up` has W_gate over W_up [2 f, h], `down` [h, f]. A matrix is contracted when its expert is called: less memory, not less time.
    """

    def __init__(self, gate_up: SharedMatrices, down: SharedMatrices, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.gate_up, self.down, self.activation = gate_up, down, activation
        self.num_experts = gate_up.experts

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        centers_learn: bool = True,
    ) -> torch.Tensor:
        """Outputs [tokens, h] for hidden states [tokens, h], the experts of each token [tokens, k] and their weights [tokens, k]."""
        result = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            tokens, places = torch.where(top_k_index == expert)
            if len(tokens) == 0:
                continue
            first, second = self.gate_up.matrix(expert, centers_learn), self.down.matrix(expert, centers_learn)
            gate, up = nn.functional.linear(hidden_states[tokens], first).chunk(2, dim=-1)
            y = nn.functional.linear(ACTIVATIONS[self.activation](gate) * up, second)
            result.index_add_(0, tokens, (y * top_k_weights[tokens, places, None]).to(result.dtype))
        return result

    def shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Those of the fused weights that it stands for: (E, 2 f, h) and (E, h, f)."""
        first, second = (
            (self.num_experts, math.prod(one.out_factors), math.prod(one.in_factors))
            for one in (self.gate_up, self.down)
        )
        return first, second

    def spec(self) -> dict[str, object]:
        """What rebuilds this module's empty form: the entry of the loading plug-in."""
        return {
            "form": "shared_experts",
            "experts": self.num_experts,
            "gate_up": self.gate_up.form(),
            "down": self.down.form(),
            "activation": self.activation,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> SharedExperts:
        gate_up, down = (SharedMatrices(spec["experts"], **spec[name]) for name in ("gate_up", "down"))
        return cls(gate_up, down, spec["activation"])

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, {self.activation}"


class SharedMixture(SharedExperts):
    """A mixture of such experts with a router of its own; stands for a dense gated feed-forward, inputs and outputs [..., h].

    The `active` experts with the largest logits of `router` [E, h] work on a token; the softmax over theirs weighs them. In the share
    `core_updates` of the passes that are to give gradients, drawn by `seed`, the central cores get theirs, in the others none.
    """

    def __init__(
        self,
        gate_up: SharedMatrices,
        down: SharedMatrices,
        activation: str,
        router: torch.Tensor,
        *,
        active: int,
        core_updates: float,
        seed: int,
    ):
        """Take the matrices as they are, and a copy of the router. Raises ValueError for more active experts than there are."""
        super().__init__(gate_up, down, activation)
        if not 1 <= active <= self.num_experts:
            raise ValueError(f"{active} active of {self.num_experts} experts")
        self.active, self.core_updates, self.seed = active, core_updates, seed
        self.router = nn.Parameter(router.detach().clone())
        self.draws = random.Random(seed)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = nn.functional.linear(tokens, self.router)
        chosen, experts = logits.to(torch.promote_types(logits.dtype, torch.float32)).topk(self.active, dim=-1)
        found = super().forward(tokens, experts, chosen.softmax(-1), self._centers_learn())
        return found.reshape(hidden_states.shape)

    def _centers_learn(self) -> bool:
        """Whether this pass gives the central cores gradients; drawn only where they would get some."""
        if self.core_updates == 1 or not torch.is_grad_enabled():
            return True
        return self.draws.random() < self.core_updates

    def spec(self) -> dict[str, object]:
        """What rebuilds this module's empty form: the entry of the loading plug-in."""
        own = {"active": self.active, "core_updates": self.core_updates, "seed": self.seed}
        return {**super().spec(), "form": "shared_mixture", **own}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> SharedMixture:
        gate_up, down = (SharedMatrices(spec["experts"], **spec[name]) for name in ("gate_up", "down"))
        router = torch.zeros(spec["experts"], math.prod(spec["gate_up"]["in_factors"]))
        own = {name: spec[name] for name in ("active", "core_updates", "seed")}
        return cls(gate_up, down, spec["activation"], router, **own)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, active={self.active}, core_updates={self.core_updates}"
