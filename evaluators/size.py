"""Bytes on disk, and bits for each parameter of the original; read from file sizes and safetensors headers alone."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open

from tensorpress.checks import PICKLES, read_config, weight_files
from tensorpress.errors import InputError
from tensorpress.evaluators.base import EvaluationData, Evaluator, Measurement, Progress, Subject, no_progress

RULE = (
    "all files of the folder (not of folders in it) but documentation, tensorpress.json, pictures, Python sources, plain "
    "texts other than vocabularies, hidden files, and weights that are not opened"
)
NOT_NEEDED = {".md", ".py", ".png", ".svg", ".jpg", ".jpeg", ".gif", ".html", ".txt", ".lock"}
OTHER_WEIGHTS = {".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", *PICKLES}
VOCABULARIES = {"vocab.txt", "merges.txt"}
PACKED = ("qweight", "qzeros", "scales", "g_idx")
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def needed_files(folder: Path) -> list[Path]:
    """The files that have to be there to run the model, sorted: what `RULE` says. Raises InputError without weights."""
    weights = weight_files(folder)
    others = [
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith((".", "LICENSE", "README", "NOTICE"))
        and path.name != "tensorpress.json"
        and (path.suffix.lower() not in NOT_NEEDED | OTHER_WEIGHTS or path.name in VOCABULARIES)
    ]
    return sorted({*weights, *others})


def bytes_of(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def tensor_shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) of all tensors of a model folder, from the headers."""
    shapes = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                view = tensors.get_slice(name)
                shapes[name] = (view.get_dtype(), tuple(view.get_shape()))
    return shapes


def original_parameters(folder: Path) -> int:
    """Number of weights that a model folder stores.

    A packed GPTQ layer counts as the in * out weights (len(g_idx) * columns of qweight) that its words hold, without its
    zeros, scales and g_idx; a tied head counts once; masks and other buffers do not count. Raises InputError for packed
    weights without their g_idx.
    """
    shapes = tensor_shapes(folder)
    packed = {name.removesuffix("qweight") for name in shapes if name.endswith(".qweight")}
    total = 0
    for prefix in packed:
        if prefix + "g_idx" not in shapes:
            raise InputError(f"{folder}: {prefix}qweight has no {prefix}g_idx beside it; this is no GPTQ layout")
        total += shapes[prefix + "g_idx"][1][0] * shapes[prefix + "qweight"][1][1]
    for name, (dtype, shape) in shapes.items():
        prefix, _, last = name.rpartition(".")
        of_packed = prefix + "." in packed and last in PACKED
        buffer = dtype not in FLOATS or last in ("inv_freq", "masked_bias") or (last == "bias" and len(shape) > 1)
        if not of_packed and not buffer:
            total += math.prod(shape)
    return total - _stored_twice(folder, shapes)


def _stored_twice(folder: Path, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Weights of a head that is the embedding but was written beside it."""
    heads = [name for name in HEADS if name in shapes]
    if not heads or not read_config(folder).get_text_config().tie_word_embeddings:
        return 0
    embedded = any(name.endswith(EMBEDDINGS) and shape == shapes[heads[0]][1] for name, (_, shape) in shapes.items())
    return math.prod(shapes[heads[0]][1]) if embedded else 0


class Size(Evaluator):
    """`bytes` of all that is needed to run, `weight_bytes`, `parameters`, and `bits_per_parameter`.

    The last is the weight files' bits, with scales, zeros and embeddings, over the parameters of the original.
    """

    name = "size"
    gives = (
        "bytes",
        "weight_bytes",
        "size_ratio",
        "bits_per_parameter",
        "parameters",
    )
    kinds = ("causal", "encoder")

    def evaluate(self, subject: Subject, data: EvaluationData, progress: Progress = no_progress) -> Measurement:
        weight_bytes = bytes_of(weight_files(subject.folder))
        original = original_parameters(subject.original_folder)
        metrics = {
            "bytes": float(bytes_of(needed_files(subject.folder))),
            "weight_bytes": float(weight_bytes),
            "parameters": float(original_parameters(subject.folder)),
            "bits_per_parameter": 8 * weight_bytes / original,
        }
        return Measurement(metrics, {"original_parameters": original, "bytes_count": RULE})
