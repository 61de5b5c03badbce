"""What all layers share whose kernel is chosen: found, measured, counted and switched in one way, whatever form their weights have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import nn

from tensorpress.kernels import operators, registry
from tensorpress.kernels.origin import Origin


class Kept(Protocol):
    """What a kernel keeps: a tensor, or an object with its memory in one."""

    @property
    def data(self) -> torch.Tensor: ...

    @property
    def nbytes(self) -> int: ...


class KernelLayer(nn.Module, ABC):
    """y = x W^T + b, inputs [..., in_features], outputs [..., out_features], by a backend of its `operation`."""

    kinds: ClassVar[dict[str, type[KernelLayer]]] = {}
    """The kinds of layers by operation."""
    operation: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """What `spec` has besides `form`, in its order."""
    lists: ClassVar[tuple[str, ...]] = ()
    """Those that are lists of whole numbers."""
    trained_by: ClassVar[str] = "reference"
    """The backend that has gradients, and can be traced."""
    judged_by: ClassVar[str] = "reference"
    """The backend that computes the reference's own numbers, at the memory of a dense weight if it is another."""
    in_features: int
    out_features: int
    kernel: str
    """Name of the backend, or `auto`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        KernelLayer.kinds[cls.operation] = cls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            return registry.kernel_for(self.operation, self, x)(self, x)
        stored = self.stored()
        learns = torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in stored))
        cast = torch.is_autocast_enabled(x.device.type)  # which does not reach into an operator
        if learns or cast or torch.compiler.is_exporting():  # plain operations
            return registry.backends(self.operation)[self.trained_by].run(self, x)
        found: torch.Tensor = operators.linear(
            x, stored, self.operation, self.numbers(), self.out_features, self.kernel
        )
        return found

    @abstractmethod
    def dense_weight(self) -> torch.Tensor:
        """The weight W [out_features, in_features]."""

    @abstractmethod
    def stored(self) -> list[torch.Tensor]:
        """The layer's own tensors, the bias last if it has one."""

    @abstractmethod
    def place(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take such tensors as they are for the layer's own."""

    @abstractmethod
    def kept(self, names: Collection[str] | None = None) -> Iterator[Kept]:
        """What kernels of these names, or all, keep beside the layer's own tensors."""

    @abstractmethod
    def release_own(self, names: Collection[str]) -> None:
        """Drop what kernels other than these keep in the layer itself."""

    @abstractmethod
    def kernel_key(self) -> str:
        """What the speed of its kernels depends on."""

    @abstractmethod
    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form: the entry of the loading plug-in."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: dict) -> Self:
        """The layer's empty form, on `auto`."""

    def numbers(self) -> list[int]:
        """`spec` as numbers alone: lists behind their length."""
        found: list[int] = []
        spec: dict[str, Any] = self.spec()
        for name in self.fields:
            value = spec[name]
            if name in self.lists:
                found += [len(value), *value]
            else:
                found.append(int(value))
        return found

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Self:
        """The inverse of `numbers`."""
        spec: dict[str, Any] = {}
        rest = iter(numbers)
        for name in cls.fields:
            first = next(rest)
            spec[name] = [next(rest) for _ in range(first)] if name in cls.lists else first
        return cls.from_spec({**spec, "bias": bool(spec["bias"])})

    def kept_bytes(self, names: Collection[str] | None = None) -> int:
        """Bytes that kernels keep beside the layer's own tensors, for graphs, too: those of these names, or all. What is shared counts once."""
        stored = self.stored()
        own, found = Origin(stored), {}
        for layer in (self, *operators.layers_of(stored[0])):
            for kept in layer.kept(names):
                if not own.shares(kept.data):  # a tensor by itself is only looked at differently
                    found[kept.data.data_ptr()] = kept.nbytes
        return sum(found.values())

    def read_bytes(self, rows: int) -> int:
        """Bytes of weights that the kernel in use reads for so many rows."""
        used = [kept.nbytes for kept in self.kept([registry.in_use(self.operation, self, rows)])]
        return used[-1] if used else sum(tensor.nbytes for tensor in self.stored())

    def release(self, names: Collection[str] = ()) -> None:
        """Drop what kernels other than these keep, for graphs, too."""
        self.__dict__.pop(registry.LAST, None)
        first = self.stored()[0]
        for layer in (self, *operators.layers_of(first)):
            layer.release_own(names)
        if not names:
            operators.forget(first)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move with the model; what kernels keep is made anew."""
        self.release()
        super()._apply(fn, recurse)
        return self

    def parameter_count(self) -> int:
        """Weights and biases that the layer stores; packed integers count as the weights that they hold."""
        return sum(parameter.numel() for parameter in self.parameters())

    def check(self) -> None:
        """Refuse integers, read from a file, that name what there is not. Raises ValueError."""


def kernel_layers(model: nn.Module) -> list[KernelLayer]:
    """The layers of a model whose kernel is chosen, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, KernelLayer)]
