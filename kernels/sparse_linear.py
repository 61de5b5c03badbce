"""Linear layers that store some of their weights: single ones anywhere, or all weights of some inputs. Parts of a `SumLinear`, mostly.

A sparse matrix beside a low rank is SLTrain's form (Han et al. 2024, arXiv 2406.02214), whole channels beside it LOST's (Li et al. 2025,
arXiv 2508.02668). The index of a sparse weight is stored as compressed rows: which inputs, and where each output's begin.
"""

from __future__ import annotations

import warnings
from typing import Any, Self

import torch
from torch import nn

from tensorpress.kernels.origin import Origin

LARGEST_SHORT = 2**15
"""Inputs that int16 numbers."""


def index_dtype(inputs: int) -> torch.dtype:
    """How the inputs of sparse weights are stored: int16 where it reaches."""
    return torch.int16 if inputs <= LARGEST_SHORT else torch.int32


def sparse_bytes(outputs: int, inputs: int, count: int) -> int:
    """Bytes of so many sparse weights [m, n] at 16 bits, with their index."""
    return count * (2 + index_dtype(inputs).itemsize) + 4 * (outputs + 1)


class SparseLinear(nn.Module):
    """y = x W^T + b for W [m, n] with few weights that are stored; inputs [..., n], outputs [..., m].

    `values` [k] row by row, in each row from the first input on; `columns` [k], int16 or int32: the input of each;
    `starts` int32 [m + 1]: where the values of each output begin, the end behind.
    """

    columns: torch.Tensor
    starts: torch.Tensor

    def __init__(self, in_features: int, out_features: int, count: int, *, bias: bool):
        super().__init__()
        if not 1 <= count <= min(in_features * out_features, 2**31 - 1):
            raise ValueError(f"from 1 to {in_features * out_features} values, those of a dense weight")
        self.in_features, self.out_features, self.count = in_features, out_features, count
        self.values = nn.Parameter(torch.zeros(count))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("columns", (torch.arange(count) % in_features).to(index_dtype(in_features)))
        starts = (in_features * torch.arange(out_features + 1)).clamp(max=count)
        self.register_buffer("starts", starts.to(torch.int32))
        self._kept: tuple[Origin, torch.Tensor] | None = None

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | None = None
    ) -> SparseLinear:
        """Store the weights [m, n] that a bool mask [m, n] marks, or those that are not zero; they are copied.

        Raises ValueError where there is none.
        """
        mask = weight != 0 if mask is None else mask
        rows, columns = mask.nonzero(as_tuple=True)
        outputs, inputs = weight.shape
        with torch.device("meta"):
            layer = cls(inputs, outputs, len(rows), bias=bias is not None)
        layer.values = nn.Parameter(weight.detach()[rows, columns].clone())
        layer.columns = columns.to(index_dtype(inputs))
        layer.starts = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        learns = torch.is_grad_enabled() and (x.requires_grad or self.values.requires_grad)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if learns or traced or torch.is_autocast_enabled(x.device.type) or x.numel() == 0 or x.is_meta:
            y = nn.functional.linear(x, self.dense_weight().to(x.dtype))
        else:
            y = self._by_rows(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _by_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The product by the stored weights alone; 16 bits are widened, which sparse products of the CPU have not."""
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = x.reshape(-1, self.in_features).to(precise)
        y = (self._compressed(precise) @ rows.T).T
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def _compressed(self, precise: torch.dtype) -> torch.Tensor:
        """W as torch's compressed rows in a precision. Kept until the weights change."""
        stored = [self.values, self.columns, self.starts]
        if self._kept is None or self._kept[1].dtype != precise or not self._kept[0].holds(stored):
            values, shape = self.values.detach().to(precise), (self.out_features, self.in_features)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                made = torch.sparse_csr_tensor(
                    self.starts, self.columns.to(torch.int32), values, shape, check_invariants=False
                )
            self._kept = Origin(stored), made
        return self._kept[1]

    def dense_weight(self) -> torch.Tensor:
        """The weight W [m, n] with its zeros; it has the gradients of the values."""
        outputs = torch.arange(self.out_features, device=self.values.device)
        rows = outputs.repeat_interleave(self.starts.diff().long(), output_size=self.count)
        places = rows * self.in_features + self.columns.long()
        flat = self.values.new_zeros(self.out_features * self.in_features).scatter(0, places, self.values)
        return flat.view(self.out_features, self.in_features)

    def check(self) -> None:
        """Refuse an index, read from a file, that is not one. Raises ValueError."""
        starts, columns = self.starts.long(), self.columns.long()
        if int(starts[0]) != 0 or int(starts[-1]) != self.count or bool((starts.diff() < 0).any()):
            raise ValueError(f"starts: do not rise from 0 to {self.count}")
        if int(columns.min()) < 0 or int(columns.max()) >= self.in_features:
            raise ValueError(
                f"columns: from {int(columns.min())} to {int(columns.max())}, of {self.in_features} inputs"
            )
        first = torch.zeros(self.count + 1, dtype=torch.bool, device=starts.device)
        first[starts] = True
        wrong = ((columns.diff() <= 0) & ~first[1:-1]).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise ValueError(f"columns: {int(columns[place])} is not before {int(columns[place + 1])} in one row")

    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form: the entry of the loading plug-in."""
        return {
            "form": "sparse",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "count": self.count,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> SparseLinear:
        return cls(spec["in_features"], spec["out_features"], spec["count"], bias=spec["bias"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._kept = None
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, count={self.count}"


class ChannelLinear(nn.Module):
    """y = x[channels] W^T + b: all weights of some inputs, none of the others; inputs [..., n], outputs [..., m].

    `weight` [m, k]; `channels` int32 [k], rising: the inputs that it is for.
    """

    channels: torch.Tensor

    def __init__(self, in_features: int, out_features: int, count: int, *, bias: bool):
        super().__init__()
        if not 1 <= count <= in_features:
            raise ValueError(f"from 1 to {in_features} channels, the inputs")
        self.in_features, self.out_features, self.count = in_features, out_features, count
        self.weight = nn.Parameter(torch.zeros(out_features, count))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("channels", torch.arange(count, dtype=torch.int32))

    @classmethod
    def from_columns(
        cls, weight: torch.Tensor, channels: torch.Tensor, inputs: int, bias: torch.Tensor | None
    ) -> ChannelLinear:
        """Wrap columns [m, k] for the rising `channels` [k] of so many inputs; they are copied."""
        with torch.device("meta"):
            layer = cls(inputs, len(weight), len(channels), bias=bias is not None)
        layer.weight = nn.Parameter(weight.detach().clone())
        layer.channels = channels.to(torch.int32).clone()
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken = x.index_select(-1, self.channels)
        return nn.functional.linear(taken, self.weight, self.bias)

    def dense_weight(self) -> torch.Tensor:
        """The weight W [m, n] with its zeros; it has gradients."""
        empty = self.weight.new_zeros(self.out_features, self.in_features)
        return empty.index_copy(1, self.channels.long(), self.weight)

    def check(self) -> None:
        """Refuse channels, read from a file, that are no inputs or do not rise. Raises ValueError."""
        channels = self.channels.long()
        if int(channels.min()) < 0 or int(channels.max()) >= self.in_features:
            raise ValueError(
                f"channels: from {int(channels.min())} to {int(channels.max())}, of {self.in_features} inputs"
            )
        if bool((channels.diff() <= 0).any()):
            raise ValueError("channels: do not rise")

    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form: the entry of the loading plug-in."""
        return {
            "form": "channels",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "count": self.count,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> ChannelLinear:
        return cls(spec["in_features"], spec["out_features"], spec["count"], bias=spec["bias"])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, count={self.count}"
