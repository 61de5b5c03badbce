"""Measuring one model folder: what was measured before on the same bytes is remembered. Knows neither Prefect nor MLflow."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tensorpress import digest
from tensorpress.artifact import Store
from tensorpress.checks import read_config
from tensorpress.evaluators.base import EvaluationData, Subject
from tensorpress.evaluators.catalog import MEASURES, relative_metrics
from tensorpress.evaluators.data import evaluation_data
from tensorpress.kernels import cpu_linear, registry
from tensorpress.loading import load, use_kernels, use_quick_kernels
from tensorpress.source import read_tokenizer
from tensorpress.tasks.isolate import Clock, is_isolated, run_isolated
from tensorpress.tasks.planning import config_kind, evaluation_fingerprint, working_dtype
from tensorpress.tasks.progress import reporter
from tensorpress.text import marks_of, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_within(
    job: dict[str, Any], subject: dict[str, Any], original: dict[str, Any] | None, label: str
) -> dict[str, Any]:
    """`measure` within the limits of the job, in a process of its own where that is asked for and something is to be measured."""
    if not is_isolated(job.get("limits")):
        return measure(job, subject, original, label)
    store = Store(job["store"]).open()
    keys = [_key(name, job, subject) for name in job["measures"]]
    with store.lock(f"measuring-{digest.of_json(keys)[:32]}"):  # others wait here, not each in a process of its own
        if all(store.evaluation(key) is not None for key in keys):
            return measure(job, subject, original, label)
        arguments = {"job": job, "subject": subject, "original": original, "label": label}
        return run_isolated(f"{__name__}:measure", arguments, job.get("limits"), label)


def measure(
    job: dict[str, Any],
    subject: dict[str, Any],
    original: dict[str, Any] | None,
    label: str,
    clock: Clock = nullcontext,
) -> dict[str, Any]:
    """Apply the measures named in `job["measures"]` to a model folder; see `tasks.evaluate.run_evaluation`."""
    start = time.monotonic()
    store = Store(job["store"]).open()
    session = _Session(job, subject, is_original=original is None, label=label)
    metrics: dict[str, float] = {}
    conditions: dict[str, Any] = {}
    texts: dict[str, str] = {}
    cached = True
    general: dict[str, Any] = {"dtype": job["dtype"]}
    for name in job["measures"]:
        key = _key(name, job, subject)
        with store.lock(f"evaluation-{key}"):
            found = store.evaluation(key)
            if found is None:
                cached = False
                with clock():
                    session.set_kernels(timed=MEASURES[name].timed)
                    measured = MEASURES[name]().evaluate(session.subject, session.data, reporter(label))
                found = {"metrics": measured.metrics, "conditions": measured.conditions, "texts": measured.texts}
                found["general"] = {"threads": torch.get_num_threads()}
                found["subject"] = subject["digest"]
                if not MEASURES[name].timed:
                    found["general"]["kernels"] = registry.names_in_use(session.subject.model)
                store.remember("evaluations", key, found)
        metrics.update(found["metrics"])
        conditions.update(found["conditions"])
        general.update(found["general"])
        texts.update(found["texts"])
    if "kernels" in conditions:  # those of the measure that is timed
        general["quality_kernels"] = general.pop("kernels", {})
    conditions = {**general, **conditions}
    if original is not None:
        metrics.update(relative_metrics(metrics, original["metrics"]))
    else:
        metrics.update(relative_metrics(metrics, metrics))
    return {
        "metrics": metrics,
        "conditions": conditions,
        "texts": texts,
        "seconds": round(time.monotonic() - start, 3),
        "cached": cached,
    }


class _Session:
    """The model under test and its data, loaded when the first measure that was not remembered asks for them."""

    def __init__(self, job: dict[str, Any], subject: dict[str, Any], is_original: bool, label: str):
        self.job, self.folder, self.is_original = job, Path(subject["path"]), is_original
        self._subject: Subject | None = None
        self._timed = False
        self._data: EvaluationData | None = None

    @property
    def subject(self) -> Subject:
        if self._subject is None:
            model = load(self.folder, dtype=working_dtype(self.job["dtype"]))
            root = Path(self.job["root"]["path"])
            self._subject = Subject(model, self._original(model), self.folder, root, self.is_original)
        return self._subject

    def set_kernels(self, timed: bool) -> None:
        """Speed is measured with the kernels that were asked for; the other measures take what is quick."""
        self._timed = timed
        self._choose_kernels(self.subject.model)

    def _choose_kernels(self, model: PreTrainedModel) -> None:
        if self._timed:
            use_kernels(model, self.job.get("kernels", "auto"))
        else:
            use_quick_kernels(model)

    @property
    def data(self) -> EvaluationData:
        if self._data is None:
            spec, measures = self.job["evaluation"], self.job["measures"]
            tokenizer = read_tokenizer(self.folder)
            marks = marks_of(tokenizer, config_kind(read_config(self.folder)))
            self._data = evaluation_data(spec, measures, self.job["demo"], tokenizer, marks)
        return self._data

    def _original(self, model: PreTrainedModel) -> Callable[[], PreTrainedModel]:
        if self.is_original:
            return lambda: model

        @lru_cache(maxsize=1)
        def loaded() -> PreTrainedModel:
            return load(self.job["root"]["path"], dtype=working_dtype(self.job["dtype"]))

        def original() -> PreTrainedModel:
            self._choose_kernels(loaded())  # it may be quantized itself
            return loaded()

        return original


def _key(name: str, job: dict[str, Any], subject: dict[str, Any]) -> str:
    spec = job["evaluation"]
    texts = {}
    if name in ("perplexity", "fidelity", "generation"):
        texts["text"] = read_text(spec["source"], spec["split"], "data.evaluation.source").digest
        if spec["other"]:
            texts["other"] = read_text(spec["other"], "other", "data.evaluation.other").digest
    if name == "sts":
        texts["pairs"] = digest.of_file(Path(spec["pairs"]).expanduser())
    machine = None
    if MEASURES[name].timed:
        kernels = [job.get("kernels"), registry.asked_for(), cpu_linear.fingerprint()]
        machine = [platform.node(), platform.processor(), torch.get_num_threads(), *kernels]
    return digest.of_json(
        {
            "measure": name,
            "subject": subject["digest"],
            "root": job["root"]["digest"],
            "data": [texts, spec["samples"], spec["length"], job["demo"]],
            "dtype": job["dtype"],
            "machine": machine,
            "code": evaluation_fingerprint(),
        }
    )[:32]
