"""What something was made of: kept layouts of weights are made anew when the weights change."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Origin:
    """Tensors as they are now; equal to a later one of the same tensors that nobody wrote to.

    It holds their memory, so that another tensor cannot lie at the same address meanwhile. What is written through `.data` is not seen.
    """

    def __init__(self, tensors: Iterable[torch.Tensor | None]):
        self.tensors = [tensor.detach() for tensor in tensors if tensor is not None]
        self.versions = [0 if tensor.is_inference() else tensor._version for tensor in self.tensors]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Origin)
            and self.versions == other.versions
            and [*map(_place, self.tensors)] == [*map(_place, other.tensors)]
        )

    __hash__ = None  # type: ignore[assignment]

    def shares(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of one of these."""
        place = tensor.untyped_storage().data_ptr()
        return any(place == own.untyped_storage().data_ptr() for own in self.tensors)


def _place(tensor: torch.Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
