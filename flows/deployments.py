"""The flows as deployments of a Prefect server: a form for each, worked on by the workers of one pool."""

from __future__ import annotations

from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from tensorpress.flows.benchmark import benchmark
from tensorpress.flows.compress import compress
from tensorpress.flows.nightly import nightly
from tensorpress.flows.place import POOL

TAG = "tensorpress"


FLOWS: dict[str, Flow[..., Any]] = {"compress": compress, "nightly": nightly, "benchmark": benchmark}


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
    deployed = FLOWS[flow]
    return client.create_deployment(
        flow_id=client.create_flow_from_name(flow),
        name=name,
        description=deployed.description,
        entrypoint=f"tensorpress.flows.{flow}.{flow}",
        parameters=parameters,
        parameter_openapi_schema=deployed.parameters.model_dump_for_openapi(),
        enforce_parameter_schema=True,
        work_pool_name=POOL,
        schedules=schedules,
        tags=[TAG, *tags],
        paused=False,
    )
