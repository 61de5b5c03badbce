"""What something was made of: kept layouts of weights are made anew when the weights change."""

from __future__ import annotations

from collections.abc import Iterable

import torch

NOTHING = (None, -1, -1, None)


class Origin:
    """Tensors as they are now, to be asked later whether others are the same, and nobody wrote to them. What is written through `.data` is not seen.

    It holds their memory, so that another tensor cannot lie at the same address meanwhile.
    """

    def __init__(self, tensors: Iterable[torch.Tensor | None]):
        self.tensors = [tensor for tensor in tensors if tensor is not None]
        self.memory = [tensor.untyped_storage() for tensor in self.tensors]
        self.marks = [(t, t.data_ptr(), _version(t), (t.dtype, t.shape, t.stride())) for t in self.tensors]

    def holds(self, tensors: Iterable[torch.Tensor | None]) -> bool:
        """Whether these are the tensors as they were. Called for every product: what is the same object is asked less."""
        rest = iter(self.marks)
        for tensor in tensors:
            if tensor is None:
                continue
            own, place, version, form = next(rest, NOTHING)
            if tensor.data_ptr() != place or (0 if tensor.is_inference() else tensor._version) != version:
                return False
            if tensor is not own and (tensor.dtype, tensor.shape, tensor.stride()) != form:
                return False
        return next(rest, NOTHING) is NOTHING

    def __reduce__(self) -> tuple[type, tuple[tuple[()]]]:
        """A copy is of nothing: what was kept of these tensors is made anew for others."""
        return Origin, ((),)

    def shares(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of one of these."""
        place = tensor.untyped_storage().data_ptr()
        return any(place == memory.data_ptr() for memory in self.memory)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
