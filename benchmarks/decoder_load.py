"""How long it takes from a model's folder to its first token, in processes that have done nothing else; for `benchmarks/decoder.py`.

python -P benchmarks/decoder_load.py FOLDER prints the seconds of opening it, of packing all layers and of one token, as JSON. What is
imported is not counted, and the files are in memory already.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama  # noqa: F401 - else imported while the clock runs
from transformers.utils.logging import disable_progress_bar

import tensorpress
from tensorpress.artifact import save_model
from tensorpress.kernels.decoder import Decoder

PLACES = 256


def load_and_repack(model: PreTrainedModel, repeats: int, bar: float | None) -> list[dict[str, Any]]:
    """Rows of a model that is written to a folder and opened again in fresh processes."""
    from rows import row  # the fresh process does not have it

    with tempfile.TemporaryDirectory(prefix="tensorpress-decoder-") as folder:
        save_model(model, Path(folder), torch.bfloat16)
        size = sum(len(file.read_bytes()) for file in Path(folder).iterdir())  # and so they are in memory
        command = [sys.executable, "-P", __file__, folder]
        runs = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            for _ in range(repeats)
        ]
    best = {name: median(run[name] for run in runs) for name in runs[0]}
    how = "fresh process, imports not counted, files in memory"
    return [
        row("bytes of the folder", size / 1e6, "MB", None),
        row(f"load ({how})", best["load"], "s", None),
        row(f"packing ({how})", best["packing"], "s", None),
        row(f"first token ({how})", best["token"], "s", None),
        row(f"load and repack, to the first token ({how})", best["all"], "s", bar),
    ]


def from_folder(folder: Path) -> dict[str, float]:
    """Seconds from the folder to a decoder that has read a token."""
    began = time.perf_counter()
    model = tensorpress.load(folder)
    loaded = time.perf_counter()
    decoder = Decoder(model, "cpu_int8", PLACES)
    packed = time.perf_counter()
    decoder(torch.tensor([1])).argmax(1)
    ended = time.perf_counter()
    return {"load": loaded - began, "packing": packed - loaded, "token": ended - packed, "all": ended - began}


if __name__ == "__main__":
    disable_progress_bar()
    print(json.dumps(from_folder(Path(sys.argv[1]))))
