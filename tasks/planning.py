"""The plan of a recipe: what has to be done, under which digest, and what is there already. Runs nothing, writes nothing."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PretrainedConfig

from tensorpress import digest
from tensorpress.artifact import Store, write_whole
from tensorpress.checks import check_folder, read_config
from tensorpress.compressors.base import Compressor
from tensorpress.compressors.catalog import METHODS
from tensorpress.compressors.data import VALIDATION_SHARE
from tensorpress.errors import InputError, nearest
from tensorpress.evaluators.catalog import MEASURES, applicable, given_metrics
from tensorpress.evaluators.sts import read_pairs
from tensorpress.kernels import registry
from tensorpress.recipe import ROOT, Node, Recipe
from tensorpress.secrets import redact
from tensorpress.source import ModelHandle, check_source, read_tokenizer, resolve, source_files
from tensorpress.structure import Kind
from tensorpress.text import Text, has_tokens, overlap, read_text


@dataclass(frozen=True)
class Job:
    """One step on one branch, self-contained and JSON-able: what is handed to a task, here or on another machine."""

    node: str
    step: str
    branch: str
    parent: str
    use: str
    config: dict[str, Any]
    digest: str
    parent_digest: str
    root: dict[str, str]
    calibration: dict[str, Any]
    seed: int
    dtype: str
    store: str
    chain: list[dict[str, Any]] = field(default_factory=list)
    recipe_yaml: str = ""
    threads: int = 0
    """Threads of torch that the step may use; 0: as the process has them."""
    limits: dict[str, float | None] = field(default_factory=dict)
    """`seconds` and `memory` (GiB) that the step may take; see `tensorpress.recipe.Limits`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def method(self) -> Compressor:
        return METHODS[self.use].model_validate(self.config)


@dataclass(frozen=True)
class Plan:
    """A recipe, checked against its model and its texts."""

    recipe: Recipe
    store: Store
    root: ModelHandle
    kind: Kind
    jobs: dict[str, Job]
    cached: dict[str, bool]
    leaves: tuple[str, ...]
    recipe_yaml: str
    layers: dict[str, int]
    """Parameters of each dense linear layer in the root's blocks; empty where every step is cached."""

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Nodes whose artifacts are measured; the original is measured always."""
        return tuple(self.jobs) if self.recipe.evaluate.at == "steps" else self.leaves


def make_plan(recipe: Recipe, store: Store, recipe_yaml: str = "") -> Plan:
    """Check a recipe's model and texts and name every artifact that it makes. Raises InputError; nothing is written."""
    recipe_yaml = redact(recipe_yaml)  # it goes into cards, records and MLflow; no digest is made of it
    _check_store(store)
    folder = resolve(recipe.model.source, recipe.model.revision)
    config = check_folder(folder)
    kind = config_kind(config)
    _check_measures(recipe, kind)
    root = known_source(folder, store)
    _check_texts(recipe, folder)
    data = calibration_key(recipe)
    jobs: dict[str, Job] = {}
    for node in recipe.nodes:
        parent = jobs.get(node.parent)
        jobs[node.id] = _job(recipe, node, parent, root, data, store, recipe_yaml)
    cached = {name: store.has(job.digest) for name, job in jobs.items()}
    layers = {} if all(cached.values()) else _check_methods(recipe, folder, kind)
    leaves = tuple(node.id for node in recipe.leaves)
    return Plan(recipe, store, root, kind, jobs, cached, leaves, recipe_yaml, layers)


def check_kernels(name: str) -> None:
    """Refuse a backend that no operation knows. Raises InputError."""
    known = {backend for operation in registry.operations() for backend in registry.backends(operation)}
    if name != "auto" and name not in known:
        raise InputError(f"kernels: {name!r} is not known; known: auto, {', '.join(sorted(known))}")


def timed(recipe: Recipe) -> bool:
    """Whether any of a recipe's measures takes times, which other work on the machine would falsify."""
    return any(MEASURES[name].timed for name in recipe.evaluate.use)


def config_kind(config: PretrainedConfig) -> Kind:
    """`causal` or `encoder`, from the architecture that a config names."""
    name = (config.architectures or [""])[0]
    return "causal" if name.endswith(("ForCausalLM", "LMHeadModel")) else "encoder"


_known: dict[str, str] = {}


def known_source(folder: Path, store: Store) -> ModelHandle:
    """Check and name a model folder; remembered by path, length and time of its files, since large models take minutes."""
    files = source_files(folder)
    seen = digest.of_json([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    place = store.root / "sources" / f"{seen}.json"
    if place.is_file():
        _known[seen] = place.read_text(encoding="utf-8").strip()
    elif seen not in _known:
        _known[seen] = check_source(folder).digest
    if place.parent.is_dir() and not place.is_file():
        write_whole(place, _known[seen])
    return ModelHandle(str(folder.resolve()), _known[seen])


def code_fingerprint(use: str) -> str:
    """Digest of the code that a method's result depends on: its own file, what that imports, the kernels, and library versions."""
    package = Path(digest.__file__).parent
    room = _source_folder("tensorpress.compressors")
    own = _imported(Path(_source_file(METHODS[use])), room) | {room / "calibration.py", room / "data.py"}
    files = [package / name for name in ("structure.py", "specs.py", "loading.py", "artifact.py", "text.py")]
    code = digest.of_code(*sorted(own), _source_folder("tensorpress.kernels"), *files)
    return digest.of_json([code, _library_versions()])


def _imported(file: Path, room: Path) -> set[Path]:
    """A file and all that it imports from the compressors, directly or not."""
    found, left = set[Path](), [file]
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            names = re.findall(
                r"^from tensorpress\.compressors\.([\w.]+) import", one.read_text(encoding="utf-8"), re.M
            )
            left += [room / f"{name.replace('.', '/')}.py" for name in names]
    return found


def evaluation_fingerprint() -> str:
    """Digest of the code that measurements depend on, and library versions."""
    package = Path(digest.__file__).parent
    rooms = [_source_folder("tensorpress.evaluators"), _source_folder("tensorpress.kernels")]
    files = [package / name for name in ("structure.py", "loading.py", "text.py")]
    return digest.of_json([digest.of_code(*rooms, *files), torch.__version__, transformers.__version__])


def _library_versions() -> list[str]:
    libraries = (torch.__version__, transformers.__version__, metadata.version("tensorly"))
    return [".".join(version.split(".")[:2]) for version in libraries]


def calibration_key(recipe: Recipe) -> dict[str, Any]:
    """What the calibration data depend on."""
    spec = recipe.data.calibration
    text = read_text(spec.source, spec.split, "data.calibration.source")
    source = spec.source if spec.source == "demo" else str(Path(spec.source).expanduser().resolve())
    return {"source": source, "split": spec.split, "samples": spec.samples, "length": spec.length, "text": text.digest}


def _job(
    recipe: Recipe, node: Node, parent: Job | None, root: ModelHandle, data: dict[str, Any], store: Store, text: str
) -> Job:
    method = node.method
    assert isinstance(method, Compressor)
    config = method.model_dump(mode="json")
    parent_digest = parent.digest if parent else root.digest
    made_of = {
        "parent": parent_digest,
        "root": root.digest,
        "config": config,
        "code": code_fingerprint(method.use),
        "data": {**data, "source": None, "validation": VALIDATION_SHARE} if method.needs_calibration else None,
        "seed": recipe.seed,
        "dtype": recipe.model.dtype,
    }
    name = digest.of_json(made_of)[:32]
    chain = [
        *(parent.chain if parent else []),
        {"step": node.step, "use": method.use, "config": config, "digest": name},
    ]
    source = recipe.model.source
    handle = {"path": root.path, "digest": root.digest, "source": source, "name": Path(source).name}
    return Job(
        node.id, node.step, node.branch, node.parent, method.use, config, name, parent_digest, handle, data, recipe.seed,
        recipe.model.dtype, str(store.root), chain, text, limits=recipe.limits.model_dump(),
    )  # fmt: skip


def _check_store(store: Store) -> None:
    place = store.root
    try:
        in_the_way = next((path for path in store.folders if path.exists() and not path.is_dir()), None)
        while not place.exists():
            place = place.parent
        if in_the_way or not place.is_dir():
            raise InputError(f"store: {store.root} cannot be written: {in_the_way or place} is a file")
        with tempfile.TemporaryFile(dir=place):  # permissions alone do not tell: root, /proc, a disk that is read-only
            pass
    except OSError as error:
        raise InputError(f"store: {store.root} cannot be written: {place}: {error.strerror or error}") from None


def _check_measures(recipe: Recipe, kind: Kind) -> None:
    for name in recipe.evaluate.use:
        if not applicable(name, kind):
            usable = ", ".join(n for n in MEASURES if applicable(n, kind))
            raise InputError(f"evaluate: {name} cannot measure a model of kind {kind}; usable: {usable}")
    evaluation = recipe.data.evaluation
    demo = recipe.model.source == "demo" and evaluation.source == "demo"
    known = {"step_seconds", *given_metrics(recipe.evaluate.use, kind, other=bool(evaluation.other), demo=demo)}
    for name in recipe.gates:
        if name not in known:
            used = ", ".join(recipe.evaluate.use)
            here = f"a model of kind {kind}" + ("" if evaluation.other else " without data.evaluation.other")
            raise InputError(f"gates.{name}: is not measured by {used} for {here}{nearest(name, known)}")
    if "sts" in recipe.evaluate.use and recipe.data.evaluation.pairs is None:
        raise InputError("data.evaluation.pairs: is missing; sts needs a CSV of sentence pairs")


def _check_texts(recipe: Recipe, folder: Path) -> None:
    calibration, evaluation = recipe.data.calibration, recipe.data.evaluation
    first = read_text(calibration.source, calibration.split, "data.calibration.source")
    texts: list[tuple[str, Text]] = []
    if set(recipe.evaluate.use) - {"size", "sts"}:
        texts.append(("evaluation.source", read_text(evaluation.source, evaluation.split, "data.evaluation.source")))
    if evaluation.other is not None:
        texts.append(("evaluation.other", read_text(evaluation.other, "other", "data.evaluation.other")))
    for where, text in texts:
        count = (evaluation.samples or 0) * evaluation.length * 8  # characters that are surely measured on, as a rule
        measured = Text(text.name, text.content[:count] or text.content)
        if max(overlap(measured, first), overlap(text, first), overlap(first, text)) > 0.5:
            raise InputError(
                f"data.{where}: stands in the calibration text; quality must be measured on text that calibration never saw"
            )
    if evaluation.pairs is not None:
        read_pairs(Path(evaluation.pairs).expanduser())
    limit = getattr(read_config(folder).get_text_config(), "max_position_embeddings", None)
    for name, length in (("calibration", calibration.length), ("evaluation", evaluation.length)):
        if limit is not None and length > limit:
            raise InputError(f"data.{name}.length: found {length}, but the model takes {limit} tokens at most")
    tokenizer = read_tokenizer(folder)
    if not has_tokens(first, tokenizer, 2 * calibration.length):
        raise InputError(f"data.calibration: the text has fewer than two windows of {calibration.length} tokens")
    for where, text in texts:
        if not has_tokens(text, tokenizer, evaluation.length):
            raise InputError(f"data.{where}: the text has fewer than one window of {evaluation.length} tokens")


def _check_methods(recipe: Recipe, folder: Path, kind: Kind) -> dict[str, int]:
    """Let every method refuse the model before any of them works; returns the parameters of its dense block layers."""
    from tensorpress.loading import load, outline
    from tensorpress.structure import DENSE, find_structure, linear_shape

    for node in recipe.nodes:
        kinds = getattr(type(node.method), "kinds", ())
        if kind not in kinds:
            raise InputError(
                f"steps.{node.step}: {node.method.use} needs a model of kind {' or '.join(kinds)}; this one is {kind}"
            )
    try:
        model = outline(folder)
        structure = find_structure(model)
    except (RuntimeError, NotImplementedError):  # the architecture looks at values, which the meta device has not
        model = load(folder)
        structure = find_structure(model)
    for node in recipe.nodes:
        assert isinstance(node.method, Compressor)
        try:
            node.method.check(model, structure)
            if not {before.method.use for before in recipe.ancestors(node)} & set(node.method.works_on):
                node.method.check_layers(model, structure)
        except InputError as error:
            lines = (_placed(node.step, type(node.method), problem) for problem in error.problems)
            raise InputError(*lines) from None
    layers = {path: model.get_submodule(path) for path in structure.linear_paths}
    return {path: math.prod(linear_shape(layer)) for path, layer in layers.items() if isinstance(layer, DENSE)}


def _placed(step: str, method: type[Compressor], problem: str) -> str:
    """A problem's line with its place in the recipe: `steps.q.group_size: ...`, or `steps.q: gptq: ...`."""
    field_ = problem.partition(":")[0]
    return f"steps.{step}.{problem}" if field_ in method.model_fields else f"steps.{step}: {problem}"


def _source_file(thing: Any) -> str:
    import inspect

    return inspect.getfile(thing)


def _source_folder(package: str) -> Path:
    import importlib.util

    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


Dtype = Literal["float32", "bfloat16", "stored"]


def working_dtype(name: str) -> Any:
    """The dtype that a model is opened in."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "stored": "auto"}[name]


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision that artifacts are written in: the one that the original has."""
    config = read_config(folder)
    value = getattr(config, "dtype", None)
    return value if isinstance(value, torch.dtype) else getattr(torch, str(value or "float32").removeprefix("torch."))


__all__ = ["ROOT", "Job", "Plan", "make_plan"]
