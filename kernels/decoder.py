"""A whole decoder of the Llama family in C++ (`kernels/cpu/decoder.cpp`): one call for all tokens that are new, no Python in between.

Norms, rotary positions, attention over kept keys and values, the activation, and linear layers of 2, 3, 4, 8 bits or bf16; those with one
input (queries, keys and values; gate and up) are done together, and their input is rounded once. Sums are in fp32; what goes into a linear
layer and what is kept has the model's precision. Mode `cpu` or `cpu_int8` as in `cpu_linear`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensorpress.kernels import cpu_linear
from tensorpress.kernels.cpu_linear import LANES, Weights
from tensorpress.kernels.packed_dense import PackedDense
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.kernels.removed import RemovedAttention, RemovedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}
FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on how long the text is."""
AT_ONCE = 512
"""Tokens that are read in one call: what lies between the layers is kept for so many."""


class _Block(ctypes.Structure):
    """`tp_block` of kernels/cpu/decoder.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "feed_forward_norm")),
        *((name, ctypes.POINTER(Weights)) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("query_norm", "key_norm")),
        *((name, ctypes.c_int64) for name in ("heads", "shared")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    )


class _Decoder(ctypes.Structure):
    """`tp_decoder` of kernels/cpu/decoder.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "head", "vocabulary", "places", "blocks")),
        ("block", ctypes.POINTER(_Block)),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm")),
        ("top", ctypes.POINTER(Weights)),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine")),
        *((name, ctypes.c_float) for name in ("epsilon", "scale")),
        *((name, ctypes.c_int32) for name in ("embedding_type", "activation", "mode", "type")),
    )


def refusal(model: PreTrainedModel, places: int = 0) -> str | None:
    """Why the compiled decoder cannot run a model for texts of so many tokens; None if it can, as far as its weights are not looked at."""
    config = model.config
    if cpu_linear.compiled() is None:
        return "the compiled kernels were not built"
    if config.model_type not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        return f"it is no decoder of the kinds {', '.join(FAMILIES)}"
    if any(p.device.type != "cpu" for p in model.parameters()) or model.dtype not in (torch.float32, torch.bfloat16):
        return f"it is in {str(model.dtype).removeprefix('torch.')} on {model.device}; float32 or bfloat16 on the CPU can be run"
    if config.hidden_act not in ACTIVATIONS:
        return f"its activation is {config.hidden_act}"
    base: Any = model.model
    if base.rotary_emb.rope_type not in FIXED_ROPE:
        return f"its rotary positions are {base.rotary_emb.rope_type}"
    if not isinstance(base.embed_tokens, nn.Embedding):
        return f"its embedding is a {type(base.embed_tokens).__name__}"
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or []) or config.model_type == "mistral"
    if slides and window is not None and window < places:
        return f"its attention has a window of {window} tokens"
    for index, layer in enumerate(base.layers):
        for name, module in _linears(layer).items():
            if not isinstance(module, (nn.Linear, QuantizedLinear)):
                return f"{name} of block {index} is a {type(module).__name__}"
    return None


def _linears(layer: Any) -> dict[str, Any]:
    """The linear layers of a block, without those of a sublayer that was removed."""
    names: dict[str, Any] = {}
    if not isinstance(layer.self_attn, RemovedAttention):
        names |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), layer.self_attn)
    if not isinstance(layer.mlp, RemovedLinear):
        names |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), layer.mlp)
    return {name: getattr(part, name, part) for name, part in names.items()}  # a part that has none is told as it is


def _check_sizes(layer: Any, hidden: int, head: int) -> None:
    """Refuse layers that do not fit together: C does not look. Raises ValueError."""
    sizes = {name: (part.in_features, part.out_features) for name, part in _linears(layer).items()}
    wanted: dict[str, tuple[int, int]] = {}
    if "q_proj" in sizes:
        heads, shared = (sizes[name][1] // head for name in ("q_proj", "k_proj"))
        if shared < 1 or heads % shared:
            raise ValueError(f"its {heads} heads of queries cannot share {shared} of keys")
        wanted |= {
            "q_proj": (hidden, heads * head),
            "k_proj": (hidden, shared * head),
            "v_proj": (hidden, shared * head),
        }
        wanted |= {"o_proj": (heads * head, hidden)}
    if "up_proj" in sizes:
        width = sizes["up_proj"][1]
        wanted |= {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    for name, size in wanted.items():
        if sizes[name] != size:
            raise ValueError(f"its {name} is {sizes[name][0]} to {sizes[name][1]}, not {size[0]} to {size[1]}")


class Decoder:
    """A model that reads tokens one after the other, with what it keeps of them; not for several threads at once.

    `places` is the longest text. Raises ValueError with what stands against it.
    """

    def __init__(self, model: PreTrainedModel, kernel: str = "cpu", places: int = 2048):
        reason = refusal(model, places)
        if reason is not None:
            raise ValueError(reason)
        self.model, self.kernel, self.places, self.place = model, kernel, places, 0
        self._kept: list[Any] = []  # what C points to
        self._packed: dict[int, Any] = {}
        base: Any = model.model
        config = model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        blocks = (_Block * len(base.layers))(*(self._block(layer, head) for layer in base.layers))
        with torch.no_grad():
            angles = base.rotary_emb(
                torch.zeros(1, 1, dtype=torch.float32, device="cpu"), torch.arange(places, device="cpu")[None]
            )
        if head % 2 or any(angle.shape != (1, places, head) for angle in angles):
            raise ValueError(f"its rotary positions do not turn whole heads of {head}")
        cosine, sine = (self._floats(angle[0]) for angle in angles)
        embedding = base.embed_tokens.weight.detach().contiguous()
        self._kept += [blocks, embedding]
        top: Any = model.lm_head
        fits = isinstance(top, (nn.Linear, QuantizedLinear)) and (top.out_features, top.in_features) == embedding.shape
        if not fits or embedding.shape[1] != config.hidden_size:
            raise ValueError("its head is no linear layer from the hidden size to the vocabulary")
        self._decoder = _Decoder(
            config.hidden_size, head, embedding.shape[0], places, len(base.layers), blocks, embedding.data_ptr(),
            self._floats(base.norm.weight), ctypes.pointer(self._weights(top)), cosine, sine, base.norm.variance_epsilon,
            self._scale(base, head), cpu_linear.TYPES[embedding.dtype], ACTIVATIONS[config.hidden_act], cpu_linear.MODES[kernel],
            cpu_linear.TYPES[model.dtype],
        )  # fmt: skip
        self.vocabulary = int(top.out_features)

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, wanted: int = 1) -> torch.Tensor:
        """Read tokens [n]; returns the logits, fp32 [wanted, vocabulary], behind the last `wanted` of them.

        Raises ValueError for tokens that there are not or a text that gets too long, MemoryError.
        """
        code = cpu_linear.compiled()
        assert code is not None
        if tokens.dim() != 1 or not 0 < wanted <= len(tokens):
            raise ValueError(f"{wanted} logits are wanted of {len(tokens)} tokens in {tokens.dim()} dimensions")
        tokens = tokens.to("cpu", torch.int64).contiguous()
        if self.place + len(tokens) > self.places or not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            raise ValueError(
                f"{len(tokens)} tokens behind {self.place} of {self.places}: too many, or not of the vocabulary"
            )
        logits = torch.empty(wanted, self.vocabulary, dtype=torch.float32, device="cpu")
        before = self.place
        for first in range(0, len(tokens), AT_ONCE):
            part = tokens[first : first + AT_ONCE]
            end = first + len(part)
            of_part = max(0, min(len(part), end - (len(tokens) - wanted)))
            to = logits[max(0, first - (len(tokens) - wanted)) :]
            problem = code.tp_decode(
                ctypes.byref(self._decoder), part.data_ptr(), len(part), self.place, of_part, to.data_ptr(), torch.get_num_threads()
            )  # fmt: skip
            if problem:
                self.place = before  # all or nothing
                raise MemoryError(f"no memory to read {len(part)} tokens")
            self.place += len(part)
        return logits

    def reset(self, place: int = 0) -> None:
        """Forget all but the first `place` tokens."""
        self.place = min(self.place, place)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that reading one token reads."""
        return sum(packed.nbytes for packed in self._packed.values())

    @property
    def kept_bytes(self) -> int:
        """Bytes of keys and values, for the longest text."""
        return sum(t.nbytes for t in self._kept if isinstance(t, torch.Tensor) and t.dim() == 3)

    def _block(self, layer: Any, head: int) -> _Block:
        _check_sizes(layer, self.model.config.hidden_size, head)
        block = _Block()
        attention = layer.self_attn
        for name, module in _linears(layer).items():
            setattr(block, name.split("_")[0], ctypes.pointer(self._weights(module)))
        if block.q:
            block.attention_norm = self._floats(layer.input_layernorm.weight)
            for field, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
                if hasattr(attention, name):
                    setattr(block, field, self._floats(getattr(attention, name).weight))
            block.heads, block.shared = (getattr(attention, name).out_features // head for name in ("q_proj", "k_proj"))
            kept = -(-self.places // LANES) * LANES
            room = [torch.zeros(block.shared, kept, head, dtype=self.model.dtype, device="cpu") for _ in range(2)]
            self._kept += room
            block.keys, block.values = (tensor.data_ptr() for tensor in room)
        if block.down:
            block.feed_forward_norm = self._floats(layer.post_attention_layernorm.weight)
        return block

    def _weights(self, layer: nn.Module) -> Weights:
        if isinstance(layer, QuantizedLinear):
            packed: Any = cpu_linear.packed(layer)
        else:
            assert isinstance(layer, nn.Linear)
            packed = PackedDense(layer.weight, layer.bias)
        self._packed[id(layer)] = packed
        self._kept.append(layer)
        weights: Weights = packed.weights
        return weights

    def _floats(self, tensor: torch.Tensor) -> int:
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    @staticmethod
    def _scale(base: Any, head: int) -> float:
        """What products of queries and keys are multiplied with; blocks without attention have none."""
        scales = {float(layer.self_attn.scaling) for layer in base.layers if hasattr(layer.self_attn, "scaling")}
        if len(scales) > 1:
            raise ValueError("its blocks scale attention differently")
        return scales.pop() if scales else head**-0.5
