"""Flow: run recipes one after the other, hold each against the champion of its line, and say what got worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run as running
from prefect.states import Completed, Failed, State

from tensorpress.artifact import Store
from tensorpress.errors import InputError, StepError
from tensorpress.flows.compress import compress
from tensorpress.flows.parameters import NightlyParameters
from tensorpress.flows.place import enter_folder, here
from tensorpress.pictures.markdown import table
from tensorpress.tasks.champions import decide
from tensorpress.tasks.show import say_failures_once, show_table
from tensorpress.tasks.tracking import open_client

DAY, GIGABYTE = 86_400, 1e9


def run_name() -> str:
    """The name of a flow run: the deployment's, and how many runs it has."""
    given = running.parameters["parameters"]
    parameters = given if isinstance(given, NightlyParameters) else NightlyParameters.model_validate(given)
    names = [run.recipe for run in parameters.runs]
    return f"{running.deployment_name or 'nightly'}: {', '.join(map(str, names))}"[:200]


@flow(name="nightly", flow_run_name=run_name, persist_result=False, validate_parameters=True)
def nightly(parameters: NightlyParameters) -> State[dict[str, Any]]:
    """Run recipes, promote what passes its gates and is not worse than the champion, remove what is old.

    The state's result is {"decisions": [...], "failed": [...]}. Its state is Failed when a run failed, and Completed by the name of
    `Worse` when something got worse.
    """
    enter_folder()
    say_failures_once()
    log, place = get_run_logger(), here()
    decisions: list[dict[str, Any]] = []
    failed: list[str] = []
    pages: list[str] = []
    for asked in parameters.runs:
        state = compress(asked, return_state=True)
        document = state.result(raise_on_failure=False)
        if not isinstance(document, dict) or document["verdict"] == "FAILED":
            failed.append(f"{asked.recipe}: {state.message}")
            log.error(failed[-1])
            continue
        try:
            decision = decide(
                open_client(place.store),
                Store(place.store),
                document,
                parameters.tolerance,
                parameters.speed_tolerance,
                parameters.promote,
            )
        except (InputError, StepError) as error:
            failed.append(f"{document['name']}: {error}")
            log.error(failed[-1])
            continue
        for line in decision.says:
            log.info(line)
        pages.append(decision.markdown)
        decisions.append({"line": decision.line, "verdict": decision.verdict, "says": decision.says})
    try:
        _clean(parameters, place.store)
    except (InputError, StepError) as error:
        failed.append(f"retention: {error}")
    if failed:
        pages.append(table(["failed"], [[line] for line in failed]))
    show_table("nightly", "\n\n".join(pages), "every run against the champion of its line")
    result = {"decisions": decisions, "failed": failed}
    if failed:
        return Failed(message="; ".join(failed)[:1000], data=result)
    worse = [line for decision in decisions if decision["verdict"] == "worse" for line in decision["says"]]
    if worse:
        return Completed(name="Worse", message="; ".join(worse)[:1000], data=result)
    return Completed(message="; ".join(d["says"][0] for d in decisions)[:1000], data=result)


def _clean(parameters: NightlyParameters, store: Path) -> None:
    """Remove what the retention rule of the form says, and tell what went."""
    if parameters.keep_days is None and parameters.keep_gigabytes is None:
        return
    from tensorpress.tasks.retention import Rule, retain

    seconds = None if parameters.keep_days is None else parameters.keep_days * DAY
    size = None if parameters.keep_gigabytes is None else parameters.keep_gigabytes * GIGABYTE
    get_run_logger().info("%s", retain(Store(store), Rule(unused_seconds=seconds, store_bytes=size)))
