"""Faults, injected for real into runs of the command line: what is lost, made twice, or left behind, and what many runs at once cost.

    python benchmarks/faults.py --json out.json              # 30 kills of the flow, 5 of each other process, 2 and 8 runs at once; an hour
    python benchmarks/faults.py --quick --json out.json      # one kill, two runs at once; no bar on times

A run is killed with -9 at a random moment and started again in the same store; in the end weights must be those of a run that
nobody disturbed, byte for byte, every artifact written once, and neither MLflow nor Prefect may call anything running.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from filelock import FileLock, Timeout
from rows import finish, row

from tensorpress.digest import of_file

RECIPE = {
    "name": "faults",
    "model": {"source": "demo"},
    "data": {
        "calibration": {"source": "demo", "samples": 8, "length": 128},
        "evaluation": {"source": "demo", "samples": 8, "length": 128},
    },
    "steps": {
        "prune": {"use": "finercut", "after": "model", "remove": 0.1, "samples": 1},
        "heal": {"use": "distill", "after": "prune", "tokens": 4000},
        "quantize": {"use": "gptq", "after": "heal", "bits": {"each": [4, 3]}},
        "baseline": {"use": "gptq", "after": "model"},
    },
    "evaluate": ["perplexity", "size"],
}
LONGER = {"steps.heal.tokens": 120_000, "steps.prune.samples": 6, "data.evaluation.samples": 100}
"""Changes that make of it the minutes of work that eight runs at once are measured on; what a further run costs does not grow with them."""


class Bench:
    """A recipe, the weights that it makes undisturbed, and what was counted."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.chosen = random.Random(seed)
        self.path = folder / "recipe.yaml"
        self.path.write_text(yaml.safe_dump(RECIPE))
        self.counts: dict[str, float] = {}
        self.weights_of_one: dict[str, str] = {}

    def start(self, store: Path, *settings: str, **variables: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tensorpress", "run", str(self.path), "--store", str(store), *settings]
        log = (self.folder / "errors.log").open("ab")
        return subprocess.Popen(
            command, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )

    def undisturbed(self) -> None:
        """One run that nobody disturbs: its weights, and how long it takes."""
        began = time.monotonic()
        if self.start(self.folder / "whole").wait():
            raise SystemExit(f"the undisturbed run failed: {(self.folder / 'errors.log').read_text()[-500:]}")
        self.seconds = time.monotonic() - began
        self.wanted = {name: digest for name, (digest, _) in weights(self.folder / "whole").items()}

    def kills(self, name: str, count: int, strike: Callable[[int], bool], **variables: str) -> None:
        """Let `strike` kill something at a random moment of each run, until it did so `count` times; each run is then done again."""
        counts = dict.fromkeys(
            ("lost", "built twice", "other bytes", "stale locks", "still running", "without a history"), 0
        )
        done = tried = 0
        while done < count:
            store, tried = self.folder / f"{name}-{tried}", tried + 1
            run, made = self.start(store, **variables), {}
            moment = time.monotonic() + self.chosen.random() * self.seconds
            while time.monotonic() < moment and run.poll() is None:
                time.sleep(0.01)
            if run.poll() is None and strike(run.pid):
                done += 1
                made = weights(store)
            run.wait()
            failed = self.start(store, **variables).wait() != 0
            after = weights(store)
            counts["lost"] += failed + len(self.wanted.keys() - after.keys())
            counts["built twice"] += sum(after.get(digest) != file for digest, file in made.items())
            counts["other bytes"] += sum(after[n][0] != digest for n, digest in self.wanted.items() if n in after)
            counts["stale locks"] += sum(is_held(lock) for lock in store.glob("locks/*.lock"))
            counts["still running"] += still_running(store)
            counts["without a history"] += not (store / "prefect/prefect.db").exists()
            print(f"{name}: {done} of {count} {counts}", flush=True)
        self.counts |= {f"{count} kills of {name}: {what}": value for what, value in counts.items()}

    def at_once(self, count: int, settings: list[str], one: float) -> float:
        """So many runs at once in one store; returns their wall time over that of one."""
        store = self.folder / f"at-once-{count}"
        files = [self.folder / f"{count}-{number}.json" for number in range(count)]
        began = time.monotonic()
        runs = [self.start(store, "--json", str(file), *settings) for file in files]
        failed = sum(run.wait() != 0 for run in runs)
        seconds = time.monotonic() - began
        if failed:
            print((self.folder / "errors.log").read_text()[-2000:])
        documents = [json.loads(file.read_text()) for file in files if file.exists()]
        built = [a["digest"] for document in documents for a in document["artifacts"] if not a["cached"]]
        self.counts |= {
            f"{count} runs at once: failed": failed,
            f"{count} runs at once: built twice": len(built) - len(set(built)),
            f"{count} runs at once: still running": still_running(store),
            f"{count} runs at once: other weights": self.weights_of_one
            != {n: d for n, (d, _) in weights(store).items()},
        }
        return seconds / one


def weights(store: Path) -> dict[str, tuple[str, int]]:
    """Bytes and file of each artifact: one that is written again is another file."""
    files = store.glob("models/[0-9a-f]*/model.safetensors")
    return {file.parent.name: (of_file(file), file.stat().st_ino) for file in files}


def is_held(path: Path) -> bool:
    try:
        with FileLock(path).acquire(blocking=False):
            return False
    except Timeout:
        return True


def still_running(store: Path) -> int:
    """Runs that MLflow or Prefect calls running although none is."""
    count = 0
    for database, query in (
        (store / "mlflow.db", "select count(*) from runs where status = 'RUNNING'"),
        (store / "prefect/prefect.db", "select count(*) from flow_run where state_type in ('RUNNING', 'PENDING')"),
        (
            store / "prefect/prefect.db",
            "select count(*) from task_run where state_type in ('RUNNING', 'PENDING') and state_name <> 'NotReady'",
        ),
    ):
        if database.exists():
            connection = sqlite3.connect(database)
            count += connection.execute(query).fetchone()[0]
            connection.close()
    return count


def kill_flow(run: int) -> bool:
    os.kill(run, signal.SIGKILL)
    return True


def kill_below(module: str) -> Callable[[int], bool]:
    """Kills the process of a module that a run started; False where there is none just now."""

    def strike(run: int) -> bool:
        try:
            family = psutil.Process(run).children(recursive=True)
            victim = next((p for p in family if module in p.cmdline()), None)
            if victim is not None:
                victim.kill()
        except psutil.Error:
            return False
        return victim is not None

    return strike


class MLflow:
    """An MLflow server that is begun again when it is killed, as `tensorpress serve` does it."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        folder.mkdir()
        place = [
            "--backend-store-uri",
            f"sqlite:///{folder / 'mlflow.db'}",
            "--artifacts-destination",
            str(folder / "files"),
        ]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self.command = [sys.executable, "-m", "mlflow", "server", *where, *place]
        self.process: subprocess.Popen[bytes] | None = None
        self.revive()

    def revive(self) -> None:
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        nowhere = subprocess.DEVNULL
        self.process = subprocess.Popen(
            self.command, env=os.environ | quiet, stdout=nowhere, stderr=nowhere, start_new_session=True
        )
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def strike(self, _run: int) -> bool:
        self.kill()
        self.revive()
        return True


PARTS = ("flow", "step", "prefect", "mlflow", "together")


def measure(folder: Path, quick: bool, seed: int, parts: Collection[str]) -> list[dict[str, Any]]:
    """Do the parts that are asked for; rows of the table."""
    bench = Bench(folder, seed)
    bench.undisturbed()
    many, few = (1, 1) if quick else (30, 5)
    if "flow" in parts:
        bench.kills("the flow", many, kill_flow)
    if "step" in parts and not quick:
        bench.kills("a step's process", few, kill_below("tensorpress.tasks.child"), TENSORPRESS_ISOLATE="1")
    if "prefect" in parts and not quick:
        bench.kills("the Prefect server", few, kill_below("tensorpress.flows.keeper"))
    if "mlflow" in parts and not quick:
        server = MLflow(folder / "mlflow")
        bench.kills("MLflow", few, server.strike, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{server.port}")
        server.kill()
        bench.counts["runs that the killed MLflow calls running"] = still_running(folder / "mlflow")
    rows = [row(name, value, "", 0.0) for name, value in bench.counts.items()]
    return rows + (together(bench, folder, quick) if "together" in parts else [])


def together(bench: Bench, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Runs at once, against one run alone."""
    bench.counts.clear()
    settings = [] if quick else [f"--set={key}={value}" for key, value in LONGER.items()]
    began = time.monotonic()
    if not quick and bench.start(folder / "union", *settings).wait():
        raise SystemExit(f"the run alone failed: {(folder / 'errors.log').read_text()[-500:]}")
    one = bench.seconds if quick else time.monotonic() - began
    alone = weights(folder / ("whole" if quick else "union"))
    bench.weights_of_one = {name: digest for name, (digest, _) in alone.items()}
    ratios = {count: bench.at_once(count, settings, one) for count in ((2,) if quick else (2, 8))}
    rows = [row(name, value, "", 0.0) for name, value in bench.counts.items()]
    rows.append(row("one run alone", one, "s", None))
    rows += [row(f"each further of {n} runs at once", (r - 1) * one / (n - 1), "s", None) for n, r in ratios.items()]
    return rows + [
        row(f"{count} runs at once, of one alone", ratio, "x", None if quick else 1.3)
        for count, ratio in ratios.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kill and two runs at once")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; its rows replace those in the file")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.pop("PREFECT_API_URL", None)
    with tempfile.TemporaryDirectory(prefix="tensorpress-faults-") as folder:
        rows = measure(Path(folder), args.quick, args.seed, args.only or PARTS)
    if args.only and args.json and args.json.exists():
        new = {row["name"]: row for row in rows}
        rows = [new.pop(row["name"], row) for row in json.loads(args.json.read_text())["rows"]] + list(new.values())
    longer = {} if args.quick else {"work of the runs at once": LONGER}
    finish(rows, {"seed": args.seed, "quick": args.quick, **longer}, args.json)


if __name__ == "__main__":
    main()
