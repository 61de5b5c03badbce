"""Flow: run a recipe. Light to import: servers and the hooks of runs need the flow and its form, not what it works with."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.states import Completed, Failed, State

from tensorpress.errors import InputError, RunFailed, StepError
from tensorpress.flows.parameters import CompressParameters
from tensorpress.flows.place import asked_for, at_work
from tensorpress.secrets import redact_error
from tensorpress.starting import starting


def run_name() -> str:
    """The name of a flow run: its recipe and what was changed in the form."""
    parameters = asked_for(CompressParameters)
    changed = [f"{key} {value}" for key, value in parameters.changes().items()] + parameters.overrides
    return ", ".join([parameters.title, *changed])[:200]


@flow(name="compress", flow_run_name=run_name, persist_result=False, validate_parameters=True)
def compress(parameters: CompressParameters = CompressParameters()) -> State[dict[str, Any]]:  # noqa: B008
    """Run a recipe: every step on every branch, measured, judged and tracked. The state's result is the run document.

    Its state is Failed when a step failed or the input cannot be used, and Completed by the name of `Rejected` when a gate did not hold.
    """
    with starting():
        from tensorpress.flows.running import run_recipe

    try:
        with at_work():
            document = run_recipe(parameters)
    except (InputError, StepError) as error:
        redact_error(error)
        return Failed(message=str(error), data=error)
    return state_of(document)


def run_flow(parameters: CompressParameters) -> dict[str, Any]:
    """Run the flow from this process and return its run document. Raises what stopped it."""
    state = compress(parameters, return_state=True)
    result: Any = state.result(raise_on_failure=False)
    if isinstance(result, RunFailed):
        return result.result
    if isinstance(result, BaseException):
        raise result
    return dict(result)


def state_of(document: dict[str, Any]) -> State[dict[str, Any]]:
    """The state in which a flow run ends, by the verdict of its run document."""
    if document["verdict"] == "FAILED":
        # an exception: Prefect raises what a failed state has
        failed = RunFailed(f"a step failed: {first_error(document)}", document)
        return Failed(message=str(failed), data=failed)
    if document["verdict"] == "REJECT":
        gates = ", ".join(name for name, gate in document["gates"].items() if not gate["holds"])
        return Completed(name="Rejected", message=f"a gate does not hold: {gates}", data=document)
    return Completed(message="every step ran and every gate held", data=document)


def first_error(run: dict[str, Any]) -> str | None:
    """What failed first in a run, with the node it happened at; None when nothing did."""
    errors = [run["original_error"], *(f"{a['node']}: {a['error']}" for a in run["artifacts"] if a["error"])]
    return next((error for error in errors if error), None)
