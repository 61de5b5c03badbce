"""What stands where a sublayer was removed: no parameters, no arithmetic, nothing in the key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RemovedLinear(nn.Module):
    """Stands for a linear layer (or a whole feed-forward) whose output is zero: an expanded view, no memory is filled."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x.new_zeros(1).expand(*x.shape[:-1], self.out_features)

    def spec(self) -> dict[str, object]:
        return {"form": "removed", "out_features": self.out_features}


class RemovedAttention(nn.Module):
    """Stands for an attention module: returns (zeros [..., out_features], None, ...) with as many values as it did."""

    def __init__(self, out_features: int, values: int):
        super().__init__()
        self.out_features, self.values = out_features, values

    def forward(self, hidden_states: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        x = (
            hidden_states
            if hidden_states is not None
            else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
        )
        zeros = x.new_zeros(1).expand(*x.shape[:-1], self.out_features)
        return zeros if self.values == 1 else (zeros, *([None] * (self.values - 1)))

    def spec(self) -> dict[str, object]:
        return {"form": "removed_attention", "out_features": self.out_features, "values": self.values}


class RemovedNorm(nn.Module):
    """Stands for a normalisation that fed only a removed sublayer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def spec(self) -> dict[str, object]:
        return {"form": "removed_norm"}
