"""`serve`: a Prefect server, MLflow, the deployments and a worker for one store, until it is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from tensorpress.errors import InputError, StepError
from tensorpress.files import write_whole
from tensorpress.flows.access import LOOPBACK, USER, State, credentials, make_token, serve_folder, write_private
from tensorpress.flows.children import Child, answers_at, clean_environment
from tensorpress.flows.place import FOLDER_VARIABLE, POOL, STORE_VARIABLE
from tensorpress.flows.prefect_app import HOSTS_VARIABLE
from tensorpress.flows.server import QUIET, START_SECONDS
from tensorpress.tasks.progress import MLFLOW_VARIABLE


@dataclass(frozen=True)
class Options:
    """What `serve` was asked for."""

    store: Path
    host: str = "127.0.0.1"
    prefect_port: int = 4200
    mlflow_port: int = 5000
    limit: int = 1
    """Flow runs that the worker of this machine works on at once."""
    worker: bool = True
    allowed_hosts: tuple[str, ...] = ()
    """Names under which browsers and workers reach the servers, besides the host itself."""

    @property
    def named(self) -> str:
        """The host that addresses are printed with."""
        return self.allowed_hosts[0] if self.allowed_hosts else self.host

    @property
    def prefect(self) -> str:
        return f"http://{self.named}:{self.prefect_port}"

    @property
    def mlflow(self) -> str:
        return f"http://{self.named}:{self.mlflow_port}"


def check_place(store: Path) -> None:
    """Refuse a store that cannot be written. Raises InputError."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store):
            pass
    except OSError as error:
        raise InputError(f"store: {store} cannot be written: {error.strerror or error}") from None


def check(options: Options) -> None:
    """Refuse, before anything starts, what cannot be served. Raises InputError."""
    lock = options.store / "serve" / "lock"
    with contextlib.suppress(OSError):  # another user's folder: `check_place` says so
        if lock.is_file():
            try:
                FileLock(lock).acquire(blocking=False).lock.release()
            except Timeout:
                raise InputError(
                    f"store: the servers of {options.store} are being started or stopped just now"
                ) from None
    if options.host in ("0.0.0.0", "::") and not options.allowed_hosts:
        raise InputError(
            f"--host {options.host}: say with --name by which name or address others reach this machine: requests for any other are refused"
        )
    if options.prefect_port == options.mlflow_port:
        raise InputError(f"--mlflow-port {options.mlflow_port}: is Prefect's port too; the two need one each")
    for option, port in (("--prefect-port", options.prefect_port), ("--mlflow-port", options.mlflow_port)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.host, port))
            except OSError as error:
                reason = "is taken by another program" if error.errno == 98 else f"cannot be used: {error.strerror}"
                raise InputError(f"{option} {port}: {reason} on {options.host}; choose another") from None


class Servers:
    """The servers of a store. Used as a context: what was started is ended, and nothing else."""

    def __init__(self, options: Options):
        self.options = options
        self.store = options.store
        self.token, self.is_new = "", False
        self.children: list[Child] = []
        self._locks: list[FileLock] = []

    def __enter__(self) -> Servers:
        folder = serve_folder(self.store)
        self._lock(folder / "lock", f"store: the servers of {self.store} run already")
        self._lock(
            self._home() / "server.lock",
            f"store: a run in {self.store} has its own Prefect server now; start `serve` again when it has ended",
        )
        try:
            self.token, self.is_new = make_token(self.store)
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for child in reversed(self.children):
            if child.name == "worker":
                child.end_below()
            child.stop()
        (self.store / "serve" / "state.json").unlink(missing_ok=True)
        for lock in self._locks:
            lock.release()

    def watch(self, say: Callable[[str], None], stopped: Callable[[], bool]) -> None:
        """Begin again what dies, until `stopped`. Raises StepError when something dies too often."""
        while not stopped():
            for child in self.children:
                if child.dead:
                    say(f"{child.name} died; it is started again")
                    if not child.revive():
                        raise StepError(f"{child.name} dies again and again; its log: {child.log}")
            time.sleep(0.5)

    def _start(self) -> None:
        options, folder = self.options, serve_folder(self.store)
        prefect = Child(
            "Prefect", self._prefect_command(), self._prefect_environment(), folder / "prefect.log",
            answers_at(f"http://{self._local}:{options.prefect_port}/api/health"),
        )  # fmt: skip
        mlflow = Child(
            "MLflow", self._mlflow_command(), self._mlflow_environment(), folder / "mlflow.log",
            answers_at(f"http://{self._local}:{options.mlflow_port}/health"),
        )  # fmt: skip
        self.children = [prefect, mlflow]
        _rebuild_if_lost(self.store)
        with FileLock(self.store / "mlflow.lock"):  # nobody else may make the database meanwhile
            for child in self.children:
                child.start()
            prefect.wait_healthy(START_SECONDS)
            if options.worker:  # it makes the pool if need be, and takes as long to come up as what follows
                worker = worker_of(
                    self.api, self.token, self._worker_environment(), options.limit, folder / "worker.log"
                )
                self.children.append(worker)
                worker.start()
            self._deploy()  # and tell of runs that were killed with their server
            mlflow.wait_healthy(START_SECONDS)
        if options.worker:
            worker.wait_healthy(START_SECONDS)
        state = State(os.getpid(), psutil.Process().create_time(), options.prefect, options.mlflow)
        write_whole(folder / "state.json", json.dumps(asdict(state)))

    @property
    def _local(self) -> str:
        return "127.0.0.1" if self.options.host == "0.0.0.0" else self.options.host

    @property
    def api(self) -> str:
        """Address of Prefect's API, as this machine reaches it."""
        return f"http://{self._local}:{self.options.prefect_port}/api"

    def _home(self) -> Path:
        home = self.store / "prefect"
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _lock(self, path: Path, problem: str) -> None:
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            for held in self._locks:
                held.release()
            raise InputError(problem) from None
        self._locks.append(lock)

    def _hosts(self) -> list[str]:
        return list(dict.fromkeys([*LOOPBACK, self._local, *self.options.allowed_hosts]))

    def _prefect_command(self) -> list[str]:
        address = ["--host", self.options.host, "--port", str(self.options.prefect_port)]
        # a browser's open page is not waited for
        quiet = ["--log-level", "warning", "--timeout-graceful-shutdown", "2"]
        return [sys.executable, "-m", "uvicorn", "--factory", "tensorpress.flows.prefect_app:create", *address, *quiet]

    def _prefect_environment(self) -> dict[str, str]:
        origins = [f"http://{host}:{self.options.prefect_port}" for host in self._hosts()]
        return {
            **clean_environment(),
            **QUIET,
            "PREFECT_LOGGING_LEVEL": "WARNING",
            "PREFECT_HOME": str(self._home()),
            "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
            "PREFECT_SERVER_API_HOST": self.options.host,
            "PREFECT_SERVER_API_PORT": str(self.options.prefect_port),
            "PREFECT_SERVER_API_AUTH_STRING": credentials(self.token),
            "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
            "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": ",".join(origins),
            "PREFECT_SERVER_UI_API_URL": f"{self.options.prefect}/api",
            "PREFECT_API_URL": self.api,
            "PREFECT_API_AUTH_STRING": credentials(self.token),
            HOSTS_VARIABLE: ",".join(self._hosts()),
        }

    def _mlflow_command(self) -> list[str]:
        options = self.options
        hosts = [f"{host}:{options.mlflow_port}" for host in self._hosts()]
        command = {
            "--backend-store-uri": f"sqlite:///{self.store / 'mlflow.db'}",
            "--artifacts-destination": str(self.store / "artifacts"),
            "--host": options.host,
            "--port": str(options.mlflow_port),
            "--workers": "1",
            "--app-name": "basic-auth",
            "--allowed-hosts": ",".join(hosts),
            "--cors-allowed-origins": ",".join(f"http://{host}" for host in hosts),
        }
        return [sys.executable, "-m", "mlflow", "server", *(part for pair in command.items() for part in pair)]

    def _mlflow_environment(self) -> dict[str, str]:
        return {
            **clean_environment(),
            **QUIET,
            "MLFLOW_AUTH_CONFIG_PATH": str(self._mlflow_access()),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def _mlflow_access(self) -> Path:
        """Configuration of MLflow's basic authentication: one user, whose password is the token."""
        folder = serve_folder(self.store)
        path, database = folder / "mlflow-auth.ini", folder / "mlflow-auth.db"
        if self.is_new:  # it knows the password of before
            database.unlink(missing_ok=True)
        lines = [
            "[mlflow]", "default_permission = MANAGE", f"database_uri = sqlite:///{database}", f"admin_username = {USER}",
            f"admin_password = {self.token}", "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
            "auth_cache_ttl_seconds = 60",
        ]  # fmt: skip
        write_private(path, "\n".join(lines) + "\n")
        return path

    def _worker_environment(self) -> dict[str, str]:
        own = {STORE_VARIABLE: str(self.store), FOLDER_VARIABLE: str(Path.cwd())}
        return worker_environment(self.api, self.token, self.options.mlflow, self.options.limit) | own

    def _deploy(self) -> None:
        from tensorpress.flows.deployments import deploy_all
        from tensorpress.tasks.sweep import sweep_prefect

        with connected_client(self.api, credentials(self.token)) as client:
            deploy_all(client)
            sweep_prefect(self.store)


@contextlib.contextmanager
def connected_client(address: str, auth: str | None) -> Iterator[Any]:
    """A client of the Prefect API at `address`."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: address, PREFECT_API_AUTH_STRING: auth}),
        get_client(sync_client=True) as client,
    ):
        yield client


def worker_of(api: str, token: str, environment: Mapping[str, str], limit: int, log: Path) -> Child:
    """A worker that takes so many flow runs at once from the server at `api`; healthy when that lists it as online."""
    name = f"{platform.node()}-{os.getpid()}"
    options = ["--pool", POOL, "--type", "process", "--name", name, "--limit", str(limit), "--install-policy", "never"]

    def is_listed() -> bool:
        with connected_client(api, credentials(token)) as client:
            workers = client.read_workers_for_work_pool(POOL)
        return any(str(worker.status).endswith("ONLINE") and worker.name == name for worker in workers)

    return Child("worker", [sys.executable, "-m", "prefect", "worker", "start", *options], environment, log, is_listed)


def worker_environment(api: str, token: str, mlflow: str, limit: int) -> dict[str, str]:
    """The environment of a worker and of the flow runs that it starts, which share out the cores where there are several."""
    shared = {} if limit == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // limit))}
    return {
        **clean_environment(),
        **shared,
        **QUIET,
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_API_URL": api,
        "PREFECT_API_AUTH_STRING": credentials(token),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_WORKER_ENABLE_CANCELLATION": "true",
        "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "5",
        MLFLOW_VARIABLE: mlflow,
        "TENSORPRESS_ISOLATE": "1",
    }


def _rebuild_if_lost(store: Path) -> None:
    """Make MLflow's database again from the run documents where it was lost; MLflow's server makes an empty one otherwise."""
    database = store / "mlflow.db"
    documents = (path for name in ("run", "bench") for path in (store / "artifacts").glob(f"*/artifacts/{name}.json"))
    if (database.is_file() and database.stat().st_size) or next(documents, None) is None:
        return
    from tensorpress.tasks.tracking import open_client

    open_client(store)
