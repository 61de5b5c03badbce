"""The published anchor of MPO layers that are trained: a character-level GPT of one million parameters on Tiny Shakespeare.

    python benchmarks/char_gpt.py --data ../shared/data --json out.json
    python benchmarks/char_gpt.py --data ../shared/data --quick --json out.json      # a twentieth of the training; no bars

PicoGPT-MPO (arXiv 2603.28534): all linear layers as MPOs of bond dimension 16 are 18.8 % of 1.02 M parameters and come to 51.6 % of next characters
where dense layers come to 52.8 %. Here: GPT-2 with 5 blocks of width 128, windows of 128 characters, both trained from scratch with the same seed, data, steps
and schedule, the dense one to a peak of 3e-3 and the MPO to 6e-3 (no search for either); the last tenth of the text is held out. MPO layers start as TT-SVDs of the dense start, scaled to its norm.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rows import finish, row
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tensorpress.compressors.decompose.tensor_train import capped_bonds, decompose, factors
from tensorpress.compressors.recover.distill import schedule
from tensorpress.kernels.mpo_linear import MPOLinear, mpo_to_matrix
from tensorpress.structure import find_structure, linear_weight, set_module

LENGTH, BATCH = 128, 32
PUBLISHED = {"dense": 52.8, "mpo": 51.6, "share": 0.188}


def text_of(data: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(training ids, held-out ids, number of characters)."""
    text = (data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    places = {character: place for place, character in enumerate(alphabet)}
    ids = torch.tensor([places[character] for character in text])
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], len(alphabet)


def dense_model(vocabulary: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=LENGTH, n_embd=128, n_layer=5, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def to_mpo(model: GPT2LMHeadModel, bond: int, sites: int) -> None:
    """Every linear layer of the blocks as an MPO, with the norm that the dense one starts with."""
    for path in find_structure(model).linear_paths:
        layer = model.get_submodule(path)
        weight = linear_weight(layer).detach()
        rows, columns = (factors(size, sites) for size in weight.shape)
        cores = decompose(weight, rows, columns, capped_bonds(rows, columns, bond))
        scale = float(weight.norm() / mpo_to_matrix(cores).norm()) ** (1 / sites)
        even = math.prod(float(core.norm()) for core in cores) ** (1 / sites)
        cores = [core * scale * even / core.norm() for core in cores]  # no core learns faster for being small
        set_module(model, path, MPOLinear.from_cores([core.float() for core in cores], layer.bias))


def train(model: GPT2LMHeadModel, ids: torch.Tensor, steps: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        windows = torch.stack([ids[s : s + LENGTH + 1] for s in starts.tolist()])
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate * schedule((step + 0.5) / steps)
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: GPT2LMHeadModel, ids: torch.Tensor) -> float:
    """Share of next characters that are the likeliest, in percent, in windows without overlap."""
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    right = sum(
        int((model(input_ids=part, use_cache=False).logits[:, :-1].argmax(-1) == part[:, 1:]).sum())
        for part in windows.split(64)
    )
    return 100 * right / (len(windows) * (LENGTH - 1))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/tinyshakespeare.txt")
    parser.add_argument("--steps", type=int, default=1000, help="of 32 windows")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps; no bars")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    steps = args.steps // 20 if args.quick else args.steps
    training, held_out, vocabulary = text_of(args.data)
    found: dict[str, Any] = {}
    for name in ("dense", "mpo"):
        model = dense_model(vocabulary)
        if name == "mpo":
            to_mpo(model, 16, 2)
        start = time.monotonic()
        train(model, training, steps, 3e-3 if name == "dense" else 6e-3)
        found[name] = {"parameters": parameters(model), "accuracy": accuracy(model, held_out)}
        Console().print(f"[dim]{name}: {found[name]} in {time.monotonic() - start:.0f} s[/]")
    share = found["mpo"]["parameters"] / found["dense"]["parameters"]
    gap = found["dense"]["accuracy"] - found["mpo"]["accuracy"]
    barred = not args.quick
    rows = [
        {**row("dense, next character", found["dense"]["accuracy"], "%", None), "peer": "published", "peer_value": PUBLISHED["dense"]},
        {**row("MPO of bond 16, next character", found["mpo"]["accuracy"], "%", None), "peer": "published", "peer_value": PUBLISHED["mpo"]},
        row("dense less MPO", gap, "points", 1.2 if barred else None),
        row("MPO's share of the parameters", share, "ratio", 0.2 if barred else None),
    ]  # fmt: skip
    finish(rows, {"steps": steps, "windows": BATCH, "length": LENGTH, **found, "quick": args.quick}, args.json)


if __name__ == "__main__":
    main()
