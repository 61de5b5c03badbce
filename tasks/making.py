"""Making one artifact: find it in the store, or do the step and write it. Knows neither Prefect nor MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tensorpress.artifact import Artifact, Store, Writer, plain_gptq
from tensorpress.checks import weight_files
from tensorpress.compressors.base import Calibration, Report
from tensorpress.compressors.data import calibration_windows
from tensorpress.errors import InputError, StepError
from tensorpress.evaluators.size import bytes_of, needed_files, original_parameters
from tensorpress.loading import load
from tensorpress.source import read_tokenizer
from tensorpress.structure import find_structure, model_kind
from tensorpress.tasks.card import card_of, licence_of
from tensorpress.tasks.folders import artifact_folder, root_folder
from tensorpress.tasks.isolate import Clock, is_isolated, run_isolated
from tensorpress.tasks.planning import Job, stored_dtype, working_dtype
from tensorpress.tasks.progress import reporter
from tensorpress.text import marks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_artifact(job: Job, parent: Path) -> dict[str, Any]:
    """Make (or find) the artifact of `job` from the model folder `parent`; nobody else makes the same one meanwhile.

    Raises StepError when the step fails, is over its limits, or its folder does not give the model's own outputs.
    """
    store = Store(job.store).open()
    job = replace(job, root={**job.root, "path": str(root_folder(store, job.root))})
    with store.lock(job.digest):
        artifact = store.artifact(job.digest)
        if artifact is not None:
            store.touch(job.digest)
            store.publish(job.digest)
            return _result(job, artifact, cached=True)
        first = len(job.chain) == 1
        parent = Path(job.root["path"]) if first else artifact_folder(store, job.parent_digest, parent)
        if is_isolated(job.limits):
            _build_isolated(job, parent, store)
        else:
            build(job.to_dict(), str(parent))
        store.publish(job.digest, made=True)
        return _result(job, Artifact(store.folder(job.digest)), cached=False)


def build(job: dict[str, Any], parent: str, clock: Clock = nullcontext) -> None:
    """Do the step of a job and write its artifact; whoever calls this holds the artifact's lock."""
    work = Job(**job)
    store = Store(work.store)
    with clock(), Writer(store, work.digest) as writer:
        _work(work, Path(parent), store, writer)


def _build_isolated(job: Job, parent: Path, store: Store) -> None:
    """The same in a process of its own; what a process that was stopped had begun to write is removed."""
    try:
        run_isolated(f"{__name__}:build", {"job": job.to_dict(), "parent": str(parent)}, job.limits, job.node)
    finally:
        store.drop_part(job.digest)


def _work(job: Job, parent: Path, store: Store, writer: Writer) -> Artifact:
    start = time.monotonic()
    torch.manual_seed(job.seed)
    method = job.method
    model = load(parent, dtype=working_dtype(job.dtype), kernels="reference")
    try:
        method.check(model, find_structure(model))
        calibration = _calibration(job, parent, store, model_kind(model))
        model, report = method.compress(model, calibration)
    except InputError as error:
        raise StepError(f"{job.node}: {error}") from error
    seconds = time.monotonic() - start
    original = Path(job.root["path"])
    record = {
        "parent": job.parent_digest,
        "root": job.root["digest"],
        "base": Path(job.root["source"]).name if Path(job.root["source"]).exists() else job.root["source"],
        "licence": licence_of(original),
        "chain": _timed_chain(job, parent, seconds),
        "seed": job.seed,
        "seconds": round(seconds, 3),
        "report": report.to_dict(),
        "recipe": job.recipe_yaml,
        "title": f"{job.root['name']}, {job.step}",
        "kind": model_kind(model),
        "plain_gptq": plain_gptq(model) is not None,
    }
    return writer.write(model.eval(), parent, stored_dtype(original), record, card_of(record))


def _calibration(job: Job, parent: Path, store: Store, kind: str) -> Calibration:
    tokenizer = read_tokenizer(parent)
    marks = marks_of(tokenizer, kind)
    found = calibration_windows(job.calibration, tokenizer, job.seed, marks)
    stored = stored_dtype(Path(job.root["path"]))
    return Calibration(*found, job.seed, _original(job), reporter(job.node), store.scratch(job.digest), marks, stored)


def _original(job: Job) -> Callable[[], PreTrainedModel]:
    kept: list[PreTrainedModel] = []

    def original() -> PreTrainedModel:
        if not kept:
            kept.append(load(job.root["path"], dtype=working_dtype(job.dtype), kernels="reference"))
        return kept[0]

    return original


def _timed_chain(job: Job, parent: Path, seconds: float) -> list[dict[str, Any]]:
    """The chain of steps; the seconds of earlier steps come from the parent's record."""
    earlier = Artifact(parent).record["chain"] if len(job.chain) > 1 else []
    known = {link["digest"]: link.get("seconds") for link in earlier}
    chain = [{**link, "seconds": known.get(link["digest"])} for link in job.chain]
    chain[-1]["seconds"] = round(seconds, 3)
    return chain


def _result(job: Job, artifact: Artifact, cached: bool) -> dict[str, Any]:
    record = artifact.record
    report: dict[str, Any] = record.get("report") or Report().to_dict()
    return {
        "node": job.node,
        "path": str(artifact.folder),
        "digest": job.digest,
        "cached": cached,
        "seconds": record["seconds"],
        "report": report,
        "size": _size(artifact.folder, Path(job.root["path"])),
    }


def _size(folder: Path, original: Path) -> dict[str, float]:
    """Bytes on disk and their ratio to the original at 16 bits, for the picture of the graph."""
    weights = sum(path.stat().st_size for path in weight_files(folder))
    return {"bytes": bytes_of(needed_files(folder)), "size_ratio": weights / (2 * original_parameters(original))}
