"""Our kernels beside llama.cpp, in turns, with the same threads: single layers, and a whole Llama of 1.1 B parameters with random weights.

    make llama-cpp                                            # llama.cpp, built for this processor, in .venv-llama-cpp; ten minutes
    python benchmarks/llama_cpp.py --json out.json            # about ten minutes on two cores, 8 GB
    python benchmarks/llama_cpp.py --quick --json out.json    # a small model, one layer; no bars

llama.cpp has Q4_0, which is 4.5 bits, and 6.6 bits for the head; ours 4 bits in groups of 128, which is 4.1, or of 32, which is 4.5 as well, and
8.1 for the head. Prompts of 128 tokens, 32 tokens decoded greedily; medians. llama.cpp rounds inputs to 8 bits, as `cpu_int8` does; `cpu` does not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from decoder import PROMPT, SIZES, SMALL, TOKENS, by_decoder, quantized, random_model
from kernels_peers import Run, peers
from rows import finish, row

from tensorpress.kernels import cpu_linear
from tensorpress.kernels.cpu_linear import Packed
from tensorpress.kernels.decoder import Decoder
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.pictures.graph import ACCENT, GOOD, MUTED, save

HERE = Path(__file__).resolve().parent
NARROW = "cpu_int8, groups of 32"
SHAPES = ((4096, 4096), (4096, 12288), (2048, 5632), (11008, 4096))
ROWS = (1, 4, 16, 128)
PAUSE = 0.3
"""Seconds between two programs' turns, in which threads that wait for work go to sleep."""
ROOM = 256e6
"""Bytes of copies of a layer, so that none comes from a cache."""


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, python: Path):
        command = [str(python), "-P", str(HERE / "llama_cpp_peer.py")]
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True
        )

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.said.seek(0)
            raise SystemExit(f"llama.cpp ended: {self.said.read().decode(errors='replace')[-1000:]}")
        return json.loads(answer)


def layers(peer: Peer, shapes: tuple[tuple[int, int], ...], repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Single products: llama.cpp's in its own layout, ours in both modes, those of torch (and torchao, where it is), in turns."""
    found = []
    for inputs, outputs in shapes:
        peer.ask(layer=[inputs, outputs], threads=torch.get_num_threads())
        ours, torchs = (
            _packed(inputs, outputs),
            {name: deque(runs) for name, runs in peers(inputs, outputs, False).items()},
        )
        for rows in ROWS:
            x = torch.randn(rows, inputs).bfloat16()
            seconds: dict[str, list[float]] = {name: [] for name in ("llama.cpp", "cpu", "cpu_int8", *torchs)}
            for _ in range(3):
                answer = peer.ask(rows=rows, repeats=repeats)
                seconds["llama.cpp"] += answer["seconds"]
                time.sleep(PAUSE)
                for mode in ("cpu", "cpu_int8"):
                    ours.rotate(-len(ours) // 2)  # a turn does not find what the last one read
                    products = [partial(packed, mode=cpu_linear.MODES[mode]) for packed in ours]
                    seconds[mode] += _times(products, x, repeats)
                for name, runs in torchs.items():
                    runs.rotate(-len(runs) // 2)
                    seconds[name] += _times(runs, x, repeats if rows < 16 else 1)
                time.sleep(PAUSE)
            name = f"{inputs}x{outputs}, {rows} rows"
            for mode, times in seconds.items():
                found.append(row(f"{name}: {mode}", median(times) * 1e6, "us", None))
            for mode in ("cpu", "cpu_int8"):
                ratio = median(seconds["llama.cpp"]) / median(seconds[mode])
                bar = 1.0 if mode == "cpu_int8" and not quick else None
                found.append(row(f"{name}: {mode}, speed against llama.cpp", ratio, "x", bar, True))
    found.append(
        row(f"distance of llama.cpp's product from the dense one ({answer['layout']})", answer["error"], "", 0.15)
    )
    return found


def _packed(inputs: int, outputs: int) -> deque[Packed]:
    groups, bits = inputs // 128, 4
    layer = QuantizedLinear.from_integers(
        torch.randint(0, 1 << bits, (inputs, outputs)), torch.full((groups, outputs), 8),
        torch.rand(groups, outputs) * 0.01 + 0.001, torch.arange(inputs) // 128, bits, 128, None,
    )  # fmt: skip
    return deque(Packed(layer) for _ in range(max(2, round(ROOM / (inputs * outputs / 2)))))


def _times(runs: Sequence[Run], x: torch.Tensor, repeats: int) -> list[float]:
    seconds = []
    for repeat in range(repeats + 2):
        began = time.perf_counter()
        runs[repeat % len(runs)](x)
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def models(peer: Peer, folder: Path, sizes: dict[str, int], repeats: int, quick: bool) -> list[dict[str, Any]]:
    """The whole model, in turns."""
    made = peer.ask(make=str(folder), sizes=sizes, threads=torch.get_num_threads())
    peer.ask(model=made["path"], places=PROMPT + TOKENS + 32)
    dense = random_model(sizes)
    wide, narrow = quantized(dense), quantized(dense, 32)
    del dense
    prompt = torch.randint(sizes["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    decoders = {mode: Decoder(wide, mode, PROMPT + TOKENS + 1) for mode in ("cpu", "cpu_int8")}
    decoders[NARROW] = Decoder(narrow, "cpu_int8", PROMPT + TOKENS + 1)
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        f"ours, {mode}": lambda decoder=decoder: by_decoder(decoder, prompt, TOKENS)  # type: ignore[misc]
        for mode, decoder in decoders.items()
    }

    def theirs() -> tuple[float, float]:
        answer = peer.ask(prompt=prompt[0].tolist(), tokens=TOKENS)
        return answer["prefill"], answer["decode"]

    runs["llama.cpp Q4_0"] = theirs
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    bandwidth = []
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            found = run()
            if repeat:  # the first warms up
                seconds[name].append(found)
            time.sleep(PAUSE)
        bandwidth.append(cpu_linear.read_bandwidth(256, 3))
    rows = [row("read bandwidth", median(bandwidth) / 1e9, "GB/s", None)]
    rows.append(row("bytes of llama.cpp's file", made["bytes"] / 1e6, "MB", None))
    rows.append(row("bytes that ours reads for a token", decoders["cpu"].nbytes / 1e6, "MB", None))
    rows.append(row("bytes that ours reads for a token, groups of 32", decoders[NARROW].nbytes / 1e6, "MB", None))
    best = {name: [median(times) for times in zip(*found, strict=True)] for name, found in seconds.items()}
    for name, (read, decode) in best.items():
        rows.append(row(f"{name}: prompt of {PROMPT}", PROMPT / read, "tokens/s", None))
        rows.append(row(f"{name}: decode", TOKENS / decode, "tokens/s", None))
    peer_read, peer_decode = best["llama.cpp Q4_0"]
    for mode in decoders:
        read, decode = best[f"ours, {mode}"]
        bars = (1.5, 1.0) if mode != "cpu" and not quick else (None, None)
        rows.append(row(f"{mode}, prompt: speed against llama.cpp", peer_read / read, "x", bars[0], True))
        rows.append(row(f"{mode}, decode: speed against llama.cpp", peer_decode / decode, "x", bars[1], True))
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The speeds of the whole model as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), dpi=100)
    for place, phase in enumerate((f"prompt of {PROMPT}", "decode")):
        axes = figure.add_subplot(1, 2, place + 1)
        found = [(r["name"].partition(":")[0], r["value"]) for r in rows if r["name"].endswith(f": {phase}")]
        names, values = zip(*found, strict=True)
        colors = [MUTED if "llama.cpp" in name else GOOD if "int8" in name else ACCENT for name in names]
        bars = axes.barh(names, values, color=colors)
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set_title(f"{phase}, tokens a second", fontsize=9, loc="left")
        axes.set_xlim(0, 1.18 * max(values))
        axes.invert_yaxis()
        if place:  # the same names as beside it
            axes.set_yticklabels([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
        axes.tick_params(left=False, labelsize=8)
    figure.tight_layout()
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and one layer, no bars")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=("layers", "model"), help="half of it")
    parser.add_argument("--python", type=Path, default=HERE.parent / ".venv-llama-cpp/bin/python", help="of llama.cpp")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="a file .svg or .png")
    args = parser.parse_args()
    if not args.python.exists():
        raise SystemExit(f"{args.python}: is not there; `make llama-cpp` builds llama.cpp")
    if cpu_linear.compiled() is None:
        raise SystemExit("the compiled kernels were not built: is there a C++ compiler?")
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="tensorpress-llama-") as folder:
        peer = Peer(args.python)
        version = peer.ask(version=True)
        if args.only != "layers":
            rows += models(
                peer, Path(folder), SMALL if args.quick else SIZES, 1 if args.quick else args.repeats, args.quick
            )
        if args.only != "model":
            rows += layers(peer, ((2048, 5632),) if args.quick else SHAPES, 2 if args.quick else 7, args.quick)
        peer.process.stdin.close()  # type: ignore[union-attr]
    if args.picture and args.only != "layers":
        draw(rows, args.picture)
    conditions = {
        "instructions": cpu_linear.instructions(),
        "llama.cpp": f"llama-cpp-python {version}, its defaults but for threads and context",
        "quick": args.quick,
    }
    finish(rows, {**conditions, "repeats": args.repeats}, args.json)


if __name__ == "__main__":
    main()
