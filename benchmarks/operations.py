"""`serve` and its runs: start to ready, cancelling, a cached step's overhead, and fifty nights in a row.

python benchmarks/operations.py --json benchmarks/results/operations.json     # about 20 minutes on two cores
python benchmarks/operations.py --quick --json out.json                       # three nights
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import yaml
from rows import finish, row

COMMAND = [sys.executable, "-m", "tensorpress"]
SMALL = {
    "name": "small",
    "model": {"source": "demo"},
    "data": {
        "calibration": {"source": "demo", "samples": 2, "length": 64},
        "evaluation": {"source": "demo", "samples": 2, "length": 64},
    },
    "steps": {"quantize": {"use": "gptq", "after": "model", "bits": 4}},
    "evaluate": ["perplexity", "size"],
    "gates": {"perplexity_ratio": {"max": 9.0}},
}
LONG = {**SMALL, "name": "long", "steps": {"heal": {"use": "distill", "after": "model", "tokens": 100_000_000}}}


class Servers:
    """`tensorpress serve` in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.store = folder / "mlruns"
        self.ports = _free_ports(2)
        self.address = f"http://127.0.0.1:{self.ports[0]}/api"

    def start(self) -> float:
        """Seconds from the command to `ready`."""
        began = time.monotonic()
        self.output = (self.folder / "serve.txt").open("w+")
        ports = ["--prefect-port", str(self.ports[0]), "--mlflow-port", str(self.ports[1])]
        self.process = subprocess.Popen([*COMMAND, "serve", *ports], cwd=self.folder, stdout=self.output)
        atexit.register(self.process.terminate)  # also where the benchmark fails
        while "ready" not in (self.folder / "serve.txt").read_text():
            if self.process.poll() is not None:
                raise SystemExit("serve did not start")
            time.sleep(0.02)
        return time.monotonic() - began

    def stop(self) -> float:
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        return time.monotonic() - began

    def api(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        auth = ("tensorpress", (self.store / "serve/token").read_text().strip())
        with httpx.Client(base_url=self.address, auth=auth, timeout=60, trust_env=False) as client:
            token = client.get("/csrf-token", params={"client": "bench"}).json()["token"]
            headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "bench"}
            while True:
                answer = client.request(method, path, json=body, headers=headers)
                if answer.status_code != 503:  # the database was busy: Prefect's own client asks again, too
                    break
                time.sleep(1.0)
            answer.raise_for_status()
            return answer.json() if answer.content else None

    def begin(self, flow: str, parameters: dict[str, Any]) -> str:
        deployment = self.api("GET", f"/deployments/name/{flow}/{flow}")["id"]
        body = {"parameters": {"parameters": parameters}, "state": {"type": "SCHEDULED"}}
        return str(self.api("POST", f"/deployments/{deployment}/create_flow_run", body)["id"])

    def ended(self, run_id: str) -> str:
        while (state := self.api("GET", f"/flow_runs/{run_id}")["state_type"]) in (
            "SCHEDULED",
            "PENDING",
            "RUNNING",
            "CANCELLING",
        ):
            time.sleep(0.2)
        return str(state)

    def memory(self) -> float:
        """Resident megabytes of the servers and the worker, once the processes of runs have gone."""
        while any(self._is_run(process) for process in self._family()):
            time.sleep(0.2)
        total = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss / 1e6
        return total

    def _family(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    @staticmethod
    def _is_run(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            return any(part in line for part in ("prefect.engine", "flow-run", "tensorpress.tasks"))
        return False


def measure(folder: Path, nights: int) -> list[dict[str, Any]]:
    """All rows."""
    servers = Servers(folder)
    first = servers.start()
    servers.stop()
    rows = [
        row("serve, first start to ready", first, "s", 15.0),
        row("serve, start to ready", servers.start(), "s", 15.0),
    ]
    rows.append(row("cancel, from the click to Cancelled", _cancel(servers), "s", 15.0))
    rows.append(row("cached step and its measurement, overhead", _cached_step(folder), "s", 0.3))
    for line in rows:
        print(line["name"], line["value"], flush=True)
    rows += _nights(servers, nights)
    rows.append(row("serve, SIGTERM to ended", servers.stop(), "s", None))
    return rows


def _cancel(servers: Servers) -> float:
    run_id = servers.begin("compress", {"recipe": "the text below", "text": yaml.safe_dump(LONG)})
    while (
        not list((servers.store / "scratch").glob("*"))
        and servers.api("GET", f"/flow_runs/{run_id}")["state_type"] != "RUNNING"
    ):
        time.sleep(0.2)
    time.sleep(20)
    began = time.monotonic()
    servers.api("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert servers.ended(run_id) == "CANCELLED"
    return time.monotonic() - began


def _nights(servers: Servers, count: int) -> list[dict[str, Any]]:
    """Nights with a new seed each, so that each makes an artifact, and a store that is kept below 60 MB."""
    memory = []
    for night in range(count):
        text = yaml.safe_dump({**SMALL, "seed": night})
        parameters = {"runs": [{"recipe": "the text below", "text": text}], "keep_gigabytes": 0.06}
        assert servers.ended(servers.begin("nightly", parameters)) == "COMPLETED"
        memory.append(servers.memory())
        print(f"night {night + 1} of {count}", flush=True)
    early, late = median(memory[4:10] or memory), median(memory[-5:])
    databases = sum(path.stat().st_size for path in (servers.store / "prefect").glob("prefect.db*")) / 1e6
    whole = 0.0
    for path in servers.store.rglob("*"):
        with contextlib.suppress(OSError):  # servers make and remove files beside their databases
            whole += path.lstat().st_size / 1e6
    return [
        row(f"nights run, {count} asked", len(memory), "", None),
        row("memory of the servers, last five nights against nights 5 to 10", late / early, "x", 1.1),
        row("memory of the servers, last five nights", late, "MB", None),
        row("Prefect's database after the last night", databases, "MB", 50.0),
        row("MLflow's database after the last night", (servers.store / "mlflow.db").stat().st_size / 1e6, "MB", 50.0),
        row("the whole store, kept below 60 MB", whole, "MB", 60.0),
    ]


def _cached_step(folder: Path) -> float:
    """Seconds that one more cached branch (a step and its measurement) takes in a run where everything is cached."""
    seconds = {}
    for count in (1, 8):
        sizes = [32, 64, 128, 256][: max(1, count // 2)]
        steps = {
            "q": {"use": "gptq", "after": "model", "bits": {"each": [4, 8][:count]}, "group_size": {"each": sizes}}
        }
        (folder / "cached.yaml").write_text(yaml.safe_dump({**SMALL, "name": "cached", "steps": steps}))
        for _ in range(2):
            run = [*COMMAND, "run", "cached.yaml", "--store", "cached", "--json", "cached.json"]
            subprocess.run(run, cwd=folder, check=False, stdout=subprocess.DEVNULL)
        document = json.loads((folder / "cached.json").read_text())
        assert len(document["artifacts"]) == count and all(a["cached"] for a in document["artifacts"])
        seconds[count] = document["seconds"]
    return (seconds[8] - seconds[1]) / 7


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three nights")
    parser.add_argument("--nights", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in [name for name in os.environ if name.startswith(("PREFECT", "MLFLOW"))]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="tensorpress-operations-") as folder:
        rows = measure(Path(folder), 3 if args.quick else args.nights)
    finish(rows, {"quick": args.quick}, args.json)


if __name__ == "__main__":
    main()
