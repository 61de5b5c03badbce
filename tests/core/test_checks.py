"""Folders and sources that are no model: one line that names the file and what is wrong, and never a wait without end."""

import http.server
import json
import shutil
import socket
import struct
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tensorpress.checks import check_finite, check_folder, check_safetensors, check_tokenizer, weight_files
from tensorpress.errors import InputError
from tensorpress.source import check_source, folder_digest, read_tokenizer, resolve


@pytest.fixture
def folder(make_folder):
    return make_folder("llama")


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def refused(folder, one_line, *parts, check=check_source):
    with pytest.raises(InputError) as caught:
        check(folder)
    return one_line(caught, *parts)


def test_a_whole_folder_passes(folder):
    handle = check_source(folder)
    assert handle.folder == folder.resolve() and handle.digest == folder_digest(folder) and len(handle.digest) == 64
    assert check_folder(folder).model_type == "llama"


def test_missing_parts(folder, one_line):
    refused(folder / "none", one_line, "none: no such folder")
    refused(folder / "config.json", one_line, "config.json: is a file; a model is a folder")
    (folder / "model.safetensors").unlink()
    refused(folder, one_line, "has no model.safetensors")
    (folder / "config.json").unlink()
    refused(folder, one_line, "has no config.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"x"', "\xff", "[" * 100_000])
def test_config_that_is_none(folder, one_line, content):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    refused(folder, one_line, "config.json: ")


def test_config_of_what_transformers_does_not_know(folder, one_line):
    edit_config(folder, model_type="no_such_thing")
    refused(folder, one_line, "model_type 'no_such_thing' cannot be used")


def test_remote_code_is_never_run(folder, one_line, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass")
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    refused(folder, one_line, "config.json: model_type 'evil' cannot be used")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "x.ckpt"])
def test_pickles_are_refused_by_name(folder, one_line, name):
    (folder / "model.safetensors").rename(folder / name)
    refused(
        folder, one_line, rf"only pickled weights \({name}\), which can run code when opened; convert it to safetensors"
    )


@pytest.mark.parametrize(
    "damage", ["empty", "header length", "zero header", "cut header", "cut data", "text", "short", "bad json"]
)
def test_safetensors_that_are_not_whole(folder, one_line, damage):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    file.write_bytes(
        {
            "empty": b"",
            "header length": struct.pack("<Q", 2**63 - 1) + data[8:],
            "zero header": struct.pack("<Q", 0) + data[8:],
            "cut header": data[: 8 + length // 2],
            "cut data": data[:-100],
            "text": b"this is a page that says 404 not found",
            "short": data[:5],
            "bad json": data[:8] + b"\xff" * length + data[8 + length :],
        }[damage]
    )
    refused(folder, one_line, "model.safetensors: is no whole safetensors file")
    refused(file, one_line, "is no whole safetensors file", check=check_safetensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named(folder, one_line, value, dtype):
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, file, {"format": "pt"})
    refused(folder, one_line, "model.safetensors: tensor model.layers.1.mlp.down_proj.weight holds NaN or infinity")
    refused(folder, one_line, "holds NaN or infinity", check=check_finite)


def sharded(folder, names=None):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for number, name in enumerate(tensors):
        shard = f"model-{number % 2}.safetensors"
        index[name] = shard
    for shard in set(index.values()):
        save_file({n: tensors[n] for n in tensors if index[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names or index}))


def test_shards(folder, one_line):
    sharded(folder)
    assert [file.name for file in weight_files(folder)] == ["model-0.safetensors", "model-1.safetensors"]
    check_source(folder)
    (folder / "model-1.safetensors").unlink()
    refused(folder, one_line, "model-1.safetensors: is missing, though model.safetensors.index.json names it")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", 7, None, ["x"]]
)
def test_an_index_that_leads_outside(folder, one_line, name):
    shutil.copyfile(folder / "model.safetensors", folder.parent / "secret.safetensors")
    sharded(folder, {"model.norm.weight": name})
    refused(folder, one_line, "model.safetensors.index.json|is missing")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', '{"weight_map": {}}', "\xff"]
)
def test_an_index_that_is_none(folder, one_line, content):
    sharded(folder)
    (folder / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    refused(folder, one_line, "model.safetensors.index.json: is not an index of safetensors files")


def test_what_is_checked_is_what_is_loaded(folder, one_line):
    """With a single file beside an index transformers takes the single file: it is the one that must be checked."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "bad.safetensors", {"format": "pt"})
    sharded(folder)
    (folder / "bad.safetensors").rename(folder / "model.safetensors")
    refused(folder, one_line, "model.norm.weight holds NaN")


def test_tokenizers_that_do_not_fit(make_folder, make_tokenizer, one_line, folder):
    big = make_folder("llama", vocabulary=65)
    refused(big, one_line, "the tokenizer has ids up to 64, the embedding 64 rows: they do not belong together")
    config = AutoConfig.from_pretrained(folder)
    check_tokenizer(make_tokenizer(64), config, folder)
    check_tokenizer(make_tokenizer(20), config, folder)
    (folder / "tokenizer.json").write_text("{")
    line = refused(folder, one_line, "its tokenizer cannot be read", check=read_tokenizer)
    assert str(folder) in line


def test_digest_follows_what_makes_the_model_and_nothing_else(folder, tmp_path):
    before = folder_digest(folder)
    (folder / "notes.txt").write_text("x")
    (folder / "loss_curve.png").write_bytes(b"x")
    assert folder_digest(folder) == before
    copied = tmp_path / "elsewhere"
    shutil.copytree(folder, copied)
    assert folder_digest(copied) == before
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        data = (copied / name).read_bytes()
        (copied / name).write_bytes(data + b" ")
        assert folder_digest(copied) != before, name
        (copied / name).write_bytes(data)
    assert folder_digest(copied) == before


# --- sources


def test_demo_and_folders(folder):
    assert (resolve("demo") / "__init__.py").is_file()
    assert resolve(str(folder)) == folder


@pytest.mark.parametrize(
    "source",
    [
        "/no/such/folder",
        "./none",
        "~/no-such-folder-here",
        "none",
        "a/b/c",
        "",
        "~nobody-has-this-name/x",
        "x" * 5000,
        "/a\0b",
    ],
)
def test_sources_that_are_no_folder(one_line, source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        resolve(source)
    assert "model.source: no such folder: " in str(caught.value) and len(caught.value.problems) == 1


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No proxy between us and the hub that a test plays, and an empty cache."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "no body/has this", "a/..", "gpt2/"])
def test_a_hub_id_with_no_hub(no_hub, monkeypatch, one_line, name):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError) as caught:
        resolve(name)
    one_line(caught, "model.source: ")


@pytest.mark.timeout(60)
def test_a_hub_whose_front_page_is_all_that_answers(no_hub, monkeypatch, one_line):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            if self.path not in ("/", ""):
                released.wait(60)
            self.send_response(200)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    released = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(InputError) as caught:
            resolve("owner/name")
    finally:
        released.set()
        server.shutdown()
        server.server_close()
    one_line(caught, "no model hub answers at http://127.0.0.1")


@pytest.mark.timeout(60)
def test_a_hub_that_accepts_and_never_answers(no_hub, monkeypatch, one_line):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(InputError) as caught:
            resolve("owner/name")
    one_line(caught, "owner/name is not a folder here, and no model hub answers at http://127.0.0.1")


@pytest.mark.timeout(60)
def test_a_name_service_that_is_dead(no_hub, monkeypatch, one_line):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    released, start = threading.Event(), time.monotonic()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: released.wait(50) and [])
    with pytest.raises(InputError) as caught:
        resolve("owner/name")
    assert time.monotonic() - start < 10
    released.set()
    one_line(caught, "no model hub answers at http://hub.invalid")


@pytest.mark.parametrize(
    "endpoint", [f"http://{'a' * 64}.example", "http://[::1", "nonsense", "http://127.0.0.1:99999"]
)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_endpoint_that_cannot_be(no_hub, monkeypatch, one_line, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(InputError) as caught:
        resolve("owner/name")
    one_line(caught, "no model hub answers at ")


def test_a_cache_with_a_config_alone_does_not_hide_the_hub(no_hub, monkeypatch, one_line, tmp_path):
    snapshot = tmp_path / "cache/models--owner--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "cache/models--owner--name/refs").mkdir()
    (tmp_path / "cache/models--owner--name/refs/main").write_text("abc")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError) as caught:
        resolve("owner/name")
    one_line(caught, "no model hub answers")
