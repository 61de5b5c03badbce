"""Flow: run recipes one after the other, hold each against the champion of its line, and say what got worse."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.states import State

from tensorpress.errors import InputError, StepError
from tensorpress.flows.parameters import NightlyParameters
from tensorpress.flows.place import asked_for, at_work


def run_name() -> str:
    """The name of a flow run: its recipes."""
    parameters = asked_for(NightlyParameters)
    return f"night: {', '.join(run.title for run in parameters.runs)}"[:200]


@flow(name="nightly", flow_run_name=run_name, persist_result=False, validate_parameters=True)
def nightly(parameters: NightlyParameters = NightlyParameters()) -> State[dict[str, Any]]:  # noqa: B008
    """Run recipes, promote what passes its gates and is not worse than the champion, remove what is old.

    The state's result is {"decisions": [...], "failed": [...]}. Its state is Failed when a run failed, and Completed by the name of
    `Worse` when something got worse.
    """
    from tensorpress.flows.night import Night, clean
    from tensorpress.tasks.show import show_table

    night = Night()
    with at_work() as place:
        for asked in parameters.runs:
            night.run(asked, parameters, place.store)
        try:
            clean(parameters, place.store)
        except (InputError, StepError, OSError) as error:
            night.fail(f"retention: {error}")
    show_table("nightly", night.page, "every run against the champion of its line")
    return night.state
