"""Matrix product operators that are healed, on the demo model: what minutes of training give back, and which cores have to be trained for it.

    python benchmarks/mpo_heal.py --json out.json --picture out.png
    python benchmarks/mpo_heal.py --quick --json out.json      # a little training; no bars

Three questions. (1) Half of the block parameters, healed for `--minutes`: perplexity ratio. (2) MPOs of five sites, healed by their auxiliary cores alone or by
all cores, the same tokens: share of the gain in validation loss, share of what is trained. (3) CompactifAI's headline, 30 % of the block parameters and
14 % of the model's 16-bit bytes at 97 % of the next tokens: decomposed, healed, quantized; beside GPTQ at 4, 3 and 2 bits, and what at 4 bits has the bytes of 3 bits alone. Block layers alone are compressed, so
the bytes are given for these and for all weights with the embedding. 100 windows of 256 tokens, weights rounded to bf16.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from mpo import Demo
from rich.console import Console
from rows import finish, row

from tensorpress.compressors.catalog import METHODS
from tensorpress.structure import find_structure

QUARTERS: dict[str, Any] = {"use": "mpo", "keep": 0.74, "plans": "low_rank", "pivots": False}
"""At 4 bits, which give pivots up, about as large as 3 bits alone."""
HALF, THIRD = {"use": "mpo", "keep": 0.5}, {"use": "mpo", "keep": 0.3, "plans": "low_rank"}
FIVE = {"use": "mpo", "keep": 0.5, "plans": "balanced", "sites": 5, "multiple": 1}
RATES = {"auxiliary": (2e-3, 1e-3), "all": (1e-3, 3e-4)}
"""Learning rates of question 2, of which the best counts for each."""
FEWER_BITS: dict[str, dict[str, Any]] = {
    "8 bits": {"use": "gptq", "bits": 8},
    "8 and 4 bits": {"use": "gptq", "bits": 4, "bits_for": {"*.outer": 8}},
    "4 bits": {"use": "gptq", "bits": 4},
}


class Bench:
    """Models on their way: each step is done on what came of the ones before."""

    def __init__(self, quick: bool):
        self.demo = Demo(16 if quick else 64, 20 if quick else 100)
        self.start = time.monotonic()
        self.original = self.tokens(self.demo.model())
        model = self.demo.model()
        self.all_weights = sum(p.numel() for p in model.parameters())
        paths = find_structure(model).linear_paths
        self.block_weights = sum(model.get_submodule(path).weight.numel() for path in paths)

    def step(self, model: Any, config: dict[str, Any]) -> tuple[Any, Any]:
        torch.manual_seed(0)
        method = METHODS[config["use"]](**config)
        model, report = method.compress(model, self.demo.calibration)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        return model, report

    @torch.no_grad()
    def tokens(self, model: Any) -> float:
        """Share of the next tokens of the test text that are the likeliest."""
        right = total = 0
        for part in self.demo.test.split(16):
            found = model(input_ids=part, use_cache=False).logits[:, :-1].argmax(-1) == part[:, 1:]
            right, total = right + int(found.sum()), total + found.numel()
        return right / total

    def point(self, name: str, model: Any, block_bytes: float) -> dict[str, Any]:
        """Quality and size of a model whose block layers are down to so many bytes."""
        rest = 2 * (self.all_weights - self.block_weights)
        found = {
            "name": name,
            "ratio": self.demo.perplexity(model) / self.demo.dense,
            "accuracy_kept": self.tokens(model) / self.original,
            "block_bytes": block_bytes / (2 * self.block_weights),
            "all_bytes": (block_bytes + rest) / (2 * self.all_weights),
        }
        text = ", ".join(f"{key} {value:.4f}" for key, value in found.items() if key != "name")
        Console().print(f"[dim]{time.monotonic() - self.start:5.0f} s  {name}: {text}[/]")
        return found


def size_of(report: Any) -> float:
    return float(sum(line.bytes_after for line in report.layers))


def healed(bench: Bench, minutes: float) -> tuple[list[dict[str, Any]], float]:
    """Questions 1 and 3: the points, and the ratio of the healed half."""
    heal = {"use": "distill", "minutes": minutes, "learning_rate": 2e-4, "validate_every": 0.2}
    points, half = [], 0.0
    for name, config in (("keep 0.74", QUARTERS), ("keep 0.5", HALF), ("keep 0.3", THIRD)):
        model, report = bench.step(bench.demo.model(), config)
        points.append(bench.point(name, model, size_of(report)))
        model, _ = bench.step(model, heal)
        points.append(bench.point(f"{name}, healed", model, size_of(report)))
        if config is HALF:
            half = points[-1]["ratio"]
        still = sum(line.bytes_after for line in report.layers if "sites" in line.action)
        for bits, fewer in FEWER_BITS.items():
            if config is QUARTERS and bits != "4 bits":
                continue
            small, packed = bench.step(copy.deepcopy(model), fewer)
            points.append(bench.point(f"{name}, healed, factors at {bits}", small, size_of(packed) + still))
    for bits in (4, 3, 2):
        model, report = bench.step(bench.demo.model(), {"use": "gptq", "bits": bits})
        points.append(bench.point(f"GPTQ {bits} bits", model, size_of(report)))
    return points, half


def parts(bench: Bench, tokens: int) -> dict[str, float]:
    """Question 2: the gain in validation loss by the auxiliary cores over that by all, and the share of the numbers that is trained."""
    gains, trained = dict[str, float](), dict[str, int]()
    start, _ = bench.step(bench.demo.model(), FIVE)
    for train, rates in RATES.items():
        for rate in rates:
            tune = {"use": "mpo_tune", "train": train, "tokens": tokens, "learning_rate": rate, "validate_every": 0.2}
            _, report = bench.step(copy.deepcopy(start), tune)
            (line,) = report.layers
            gains[train] = max(gains.get(train, 0.0), line.error_before - line.error_after)
            trained[train] = report.summary["trainable_parameters"]
            Console().print(f"[dim]{train} cores at {rate:g}: {line.error_before:.4f} to {line.error_after:.4f}[/]")
    return {
        "gain": gains["auxiliary"] / gains["all"],
        "trained": trained["auxiliary"] / trained["all"],
        **{f"nats gained by {train} cores": gain for train, gain in gains.items()},
    }


def draw(points: list[dict[str, Any]], target: Path) -> None:
    """The size-quality curve: a line for each treatment over what is kept, GPTQ as the points to beat."""
    from tensorpress.pictures.curve import draw_curve
    from tensorpress.pictures.graph import save

    rows = [{"name": p["name"], "bytes": p["block_bytes"], "ratio": p["ratio"]} for p in points]
    lines = [row for row in rows if row["name"].startswith("GPTQ")]
    forms = [{**row, "name": row["name"].partition(", ")[2] or "mpo, not healed"} for row in rows if row not in lines]
    save(draw_curve(forms, lines, "perplexity over bytes, demo model, healed and quantized"), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of healing")
    parser.add_argument("--tokens", type=int, default=100_000, help="of tuning by parts")
    parser.add_argument("--quick", action="store_true", help="a little training; no bars")
    parser.add_argument("--picture", type=Path, help="where to draw the size-quality curve")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    minutes, tokens, barred = (0.1, 2000, False) if args.quick else (args.minutes, args.tokens, True)
    bench = Bench(args.quick)
    points, half = healed(bench, minutes)
    if args.picture:
        draw(points, args.picture)
    found = parts(bench, tokens)
    rows = [
        row(f"{p['name']} ({p['all_bytes']:.3f} of all bytes), next tokens kept", p["accuracy_kept"], "ratio", None)
        for p in points
    ]
    rows += [
        row("keep 0.5, healed: perplexity ratio", half, "ratio", 1.15 if barred else None),
        row("gain by auxiliary cores alone, of all cores' gain", found["gain"], "ratio", 0.9 if barred else None, least=True),
        row("numbers trained, of all cores'", found["trained"], "ratio", 0.15 if barred else None),
    ]  # fmt: skip
    finish(
        rows,
        {"model": "demo", "minutes": minutes, "tokens": tokens, "points": points, "parts": found, "quick": args.quick},
        args.json,
    )


if __name__ == "__main__":
    main()
