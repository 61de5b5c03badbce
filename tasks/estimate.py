"""What a plan will take: time as it was measured before on the same model, and memory at its peak. Reads, never writes."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tensorpress.artifact import RECORD, Store
from tensorpress.checks import read_config, shapes_of, weight_files
from tensorpress.compressors.catalog import METHODS
from tensorpress.compressors.recover.distill import MICRO_BATCH
from tensorpress.evaluators.size import EMBEDDINGS, HEADS, bytes_of, needed_files, original_parameters
from tensorpress.pictures.tables import human_bytes, human_seconds
from tensorpress.source import is_compressed
from tensorpress.tasks.planning import Job, Plan, stored_dtype, working_dtype

BESIDE_ORIGINAL = {"distill", "mpo_tune", "squeeze", "pela", "overparameterize", "fidelity", "speed"}
"""Methods and measures that hold the original in memory beside the model."""
TRAINED = {"distill", "mpo_tune", "squeeze", "pela", "overparameterize"}
"""Methods that train: a gradient, two moments and the best weights twice for each weight, in float32; and logits."""
MOMENTS = {"gptq", "mpo", "factorize"}
"""Methods that hold second moments of a layer's inputs in float64, several times."""
LOGITS = 4 * 4
"""Bytes for each number of a batch of logits: of teacher and student, and their gradients."""


def estimate(plan: Plan) -> dict[str, Any]:
    """What a plan does and what it is expected to take.

    Returns {"nodes": [{"node", "step", "branch", "use", "parent", "cached", "note", "seconds", "bytes"}], "summary": one line or two,
    "memory_bytes": at the peak, "seconds": of all steps that are not cached, None where one was never measured}. The time is
    that of earlier artifacts of the same method on the same model; measuring is not in it.
    """
    known = _measured_seconds(plan.store, plan.root.digest)
    nodes = [_node(plan, job, known) for job in plan.jobs.values()]
    waiting = [node for node in nodes if not node["cached"]]
    unknown = sorted({str(node["use"]) for node in waiting if node["seconds"] is None})
    seconds = None if unknown else sum(node["seconds"] for node in waiting)
    memory, parts = _memory(plan)
    time = (
        f"time: not measured before for {', '.join(unknown)}"
        if seconds is None
        else f"time: about {human_seconds(seconds)}, as measured before"
        if waiting
        else "time: only what has not been measured yet"
    )
    summary = (
        f"{len(waiting)} of {len(nodes)} steps to do, {len(nodes) - len(waiting)} cached; {time}\n"
        f"memory: about {human_bytes(memory)} at the peak ({parts})"
    )
    return {"nodes": nodes, "summary": summary, "memory_bytes": memory, "seconds": seconds}


def short_config(use: str, config: Mapping[str, Any]) -> str:
    """The settings of a step that people look for: `4 bits, g128`, `keep 0.7`."""
    parts = {
        "gptq": [("bits", "{} bits"), ("group_size", "g{}")],
        "mpo": [
            ("keep", "keep {}"),
            ("bond_dimension", "bond dimension {}"),
            ("bytes", "{:,} bytes"),
            ("perplexity_ratio", "perplexity ratio {}"),
            ("sites", "{} sites"),
            ("embeddings", "embeddings {}"),
        ],
        "factorize": [("form", "{}"), ("keep", "keep {}")],
        "mpo_tune": [("train", "{} cores"), ("tokens", "{:,} tokens"), ("minutes", "{} minutes")],
        "squeeze": [("keep", "keep {}"), ("gap", "gap {}")],
        "finercut": [("remove", "remove {}")],
        "distill": [("tokens", "{:,} tokens"), ("minutes", "{} minutes")],
    }.get(use) or [(key, f"{key} {{}}") for key in config if key != "use"]
    shown = [form.format(config[key]) for key, form in parts if config.get(key) is not None]
    return ", ".join("whole rows" if text == "g-1" else text for text in shown)


def _node(plan: Plan, job: Job, known: list[dict[str, Any]]) -> dict[str, Any]:
    cached = plan.cached[job.node]
    seconds = 0.0 if cached else _expected_seconds(job, known)
    note = [short_config(job.use, job.config)]
    folder = plan.store.folder(job.digest)
    size = bytes_of(needed_files(folder)) if cached and folder.is_dir() else expected_bytes(plan, job)
    note.append(human_bytes(size) if cached else f"about {human_bytes(size)}")
    if not cached:
        note += [f"about {human_seconds(seconds)}"] if seconds is not None else []
    return {
        "node": job.node,
        "step": job.step,
        "branch": job.branch,
        "use": job.use,
        "parent": job.parent,
        "cached": cached,
        "note": ", ".join(part for part in note if part),
        "seconds": seconds,
        "bytes": size,
    }


def expected_bytes(plan: Plan, job: Job) -> int:
    """Bytes of weights that a step's artifact will have, by the settings of the steps that lead to it.

    Counts bits, scales and zeros of `gptq`, what `mpo`, `factorize` and `squeeze` keep, and the share that `finercut` removes (of all sublayers alike).
    """
    folder = Path(plan.root.path)
    width = stored_dtype(folder).itemsize
    dense = {path: float(count) for path, count in plan.layers.items()}
    fixed = bytes_of(weight_files(folder)) - width * sum(dense.values())
    shapes = shapes_of(folder)
    tables = sum(math.prod(size) for name, size in shapes.items() if name.endswith((*HEADS, *EMBEDDINGS)))
    cores = 0.0  # numbers of matrix product operators, which gptq leaves alone
    factors = dict[str, float]()  # of low ranks, which it quantizes
    # What quantized low ranks have without pivots, in two factors and in their product, of what they had.
    without_pivots = dict[str, tuple[float, float]]()
    for config in (link["config"] for link in job.chain):
        if config["use"] == "finercut":
            left = 1 - config["remove"]
            dense = {path: count * left for path, count in dense.items()}
            cores, factors = cores * left, {path: count * left for path, count in factors.items()}
        elif config["use"] in ("mpo", "factorize"):
            named = [p for p in dense if any(fnmatch.fnmatchcase(p, pattern) for pattern in config["layers"])]
            numbers = sum(dense[path] for path in named)
            kept = _kept_numbers(config, numbers)
            if config.get("embeddings") is not None:
                fixed -= width * tables * (1 - config["embeddings"])
            if kept is None:
                continue
            if _of_low_rank(config):
                factors |= {path: dense[path] * kept / numbers for path in named}
                if config["use"] == "mpo" and config["pivots"]:
                    without_pivots |= {
                        path: _without_pivots(kept / numbers, shapes.get(f"{path}.weight")) for path in named
                    }
            else:
                cores += kept
            dense = {path: count for path, count in dense.items() if path not in named}
        elif config["use"] == "squeeze":
            cores *= config["keep"]
            factors = {path: count * config["keep"] for path, count in factors.items()}
        elif config["use"] == "gptq":
            fixed += sum(count * _stored_bytes(config, path, width) for path, count in dense.items())
            for path, count in factors.items():
                ends = [_stored_bytes(config, path + end, width) for end in (".inner", ".outer")]
                spread, product = without_pivots.get(path, (1.0, math.inf))
                pivoted = count * sum(ends) / 2
                both = width not in ends
                fixed += min(spread * pivoted, product * count * max(ends)) if both else pivoted
            dense, factors = {}, {}
    return round(fixed + width * (cores + sum(factors.values()) + sum(dense.values())))


def _without_pivots(share: float, shape: list[int] | None) -> tuple[float, float]:
    """Numbers of a low rank r in plain factors, r (m + n), and in their product, over r (m + n - r), which are that share of m n."""
    if shape is None or len(shape) != 2:
        return 1.0, math.inf
    both, whole = sum(shape), math.prod(shape)
    rank = (both - math.sqrt(max(0.0, both * both - 4 * share * whole))) / 2
    return rank * both / (share * whole), 1 / share


def _stored_bytes(config: dict[str, Any], path: str, width: int) -> float:
    """Bytes of a weight after `gptq`, its share of scales and zeros included."""
    chosen = config["bits_for"].items()
    bits = next((bits for pattern, bits in chosen if fnmatch.fnmatchcase(path, pattern)), config["bits"])
    group = config["group_size"] if config["group_size"] > 0 else 4096
    return float(width) if bits == 16 else (bits + (16 + bits) / group) / 8


def _kept_numbers(config: dict[str, Any], numbers: float) -> float | None:
    """Of the `numbers` of the weights that a step decomposes, those that it keeps; None where its settings do not tell."""
    if config["keep"] is not None:
        return float(config["keep"]) * numbers
    if config.get("bytes") is not None:  # told for 16 bits a number
        return min(numbers, config["bytes"] / 2)
    return None


def _of_low_rank(config: dict[str, Any]) -> bool:
    """Whether most of what a step makes are two linear layers in place of one."""
    if config["use"] == "factorize":
        return config["form"] in ("svd", "whitened_svd", "asvd")
    return config["metric"] != "weights" and config["plans"] != "balanced"


def _measured_seconds(store: Store, root: str) -> list[dict[str, Any]]:
    """{"use", "config", "seconds"} of every artifact that was made of the model with the digest `root`."""
    found = []
    for path in sorted((store.root / "models").glob(f"[!.]*/{RECORD}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            last = record["chain"][-1]
            if record["root"] == root:
                found.append({"use": last["use"], "config": last["config"], "seconds": float(record["seconds"])})
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            continue  # not an artifact of ours, or half of one: it tells nothing
    return found


def _expected_seconds(job: Job, known: list[dict[str, Any]]) -> float | None:
    """Median time of the same method with the same settings, else with any."""
    same = [entry for entry in known if entry["use"] == job.use]
    alike = [entry for entry in same if entry["config"] == job.config] or same
    return median(entry["seconds"] for entry in alike) if alike else None


def _memory(plan: Plan) -> tuple[int, str]:
    """Bytes at the peak, and what they are made of."""
    folder = Path(plan.root.path)
    config = read_config(folder)
    dtype = working_dtype(plan.recipe.model.dtype)
    dtype = dtype if isinstance(dtype, torch.dtype) else stored_dtype(folder)
    parameters = original_parameters(folder)
    model = bytes_of(weight_files(folder)) if is_compressed(config) else parameters * dtype.itemsize
    spec = plan.recipe.data.calibration
    hidden = int(config.get_text_config().hidden_size)
    activations = 2 * spec.samples * spec.length * hidden * dtype.itemsize  # into a block and out of it
    training = 5 * 4 * parameters + LOGITS * min(MICRO_BATCH, 4096 * config.get_text_config().vocab_size)
    named = getattr(config.get_text_config(), "intermediate_size", None)
    hessians = 36 * (named if isinstance(named, int) else 4 * hidden) ** 2  # of the widest layer
    works = {job.use for name, job in plan.jobs.items() if not plan.cached[name]}
    needs = dict.fromkeys([*plan.recipe.evaluate.use], model)
    for use in works:
        needs[use] = model + (activations if METHODS[use].needs_calibration else 0)
        needs[use] += training if use in TRAINED else 0
        needs[use] += hessians if use in MOMENTS else 0
    for name in BESIDE_ORIGINAL & set(needs):
        needs[name] += model
    searches = (name for name, job in plan.jobs.items() if job.config.get("perplexity_ratio") and not plan.cached[name])
    trials = {plan.jobs[name].use for name in searches}
    for name in trials:
        needs[name] += 2 * model
    largest = max(needs, key=lambda name: needs[name]) if needs else ""
    made_of = [f"the model {human_bytes(model)} in {str(dtype).removeprefix('torch.')}"]
    if largest in BESIDE_ORIGINAL:
        made_of.append("as much for its original")
    if largest in trials:
        made_of.append("twice as much for its original and a trial")
    if largest in works and METHODS[largest].needs_calibration:
        made_of.append(f"calibration {human_bytes(activations)}")
    if largest in MOMENTS:
        made_of.append(f"second moments {human_bytes(hessians)}")
    if largest in TRAINED:
        made_of.append(f"training {human_bytes(training)}")
    return int(needs.get(largest, model)), f"{largest}: {', '.join(made_of)}" if largest else made_of[0]


__all__ = ["estimate", "short_config"]
