"""The entries of MLflow's database that a run is made of, the same whether it is tracked or rebuilt from its documents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Param

LONGEST = 5000
"""Characters of a tag's or a parameter's value that are kept."""
BENCHMARKS = "speed"
"""The experiment of benchmarks."""


def local_artifacts(store: Path) -> str:
    """The address of the folder in which a store's own database keeps the files of its runs."""
    return (store.absolute() / "artifacts").as_uri()


def step_params(step: str, use: str, branch: str, config: Mapping[str, Any]) -> list[Param]:
    """Parameters of a step's run: what the recipe says of it."""
    params = {"step": step, "method": use, "branch": branch or "-"}
    params |= {f"{use}.{key}": _short(value) for key, value in config.items() if key != "use" and value is not None}
    return [Param(key, str(value)) for key, value in params.items()]


def summary_metrics(use: str, report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report's summary, under the name of the method."""
    return {
        f"{use}.{key}": value
        for key, value in report["summary"].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def benchmark_entries(answer: Mapping[str, Any]) -> tuple[str, dict[str, str], list[Param]]:
    """Name, tags and parameters of the run of a benchmark's answer."""
    name = f"{answer['model']}{' beside ' + answer['against'] if 'against' in answer else ''}"[:200]
    tags = {
        "tensorpress.flow_run_id": answer["flow_run_id"],
        "tensorpress.digest": answer["digest"],
        "mlflow.source.type": "JOB",
    }
    return name, tags, [Param(key, str(value)[:LONGEST]) for key, value in answer["conditions"].items()]


def link_dataset(client: MlflowClient, run_id: str, data: Mapping[str, str]) -> None:
    """Link the evaluation text (name, digest, source; nothing if empty) to a run."""
    if data:
        dataset = Dataset(data["name"], data["digest"], "local", json.dumps({"uri": data["source"]}))
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])])


def link_model(
    client: MlflowClient, experiment: str, run_id: str, node: Mapping[str, str], path: str, parent: str
) -> str:
    """Link the artifact in the folder `path` to the run of a node (`step`, `use`, `digest`); returns its LoggedModel's id.

    There is one LoggedModel for each artifact and experiment, however many runs find it.
    """
    known = client.search_logged_models([experiment], filter_string=f"tags.digest = '{node['digest']}'")
    model = next((model for model in known if model.tags.get("path") == path), None)
    if model is None:
        tags = {"path": path, "digest": node["digest"], "parent": parent}
        model = client.create_logged_model(
            experiment,
            name=f"{node['step']}-{node['digest'][:8]}",
            source_run_id=run_id,
            tags={**tags, "weights": "by reference", "mlflow.model.isExternal": "true"},
            params={"method": node["use"]},
            model_type="tensorpress",
        )
        client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return str(model.model_id)


def _short(value: Any) -> Any:
    return ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else value
