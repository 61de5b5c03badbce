"""What all layers share whose kernel is chosen: found, measured, counted and switched in one way, whatever form their weights have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import ClassVar

import torch
from torch import nn

from tensorpress.kernels import registry


class KernelLayer(nn.Module, ABC):
    """y = x W^T + b, inputs [..., in_features], outputs [..., out_features], by a backend of its `operation`."""

    operation: ClassVar[str]
    trained_by: ClassVar[str] = "reference"
    """The backend that has gradients, and can be traced."""
    judged_by: ClassVar[str] = "reference"
    """The backend that computes the reference's own numbers, at the memory of a dense weight if it is another."""
    in_features: int
    out_features: int
    kernel: str
    """Name of the backend, or `auto`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # a graph has plain operations, or what a layer puts in their place
            return registry.backends(self.operation)[self.trained_by].run(self, x)
        return registry.kernel_for(self.operation, self, x)(self, x)

    @abstractmethod
    def dense_weight(self) -> torch.Tensor:
        """The weight W [out_features, in_features]."""

    @abstractmethod
    def kept_bytes(self, names: Collection[str] | None = None) -> int:
        """Bytes that kernels keep beside the layer's own tensors: those of these names, or all."""

    @abstractmethod
    def read_bytes(self, rows: int) -> int:
        """Bytes of weights that the kernel in use reads for so many rows."""

    @abstractmethod
    def release(self, names: Collection[str] = ()) -> None:
        """Drop what kernels other than these keep."""

    @abstractmethod
    def kernel_key(self) -> str:
        """What the speed of its kernels depends on."""

    @abstractmethod
    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form: the entry of the loading plug-in."""

    def parameter_count(self) -> int:
        """Weights and biases that the layer stores; packed integers count as the weights that they hold."""
        return sum(parameter.numel() for parameter in self.parameters())

    def check(self) -> None:
        """Refuse integers, read from a file, that name what there is not. Raises ValueError."""


def kernel_layers(model: nn.Module) -> list[KernelLayer]:
    """The layers of a model whose kernel is chosen, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, KernelLayer)]
