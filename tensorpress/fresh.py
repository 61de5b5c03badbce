"""A fresh process that opens a folder and compares its outputs with those that were written beside it.

Reads one JSON request from standard input, answers with one JSON line: {"difference": largest absolute difference}, or {"error": ...}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tensorpress.starting import starting


def main() -> None:
    """Answer one request."""
    answer_to, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115, PTH123 - nothing else may print there
    with starting():
        import torch
        from safetensors.torch import load_file

        from tensorpress.loading import load

    line = sys.stdin.readline()
    if not line:
        return
    request = json.loads(line)
    try:
        model = load(
            request["folder"], dtype=getattr(torch, request["dtype"]), device=request["device"], kernels="reference"
        )
        probe = load_file(Path(request["probe"]))
        with torch.no_grad():
            output = model(input_ids=probe["ids"].to(model.device))[0].float().cpu()
        difference = (output - probe["output"].cpu()).abs().max()
        answer: dict[str, object] = {
            "difference": float(difference) if bool(torch.isfinite(difference)) else float("inf")
        }
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answer_to, flush=True)


if __name__ == "__main__":
    main()
