"""Runs a graph of Prefect tasks: each is submitted when what it needs is done, so many at once as were asked for."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prefect import Task
from prefect.client.schemas.objects import RunInput, TaskRunResult
from prefect.context import TagsContext
from prefect.exceptions import UnfinishedRun
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from tensorpress.errors import InputError, StepError
from tensorpress.flows.parameters import Runner
from tensorpress.tasks.isolate import SWITCH, stop_isolated


@dataclass(frozen=True)
class Work:
    """One task of the graph. `needs` gives, for parameters of the task, the name of the work whose result they take."""

    name: str
    task: Task[..., Any]
    arguments: dict[str, Any]
    needs: dict[str, str] = field(default_factory=dict)
    alone: bool = False
    """Whether nothing else may run meanwhile: what is timed."""


def run_graph(runner: TaskRunner[Any], works: Sequence[Work], parallel: int) -> dict[str, PrefectFuture[Any]]:
    """Run works, each after what it needs, in the order given where there is a choice; returns their finished futures.

    Prefect's graph shows the edges. At most `parallel` run at once.
    """
    waiting = {work.name: work for work in works}
    running: dict[str, tuple[Work, PrefectFuture[Any]]] = {}
    finished: dict[str, PrefectFuture[Any]] = {}
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    while waiting or running:
        while (work := _next(waiting, finished, [w for w, _ in running.values()], parallel)) is not None:
            del waiting[work.name]
            needed = {parameter: finished[need] for parameter, need in work.needs.items()}
            inputs = {parameter: _result(future) for parameter, future in needed.items()}
            edges: dict[str, set[RunInput]] = {
                parameter: {TaskRunResult(id=future.task_run_id)} for parameter, future in needed.items()
            }
            # without tags: for those of a task Prefect asks its server for leases, and can wait for ever
            with TagsContext(current_tags=set()):
                future = runner.submit(work.task, parameters={**work.arguments, **inputs}, dependencies=edges)
            running[work.name] = work, future
            threading.Thread(target=_tell, args=(work.name, future, done), daemon=True).start()
        name = done.get()
        finished[name] = running.pop(name)[1]
    return finished


def _next(waiting: Mapping[str, Work], finished: Mapping[str, Any], running: list[Work], parallel: int) -> Work | None:
    """What to start now: the first work whose needs are met; one that runs alone, when nothing else could be done."""
    if len(running) >= parallel or any(work.alone for work in running):
        return None
    ready = [work for work in waiting.values() if all(need in finished for need in work.needs.values())]
    together = [work for work in ready if not work.alone or parallel == 1]
    return next(iter(together or ([] if running else ready)), None)


def _result(future: PrefectFuture[Any]) -> Any:
    """What a finished task returned; the future of one that failed or never began: Prefect sees that its followers cannot run.

    Not the future of all: Dask puts a task beside the data of a future, which here would be both branches on one worker.
    """
    with contextlib.suppress(UnfinishedRun):
        if isinstance(result := future.result(raise_on_failure=False), dict):
            return result
    return future


def _tell(name: str, future: PrefectFuture[Any], done: queue.SimpleQueue[str]) -> None:
    try:
        with contextlib.suppress(Exception):  # what failed is in the future's state, or it has none
            future.wait()
    finally:
        done.put(name)


@contextmanager
def task_runner(wanted: Runner) -> Iterator[TaskRunner[Any]]:
    """The task runner of a run, started. Raises InputError when its extra is not installed, StepError when no cluster answers."""
    runner = _RUNNERS[wanted.kind](wanted)
    try:
        runner.__enter__()
        if wanted.kind == "dask":
            _check_dask(runner)
    except InputError:
        runner.__exit__(None, None, None)
        raise
    except (OSError, TimeoutError) as error:
        raise StepError(
            f"runner: no {wanted.kind} cluster answers at {wanted.address or 'this machine'}: {error}"
        ) from None
    try:
        with _isolated(wanted):
            yield runner
    except BaseException:
        stop_isolated()  # else leaving the pool would wait for what is at work
        raise
    finally:
        runner.__exit__(None, None, None)


@contextmanager
def _isolated(wanted: Runner) -> Iterator[None]:
    """Branches side by side in one process would change each other's dtype and weights while models are opened: each gets its own."""
    before = os.environ.get(SWITCH)
    if wanted.kind == "threads" and wanted.parallel > 1:
        os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(SWITCH, None)
        if before is not None:
            os.environ[SWITCH] = before


def threads_for(wanted: Runner) -> int:
    """Threads of torch for each of the branches that run side by side on this machine; 0: as a cluster's workers have them."""
    import torch

    return 0 if wanted.address else max(1, torch.get_num_threads() // wanted.parallel)


def _threads(wanted: Runner) -> TaskRunner[Any]:
    return ThreadPoolTaskRunner(max_workers=wanted.parallel)


def _dask(wanted: Runner) -> TaskRunner[Any]:
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError:
        raise InputError("runner: dask is not installed; install tensorpress[dask]") from None
    if wanted.address:
        return DaskTaskRunner(address=wanted.address, client_kwargs={"timeout": 10})
    workers = {"n_workers": wanted.parallel, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs={**workers, "memory_limit": 0})


def _check_dask(runner: Any) -> None:
    """Connect, and refuse workers that would work on two branches in one process. Raises InputError, OSError."""
    threads = runner.client.nthreads()  # it connects when it is first asked for
    several = [address for address, count in threads.items() if count > 1]
    if several:
        raise InputError(
            f"runner.address: the Dask worker {several[0]} has {threads[several[0]]} threads; start workers with --nthreads 1: "
            "branches in one process would change each other's dtype and weights"
        )


def _ray(wanted: Runner) -> TaskRunner[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise InputError("runner: ray is not installed; install tensorpress[ray]") from None
    if wanted.address:
        return RayTaskRunner(address=wanted.address)
    own = {"num_cpus": wanted.parallel, "include_dashboard": False, "log_to_driver": False}
    return RayTaskRunner(init_kwargs={**own, "_node_ip_address": "127.0.0.1"})


_RUNNERS = {"threads": _threads, "dask": _dask, "ray": _ray}
