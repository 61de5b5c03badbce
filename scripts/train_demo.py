"""Train tensorpress's demo model: a small Llama of Python source, from the running Python's standard library.

    python scripts/train_demo.py --out build/demo            # 80 minutes on two cores that were shared with other work

The corpus, the split, the tokenizer, the weights and the model card are all made here; nothing is downloaded.
Matrices are trained with Muon (torch.optim.Muon), embeddings and norms with AdamW, both on a trapezoidal schedule.
The last fifth of the tokens is read in windows of 512, the rest in windows of 256.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from demo_corpus import HELD_OUT, sources
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
# A line break takes the indentation after it along: one token for "new line, eight spaces".
SPLIT = r" ?[A-Za-z]+| ?\p{L}+|\p{N}|\s*\n *| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def encode(tokenizer: PreTrainedTokenizerFast, files: list[tuple[str, str]]) -> np.ndarray:
    """All files, each followed by the end token, as one array of uint16."""
    ids = tokenizer([text for _, text in files])["input_ids"]
    return np.concatenate([np.asarray([*row, tokenizer.eos_token_id], dtype=np.uint16) for row in ids])


def model_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        attention_dropout=0.0,
    )


class Windows:
    """Shuffled windows of the token stream; an epoch shifts the grid, so that windows differ between epochs."""

    def __init__(self, stream: np.ndarray, seed: int):
        self.stream, self.generator = stream, np.random.default_rng(seed)
        self.order: list[int] = []

    def batch(self, size: int, length: int) -> torch.Tensor:
        if len(self.order) < size:
            offset = int(self.generator.integers(length))
            starts = np.arange(offset, len(self.stream) - length - 1, length)
            self.order = list(self.generator.permutation(starts))
        starts = [self.order.pop() for _ in range(size)]
        starts = [min(start, len(self.stream) - length) for start in starts]
        return torch.from_numpy(np.stack([self.stream[s : s + length] for s in starts]).astype(np.int64))


def schedule(progress: float, warmup: float = 0.02, cooldown: float = 0.55) -> float:
    """Trapezoid: up over `warmup`, flat, linearly down to 2 % over the last `cooldown` of the tokens."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 1.0 if progress < 1 - cooldown else max((1 - progress) / cooldown, 0.02)


@torch.no_grad()
def held_out_nll(model: LlamaForCausalLM, stream: np.ndarray, windows: int, length: int = 256) -> float:
    """Mean negative log-likelihood in nats per token over the first `windows` windows."""
    rows = torch.from_numpy(stream[: windows * length].astype(np.int64)).view(-1, length)
    total = sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(16))
    return total / len(rows)


def make_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, nesterov=True, weight_decay=0.02),
        torch.optim.AdamW(others, lr=rate / 4, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(args: argparse.Namespace, out: Path) -> None:
    torch.manual_seed(args.seed)
    train_files, held_out_files = sources()
    tokenizer = train_tokenizer([text for _, text in train_files], args.vocabulary)
    stream, held_out = encode(tokenizer, train_files), encode(tokenizer, held_out_files)
    sizes = [sum(len(t.encode()) for _, t in files) for files in (train_files, held_out_files)]
    print(
        f"train {len(train_files)} files {sizes[0]:,} B {len(stream):,} tokens; held out {len(held_out_files)} files {sizes[1]:,} B {len(held_out):,} tokens",
        flush=True,
    )
    tokenizer.save_pretrained(out)
    model = LlamaForCausalLM(model_config(args.vocabulary))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizers = make_optimizers(model, args.rate)
    base_rates = [group["lr"] for o in optimizers for group in o.param_groups]
    step_model = torch.compile(model) if args.compile else model
    windows, seen, step, curve = Windows(stream, args.seed), 0, 0, []
    start = time.monotonic()
    while seen < args.tokens:
        progress = seen / args.tokens
        length = 512 if progress >= 0.8 else 256
        if length == 512 and curve and curve[-1].get("length") == 256:
            windows.order = []
        batch = windows.batch(args.batch_tokens // length, length)
        for group, base in zip((g for o in optimizers for g in o.param_groups), base_rates, strict=True):
            group["lr"] = base * schedule(progress)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = step_model(input_ids=batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen, step = seen + batch.numel(), step + 1
        if step % 25 == 0 or seen >= args.tokens:
            row = {
                "step": step,
                "tokens": seen,
                "loss": round(loss.item(), 4),
                "seconds": round(time.monotonic() - start, 1),
                "length": length,
            }
            if step % 250 == 0 or seen >= args.tokens:
                row["held_out_perplexity"] = round(math.exp(held_out_nll(model, held_out, 64)), 3)
                save(model, out)
            curve.append(row)
            print(json.dumps(row), flush=True)
            (out / "loss_curve.json").write_text(json.dumps(curve))
    summary = {
        "tokens": seen,
        "steps": step,
        "seconds": round(time.monotonic() - start),
        "batch_tokens": args.batch_tokens,
        "seed": args.seed,
        "rate": args.rate,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "train_files": len(train_files),
        "train_bytes": sizes[0],
        "train_tokens": len(stream),
        "held_out_modules": HELD_OUT,
        "held_out_files": len(held_out_files),
        "held_out_bytes": sizes[1],
        "held_out_tokens": len(held_out),
    }
    (out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights in bf16, leaving the fp32 model in training as it is."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    twin = LlamaForCausalLM(model.config).to(torch.bfloat16)
    twin.load_state_dict(state)
    twin.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--tokens", type=int, default=16_400_000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=0.015)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args, args.out)


if __name__ == "__main__":
    main()
