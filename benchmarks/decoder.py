"""A whole Llama of 1.1 B parameters with random weights: the compiled decoder beside transformers, with the same kernels and dense in bf16.

    python benchmarks/decoder.py --json out.json            # about five minutes on two cores, 6 GB
    python benchmarks/decoder.py --quick --json out.json    # a small one; no bars

Linear layers have 4 bits in groups of 128, the head 8 bits. Prompts of 128 tokens, 32 tokens decoded greedily, in turns, medians. How long it
takes from the model's folder to the first token is measured in fresh processes (decoder_load.py).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from decoder_load import load_and_repack
from rows import finish, row
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tensorpress.evaluators.generation import step
from tensorpress.kernels import cpu_linear
from tensorpress.kernels.decoder import Decoder
from tensorpress.kernels.packing import pack
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.loading import use_kernels
from tensorpress.structure import find_structure, set_module

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SMALL = {**SIZES, "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
PROMPT, TOKENS = 128, 32
GROUP = 128
FEWER = {3: 1.15, 2: 1.4}
"""Bits of further models, and how much faster than with 4 they should decode."""


def random_model(sizes: dict[str, int]) -> PreTrainedModel:
    """Random weights in bf16."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=1024)).to(torch.bfloat16).eval()


def quantized(model: PreTrainedModel, group: int = GROUP, width: int = 4) -> PreTrainedModel:
    """A copy with layers of random integers of so many bits; the head keeps 8 bits and groups of 128."""
    made = copy.deepcopy(model)
    for path in [*find_structure(made).linear_paths, "lm_head"]:
        layer: nn.Linear = made.get_submodule(path)  # type: ignore[assignment]
        bits, size = (8, GROUP) if path == "lm_head" else (width, group)
        set_module(made, path, random_layer(layer.in_features, layer.out_features, bits, size))
    return made


def random_layer(inputs: int, outputs: int, bits: int, group: int = GROUP) -> QuantizedLinear:
    """A symmetric layer of random integers, in its place without being packed."""
    layer = QuantizedLinear(inputs, outputs, bits, group, bias=False)
    layer.qweight.random_(-(2**31), 2**31 - 1)
    groups = layer.scales.shape[0]
    layer.qzeros = pack(torch.full((outputs, groups), (1 << (bits - 1)) - 1), bits).T.contiguous()
    layer.scales.fill_(0.02 / (1 << bits))
    return layer


def by_decoder(decoder: Decoder, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds to read the prompt, and to decode."""
    decoder.reset()
    began = time.perf_counter()
    token = decoder(prompt[0]).argmax(1)
    read = time.perf_counter()
    for _ in range(tokens):
        token = decoder(token).argmax(1)
    return read - began, time.perf_counter() - read


@torch.no_grad()
def by_transformers(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    began = time.perf_counter()
    token, cache = step(model, prompt)
    read = time.perf_counter()
    for _ in range(tokens):
        token, cache = step(model, token, cache)
    return read - began, time.perf_counter() - read


def measure(sizes: dict[str, int], repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Rows of the table."""
    dense = random_model(sizes)
    model = quantized(dense)
    prompt = torch.randint(sizes["vocab_size"], (1, PROMPT))
    rows = load_and_repack(model, min(repeats, 3), None if quick else 5.0)
    decoders = {name: Decoder(model, name, PROMPT + TOKENS + 1) for name in ("cpu", "cpu_int8")}
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        f"decoder, {name}": lambda decoder=decoder: by_decoder(decoder, prompt, TOKENS)  # type: ignore[misc]
        for name, decoder in decoders.items()
    }
    for width in FEWER:
        few = quantized(dense, width=width)
        for mode in ("cpu", "cpu_int8"):
            decoder = Decoder(few, mode, PROMPT + TOKENS + 1)
            runs[f"decoder, {mode}, {width} bits"] = lambda decoder=decoder: by_decoder(decoder, prompt, TOKENS)  # type: ignore[misc]
    runs["transformers, dense bf16"] = lambda: by_transformers(dense, prompt, TOKENS)
    for name in ("cpu", "cpu_int8"):
        other = copy.copy(model)

        def run(name: str = name, other: PreTrainedModel = other) -> tuple[float, float]:
            for module in other.modules():
                if isinstance(module, QuantizedLinear):
                    module.kernel = name
            return by_transformers(other, prompt, TOKENS)

        runs[f"transformers, {name}"] = run
    use_kernels(model, "cpu")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    bandwidth: list[float] = []
    for repeat in range(repeats + 1):
        for name, run_one in runs.items():
            found = run_one()
            if repeat:  # the first warms up
                seconds[name].append(found)
        bandwidth.append(cpu_linear.read_bandwidth(256, 3))
    best = {name: [median(times) for times in zip(*found, strict=True)] for name, found in seconds.items()}
    for name, (read, decode) in best.items():
        rows.append(row(f"{name}: prompt of {PROMPT}", PROMPT / read, "tokens/s", None))
        rows.append(row(f"{name}: decode", TOKENS / decode, "tokens/s", None))
    floor = decoders["cpu"].nbytes / median(bandwidth)
    for name in decoders:
        share = floor / (best[f"decoder, {name}"][1] / TOKENS)
        rows.append(row(f"decoder, {name}: share of the read bandwidth", share, "x", None))
        for width, faster in FEWER.items():
            ratio = best[f"decoder, {name}"][1] / best[f"decoder, {name}, {width} bits"][1]
            bar = None if quick or name == "cpu" else faster
            rows.append(row(f"decoder, {name}: decode with {width} bits against 4", ratio, "x", bar, True))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, no bars")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = measure(SMALL if args.quick else SIZES, 1 if args.quick else args.repeats, args.quick)
    conditions = {"instructions": cpu_linear.instructions(), "bits": 4, "head bits": 8, "group": GROUP}
    finish(rows, {**conditions, "quick": args.quick, "repeats": args.repeats}, args.json)


if __name__ == "__main__":
    main()
