"""One Prefect server for all flow tests, and a small model with its texts on disk."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import torch
import yaml
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 192,
}


def words(seed: int, count: int) -> str:
    chosen = random.Random(seed)
    return " ".join(
        chosen.choice(["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "runs", "away"])
        for _ in range(count)
    )


def write_texts(folder: Path) -> None:
    (folder / "train.txt").write_text(words(1, 600))
    (folder / "test.txt").write_text(words(2, 200))


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running server; tests whose runs are to find it set PREFECT_API_URL."""
    from tensorpress.flows.server import PrefectServer

    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    address = server.wait()
    os.environ.pop("PREFECT_API_URL")  # others look for the servers of their store
    yield address
    server.stop()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_folder: Any) -> Path:
    """A working folder with a bf16 llama, a bert, texts and sentence pairs."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_folder(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).to(torch.bfloat16), tmp_path / "llama")
    save_folder(BertModel(BertConfig(**SIZES)), tmp_path / "bert")
    write_texts(tmp_path)
    rows = [f"{i % 6},{words(i, 4)},{words(i + 50, 4)}" for i in range(20)]
    (tmp_path / "pairs.csv").write_text("score,sentence1,sentence2\n" + "\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def recipe(place: Path) -> Callable[..., Path]:
    """`recipe(steps={...}, gates=...)`: writes recipe.yaml for the llama, with what is given in place of the defaults."""

    def write(**fields: Any) -> Path:
        data = {
            "name": "tiny",
            "model": {"source": "llama"},
            "data": {
                "calibration": {"source": "train.txt", "samples": 6, "length": 32},
                "evaluation": {"source": "test.txt", "samples": 8, "length": 32},
            },
            "steps": {"quantize": {"use": "gptq", "after": "model", "group_size": 32}},
            "evaluate": ["perplexity", "fidelity", "size"],
        }
        data.update(fields)
        path = place / "recipe.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


def without_servers() -> dict[str, str]:
    """The environment of a user who named no servers."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}


class Served(NamedTuple):
    """Servers that `tensorpress serve` started, as a user has them."""

    process: subprocess.Popen[bytes]
    folder: Path
    prefect: str
    mlflow: str
    token: str
    output: Path

    @property
    def store(self) -> Path:
        return self.folder / "mlruns"

    @property
    def auth(self) -> tuple[str, str]:
        return "tensorpress", self.token

    def api(self, method: str, path: str, **body: Any) -> httpx.Response:
        """A request to Prefect as its own client makes it: asked again while the server's database is busy (503)."""
        with httpx.Client(base_url=f"{self.prefect}/api", auth=self.auth, timeout=30, trust_env=False) as client:
            headers, content = {}, {}
            if method != "GET":  # what reads alone needs no token, which the server would have to write
                token = client.get("/csrf-token", params={"client": "test"}).json()["token"]
                headers, content = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}, {"json": body}
            end = time.monotonic() + 30
            while True:
                answer = client.request(method, path, headers=headers, **content)
                if answer.status_code != 503 or time.monotonic() > end:
                    return answer
                time.sleep(0.5)

    def deployment(self, name: str) -> dict[str, Any]:
        answer = self.api("GET", f"/deployments/name/{name}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def start(self, name: str, **parameters: Any) -> httpx.Response:
        """Start a run of a deployment as the form does."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return self.api("POST", path, parameters={"parameters": parameters}, state={"type": "SCHEDULED"})

    def started(self, name: str, **parameters: Any) -> str:
        """The id of a run that a deployment took."""
        answer = self.start(name, **parameters)
        assert answer.status_code == 201, (answer.status_code, answer.text)
        return str(answer.json()["id"])

    def flow_run(self, run_id: str) -> dict[str, Any]:
        answer = self.api("GET", f"/flow_runs/{run_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ended(self, run_id: str, seconds: float = 180.0) -> dict[str, Any]:
        """A flow run when it has ended; a server that is silent meanwhile is asked again."""
        end, run = time.monotonic() + seconds, {"state_type": "", "state_name": "no answer"}
        while run["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            assert time.monotonic() < end, f"{run['state_name']} after {seconds} s"
            time.sleep(0.5)
            with contextlib.suppress(httpx.ReadTimeout):
                run = self.flow_run(run_id)
        return run

    def tasks_of(self, run_id: str) -> dict[str, str]:
        """The tasks of a flow run and the state of each."""
        found = self.api("POST", "/task_runs/filter", flow_runs={"id": {"any_": [run_id]}}).json()
        return {task["name"]: task["state_type"] for task in found}

    def said_by(self, run_id: str, part: str, seconds: float = 30.0) -> list[str]:
        """The messages of a flow run that has ended, when `part` is in one: its process hands the last ones over behind its state."""
        end = time.monotonic() + seconds
        while True:
            logs = self.api("POST", "/logs/filter", logs={"flow_run_id": {"any_": [run_id]}}).json()
            said = [entry["message"] for entry in logs]
            if any(part in message for message in said):
                return said
            assert time.monotonic() < end, said
            time.sleep(0.5)

    def at_work(self, run_id: str, task: str, seconds: float = 90.0) -> None:
        """Wait until a task of a flow run works."""
        end = time.monotonic() + seconds
        while self.tasks_of(run_id).get(task) != "RUNNING":
            assert time.monotonic() < end, self.tasks_of(run_id)
            time.sleep(0.3)

    def process_of(self, run_id: str) -> psutil.Process:
        """The process that works on a flow run."""
        notes = [json.loads(path.read_text()) for path in (self.store / "running").glob(f"{run_id}.json")]
        return psutil.Process(int(notes[0]["pid"]))

    @property
    def ports(self) -> list[int]:
        return [int(address.rsplit(":", 1)[1]) for address in (self.prefect, self.mlflow)]

    def begin(self, *arguments: object) -> subprocess.Popen[bytes]:
        """Begin the command line where the servers were started, in a session of its own."""
        line = [sys.executable, "-m", "tensorpress", *map(str, arguments)]
        return subprocess.Popen(line, cwd=self.folder, env=without_servers(), start_new_session=True)

    def command(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the command line where the servers were started."""
        line = [sys.executable, "-m", "tensorpress", *map(str, arguments)]
        options = {"env": without_servers(), **options}
        return subprocess.run(line, cwd=self.folder, capture_output=True, text=True, timeout=300, **options)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory, save_folder: Any) -> Callable[[str], Path]:
    """`small_folder("name")`: a new folder with a small model, `llama`, and its texts."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        write_texts(folder)
        torch.manual_seed(0)
        save_folder(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).to(torch.bfloat16), folder / "llama")
        return folder

    return make


@pytest.fixture(scope="session")
def served(small_folder: Callable[[str], Path]) -> Iterator[Served]:
    """`tensorpress serve` in a folder with a small model and its texts; at the end nothing of it may be left."""
    with serve_in(small_folder("served")) as servers:
        yield servers


@pytest.fixture(scope="session")
def serve() -> Callable[..., contextlib.AbstractContextManager[Served]]:
    """`with serve(folder, "--no-worker", end=signal.SIGINT) as served`: servers of a test's own."""
    return serve_in


@contextlib.contextmanager
def serve_in(
    folder: Path, *options: str, end: int = signal.SIGTERM, ports: Sequence[int] | None = None
) -> Iterator[Served]:
    """`tensorpress serve` in a folder, ended by a signal; at the end nothing of it may be left."""
    prefect, mlflow = ports or free_ports(2)
    output = folder / "serve.txt"
    chosen = ["--prefect-port", str(prefect), "--mlflow-port", str(mlflow), *options]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorpress", "serve", *chosen],
            cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=without_servers(),
        )  # fmt: skip
    try:
        late = time.monotonic() + 180
        while "ready" not in output.read_text():
            assert process.poll() is None and time.monotonic() < late, output.read_text()
            time.sleep(0.1)
        token = (folder / "mlruns/serve/token").read_text().strip()
        addresses = f"http://127.0.0.1:{prefect}", f"http://127.0.0.1:{mlflow}"
        family = psutil.Process(process.pid).children(recursive=True)
        yield Served(process, folder, *addresses, token, output)
    except BaseException:
        process.terminate()
        raise
    family = {*family, *psutil.Process(process.pid).children(recursive=True)}
    process.send_signal(end)
    assert process.wait(60) == (-end if end == signal.SIGKILL else 0), output.read_text()
    _gone, alive = psutil.wait_procs(family, timeout=15 if end == signal.SIGKILL else 5)
    assert not alive, [left.cmdline() for left in alive]


def small_recipe(**fields: Any) -> str:
    """The text of a recipe for the small model of `served`."""
    data = {
        "name": "small",
        "model": {"source": "llama"},
        "data": {
            "calibration": {"source": "train.txt", "samples": 6, "length": 32},
            "evaluation": {"source": "test.txt", "samples": 8, "length": 32},
        },
        "steps": {"quantize": {"use": "gptq", "after": "model", "group_size": 32}},
        "evaluate": ["perplexity", "size"],
        "gates": {"perplexity_ratio": {"max": 2.0}},
        **fields,
    }
    return yaml.safe_dump(data, sort_keys=False)


@pytest.fixture(scope="session")
def recipe_text() -> Callable[..., str]:
    return small_recipe


UNCLEAR = re.compile(
    r"Traceback|TENSORPRESS_DEBUG|\b(?!Input)[A-Z]\w*(Error|Exception|Warning)\b|<class|object at 0x|site-packages|(bad|memory).alloc|alloc(?!ation\b)|allocation (failed|of)"
)
"""What an error line says when nobody thought of the error."""


@pytest.fixture
def told(place: Path, tensorpress_run: Any) -> Callable[..., Any]:
    """`told("validate", "recipe.yaml")`: runs what may be malformed; it is in order, or refused in a few clear lines.

    Either way within 10 s, within 4 GiB of memory more than before, and without a file made, changed or removed.
    """

    import tensorpress.tasks.bench
    import tensorpress.tasks.evaluate
    import tensorpress.tasks.tracking  # noqa: F401 - what takes long when it is imported is no part of an answer

    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in place.rglob("*")}

    def run(*arguments: object) -> Any:
        before, start = state(), time.monotonic()
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30), limits[1]))
        try:
            ended = tensorpress_run(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        assert time.monotonic() - start < 10
        assert ended.code in (0, 2), ended
        lines = ended.err.splitlines()
        assert bool(lines) == (ended.code == 2), ended
        assert len(lines) <= 13 and all(line.startswith("error: ") and 10 < len(line) < 520 for line in lines), lines
        assert all(line.isprintable() for line in lines) and not UNCLEAR.search(ended.err), lines
        assert state() == before
        return ended

    return run
