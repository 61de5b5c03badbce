"""Put a trained demo model into the package: weights, tokenizer, texts, loss curve and model card.

    python scripts/package_demo.py --from build/demo         # after scripts/train_demo.py; about two minutes

Texts: `train.txt` for calibration (files spread over the training modules), `test.txt` held-out modules, `other.txt` English
prose of the language reference, which was in neither.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import shutil
from pathlib import Path

import torch
from demo_corpus import sources
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGET = Path(__file__).parent.parent / "tensorpress" / "demo"
TRAIN_BYTES, TEST_BYTES, OTHER_BYTES = 700_000, 420_000, 150_000
LONGEST_FILE = 30_000


def train_text(files: list[tuple[str, str]]) -> str:
    """Whole files of moderate length, evenly spread over the sorted list."""
    moderate = [text for _, text in files if len(text) <= LONGEST_FILE]
    share = TRAIN_BYTES / sum(map(len, moderate))
    step = max(1, int(1 / share))
    return "\n".join(moderate[::step])


def test_text(files: list[tuple[str, str]]) -> str:
    """Library modules first, then as many of their tests as fit."""
    ordered = sorted(files, key=lambda file: (file[0].startswith("test/"), file[0]))
    return "\n".join(text for _, text in ordered)[:TEST_BYTES].rpartition("\n")[0] + "\n"


def other_text() -> str:
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))[:OTHER_BYTES].rpartition("\n")[0] + "\n"


@torch.no_grad()
def measure(model: AutoModelForCausalLM, tokenizer: AutoTokenizer, text: str, length: int = 256) -> dict[str, float]:
    """Perplexity and bits per byte over all windows of a text, without overlap."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)
    nats = scored = 0.0
    for batch in rows.split(16):
        logits = model(input_ids=batch).logits[:, :-1].float()
        targets = batch[:, 1:]
        nats += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        scored += targets.numel()
    size = len(tokenizer.decode(rows.flatten().tolist()).encode()) * scored / rows.numel()
    return {"perplexity": math.exp(nats / scored), "bits_per_byte": nats / math.log(2) / size, "tokens": rows.numel()}


def complete(model: AutoModelForCausalLM, tokenizer: AutoTokenizer, prompt: str, tokens: int = 40) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0
    )
    return tokenizer.decode(out[0])


def curve_picture(curve: list[dict], path: Path) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [r["tokens"] / 1e6 for r in curve], [r["loss"] for r in curve], color="#9db4c0", lw=0.8, label="train batch"
    )
    held = [r for r in curve if "held_out_perplexity" in r]
    axes.plot(
        [r["tokens"] / 1e6 for r in held],
        [math.log(r["held_out_perplexity"]) for r in held],
        color="#1d4e89",
        marker="o",
        ms=3,
        label="held out",
    )
    axes.set(xlabel="million tokens", ylabel="nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def card(training: dict, curve: list[dict], test: dict, other: dict, samples: list[str], parameters: int) -> str:
    modules = ", ".join(f"`{name}`" for name in training["held_out_modules"])
    rows = "\n".join(
        f"| {r['step']:,} | {r['tokens'] / 1e6:.1f} | {r['loss']:.3f} | {r['held_out_perplexity']:.2f} |"
        for r in curve
        if "held_out_perplexity" in r
    )
    shown = "\n\n".join(f"```python\n{sample.rstrip()}\n```" for sample in samples)
    return f"""---
license: psf-2.0
library_name: transformers
tags: [llama, python, demo]
---
# tensorpress demo model

A Llama of {parameters:,} parameters that writes Python, made for trying and measuring compression methods. Width 256, feed-forward 768, 8 blocks,
8 heads with 4 key-value heads, tied embedding, byte-level BPE of 4,096 tokens, bf16. A yardstick, not a good programmer.

- **Data**: the standard library of Python {training["python"]} with its tests: {training["train_files"]:,} files, {training["train_bytes"]:,} bytes,
  {training["train_tokens"]:,} tokens. Held out with their tests, never trained on: {modules}.
- **Licence**: the texts are the Python Software Foundation's (`LICENSE-PSF`); the weights come under the same terms.
- **Training**: `python scripts/train_demo.py`, {training["tokens"]:,} tokens in {training["steps"]:,} steps of {training["batch_tokens"]:,} ({training["tokens"] / training["train_tokens"]:.1f} passes), windows of 256,
  in the last fifth 512; Muon for the matrices, AdamW for the rest, trapezoidal schedule, seed {training["seed"]}; {training["seconds"] / 60:.0f} minutes on {training["threads"]} cores
  (torch {training["torch"]}), shared with other work.
- **Held-out Python** (`test.txt`, windows of 256, {test["tokens"]:,} tokens): perplexity **{test["perplexity"]:.3f}**, **{test["bits_per_byte"]:.4f}** bits per byte.
- **English prose** (`other.txt`): perplexity {other["perplexity"]:.2f}, {other["bits_per_byte"]:.3f} bits per byte.

![loss curve](loss_curve.png)

| step | million tokens | loss of the batch | held-out perplexity (64 windows) |
|---|---|---|---|
{rows}

Greedy completions, the prompt first:

{shown}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, default=Path("build/demo"))
    args = parser.parse_args()
    train_files, held_out = sources()
    texts = {"train.txt": train_text(train_files), "test.txt": test_text(held_out), "other.txt": other_text()}
    TARGET.mkdir(exist_ok=True)
    for name, text in texts.items():
        (TARGET / name).write_text(text, encoding="utf-8")
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copyfile(args.source / name, TARGET / name)
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    test, other = (measure(model, tokenizer, texts[name]) for name in ("test.txt", "other.txt"))
    curve = json.loads((args.source / "loss_curve.json").read_text())
    prompts = [  # a line break and the indentation after it are one token: a prompt ends before both
        "def total(values):\n    result = 0\n    for value in values:",
        "import os\n\ndef files(path):\n    for name in os.listdir(path):",
        "    def test_add(self):\n        for x in",
        "class Stack:\n    def __init__(self):",
    ]
    samples = [complete(model, tokenizer, prompt) for prompt in prompts]
    curve_picture(curve, TARGET / "loss_curve.png")
    training = json.loads((args.source / "training.json").read_text())
    parameters = sum(p.numel() for p in model.parameters())
    (TARGET / "README.md").write_text(card(training, curve, test, other, samples, parameters), encoding="utf-8")
    print(json.dumps({"test": test, "other": other}), *samples, sep="\n\n")


if __name__ == "__main__":
    main()
