"""The flows as deployments of a Prefect server: a form for each, worked on by the workers of one pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.utilities.callables import parameter_schema

from tensorpress.flows.parameters import BenchmarkParameters, CompressParameters, NightlyParameters
from tensorpress.flows.place import POOL

TAG = "tensorpress"


def compress(parameters: CompressParameters = CompressParameters()) -> None:  # noqa: B008
    """Run a recipe: every step on every branch, measured, judged and tracked in MLflow."""


def nightly(parameters: NightlyParameters = NightlyParameters()) -> None:  # noqa: B008
    """Run recipes one after the other, hold each against its champion, promote what is better, and say what got worse."""


def benchmark(parameters: BenchmarkParameters = BenchmarkParameters()) -> None:  # noqa: B008
    """Measure the speed of a model, beside its original, and track it in MLflow."""


FLOWS: dict[str, tuple[str, Callable[..., None]]] = {
    "compress": ("tensorpress.flows.compress.compress", compress),
    "nightly": ("tensorpress.flows.nightly.nightly", nightly),
    "benchmark": ("tensorpress.flows.benchmark.benchmark", benchmark),
}
"""Entry point of each flow, and a function with the same parameters that is light to import."""


def deploy_all(client: SyncPrefectClient) -> None:
    """Make or renew the pool and one deployment for each flow."""
    ensure_pool(client)
    for name in FLOWS:
        deploy(client, name, name, {})


def ensure_pool(client: SyncPrefectClient) -> None:
    """Make the pool of the workers; runs are processes of the worker that takes them."""
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        pool = WorkPoolCreate(
            name=POOL, type="process", description="machines that run `tensorpress worker` or `serve`"
        )
        try:
            client.create_work_pool(pool)
        except ObjectAlreadyExists:  # by another that started now
            return


def deploy(
    client: SyncPrefectClient,
    flow: str,
    name: str,
    parameters: dict[str, Any],
    schedules: list[DeploymentScheduleCreate] | None = None,
    tags: tuple[str, ...] = (),
) -> Any:
    """Make or renew the deployment `flow/name`; returns its id. `parameters` are the defaults of its form."""
    entrypoint, function = FLOWS[flow]
    schema = parameter_schema(function).model_dump_for_openapi()
    return client.create_deployment(
        flow_id=client.create_flow_from_name(flow),
        name=name,
        description=function.__doc__,
        entrypoint=entrypoint,
        parameters=parameters,
        parameter_openapi_schema=schema,
        enforce_parameter_schema=True,
        work_pool_name=POOL,
        schedules=schedules,
        tags=[TAG, *tags],
        paused=False,
    )
