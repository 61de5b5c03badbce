"""kill -9 at any moment; the same command again resumes from what is finished and ends with the same digests."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tensorpress.digest import of_file

STEPS = {
    "prune": {"use": "finercut", "after": "model", "remove": 0.34, "samples": 4},
    "heal": {"use": "distill", "after": "prune", "tokens": 4096, "batch_tokens": 128},
    "quantize": {"use": "gptq", "after": "heal", "group_size": 32, "bits": {"each": [4, 3, 2]}},
}


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tensorpress", "run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def digests(path: str) -> dict[str, str]:
    return {a["node"]: a["digest"] for a in json.loads(Path(path).read_text())["artifacts"]}


def weights(path: str) -> dict[str, str]:
    """What is really in the artifacts: the digest of an artifact names only what made it."""
    folders = {a["node"]: Path(a["path"]) for a in json.loads(Path(path).read_text())["artifacts"]}
    return {node: of_file(folder / "model.safetensors") for node, folder in folders.items()}


@pytest.mark.timeout(900)
def test_kill_and_run_again(prefect_api, recipe, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    path = str(recipe(steps=STEPS, evaluate=["size"]))
    assert start(path, "--store", "whole", "--json", "whole.json").wait() == 0
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    chosen = random.Random(seed)
    models = Path("killed/models")
    for wanted in (0, 1, 3):  # artifacts that are finished when it is killed, and a random moment after that
        process = start(path, "--store", "killed")
        while process.poll() is None and len(list(models.glob("[0-9a-f]*"))) < wanted:
            time.sleep(0.02)
        time.sleep(chosen.random() * (6.0 if wanted == 0 else 1.0))
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(children, timeout=10)
    kept = {folder.name: (folder / "model.safetensors").stat().st_mtime_ns for folder in models.glob("[0-9a-f]*")}
    assert start(path, "--store", "killed", "--json", "after.json").wait() == 0
    assert digests("after.json") == digests("whole.json")
    assert weights("after.json") == weights("whole.json")
    for name, written in kept.items():
        assert (models / name / "model.safetensors").stat().st_mtime_ns == written, "a finished artifact was made again"
    assert not list(models.glob(".part-*"))


def test_a_run_without_a_server_starts_one_and_leaves_nothing_running(recipe, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    path = str(recipe(evaluate=["size"]))
    process = start(path, "--json", "out.json")
    seen: set[psutil.Process] = set()
    while process.poll() is None:
        try:
            seen.update(psutil.Process(process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.1)
    assert process.wait() == 0
    assert Path("mlruns/prefect/server.log").is_file() and seen
    _gone, alive = psutil.wait_procs(seen, timeout=10)
    assert not alive
