"""The entries of MLflow's database that a run is made of, the same whether it is tracked or rebuilt from its documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Param

from tensorpress.pictures.tables import present
from tensorpress.secrets import redact

LONGEST = 5000
"""Characters of a tag's or a parameter's value that are kept."""
BENCHMARKS = "speed"
"""The experiment of benchmarks."""


def local_artifacts(store: Path) -> str:
    """The address of the folder in which a store's own database keeps the files of its runs."""
    return (store.absolute() / "artifacts").as_uri()


def step_params(
    step: str, use: str, chain: Sequence[Mapping[str, Any]], steps: Mapping[str, Mapping[str, Any]]
) -> list[Param]:
    """Parameters of a step's run: its method, and every value on the way to it that the recipe names.

    `chain` has `step`, `use` and `config` of the steps from the model to it, `steps` is the recipe's. Values that the recipe leaves as
    they are would only stand in the way of a comparison: they are in the tag of `step_tags`.
    """
    params = {"step": step, "method": use}
    for link in chain:
        said = steps.get(link["step"], {})
        params |= {f"{link['use']}.{key}": _short(value) for key, value in link["config"].items() if key in said}
    params = {key: value for key, value in params.items() if not key.endswith(".use")}
    return [Param(key, redact(str(value))[:LONGEST]) for key, value in params.items()]


def chain_of(document: Mapping[str, Any], artifact: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The artifacts of a run document from the model to one."""
    known = {other["node"]: other for other in document["artifacts"]}
    chain = [artifact]
    while chain[0]["parent"] in known:
        chain.insert(0, known[chain[0]["parent"]])
    return chain


def step_tags(branch: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a step's run: its branch, which is too long for the axis of a chart, and its whole configuration, defaults included."""
    return {"tensorpress.branch": branch or "-", "tensorpress.config": redact(json.dumps(dict(config)))[:LONGEST]}


def summary_metrics(use: str, report: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report's summary that are not settings, under the name of the method."""
    return {
        f"{use}.{key}": value
        for key, value in report["summary"].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and config.get(key) != value
    }


def in_order(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The metrics that have a value, quality first, whatever was measured first: MLflow's charts begin with what was logged first."""
    shown = present([metrics])
    return {f"{prefix}{metric.key}": float(metrics[metric.key]) for metric in shown}


def benchmark_entries(answer: Mapping[str, Any]) -> tuple[str, dict[str, str], list[Param]]:
    """Name, tags and parameters of the run of a benchmark's answer."""
    name = f"{answer['model']}{' beside ' + answer['against'] if 'against' in answer else ''}"[:200]
    tags = {
        "tensorpress.flow_run_id": answer["flow_run_id"],
        "tensorpress.digest": answer["digest"],
        "mlflow.source.type": "JOB",
    }
    return redact(name), tags, [Param(key, redact(str(value))[:LONGEST]) for key, value in answer["conditions"].items()]


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
