"""Artifacts: model folders named by the digest of what made them, whole under their final name or not there at all.

Store layout: `models/<digest>/` the artifacts, `evaluations/<digest>.json` what was measured, `locks/`, `scratch/<digest>/`
checkpoints of long steps, `champions/<line>.json` the artifacts that are the best of a line of runs, and beside them MLflow's
database and artifacts.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import nn

from tensorpress import digest
from tensorpress.errors import InputError, StepError
from tensorpress.files import umask, write_whole
from tensorpress.kernels.kernel_layer import kernel_layers
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.lease import Lease, lease_seconds
from tensorpress.loading import FORMAT_VERSION, REPLACED, artifact_config, layers_of
from tensorpress.record import record_problem
from tensorpress.remote import CARD, RECORD, Remote, remote_here
from tensorpress.structure import DENSE, find_structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("tensorpress")
PROBE = ".probe"
SHARD = "4GB"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest difference of logits between the model in memory and the folder opened in a fresh process."""
ROUNDED = ("bias", "values")
"""Tensors of compressed layers that are no parameters, and are stored in the model's precision as those are."""
CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "chat_template*",
    "*.model",
)


@dataclass(frozen=True)
class Artifact:
    """A model folder that tensorpress wrote."""

    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        """Contents of tensorpress.json: format version, digest, chain of steps, report, files."""
        return json.loads((self.folder / RECORD).read_text(encoding="utf-8"))

    @property
    def digest(self) -> str:
        return str(self.record["digest"])

    def problem(self) -> str | None:
        """What is wrong with the files on disk against the record; None for a whole artifact."""
        try:
            record = self.record
        except (OSError, ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            return f"{RECORD} is missing or cannot be read"
        wrong = record_problem(record)
        if wrong:
            return f"{RECORD}: {wrong}"
        for name, wanted in record["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != wanted["bytes"]:
                return f"{name} is missing or has another length"
            if _known_digest(path) != wanted["sha256"]:
                return f"{name} has other bytes than were written"
        return None


_digests: dict[tuple[str, int, int], str] = {}


def _known_digest(path: Path) -> str:
    """Digest of a file, computed once per process for each state of the file: artifacts are asked for several times in a run."""
    state = path.stat()
    key = (str(path), state.st_size, state.st_mtime_ns)
    if key not in _digests:
        _digests[key] = digest.of_file(path)
    return _digests[key]


EVALUATION = ("metrics", "conditions", "general", "texts")
"""Parts that a remembered measurement from another machine must have."""


class Store:
    """The folder that holds artifacts and measurements (`mlruns` by default).

    Where the environment names a remote (see `tensorpress.remote`), machines share it: what they make is published there, and
    what the folder has not is fetched from there. The first use of a remote that cannot be used raises InputError; one that
    stops answering, StepError.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser().absolute()
        names = ("models", "evaluations", "locks", "scratch", "sources", "champions")
        self.folders = tuple(self.root / name for name in names)
        self.remote = remote_here()
        self._lease_seconds = lease_seconds()
        self._leases: dict[tuple[int, str], Lease] = {}

    def open(self) -> Store:
        """Create the folders. Raises InputError when the place cannot be written or its remote cannot be used."""
        try:
            for folder in self.folders:
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise InputError(f"store: {self.root} cannot be written: {error.strerror or error}") from None
        if self.remote is not None:
            self.remote.open()
        return self

    def folder(self, name: str) -> Path:
        return self.root / "models" / name

    def scratch(self, name: str) -> Path:
        return self.root / "scratch" / name

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock of one digest; it goes with the process that holds it, however that ends.

        It keeps out this machine's processes. Those of other machines are kept out, by a lease, from the moment that `artifact` or
        `evaluation` finds nothing and it has to be made: what is there already costs no lease.
        """
        with FileLock(self.root / "locks" / f"{name}.lock"):
            if self.remote is None:
                yield
                return
            key = threading.get_ident(), name
            lease = self._leases[key] = Lease(self.remote, name, self._place(), self._lease_seconds)
            try:
                yield
            finally:
                del self._leases[key]
                lease.release()

    def _place(self) -> str:
        """What names this folder among those of all machines, as long as the machine is up."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        except OSError:  # not Linux
            boot = uuid.uuid4().hex
        status = (self.root / "locks").stat()
        return digest.of_json([boot, status.st_dev, status.st_ino])[:32]

    def _lease(self, name: str) -> Lease | None:
        """The lease that goes with a lock, if this thread holds that."""
        return self._leases.get((threading.get_ident(), name))

    def part(self, name: str) -> Path:
        """Where an artifact is written before it has its name."""
        return self.root / "models" / f".part-{name}"

    def drop_part(self, name: str) -> None:
        """Remove what a process that is gone had begun to write; whoever calls this holds the lock."""
        shutil.rmtree(self.part(name), ignore_errors=True)
        with suppress(OSError):
            self.part(name).with_suffix(PROBE).unlink()

    @contextmanager
    def lock_if_free(self, name: str) -> Iterator[bool]:
        """Hold the lock of one digest if nobody does; yields whether it is held now."""
        lock = FileLock(self.root / "locks" / f"{name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def artifact(self, name: str) -> Artifact | None:
        """The artifact of a digest if it is there and whole; fetched if it is whole in the remote.

        None to one who holds its lock means that nobody else makes it: no machine that shares the remote.
        """
        artifact, lease = self._whole(name), self._lease(name)
        if artifact is not None or self.remote is None:
            return artifact
        artifact = self._fetch(name)
        if artifact is None and lease is not None:
            lease.hold()
            artifact = self._fetch(name)  # another one may have made it while we waited
        return artifact

    def has(self, name: str) -> bool:
        """Whether the artifact is there, here or in the remote; nothing is fetched."""
        return self._whole(name) is not None or (self.remote is not None and self.remote.record(name) is not None)

    def _whole(self, name: str) -> Artifact | None:
        artifact = Artifact(self.folder(name))
        return artifact if artifact.folder.is_dir() and not artifact.problem() else None

    def _fetch(self, name: str) -> Artifact | None:
        if self.remote is None:
            return None
        if self._lease(name) is None:
            if self.remote.record(name) is None:
                return None
            with self.lock(name):  # another process here may be fetching it
                return self._whole(name) or self._fetch(name)
        try:
            self.drop_part(name)
            if not self.remote.fetch(name, self.part(name)):
                return None
            problem = Artifact(self.part(name)).problem()
            if problem:
                log.warning("store: %s: artifact %s is not used: %s", self.remote.shown, name[:12], problem)
                return None
            return self.put_in_place(name)
        finally:
            self.drop_part(name)

    def put_in_place(self, name: str) -> Artifact:
        """Give what was written beside its place its name, over a damaged one; it is on the disk then."""
        part, final = self.part(name), self.folder(name)
        for path in part.iterdir():
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        _sync(final.parent)
        return Artifact(final)

    def publish(self, name: str, made: bool = False) -> None:
        """Send an artifact to the remote if there is one and it has none; whoever calls this holds the lock.

        One that was `made` just now replaces one that could not be used there, unless another machine has published meanwhile
        because it took us for dead. Raises StepError when the remote fails; the artifact stays in the folder.
        """
        lease = self._lease(name)
        if self.remote is None or lease is None or not (made or self.remote.record(name) is None):
            return
        self.remote.upload(name, self.folder(name))
        if (lease.hold() and made) or self.remote.record(name) is None:
            self.remote.commit(name, self.folder(name))

    def touch(self, name: str) -> None:
        """Note that an artifact was used just now: the time of its record is what `tensorpress clean` takes for its age."""
        with suppress(OSError):  # a store that only others may write
            os.utime(self.folder(name) / RECORD)

    def note(self, name: str, record: dict[str, Any], card: str) -> None:
        """Renew the record and the card of an artifact; its other files, and so its digests, stay as they are."""
        write_whole(self.folder(name) / CARD, card)
        write_whole(self.folder(name) / RECORD, json.dumps(record, indent=1))
        if self.remote is not None:
            self.remote.renew(name, self.folder(name))

    def evaluation(self, name: str) -> dict[str, Any] | None:
        """A remembered measurement, or None; to one who holds its lock (`evaluation-<name>`): nobody else measures it."""
        try:
            return json.loads((self.root / "evaluations" / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass
        if self.remote is None:
            return None
        found, lease = self._fetch_evaluation(self.remote, name), self._lease(f"evaluation-{name}")
        if found is None and lease is not None:
            lease.hold()
            found = self._fetch_evaluation(self.remote, name)
        return found

    def _fetch_evaluation(self, remote: Remote, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads(remote.read(f"evaluations/{name}.json") or b"{}")
            if not all(isinstance(found[part], dict) for part in EVALUATION):
                return None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        write_whole(self.root / "evaluations" / f"{name}.json", json.dumps(found, indent=1, sort_keys=True))
        return dict(found)

    def remember(self, kind: str, name: str, value: dict[str, Any]) -> None:
        """Write `evaluations/<name>.json` or `sources/<name>.json`, whole or not at all. Measurements are shared."""
        text = json.dumps(value, indent=1, sort_keys=True)
        write_whole(self.root / kind / f"{name}.json", text)
        if self.remote is not None and kind == "evaluations":
            self.remote.write(f"{kind}/{name}.json", text.encode())


class Writer:
    """Writes one artifact: beside its place, checked in a fresh process, then renamed.

    The fresh process is started at once and loads its libraries while the step is still at work.
    """

    def __init__(self, store: Store, name: str):
        self.store, self.name = store, name
        self.part = store.part(name)
        self.checker = subprocess.Popen(
            [sys.executable, "-m", "tensorpress.fresh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.checker.kill()
        self.checker.wait()
        shutil.rmtree(self.part, ignore_errors=True)

    def write(
        self, model: PreTrainedModel, parent: Path, stored: torch.dtype, record: dict[str, Any], card: str
    ) -> Artifact:
        """Write `model` in the precision `stored`, with the tokenizer of the folder `parent`.

        The model in memory is rounded to what is stored. Raises StepError when the folder, opened in a fresh process, does not
        give the model's own outputs.
        """
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        save_model(model, self.part, stored)
        for pattern in CARRIED:
            for path in parent.glob(pattern):
                if path.is_file() and not (self.part / path.name).exists():
                    shutil.copyfile(path, self.part / path.name)
        self._check(model)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": digest.of_file(path)}
            for path in sorted(self.part.iterdir())
        }
        full = {"format_version": FORMAT_VERSION, "digest": self.name, **record, "files": files}
        (self.part / RECORD).write_text(json.dumps(full, indent=1), encoding="utf-8")
        (self.part / CARD).write_text(card, encoding="utf-8")
        return self.store.put_in_place(self.name)

    def _check(self, model: PreTrainedModel) -> None:
        ids = probe_ids(model)
        with torch.no_grad():
            output = model(input_ids=ids)[0].float().contiguous()
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        probe = self.part.with_suffix(PROBE)
        save_file({"ids": ids, "output": output}, probe)
        request = {
            "folder": str(self.part),
            "probe": str(probe),
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(model.device),
        }
        try:
            answer, _ = self.checker.communicate(json.dumps(request))
            result = json.loads(answer or "{}")
        except ValueError:
            result = {}
        finally:
            probe.unlink(missing_ok=True)
        if "difference" not in result:
            raise StepError(f"the written folder cannot be opened in a fresh process: {result.get('error', 'it died')}")
        bound = TOLERANCE[dtype]
        if not result["difference"] <= bound:
            raise StepError(
                f"the written folder's outputs differ from the model's by {result['difference']:.3g} (allowed {bound:.3g})"
            )


def probe_ids(model: nn.Module) -> torch.Tensor:
    """Sixteen token ids that the check of an artifact runs on."""
    size = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    return torch.randint(0, size, (1, 16), generator=torch.Generator().manual_seed(0)).to(model.device)  # type: ignore[arg-type]


def save_model(model: PreTrainedModel, folder: Path, stored: torch.dtype) -> None:
    """Save a model in the precision `stored`; the model in memory keeps its dtype but is rounded to what was stored.

    A model whose block layers are all GPTQ of one kind is written in the standard GPTQ layout.
    """
    worked = {name: parameter.dtype for name, parameter in model.named_parameters()}
    buffers = [(m, n, b.dtype) for m in kernel_layers(model) for n, b in m.named_buffers() if n in ROUNDED]
    model.config.dtype = stored
    layers = layers_of(model)
    plain = plain_gptq(model) if layers else None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if plain is not None:
        model.config.quantization_config = plain
        (folder / "quantize_config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    elif layers:
        model.config.quantization_config = artifact_config(layers)
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(stored)
        for layer, name, _ in buffers:
            setattr(layer, name, getattr(layer, name).to(stored))
        model.save_pretrained(folder, max_shard_size=SHARD)
        for path in folder.glob("*.safetensors"):
            path.chmod(0o666 & ~umask())
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(worked[name])
        for layer, name, dtype in buffers:
            setattr(layer, name, getattr(layer, name).to(dtype))


def plain_gptq(model: PreTrainedModel) -> dict[str, Any] | None:
    """The standard GPTQ `quantization_config` if every linear layer of the blocks is GPTQ of one kind, else None."""
    replaced = [module for module in model.modules() if isinstance(module, REPLACED)]
    if not all(isinstance(module, QuantizedLinear) for module in replaced):
        return None
    layers = [module for module in replaced if isinstance(module, QuantizedLinear)]
    whole_rows = all(layer.group_size == layer.in_features for layer in layers)
    kinds = {(layer.bits, -1 if whole_rows else layer.group_size, layer.zero_offset) for layer in layers}
    structure = find_structure(model)
    if len(kinds) != 1 or any(isinstance(model.get_submodule(path), DENSE) for path in structure.linear_paths):
        return None
    bits, group_size, zero_offset = kinds.pop()
    layout = "gptq" if zero_offset else "gptq_v2"
    block = structure.blocks[0]
    return {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": bool(zero_offset),
        "desc_act": False,
        "format": layout,
        "checkpoint_format": layout,
        "pack_dtype": "int32",
        "lm_head": False,
        "true_sequential": True,
        "modules_in_block_to_quantize": [
            [p.removeprefix(block.path + ".") for p in group] for group in block.linear_groups
        ],
        "meta": {"quantizer": ["tensorpress:0.1"]},
    }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
