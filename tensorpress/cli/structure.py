"""What `inspect` tells of a model: its structure, sizes and history, and a map of its layers for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.text import Text

from tensorpress.cli.common import console

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STYLES = {
    "dense": ("■", "default"),
    "mpo": ("▦", "cyan"),
    "8 bits": ("8", "green"),
    "4 bits": ("4", "yellow"),
    "3 bits": ("3", "dark_orange"),
    "2 bits": ("2", "magenta"),
    "block diagonal": ("◩", "blue"),
    "2:4": ("▥", "bright_green"),
    "removed": ("×", "red"),
}
NOT_THERE = ("·", "dim")
FORMS = {"gptq": "{bits} bits", "block_diagonal": "block diagonal", "semi_structured": "2:4"}
"""How forms of layers are called here, where their own names are another."""


def describe(folder: Path) -> dict[str, Any]:
    """Structure, sizes and history of a model folder. Raises InputError for one that cannot be opened.

    `bits_per_parameter` counts the weight files' bits over the parameters of the dense model that the config describes.
    """
    from tensorpress.artifact import RECORD, Artifact
    from tensorpress.checks import check_folder, read_config, weight_files
    from tensorpress.evaluators.size import bytes_of, needed_files, original_parameters
    from tensorpress.loading import load
    from tensorpress.structure import find_structure

    check_folder(folder)
    artifact = Artifact(folder) if (folder / RECORD).is_file() else None
    problem = artifact.problem() if artifact else None
    record = artifact.record if artifact and not problem else {}
    model = load(folder)
    structure = find_structure(model)
    weight_bytes, dense = bytes_of(weight_files(folder)), dense_parameters(read_config(folder))
    layers = _layers(model, structure)
    return {
        "path": str(folder.resolve()),
        "architecture": type(model).__name__,
        "kind": structure.kind,
        "dtype": str(model.dtype).removeprefix("torch."),
        "blocks": len(structure.blocks),
        "hidden_size": structure.hidden_size,
        "sublayers": len(structure.sublayers),
        "removed": _removed(model, structure),
        "parameters": original_parameters(folder),
        "original_parameters": dense,
        "bytes": bytes_of(needed_files(folder)),
        "weight_bytes": weight_bytes,
        "bits_per_parameter": 8 * weight_bytes / dense,
        "size_ratio": weight_bytes / (2 * dense),
        "digest": record.get("digest"),
        "base": record.get("base"),
        "chain": record.get("chain", []),
        "whole": None if artifact is None else problem is None,
        "problem": problem,
        "layers": layers,
    }


def dense_parameters(config: PretrainedConfig) -> int:
    """Parameters of the uncompressed model that a config describes, tied ones once; no weight is read."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from tensorpress.tasks.planning import config_kind

    opener: Any = AutoModelForCausalLM if config_kind(config) == "causal" else AutoModel
    with torch.device("meta"):
        model = opener.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def layer_map(found: dict[str, Any]) -> Text:
    """Blocks across, kinds of linear layer down: how each is stored."""
    cells = {(layer["kind"], layer["block"]): layer["form"] for layer in found["layers"]}
    kinds: dict[str, str] = {}
    for layer in found["layers"]:
        kinds.setdefault(layer["kind"], layer["sublayer"])
    for gone in found["removed"]:
        same = [kind for kind, sublayer in kinds.items() if sublayer == gone["sublayer"]]
        for kind in same or [gone["sublayer"]]:
            kinds.setdefault(kind, gone["sublayer"])
            cells[kind, gone["block"]] = "removed"
    ordered = sorted(kinds, key=lambda kind: kinds[kind] != "attention")
    width = max((len(kind) for kind in ordered), default=0) + 2
    text = Text(no_wrap=True)
    text.append(f"{'block':<{width}}{_numbers(found['blocks'])}\n", style="dim")
    for kind in ordered:
        text.append(f"{kind:<{width}}")
        for block in range(found["blocks"]):
            symbol, style = STYLES.get(cells.get((kind, block), ""), NOT_THERE)
            text.append(f"{symbol} ", style=style)
        text.append("\n")
    counts = Counter(cells.values())
    for form, (symbol, style) in STYLES.items():
        if counts[form]:
            text.append(symbol, style=style)
            text.append(f" {form} ({counts[form]})   ")
    return text


def show(found: dict[str, Any], layers: bool) -> None:
    """Print what `describe` found."""
    from tensorpress.pictures.tables import clean, human_bytes, human_count, human_seconds
    from tensorpress.tasks.estimate import short_config

    dense, kept = human_count(found["original_parameters"]), human_count(found["parameters"])
    lines = [
        f"[bold]{escape(clean(found['path']))}[/]",
        f"{found['architecture']} ({found['kind']}, {found['dtype']}): {found['blocks']} blocks, "
        f"{found['sublayers']} sublayers, hidden size {found['hidden_size']}",
        f"{kept} parameters stored, {dense} in the dense model; {human_bytes(found['bytes'])} on disk, "
        f"{found['bits_per_parameter']:.2f} bits for each parameter of the dense model, {found['size_ratio']:.3f} of its 16-bit size",
    ]
    if found["removed"]:
        gone = ", ".join(f"block {one['block']} {one['sublayer'].replace('_', ' ')}" for one in found["removed"])
        lines.append(f"removed: {gone}")
    for number, link in enumerate(found["chain"], start=1):
        seconds = f", {human_seconds(link['seconds'])}" if link.get("seconds") is not None else ""
        use = link.get("use", "")
        settings = short_config(use, link.get("config", {}))
        lines.append(escape(clean(f"step {number}: {link['step']} ({use} {settings}{seconds})")))
    if found["whole"]:
        lines.append(f"files: [green]whole[/], as written under {str(found['digest'])[:12]}")
    elif found["problem"]:
        lines.append(f"files: [bold red]not whole:[/] {escape(clean(found['problem']))}")
    for line in lines:
        console.print(line, soft_wrap=True)
    console.print(layer_map(found), soft_wrap=True)
    if layers:
        console.print(_layer_table(found["layers"]))


def _layers(model: Any, structure: Any) -> list[dict[str, Any]]:
    from tensorpress.evaluators.speed import resident_bytes
    from tensorpress.kernels.kernel_layer import KernelLayer
    from tensorpress.structure import linear_shape

    rows = []
    for block in structure.blocks:
        for sublayer in block.sublayers:
            for path in sublayer.paths:
                layer = model.get_submodule(path)
                shape = linear_shape(layer)
                stored = resident_bytes(layer)
                spec: dict[str, Any] = {"form": "dense"}
                count = sum(parameter.numel() for parameter in layer.parameters())
                if isinstance(layer, KernelLayer):
                    spec, count = layer.spec(), layer.parameter_count()
                rows.append(
                    {
                        "layer": path,
                        "block": block.index,
                        "sublayer": sublayer.kind,
                        "kind": path.removeprefix(block.path + "."),
                        "form": FORMS.get(spec["form"], spec["form"]).format(**spec),
                        "shape": list(shape),
                        "parameters": count,
                        "bytes": stored,
                        "bits_per_weight": 8 * stored / math.prod(shape),
                        "bonds": spec.get("bonds"),
                    }
                )
    return rows


def _removed(model: Any, structure: Any) -> list[dict[str, Any]]:
    """The sublayers that were taken out: those that are missing in a block where something stands in for them."""
    from tensorpress.kernels.removed import RemovedAttention, RemovedLinear

    gone = []
    for block in structure.blocks:
        stubs = [type(module) for module in model.get_submodule(block.path).modules()]
        if block.attention is None and RemovedAttention in stubs:
            gone.append({"block": block.index, "sublayer": "attention"})
        if block.feed_forward is None and RemovedLinear in stubs:
            gone.append({"block": block.index, "sublayer": "feed_forward"})
    return gone


def _numbers(blocks: int) -> str:
    """Numbers of the blocks above columns of two characters: all up to ten, else every fifth."""
    every = 1 if blocks <= 10 else 5
    return "".join(f"{block if block % every == 0 else '':<{2 * every}}" for block in range(0, blocks, every)).rstrip()


def _layer_table(layers: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    from tensorpress.pictures.tables import clean, human_bytes

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("layer", "form", "shape", "size", "bits per weight"):
        table.add_column(heading, justify="left" if heading in ("layer", "form") else "right", overflow="fold")
    for layer in layers:
        form = f"{layer['form']} {layer['bonds']}" if layer["bonds"] else layer["form"]
        shape = " x ".join(map(str, layer["shape"]))
        table.add_row(
            escape(clean(layer["layer"])),
            escape(form),
            shape,
            human_bytes(layer["bytes"]),
            f"{layer['bits_per_weight']:.2f}",
        )
    return table
