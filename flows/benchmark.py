"""Flow: measure the speed of a model beside its original."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.context import get_run_context
from prefect.states import Completed, Failed, State

from tensorpress.errors import InputError, StepError
from tensorpress.flows.parameters import BenchmarkParameters
from tensorpress.flows.place import asked_for, at_work, here
from tensorpress.secrets import redact_error


def run_name() -> str:
    """The name of a flow run: the model, and what it is set beside."""
    parameters = asked_for(BenchmarkParameters)
    return f"speed of {parameters.model}{f' beside {parameters.against}' if parameters.against else ''}"[:200]


@flow(name="benchmark", flow_run_name=run_name, persist_result=False, validate_parameters=True)
def benchmark(parameters: BenchmarkParameters = BenchmarkParameters()) -> State[dict[str, Any]]:  # noqa: B008
    """Measure the speed of a model; the state's result is what `tensorpress bench --json` writes."""
    from tensorpress.pictures.markdown import table
    from tensorpress.tasks.show import show_link, show_table
    from tensorpress.tasks.tracking import track_benchmark

    try:
        with at_work() as place:
            answer = measure_speed(parameters.model_dump())
            flow_run_id = str(get_run_context().flow_run.id)  # type: ignore[union-attr]
            experiment_id, run_id = track_benchmark(place.store, answer, flow_run_id)
    except (InputError, StepError) as error:
        redact_error(error)
        return Failed(message=str(error), data=error)
    show_link(experiment_id, run_id)
    figures = {**answer["metrics"], **answer["conditions"]}
    rows = [[name, f"{value:.4g}" if isinstance(value, float) else str(value)] for name, value in figures.items()]
    show_table("speed", table(["figure", "value"], rows), f"speed of {parameters.model}")
    return Completed(message=f"measured {parameters.model}", data=answer)


@task(name="measure", task_run_name="speed of {asked[model]}", cache_policy=NO_CACHE, persist_result=False)
def measure_speed(asked: dict[str, Any]) -> dict[str, Any]:
    """Measure; the arguments are those of `BenchmarkParameters`."""
    from tensorpress.tasks.bench import bench_model
    from tensorpress.tasks.show import progress_shown

    against = asked.pop("against") or None
    with progress_shown(f"speed of {asked['model']}"):
        return bench_model(**asked, against=against, store=here().store)
