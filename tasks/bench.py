"""Models by name, and the speed of one: prefill and decode, in turns with the dense original, by every backend that can run it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from tensorpress.artifact import RECORD, Artifact, Store
from tensorpress.checks import check_folder, read_config
from tensorpress.errors import InputError
from tensorpress.evaluators.backends import backends_of, measure
from tensorpress.evaluators.base import EvaluationData, Subject
from tensorpress.evaluators.perplexity import position_limit
from tensorpress.evaluators.speed import Speed
from tensorpress.kernels import registry
from tensorpress.loading import load
from tensorpress.source import ModelHandle, resolve
from tensorpress.structure import model_kind
from tensorpress.tasks.planning import check_kernels, config_kind, known_source, working_dtype
from tensorpress.tasks.progress import reporter

PREFIX = re.compile(r"[0-9a-f]{6,64}")


def find_model(name: str, store: Path) -> Path:
    """The folder of `demo`, a folder, a hub id, or an artifact of the store by the beginning of its digest.

    Raises InputError.
    """
    if PREFIX.fullmatch(name.lower()) and not Path(name).exists():
        found = sorted(path for path in store.absolute().glob(f"models/{name.lower()}*") if path.is_dir())
        if len(found) == 1:
            return found[0]
        several = ", ".join(path.name[:12] for path in found[:5])
        raise InputError(
            f"{name}: {f'begins several digests: {several}' if found else f'begins no digest of an artifact in {store}'}"
        )
    try:
        return resolve(name)
    except InputError as error:
        raise InputError(*(problem.removeprefix("model.source: ") for problem in error.problems)) from None


def check_model(name: str, store: Path) -> ModelHandle:
    """Find a model and check it whole: the files of an artifact against its record, those of any other by what they hold.

    Raises InputError. Writes at most a note of what was checked, into a store that is there.
    """
    folder = find_model(name, store)
    check_folder(folder)
    if not (folder / RECORD).is_file():
        return known_source(folder, Store(store))
    artifact = Artifact(folder)
    problem = artifact.problem()
    if problem:
        raise InputError(f"{folder}: is not whole: {problem}")
    return ModelHandle(str(folder.resolve()), artifact.digest)


def bench_model(
    model: str,
    against: str | None,
    prompt: int,
    tokens: int,
    repeats: int,
    kernels: str,
    dtype: str,
    store: Path,
    batches: Sequence[int] = (),
) -> dict[str, Any]:
    """Measure prefill of `prompt` tokens and decode of `tokens`, medians of `repeats` runs in turns with the original.

    Returns {"model", "metrics", "conditions"}, "against" where an original was given, and for a causal model, if `batches` are
    given, "backends": a row for each backend and size of batch (`evaluators.backends`). Raises InputError.
    """
    check_kernels(kernels)
    handle = check_model(model, store)
    original = check_model(against, store) if against else None
    if original is not None:
        check_same_kind(read_config(handle.folder), read_config(original.folder), against or "")
    subject = load(handle.path, dtype=working_dtype(dtype), kernels=kernels)
    check_runs(subject, kernels)
    control = load(original.path, dtype=working_dtype(dtype)) if original else subject
    vocabulary = subject.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    data = EvaluationData(ids, 0, None, "random tokens")
    folder = handle.folder
    result = Speed(prompt, tokens, repeats, math.inf).evaluate(
        Subject(subject, lambda: control, folder, original.folder if original else folder, original is None),
        data,
        reporter("bench"),
    )
    shape = {"dataset": data.name, "tokens": prompt + tokens, "window": prompt}
    metrics, conditions = result.metrics, {**shape, "dtype": result.conditions["speed_dtype"], **result.conditions}
    if original is None:
        metrics = {k: v for k, v in metrics.items() if not compares(k)}
        conditions = {k: v for k, v in conditions.items() if not k.startswith("original_")}
    answer: dict[str, Any] = {"model": model, "digest": handle.digest, "metrics": metrics, "conditions": conditions}
    answer |= {"against": against} if against else {}
    if batches and model_kind(subject) == "causal":
        answer["backends"] = _backends(subject, control, kernels, prompt, tokens, repeats, batches)
    return answer


def _backends(
    subject: Any, control: Any, kernels: str, prompt: int, tokens: int, repeats: int, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """The rows of all backends, the model's and then its dense control's."""
    limit = position_limit(subject)
    tokens = min(tokens, limit // 2)
    length = min(prompt, limit - tokens)
    vocabulary = subject.config.get_text_config().vocab_size
    prompts = torch.randint(vocabulary, (max(batches), length), generator=torch.Generator().manual_seed(0))
    made = backends_of(subject, "model", kernels, batches, length + tokens)
    if control is not subject:
        made += backends_of(control, "original", "auto", batches, length + tokens)
    return measure(made, prompts, tokens, repeats, reporter("bench"))


def compares(key: str) -> bool:
    """Whether a metric sets a model beside its original."""
    return key.startswith(("original_", "perplexity_ratio")) or key.endswith("_speedup")


def check_same_kind(config: PretrainedConfig, original: PretrainedConfig, name: str) -> None:
    """Refuse an original that cannot be the one: another kind of model, or another vocabulary."""
    sizes = [c.get_text_config().vocab_size for c in (config, original)]
    if config_kind(config) != config_kind(original) or sizes[0] != sizes[1]:
        raise InputError(
            f"--against {name}: is not its original: one is a {config_kind(config)} model of {sizes[0]} tokens, "
            f"the other a {config_kind(original)} model of {sizes[1]}"
        )


def check_runs(model: Any, kernels: str) -> None:
    """Refuse a backend that cannot run a layer of the model."""
    try:
        registry.names_in_use(model)
    except ValueError as error:
        raise InputError(f"--kernels {kernels}: {str(error).splitlines()[0]}") from None
