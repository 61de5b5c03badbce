"""Matrix product operators that are healed, on the demo model: what minutes of training give back, alone and below 16 bits.

    python benchmarks/mpo_heal.py --json out.json --picture out.png
    python benchmarks/mpo_heal.py --quick --json out.json      # a little training; no bars

Two questions. (1) Half of the block parameters, healed for `--minutes`: perplexity ratio. (2) CompactifAI's headline, 30 % of the block parameters and 14 % of
the 16-bit bytes at 97 % of the next tokens: decomposed, healed, quantized; and what at 4 bits has the bytes of 3 and 2 bits alone, beside GPTQ at 4, 3 and 2 bits.
Pivots are given up when factors are quantized, so what is quantized is decomposed without. Block layers alone are compressed, so
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

LOW_RANK: dict[str, Any] = {"use": "mpo", "plans": "low_rank", "pivots": False}
STARTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "keep 0.5": ({"use": "mpo", "keep": 0.5}, ()),
    "keep 0.74 without pivots": (LOW_RANK | {"keep": 0.74}, ("4 bits",)),
    "keep 0.5 without pivots": (LOW_RANK | {"keep": 0.5}, ("4 bits",)),
    "keep 0.3 without pivots": (LOW_RANK | {"keep": 0.3}, ("8 bits", "8 and 4 bits", "4 bits")),
}
"""What is decomposed and healed, and what its factors are quantized to then: at 4 bits, 0.74 is as large as 3 bits alone and 0.5 as 2 bits alone."""
BARRED = "keep 0.5"
SMALL = 0.14
"""Share of the bytes that the headline allows."""
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
    """The points of all starts and of GPTQ, and the perplexity ratio of the start that has a bar, healed."""
    heal = {"use": "distill", "minutes": minutes, "learning_rate": 2e-4, "validate_every": 0.2}
    points, barred = [], 0.0
    for name, (config, fewer) in STARTS.items():
        model, report = bench.step(bench.demo.model(), config)
        points.append(bench.point(name, model, size_of(report)))
        model, _ = bench.step(model, heal)
        points.append(bench.point(f"{name}, healed", model, size_of(report)))
        if name == BARRED:
            barred = points[-1]["ratio"]
        for bits in fewer:
            small, packed = bench.step(copy.deepcopy(model), FEWER_BITS[bits])
            points.append(bench.point(f"{name}, healed, factors at {bits}", small, size_of(packed)))
    for bits in (4, 3, 2):
        model, report = bench.step(bench.demo.model(), {"use": "gptq", "bits": bits})
        points.append(bench.point(f"GPTQ {bits} bits", model, size_of(report)))
    return points, barred


def draw(points: list[dict[str, Any]], target: Path) -> None:
    """The size-quality curve: a line for each treatment over what is kept, GPTQ as the points to beat."""
    from tensorpress.pictures.curve import draw_curve
    from tensorpress.pictures.graph import save

    rows = [{"name": p["name"], "bytes": p["block_bytes"], "ratio": p["ratio"]} for p in points]
    lines = [found for found in rows if found["name"].startswith("GPTQ")]
    forms = []
    for point in (found for found in rows if found not in lines):
        start, _, treatment = point["name"].partition(", ")
        pivots = "" if start.endswith("without pivots") else ", pivots"
        forms.append({**point, "name": (treatment or "mpo, not healed") + pivots})
    save(draw_curve(forms, lines, "perplexity over bytes, demo model, healed and quantized"), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of healing")
    parser.add_argument("--quick", action="store_true", help="a little training; no bars")
    parser.add_argument("--picture", type=Path, help="where to draw the size-quality curve")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    minutes, barred = (0.1, False) if args.quick else (args.minutes, True)
    bench = Bench(args.quick)
    points, half = healed(bench, minutes)
    if args.picture:
        draw(points, args.picture)
    rows = [
        row(f"{p['name']} ({p['all_bytes']:.3f} of all bytes), next tokens kept", p["accuracy_kept"], "ratio", None)
        for p in points
    ]
    rows.append(row(f"{BARRED}, healed: perplexity ratio", half, "ratio", 1.15 if barred else None))
    reached = max(p["accuracy_kept"] for p in points if "keep 0.3" in p["name"] and p["block_bytes"] <= SMALL)
    headline = f"30 % of the numbers in {SMALL:.0%} of the bytes of the blocks: next tokens kept"
    rows.append(row(headline, reached, "ratio", 0.97 if barred else None, least=True))
    finish(rows, {"model": "demo", "minutes": minutes, "points": points, "quick": args.quick}, args.json)


if __name__ == "__main__":
    main()
