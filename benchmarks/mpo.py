"""Matrix product operators against what they compete with, at equal bytes, on the demo model; no healing.

    python benchmarks/mpo.py --json out.json --picture out.png
    python benchmarks/mpo.py --forms --json out.json    # and the forms of `factorize`
    python benchmarks/mpo.py --options --json out.json  # the smallest size alone, with the options that take longer; no bars
    python benchmarks/mpo.py --quick --json out.json      # one size, few windows; no bars

Perplexity ratios on 100 windows of 256 tokens of the demo model's test text, all linear layers of the blocks, at 0.8, 0.7 and 0.5 of
their 16-bit bytes, weights rounded to bf16 as they are stored; 64 windows of calibration. The peers are in the same run: plain TT-SVD, whitened SVD
in two plain factors (SVD-LLM), and GPTQ at 8, 4, 3 and 2 bits as lines of reference.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rows import finish, row
from transformers import AutoTokenizer

from tensorpress.compressors.base import Calibration
from tensorpress.compressors.catalog import METHODS
from tensorpress.compressors.data import calibration_windows
from tensorpress.evaluators.perplexity import nll, perplexity
from tensorpress.loading import load
from tensorpress.structure import find_structure
from tensorpress.text import demo_folder, read_text, tokenise, windows

PLAIN = {"use": "mpo", "metric": "weights"}
WHITENED = {
    "use": "mpo", "metric": "inputs", "plans": "low_rank", "pivots": False, "allocation": "uniform", "compensation": 0,
    "multiple": 1,
}  # fmt: skip
LOW_RANK = {"use": "mpo", "plans": "low_rank"}
FORMS: dict[str, dict[str, Any]] = {
    "plain TT-SVD, 2 sites": PLAIN,
    "plain TT-SVD, 3 sites": {**PLAIN, "sites": 3},
    "whitened SVD": WHITENED,
    "mpo, uniform": {**LOW_RANK, "allocation": "uniform", "multiple": 1},
    "mpo, expected loss": LOW_RANK,
    "mpo, measured profile": {**LOW_RANK, "allocation": "measured"},
    "mpo, all site plans": {"use": "mpo", "plans": "auto"},
}
FACTORIZED = {
    form: {"use": "factorize", "form": form}
    for form in ("svd", "asvd", "kronecker", "block_low_rank", "low_rank_sparse", "mpo_sparse")
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mpo, 2 balanced sites": {"use": "mpo", "plans": "balanced"},
    "mpo, 3 balanced sites": {"use": "mpo", "plans": "balanced", "sites": 3},
    "mpo, blocks trained": {**LOW_RANK, "train_steps": 200},
    "mpo, all site plans, arranged": {"use": "mpo", "plans": "auto", "arrange": True},
    "mpo, 3 balanced sites, arranged": {"use": "mpo", "plans": "balanced", "sites": 3, "arrange": True},
    "low rank + sparse columns": {"use": "factorize", "form": "low_rank_sparse", "channels": True},
}
KEEPS = (0.8, 0.7, 0.5)


class Demo:
    """The demo model, its text, and what a method makes of it."""

    def __init__(self, samples: int, test_windows: int):
        self.folder = demo_folder()
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        text = read_text("demo", "train", "")
        key = {"source": "demo", "split": "train", "text": text.digest, "samples": samples, "length": 256}
        self.calibration = Calibration(*calibration_windows(key, tokenizer, 0), 0, self.model)
        self.test = windows(tokenise(read_text("demo", "test", ""), tokenizer), 256, test_windows, "test")
        self.dense = self.perplexity(self.model())

    def model(self) -> Any:
        return load(self.folder, dtype=torch.float32, kernels="reference")

    def perplexity(self, model: Any) -> float:
        return perplexity(*nll(model, self.test))

    def made(self, config: dict[str, Any]) -> tuple[Any, Any, float]:
        """(model as it is stored, report, seconds) of one step."""
        start = time.monotonic()
        torch.manual_seed(0)
        method = METHODS[config["use"]](**config)
        model, report = method.compress(self.model(), self.calibration)
        seconds = time.monotonic() - start
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        return model, report, seconds

    def measured(self, config: dict[str, Any]) -> dict[str, Any]:
        """`ratio` of perplexities, `bytes` as a share of the block layers' 16-bit bytes, `seconds`; and the site plans that won."""
        model, report, seconds = self.made(config)
        size = sum(r.bytes_after for r in report.layers) / sum(r.bytes_before for r in report.layers)
        found = {"ratio": self.perplexity(model) / self.dense, "bytes": size, "seconds": seconds}
        return {**found, "plans": report.summary.get("plans")}


def comparison(demo: Demo, keeps: tuple[float, ...], forms: dict[str, Any], say: Callable[[str], None]) -> list[Any]:
    """A point for each form and size."""
    points = []
    for keep in keeps:
        for name, config in forms.items():
            found = demo.measured({**config, "keep": keep})
            points.append({"name": name, "keep": keep, **found})
            say(
                f"keep {keep:g}  {name}: {found['ratio']:.4f} at {found['bytes']:.3f} of the bytes, {found['seconds']:.0f} s {found['plans'] or ''}"
            )
    return points


def references(demo: Demo, bits: tuple[int, ...], say: Callable[[str], None]) -> list[Any]:
    lines = []
    for count in bits:
        found = demo.measured({"use": "gptq", "bits": count, "group_size": 128})
        lines.append({"name": f"GPTQ {count} bits", **found})
        say(f"GPTQ {count} bits: {found['ratio']:.4f} at {found['bytes']:.3f} of the bytes")
    return lines


OURS = ("mpo, expected loss", "mpo, measured profile", "mpo, all site plans")


def bars(points: list[Any], keeps: tuple[float, ...]) -> list[dict[str, Any]]:
    """The excess of the ratio over 1, each of ours as a share of the peers', for each size."""
    rows = []
    for keep in keeps:
        excess = {p["name"]: p["ratio"] - 1 for p in points if p["keep"] == keep}
        plain = min(excess["plain TT-SVD, 2 sites"], excess["plain TT-SVD, 3 sites"])
        for name in OURS:
            rows += [
                row(f"keep {keep:g}: excess over dense, {name} / plain TT-SVD", excess[name] / plain, "ratio", 1 / 3),
                row(f"keep {keep:g}: excess over dense, {name} / whitened SVD", excess[name] / excess["whitened SVD"], "ratio", 1.0),
                row(f"keep {keep:g}: excess over dense, {name} / uniform", excess[name] / excess["mpo, uniform"], "ratio", 0.7),
            ]  # fmt: skip
        uniform = excess["mpo, uniform"] / excess["whitened SVD"]
        rows.append(row(f"keep {keep:g}: excess over dense, mpo, uniform / whitened SVD", uniform, "ratio", 1.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, few windows; no bars")
    parser.add_argument("--forms", action="store_true", help="the forms of `factorize`, too")
    parser.add_argument("--options", action="store_true", help="the smallest size alone, with options; no bars")
    parser.add_argument("--picture", type=Path, help="where to draw the size-quality curve")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    say = lambda line: Console().print(f"[dim]{line}[/]")  # noqa: E731
    keeps = KEEPS[-1:] if args.quick or args.options else KEEPS
    demo = Demo(16 if args.quick else 64, 20 if args.quick else 100)
    forms = {name: FORMS[name] for name in list(FORMS)[::2]} if args.quick else FORMS
    if args.options:
        forms = {name: FORMS[name] for name in ("mpo, expected loss", "mpo, all site plans")} | OPTIONS
    points = comparison(demo, keeps, {**forms, **(FACTORIZED if args.forms else {})}, say)
    lines = references(demo, (4,) if args.quick or args.options else (8, 4, 3, 2), say)
    rows = [row(f"keep {p['keep']:g}: {p['name']}", p["ratio"], "ratio", None) for p in points]
    rows += [row(f"{line['name']} ({line['bytes']:.3f} of the bytes)", line["ratio"], "ratio", None) for line in lines]
    if not args.quick and not args.options:
        rows += bars(points, keeps)
    if args.picture:
        from tensorpress.pictures.curve import draw_curve
        from tensorpress.pictures.graph import save

        save(draw_curve(points, lines, "perplexity over bytes, demo model, not healed"), args.picture)
    conditions = {
        "model": "demo", "dense_perplexity": demo.dense, "windows": len(demo.test), "length": 256, "dtype": "bf16 weights, fp32",
        "layers": len(find_structure(demo.model()).linear_paths), "calibration_windows": len(demo.calibration.windows),
        "points": points, "lines": lines, "quick": args.quick,
    }  # fmt: skip
    assert math.isfinite(demo.dense)
    finish(rows, conditions, args.json)


if __name__ == "__main__":
    main()
