"""What a measure is: it takes a model and evaluation data, and returns metrics under the names of the contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Report to nobody."""


@dataclass
class EvaluationData:
    """The held-out text, tokenised once and cut into windows without overlap.

    `windows`: int64 [n, length], in domain. `text_bytes`: UTF-8 bytes of the text that these windows decode to, for bits per
    byte. `other_*`: the same for a text of another domain, or None. `pairs`: CSV of sentence pairs (encoders), or None.
    """

    windows: torch.Tensor
    text_bytes: int
    tokenizer: Any
    name: str
    other_windows: torch.Tensor | None = None
    other_bytes: int = 0
    other_name: str = ""
    pairs: Path | None = None
    demo: bool = False
    """Whether the model is the demo model (or comes from it): its text is Python source."""


@dataclass
class Subject:
    """The model under test, its original, and what is known about both.

    `model` is in evaluation mode. `original()` gives the uncompressed model (loaded at the first call; the model itself when
    the subject is the original). `folder`: the artifact's folder, for sizes. `original_folder` likewise.
    """

    model: PreTrainedModel
    original: Callable[[], PreTrainedModel]
    folder: Path
    original_folder: Path
    is_original: bool


@dataclass
class Measurement:
    """Metrics (flat, floats), the conditions they hold under, and texts worth keeping (file name -> content)."""

    metrics: dict[str, float]
    conditions: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class Evaluator(ABC):
    """Base of all measures. Stateless: everything comes in through `evaluate`."""

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    """Kinds of model that it can measure; others are skipped where the measure is not asked for by name."""
    gives: ClassVar[tuple[str, ...]] = ()
    """Names of the metrics that it can give, those that are relative to the original included."""
    timed: ClassVar[bool] = False
    """Whether the figures depend on the machine (they are then remembered for this machine alone)."""

    @abstractmethod
    def evaluate(self, subject: Subject, data: EvaluationData, progress: Progress = no_progress) -> Measurement:
        """Measure the subject."""
