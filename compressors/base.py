"""What a compression method is: a configuration that takes a model and calibration data, and returns model and report.

A method has no side effect outside the model, is deterministic for a seed, and says as class attributes what it needs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tensorpress.recipe import Method
from tensorpress.structure import Structure
from tensorpress.text import NO_MARKS, Marks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def no_progress(what: str, done: int, total: int) -> None:
    """Report to nobody."""


@dataclass
class Calibration:
    """What a method may use besides the model.

    `windows`: int64 [samples, length], token ids of the calibration text. `validation`: further windows of the same text,
    disjoint from `windows`, for guards. `stream`: the whole calibration text as ids, for training. `original`: gives
    the uncompressed model, in evaluation mode (the teacher); loaded at the first call.
    """

    windows: torch.Tensor
    validation: torch.Tensor
    stream: torch.Tensor
    seed: int
    original: Callable[[], PreTrainedModel]
    progress: Progress = no_progress
    scratch: Path | None = None
    """Folder for checkpoints of a long walk; kept when the step dies, and read when it is run again."""
    marks: Marks = NO_MARKS
    """What stands around the text in `windows` and `validation`, and does not in `stream`."""
    stored: torch.dtype | None = None
    """The precision that the model will be stored in, where it works in another: what is gained by training has to outlast it."""


@dataclass
class LayerReport:
    """What was done to one layer (or sublayer). Errors are relative; the method's docstring says of what."""

    layer: str
    action: str
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    error_before: float | None = None
    error_after: float | None = None
    seconds: float = 0.0
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """What a step did: a row for each layer, and figures of the step as a whole."""

    layers: list[LayerReport] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Compressor(Method):
    """Base of all methods. `use` is the name in recipes."""

    needs_calibration: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("causal", "encoder")
    """Kinds of model that the method can handle."""
    may_not_follow: ClassVar[Mapping[str, str]] = {}
    """Methods that it cannot come after, each with the reason."""
    works_on: ClassVar[tuple[str, ...]] = ()
    """Methods whose layers it works on: behind one of these, `check_layers` waits until the step runs."""

    def check(self, model: PreTrainedModel, structure: Structure) -> None:
        """Refuse, before any work, a model that the method cannot handle. Raises InputError."""

    def check_layers(self, model: PreTrainedModel, structure: Structure) -> None:
        """Refuse a model that has none of the layers that earlier steps should have made. Raises InputError."""

    @abstractmethod
    def compress(self, model: PreTrainedModel, calibration: Calibration) -> tuple[PreTrainedModel, Report]:
        """Compress `model` in place and return it with a report."""
        raise NotImplementedError
