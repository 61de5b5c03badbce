"""The calibration walk: block by block through a model, each block fed with what the compressed blocks before it give.

The loop over blocks lives here and nowhere else. One block's inputs are in memory at a time, and the walk can be
checkpointed after each block: a walk that is run again goes on behind the last block that was saved, to the same bits.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tensorpress.compressors.base import LayerReport, Progress, no_progress
from tensorpress.errors import InputError, StepError
from tensorpress.kernels.kernel_layer import kernel_layers
from tensorpress.loading import apply_layers, layers_of
from tensorpress.structure import Block, Structure, without_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Visit = Callable[[Block, "BlockInputs"], list[LayerReport]]


class _Stop(Exception):
    """Raised by a hook to end a forward pass that has shown what was wanted."""


@dataclass
class BlockInputs:
    """The inputs of one block over the whole calibration set.

    `hidden`: one tensor [batch, length, width] for each batch; `arguments`: the keyword arguments that the model gives to
    this block, for each batch size.
    """

    module: nn.Module
    hidden: list[torch.Tensor]
    arguments: dict[int, dict[str, Any]]
    original: BlockInputs | None = None
    """The block as it was, with the inputs that the blocks before it gave as they were; where the walk was asked for it."""

    @torch.no_grad()
    def run(self) -> Iterable[torch.Tensor]:
        """Run the block over all batches; yields each output [batch, length, width]."""
        for states in self.hidden:
            output = self.module(states, **self.arguments[len(states)])
            yield output[0] if isinstance(output, tuple) else output

    def observe(self, layer: nn.Module, see: Callable[[torch.Tensor], None]) -> None:
        """Run the block over all batches and hand every input of `layer` to `see` as [tokens, features].

        The block is left as soon as the layer was reached.
        """
        for inputs in self.inputs_of(layer):
            see(inputs)

    def observe_both(self, path: str, see: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        """The same for the layer at `path` in the block, together with what it gets in the original: see(inputs, original inputs)."""
        assert self.original is not None
        pairs = zip(
            self.inputs_of(self.module.get_submodule(path)),
            self.original.inputs_of(self.original.module.get_submodule(path)),
            strict=True,
        )
        for inputs, original in pairs:
            see(inputs, original)

    def inputs_of(self, layer: nn.Module) -> Iterator[torch.Tensor]:
        """What reaches a layer of the block, batch for batch, as [tokens, features]."""
        for states in self.hidden:
            seen: list[torch.Tensor] = []

            def hook(module: nn.Module, args: tuple[torch.Tensor, ...], seen: list[torch.Tensor] = seen) -> None:
                seen.append(args[0].detach().reshape(-1, args[0].shape[-1]))
                raise _Stop

            handle = layer.register_forward_pre_hook(hook)
            try:
                with torch.no_grad():
                    self.module(states, **self.arguments[len(states)])
            except _Stop:
                pass
            finally:
                handle.remove()
            yield seen[0]


def walk(
    model: PreTrainedModel,
    structure: Structure,
    windows: torch.Tensor,
    visit: Visit,
    *,
    what: str = "blocks",
    progress: Progress = no_progress,
    scratch: Path | None = None,
    batch_tokens: int = 4096,
    checkpoint_seconds: float = 60.0,
    with_original: bool = False,
    finished: bool = True,
) -> list[LayerReport]:
    """Visit every block in order with its inputs; return what the visits report, joined.

    `windows`: int64 [samples, length]. `visit` may change the block in place. With `scratch`, the state after a block is
    saved when more than `checkpoint_seconds` have passed since the last save. `with_original` keeps a second stream of hidden
    states, that of the model as it came, and a copy of one block. Where the method has more to do than the walk, it is not `finished`: the state behind the
    last block is saved and kept, and whoever asked for that calls `clear` in the end.
    """
    batches = list(windows.to(model.device).split(max(1, batch_tokens // windows.shape[1])))
    arguments = _block_arguments(model, structure, batches)
    checkpoint = _Checkpoint(scratch, checkpoint_seconds)
    rows, first, streams = checkpoint.restore(model, structure)
    if streams is None:
        hidden = [_first_hidden(model, structure, batch) for batch in batches]
        streams = [hidden, hidden] if with_original else [hidden]
    for block in structure.blocks[first:]:
        progress(what, block.index, len(structure.blocks))
        module = model.get_submodule(block.path)
        inputs = BlockInputs(module, streams[0], arguments[block.index])
        if with_original:
            inputs.original = BlockInputs(copy.deepcopy(module), streams[1], arguments[block.index])
        found = visit(block, inputs)
        rows += found
        streams = [list(one.run()) for one in (inputs, inputs.original) if one is not None]
        checkpoint.save(model, block, found, streams, now=not finished and block is structure.blocks[-1])
    progress(what, len(structure.blocks), len(structure.blocks))
    if finished:
        checkpoint.clear()
    return rows


def clear(scratch: Path | None) -> None:
    """Remove the checkpoint of a walk."""
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)


def _forward(model: PreTrainedModel, batch: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=batch, **without_cache(model))


def _first_hidden(model: PreTrainedModel, structure: Structure, batch: torch.Tensor) -> torch.Tensor:
    """What the embeddings give to the first block: [batch, length, width]."""
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _Stop

    handle = model.get_submodule(structure.blocks[0].path).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        _forward(model, batch)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


def _block_arguments(
    model: PreTrainedModel, structure: Structure, batches: list[torch.Tensor]
) -> list[dict[int, dict[str, Any]]]:
    """The keyword arguments (masks, positions) that each block gets, for each batch size that occurs."""
    result: list[dict[int, dict[str, Any]]] = [{} for _ in structure.blocks]
    for batch in {len(batch): batch for batch in batches}.values():
        handles = []
        for block in structure.blocks:

            def hook(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = block.index
            ) -> None:
                positional = dict(zip(_parameter_names(module)[1 : len(args)], args[1:], strict=False))
                named = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                result[index][len(batch)] = {**positional, **named}  # noqa: B023 - hooks are gone before the next batch

            handles.append(model.get_submodule(block.path).register_forward_pre_hook(hook, with_kwargs=True))
        try:
            _forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return result


def _parameter_names(module: nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(module.forward).parameters)


class _Checkpoint:
    """State of a walk on disk: for each block its layers' forms, its weights and its rows; behind the last, the hidden states."""

    def __init__(self, folder: Path | None, seconds: float):
        self.folder, self.seconds, self.last = folder, seconds, time.monotonic()
        self.unsaved: list[tuple[Block, list[LayerReport]]] = []

    def restore(
        self, model: PreTrainedModel, structure: Structure
    ) -> tuple[list[LayerReport], int, list[list[torch.Tensor]] | None]:
        """What was saved last. A checkpoint that cannot be read (the disk was full) is thrown away; then StepError."""
        try:
            return self._restore(model, structure)
        except (OSError, ValueError, KeyError, SafetensorError, InputError) as error:
            self.clear()
            raise StepError(
                f"the checkpoint of this step cannot be read and was removed; run it again ({error})"
            ) from None

    def _restore(
        self, model: PreTrainedModel, structure: Structure
    ) -> tuple[list[LayerReport], int, list[list[torch.Tensor]] | None]:
        if self.folder is None or not (self.folder / "walk.json").is_file():
            return [], 0, None
        state = json.loads((self.folder / "walk.json").read_text())
        rows: list[LayerReport] = []
        device = str(model.device)
        hidden = load_file(self.folder / state["hidden"], device)
        for block in structure.blocks[: state["next"]]:
            saved = json.loads((self.folder / f"block-{block.index:05d}.json").read_text())
            apply_layers(model, {f"{block.path}.{path}": spec for path, spec in saved["layers"].items()})
            weights = load_file(self.folder / f"block-{block.index:05d}.safetensors", device)
            model.get_submodule(block.path).load_state_dict(weights, assign=True)
            rows += [LayerReport(**row) for row in saved["rows"]]
        for layer in kernel_layers(model):
            layer.kernel = "reference"  # as in a walk that was not interrupted
        count = state["batches"]
        streams = [[hidden[f"{i:05d}"] for i in range(s, s + count)] for s in range(0, len(hidden), count)]
        return rows, state["next"], streams

    def save(
        self,
        model: PreTrainedModel,
        block: Block,
        rows: list[LayerReport],
        streams: list[list[torch.Tensor]],
        *,
        now: bool = False,
    ) -> None:
        """Save what was done since the last time, if that is long ago or it is to be `now`."""
        if self.folder is None:
            return
        self.unsaved.append((block, rows))
        if not now and time.monotonic() - self.last < self.seconds:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for done, found in self.unsaved:
            module = model.get_submodule(done.path)
            weights = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
            save_file(weights, self.folder / f"block-{done.index:05d}.safetensors")
            _write_json(
                self.folder / f"block-{done.index:05d}.json",
                {"layers": layers_of(module), "rows": [vars(row) for row in found]},
            )
        name = f"hidden-{block.index:05d}.safetensors"
        hidden = [states.contiguous() for stream in streams for states in stream]
        save_file({f"{i:05d}": states for i, states in enumerate(hidden)}, self.folder / name)
        state = {"next": block.index + 1, "hidden": name, "batches": len(streams[0])}
        _write_json(self.folder / "walk.json", state)
        for old in self.folder.glob("hidden-*.safetensors"):
            if old.name != name:
                old.unlink()
        self.unsaved, self.last = [], time.monotonic()

    def clear(self) -> None:
        clear(self.folder)


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)
