"""Artifacts are whole under their final name or not there at all, whoever dies or meddles."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import tensorpress.artifact as artifact_module
from tensorpress.artifact import Artifact, Store, Writer, probe_ids, save_model, write_whole
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.errors import InputError, StepError
from tensorpress.loading import load

NAME = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store").open()


@pytest.fixture
def compressed(make_model, make_calibration):
    model, calibration = make_model("llama"), make_calibration()
    MPO(metric="weights", keep=0.5, layers=("*mlp*",)).compress(model, calibration)
    GPTQ(bits=4, group_size=16).compress(model, calibration)
    return model


@pytest.fixture
def written(store, compressed, make_folder):
    """An artifact on disk whose parent folder has a tokenizer."""
    parent = make_folder("llama")
    with Writer(store, NAME) as writer:
        return writer.write(compressed, parent, torch.float32, {"chain": [{"step": "a"}], "seed": 3}, "# a card")


def left_behind(store):
    return sorted(path.name for path in (store.root / "models").iterdir())


def test_written_checked_and_renamed(written, store, compressed, make_ids, outputs, plain_kernels):
    assert written.folder == store.folder(NAME) and left_behind(store) == [NAME]
    record = written.record
    assert record["format_version"] == 1 and record["digest"] == written.digest == NAME
    assert record["chain"] == [{"step": "a"}] and record["seed"] == 3
    names = {path.name for path in written.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "tensorpress.json"} <= names
    assert set(record["files"]) == names - {"tensorpress.json", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".probe"))]
    assert (written.folder / "README.md").read_text() == "# a card"
    assert written.problem() is None and store.artifact(NAME).folder == written.folder
    ids = make_ids(2, 9)
    torch.testing.assert_close(outputs(load(written.folder), ids), outputs(compressed, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "damage", ["changed byte", "cut", "gone", "record gone", "record cut", "record of another kind"]
)
def test_damage_is_seen_and_the_artifact_is_no_hit(written, store, damage):
    weights, record = written.folder / "model.safetensors", written.folder / "tensorpress.json"
    data = bytearray(weights.read_bytes())
    if damage == "changed byte":
        data[-5] ^= 1
        weights.write_bytes(data)
    elif damage == "cut":
        weights.write_bytes(data[:-1])
    elif damage == "gone":
        (written.folder / "tokenizer.json").unlink()
    elif damage == "record gone":
        record.unlink()
    elif damage == "record cut":
        record.write_text(record.read_text()[:-20])
    else:
        record.write_text("[]")
    problem = Artifact(written.folder).problem()
    expected = {
        "changed byte": "model.safetensors has other bytes",
        "cut": "model.safetensors is missing or has another length",
    }
    expected |= {"gone": "tokenizer.json is missing"}
    assert problem.startswith(expected.get(damage, "tensorpress.json is missing or cannot be read"))
    assert store.artifact(NAME) is None


def test_bfloat16_and_a_damaged_artifact_is_replaced(store, compressed, make_folder):
    parent, final = make_folder("llama"), store.folder(NAME)
    final.mkdir()
    (final / "rubbish").write_text("x")
    (store.root / "models" / f".part-{NAME}").mkdir()
    (store.root / "models" / f".part-{NAME}" / "old").write_text("left by one that died")
    assert store.artifact(NAME) is None
    with Writer(store, NAME) as writer:
        made = writer.write(compressed, parent, torch.bfloat16, {}, "card")
    assert not (final / "rubbish").exists() and not (final / "old").exists() and left_behind(store) == [NAME]
    assert made.problem() is None
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"
    weights = load_file(final / "model.safetensors")
    assert weights["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert torch.equal(weights["model.embed_tokens.weight"].float(), compressed.model.embed_tokens.weight)


@pytest.mark.parametrize("how", ["other weights", "nan", "no folder", "unknown layer"])
def test_a_model_that_would_come_back_different_is_refused(store, compressed, make_folder, monkeypatch, how):
    def corrupt(model, folder, stored):
        save_model(model, folder, stored)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        if how == "other weights":
            tensors["model.layers.1.self_attn.q_proj.scales"][0, 0] += 1
        elif how == "nan":
            tensors["model.norm.weight"][3] = float("nan")
        save_file(tensors, file, {"format": "pt"})
        if how == "no folder":
            (folder / "config.json").unlink()
        if how == "unknown layer":
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"]["layers"]["model.layers.0.mlp.up_proj"]["form"] = "tucker"
            (folder / "config.json").write_text(json.dumps(config))

    parent = make_folder("llama")
    monkeypatch.setattr(artifact_module, "save_model", corrupt)
    match = "outputs differ" if how in ("other weights", "nan") else "cannot be opened in a fresh process"
    with pytest.raises(StepError, match=match), Writer(store, NAME) as writer:
        writer.write(compressed, parent, torch.float32, {}, "card")
    assert left_behind(store) == [] and store.artifact(NAME) is None


def test_a_writer_that_fails_leaves_nothing_and_no_process(store):
    with pytest.raises(RuntimeError, match="step"), Writer(store, NAME) as writer:
        writer.part.mkdir()
        raise RuntimeError("the step itself")
    assert left_behind(store) == [] and writer.checker.poll() is not None


def test_a_checker_that_dies_is_a_failed_step(store, compressed, make_folder):
    parent = make_folder("llama")
    with Writer(store, NAME) as writer:
        writer.checker.kill()
        writer.checker.wait()
        with pytest.raises(StepError, match="fresh process"):
            writer.write(compressed, parent, torch.float32, {}, "card")
    assert left_behind(store) == []


def test_saving_keeps_the_dtype_in_memory_and_rounds(make_model, tmp_path):
    model = make_model("llama", tie_word_embeddings=True)
    before = model.model.norm.weight.detach().clone()
    save_model(model, tmp_path, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.norm.weight, before.bfloat16().float())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"


def test_the_probe_is_the_same_everywhere(make_model):
    model = make_model("llama")
    ids = probe_ids(model)
    assert torch.equal(ids, probe_ids(model)) and ids.shape == (1, 16) and int(ids.max()) < 64


# --- locks and death

HOLDER = """
import sys, time
from filelock import FileLock, Timeout
try:
    with FileLock(sys.argv[1], timeout=float(sys.argv[2])):
        print("held", flush=True)
        time.sleep(float(sys.argv[3]))
except Timeout:
    print("busy", flush=True)
"""


def test_a_second_process_waits_for_the_lock(store):
    path = str(store.root / "locks" / f"{NAME}.lock")

    def other(wait):
        run = subprocess.run(
            [sys.executable, "-c", HOLDER, path, str(wait), "0"], capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    with store.lock(NAME):
        assert other(0.3) == "busy"
    assert other(30) == "held"


def test_another_process_keeps_us_out_until_it_is_killed(store):
    path = store.root / "locks" / f"{NAME}.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), "30", "600"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline().strip() == "held"
        with pytest.raises(TimeoutError), FileLock(path, timeout=0.3):
            pass
        with store.lock("another"):  # a lock for each digest
            pass
    finally:
        process.kill()
        process.wait()
    with FileLock(path, timeout=60):
        pass


def test_a_killed_writer_leaves_no_final_folder_and_a_free_lock(store, make_folder, tmp_path):
    parent = make_folder("llama")
    code = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        import torch
        import tensorpress.artifact as artifact
        from tensorpress.loading import load

        def stay(self, model):
            print(sorted(path.name for path in self.part.iterdir()), self.checker.pid, flush=True)
            time.sleep(600)

        artifact.Writer._check = stay
        store, parent = artifact.Store(sys.argv[1]), Path(sys.argv[2])
        with store.lock(sys.argv[3]), artifact.Writer(store, sys.argv[3]) as writer:
            writer.write(load(parent), parent, torch.float32, {}, "card")
        """
    )
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", code, store.root, parent, NAME], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        line = process.stdout.readline()
        assert "model.safetensors" in line and "tokenizer.json" in line, (tmp_path / "errors").read_text()[-2000:]
        checker = int(line.split()[-1])
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not store.folder(NAME).exists() and store.artifact(NAME) is None
    assert left_behind(store) == [f".part-{NAME}"]
    with FileLock(store.root / "locks" / f"{NAME}.lock", timeout=60):
        pass
    for _ in range(600):  # the checker's input ended with its parent: it goes by itself
        if not alive(checker):
            break
        time.sleep(0.2)
    assert not alive(checker)
    with store.lock(NAME), Writer(store, NAME) as writer:
        assert writer.write(load(parent), parent, torch.float32, {}, "card").problem() is None
    assert left_behind(store) == [NAME]


def alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


# --- the store


def test_store_refuses_places_that_cannot_be_written(tmp_path, one_line):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError) as caught:
        Store(tmp_path / "file" / "below").open()
    one_line(caught, "store: .*file/below cannot be written")


def test_store_remembers_whole_or_not_at_all(store, monkeypatch):
    assert store.evaluation(NAME) is None
    store.remember("evaluations", NAME, {"perplexity": 3.5})
    assert store.evaluation(NAME) == {"perplexity": 3.5}
    (store.root / "evaluations" / "cut.json").write_text('{"perplexity": 3')
    assert store.evaluation("cut") is None
    path = store.root / "evaluations" / "x.json"
    with pytest.raises(TypeError):
        write_whole(path, 5)
    assert not path.exists() and sorted(p.name for p in path.parent.iterdir()) == [f"{NAME}.json", "cut.json"]
    old = os.umask(0o022)
    try:
        write_whole(path, "x")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644
