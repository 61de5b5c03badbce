"""Schedules: deployments of the nightly flow that Prefect starts by the clock."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.server.schemas.schedules import CronSchedule as _Dates
from pydantic import ValidationError

from tensorpress.errors import InputError, nearest
from tensorpress.flows.deployments import FLOWS, deploy, ensure_pool
from tensorpress.flows.parameters import CompressParameters, NightlyParameters

TAG = "schedule"
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True)
class Scheduled:
    """A schedule, its next runs and how its last ones ended."""

    slug: str
    cron: str
    timezone: str
    active: bool
    recipes: tuple[str, ...]
    next_runs: tuple[tuple[datetime, str], ...]
    """Expected start and name of the state of each run ahead, the earliest first."""
    last_runs: tuple[tuple[datetime | None, str], ...]
    """Start and name of the state of runs that began, the latest first."""


def cron_schedule(cron: str, timezone: str) -> CronSchedule:
    """A schedule as Prefect takes it. Raises InputError for a cron line or a time zone that there is not, or a day that never comes."""
    try:
        schedule = CronSchedule(cron=cron, timezone=timezone)
        if len(cron.split()) != 5 or not asyncio.run(_Dates(cron=cron, timezone=timezone).get_dates(1)):
            raise ValueError("cron")
        return schedule
    except (ValidationError, ValueError, KeyError) as error:
        place = "--timezone" if "timezone" in str(error).lower() else "--cron"
        value, right = (
            (timezone, "a name such as Europe/Zurich")
            if place == "--timezone"
            else (cron, 'five fields such as "0 2 * * *"')
        )
        raise InputError(f"{place} {value!r}: is not known, or never comes; {right}") from None


def add(client: SyncPrefectClient, slug: str, schedule: CronSchedule, parameters: NightlyParameters) -> None:
    """Make or renew the schedule `slug`."""
    if not SLUG.fullmatch(slug):
        raise InputError(f"--slug {slug!r}: small letters, digits and dashes, 63 at most")
    if slug in FLOWS:
        raise InputError(f"--slug {slug}: is the name of a form that `serve` makes; choose another")
    ensure_pool(client)
    wanted = DeploymentScheduleCreate(schedule=schedule, active=True, slug=slug)
    given = {"parameters": parameters.model_dump(mode="json")}
    deploy(client, "nightly", slug, given, schedules=[wanted], tags=(TAG,))


def all_of(client: SyncPrefectClient) -> list[Scheduled]:
    """Every schedule, by name."""
    found = client.read_deployments(deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])))
    return [_described(client, deployment) for deployment in sorted(found, key=lambda d: d.name)]


def pause(client: SyncPrefectClient, slug: str, paused: bool) -> None:
    """Pause or resume a schedule; what runs already goes on. Raises InputError when there is none of the name."""
    deployment = _deployment(client, slug)
    if paused:
        client.pause_deployment(deployment.id)
    else:
        client.resume_deployment(deployment.id)
    for schedule in deployment.schedules:
        client.update_deployment_schedule(deployment.id, schedule.id, active=not paused)


def remove(client: SyncPrefectClient, slug: str) -> None:
    """Remove a schedule and its runs ahead. Raises InputError when there is none of the name."""
    client.delete_deployment(_deployment(client, slug).id)


def _deployment(client: SyncPrefectClient, slug: str) -> Any:
    try:
        deployment = client.read_deployment_by_name(f"nightly/{slug}")
        if TAG in deployment.tags:
            return deployment
    except ObjectNotFound:
        pass
    known = [scheduled.slug for scheduled in all_of(client)]
    raise InputError(f"{slug}: no schedule of that name{nearest(slug, known)}; known: {', '.join(known) or 'none'}")


def _described(client: SyncPrefectClient, deployment: Any) -> Scheduled:
    (schedule, *_) = deployment.schedules or [None]
    runs = [CompressParameters.model_construct(**run) for run in deployment.parameters["parameters"]["runs"]]
    ahead = _runs(client, deployment.id, [StateType.SCHEDULED], FlowRunSort.EXPECTED_START_TIME_ASC)
    begun = [kind for kind in StateType if kind not in (StateType.SCHEDULED, StateType.PENDING)]
    before = _runs(client, deployment.id, begun, FlowRunSort.START_TIME_DESC)
    return Scheduled(
        deployment.name,
        schedule.schedule.cron if schedule else "-",
        schedule.schedule.timezone if schedule else "-",
        bool(schedule and schedule.active and not deployment.paused),
        tuple(run.title for run in runs),
        tuple((run.expected_start_time, run.state_name) for run in ahead),
        tuple((run.start_time, run.state_name) for run in before),
    )


def _runs(client: SyncPrefectClient, deployment_id: Any, kinds: Sequence[StateType], sort: FlowRunSort) -> list[Any]:
    return client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment_id])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(kinds)))),
        sort=sort,
        limit=3,
    )
