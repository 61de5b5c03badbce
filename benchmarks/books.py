"""GPTQ on books-7m, a Llama of 7.3 M parameters trained on English books: perplexity ratios at 4, 3 and 2 bits.

    python benchmarks/books.py --data ../shared/data --json out.json
    python benchmarks/books.py --data ../shared/data --quick --json out.json

Protocol: the first 1,000,000 characters of `text/books/books_valid.txt`, 300 windows of 256 tokens, fp32; all linear layers of the
blocks, symmetric, groups of 128, 128 calibration windows of the training books. Round-to-nearest is measured in the same run; gptqmodel
too where it is installed (extra `gptq`), else its figures of the data's README stand in the table, named so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import lzma
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from tensorpress.compressors.base import Calibration
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.evaluators.perplexity import nll
from tensorpress.loading import load
from tensorpress.structure import find_structure, linear_weight
from tensorpress.text import Text, random_windows, tokenise, windows
from tensorpress.versions import versions

BARS = {4: 1.010, 3: 1.04}
RECORDED = {4: 1.0079, 3: 1.0330, 2: 1.277}
"""gptqmodel 7.6.0 with 128 calibration texts of 1,750 characters, from the data's README."""


def perplexity(model: Any, rows: torch.Tensor) -> float:
    nats, tokens = nll(model, rows)
    return math.exp(nats / tokens)


def round_to_nearest(model: Any, bits: int, group_size: int = 128) -> None:
    """Plain symmetric rounding on a grid of the largest absolute value, no calibration."""
    for path in find_structure(model).linear_paths:
        weight = linear_weight(model.get_submodule(path)).data
        for part in weight.split(group_size, dim=1):
            scale = part.abs().amax(1, keepdim=True) * 2 / (2**bits - 1)
            half = 2 ** (bits - 1)
            part.copy_(torch.clamp(torch.round(part / scale), -half, half - 1) * scale)


def gptqmodel_perplexity(folder: Path, bits: int, texts: list[str], rows: torch.Tensor) -> float:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    folder = folder.absolute()
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):  # it writes logs where it stands
        model = GPTQModel.load(str(folder), QuantizeConfig(bits=bits, group_size=128, sym=True))
        model.quantize(texts, batch_size=8)
        model.save(f"{place}/quantized")
        return perplexity(load(f"{place}/quantized", dtype=torch.float32), rows)


def measure(data: Path, quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    folder = data / "models" / "books-7m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with lzma.open(data / "text/books/books_train_100MB.txt.xz", "rt", encoding="utf-8") as file:
        train = file.read(3_000_000)
    with (data / "text/books/books_valid.txt").open(encoding="utf-8") as file:
        valid = file.read(1_000_000)
    rows = windows(tokenise(Text("valid", valid), tokenizer), 256, 40 if quick else 300, "valid")
    ids = tokenise(Text("train", train), tokenizer)
    samples = 16 if quick else 128
    chosen = random_windows(ids, 256, samples, 0, "train")
    dense = perplexity(load(folder, dtype=torch.float32), rows)
    progress(f"dense {dense:.3f}")
    table = []
    for bits in (4,) if quick else (4, 3, 2):
        plain = load(folder, dtype=torch.float32)
        with torch.no_grad():
            round_to_nearest(plain, bits)
        nearest = perplexity(plain, rows) / dense
        model = load(folder, dtype=torch.float32)
        start = time.monotonic()
        model, _ = GPTQ(bits=bits).compress(model, Calibration(chosen, chosen[:1], ids, 0, lambda m=model: m))
        seconds = time.monotonic() - start
        ratio = perplexity(model, rows) / dense
        peers = [("round to nearest, same run", nearest)]
        if importlib.util.find_spec("gptqmodel"):
            texts = [train[i * 20_000 : i * 20_000 + 1_750] for i in range(samples)]
            peers.append(("gptqmodel, same run", gptqmodel_perplexity(folder, bits, texts, rows) / dense))
        elif not quick:  # its figures are of 300 windows
            peers.append(("gptqmodel 7.6.0, recorded", RECORDED[bits]))
        for peer, value in peers:
            bar = None if quick else BARS.get(bits)
            table.append(
                {
                    "name": f"gptq {bits} bits, perplexity ratio",
                    "value": ratio,
                    "unit": "ratio",
                    "peer": peer,
                    "peer_value": value,
                    "ratio": (ratio - 1) / (value - 1) if value != 1 else None,
                    "bar": bar,
                    "holds": bar is None or ratio <= bar,
                    "seconds": round(seconds, 1),
                }
            )
        progress(f"{bits} bits {ratio:.4f} in {seconds:.0f} s, nearest {nearest:.4f}")
    conditions = {
        "model": "books-7m",
        "dense_perplexity": dense,
        "windows": len(rows),
        "length": 256,
        "dtype": "float32",
        "calibration_windows": samples,
        "threads": torch.get_num_threads(),
        "quick": quick,
        "versions": versions(),
    }
    return {"conditions": conditions, "rows": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/books-7m and text/books")
    parser.add_argument("--quick", action="store_true", help="one bit width, fewer windows; no bars")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console()
    result = measure(args.data, args.quick, lambda line: console.print(f"[dim]{line}[/]"))
    shown = Table("figure", "ours", "peer", "its value", "excess over dense, ours / peer's", "bar", "holds", box=None)
    for row in result["rows"]:
        bar = "" if row["bar"] is None else f"{row['bar']:.3f}"
        relative = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        shown.add_row(
            row["name"],
            f"{row['value']:.4f}",
            row["peer"],
            f"{row['peer_value']:.4f}",
            relative,
            bar,
            "yes" if row["holds"] else "NO",
        )
    console.print(shown)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(0 if all(row["holds"] for row in result["rows"]) else 1)


if __name__ == "__main__":
    main()
