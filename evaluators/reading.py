"""What reads the tokens of texts and says what may follow: transformers with its cache, or a whole decoder in C++ where that can run the model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from tensorpress.kernels import cpu_linear, registry
from tensorpress.kernels.decoder import Decoder, refusal
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.loading import free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPILED, TRANSFORMERS = "compiled decoder", "transformers"


class Reader(Protocol):
    """Reads tokens [rows, n] behind those that it read before, and returns the logits [rows, vocabulary] behind the last of them."""

    runner: str
    """`COMPILED` or `TRANSFORMERS`; a figure of speed says it."""

    def read(self, tokens: torch.Tensor) -> torch.Tensor: ...

    def forget(self) -> None:
        """Begin another text."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that it keeps beside the model: weights in its own layout, and keys and values of a compiled decoder."""

    def kernels(self) -> dict[str, int]:
        """How many layers each kernel computes, as `registry.names_in_use`."""


class TransformersReader:
    """The model's own forward pass, with its key-value cache; texts of several rows side by side."""

    runner = TRANSFORMERS

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.cache: Any = None
        self._takes_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        last = {"logits_to_keep": 1} if tokens.shape[1] > 1 and self._takes_last else {}
        output: Any = self.model(
            input_ids=tokens.to(self.model.device), past_key_values=self.cache, use_cache=True, **last
        )
        self.cache = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def forget(self) -> None:
        self.cache = None

    @property
    def kept_bytes(self) -> int:
        return 0

    def kernels(self) -> dict[str, int]:
        return registry.names_in_use(self.model)


class CompiledReader:
    """The compiled decoder: one text at a time, of at most `places` tokens. Raises ValueError with what stands against it."""

    runner = COMPILED

    def __init__(self, model: PreTrainedModel, mode: str, places: int):
        self.decoder, self.mode = Decoder(model, mode, places), mode

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) != 1:
            raise ValueError(f"the compiled decoder reads one text at a time, not {len(tokens)}")
        return self.decoder(tokens[0])

    def forget(self) -> None:
        self.decoder.reset()

    @property
    def kept_bytes(self) -> int:
        return self.decoder.nbytes + self.decoder.kept_bytes

    def kernels(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for name, count in registry.names_in_use(self.decoder.model).items():
            operation = name.partition(":")[0]
            mode = self.mode if operation == "quantized_linear" else "cpu"  # bf16 is multiplied as it is in both modes
            counts[f"{operation}:{mode}"] = counts.get(f"{operation}:{mode}", 0) + count
        return counts


def room_for(model: PreTrainedModel, places: int) -> int:
    """Bytes of the weights, keys and values that a compiled decoder of the model keeps beside it, about."""
    linears = (module for module in model.modules() if isinstance(module, (nn.Linear, QuantizedLinear)))
    weights = (
        sum(layer.in_features * layer.out_features * getattr(layer, "bits", 16) // 8 for layer in linears) * 9 // 8
    )
    return weights + cache_bytes(model, 1, places)


def cache_bytes(model: PreTrainedModel, batch: int, places: int) -> int:
    """Bytes of the keys and values of so many texts of so many tokens."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * batch * config.num_hidden_layers * shared * head * places * model.dtype.itemsize


def reader_for(model: PreTrainedModel, kernels: str, places: int) -> Reader:
    """The faster reader of one text of at most `places` tokens for the kernels that were asked for (`auto` or a name).

    `auto`, or what the environment has in its place, takes the compiled decoder, which computes transformers' numbers up to rounding, where
    it can run the model with vector instructions; the name of a mode takes it in that mode.
    """
    asked = registry.asked_for() if kernels == "auto" else kernels
    mode = "cpu" if asked == "auto" else asked
    if mode not in cpu_linear.MODES or (asked == "auto" and cpu_linear.instructions() in (None, "portable")):
        return TransformersReader(model)
    return compiled_reader(model, mode, places) or TransformersReader(model)


def compiled_reader(model: PreTrainedModel, mode: str, places: int) -> CompiledReader | None:
    """The compiled decoder for texts of at most `places` tokens; None where it cannot run the model, or half the free memory is too little."""
    if refusal(model, places) is not None or room_for(model, places) > free_bytes(model.device) / 2:
        return None
    try:
        return CompiledReader(model, mode, places)
    except (ValueError, MemoryError, RuntimeError):  # torch has no MemoryError
        return None
