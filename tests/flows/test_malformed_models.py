"""Malformed checkpoints, by hand and generated: refused in a clear line, soon, without memory for what they promise."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

HERE = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Q = "model.layers.0.self_attn.q_proj"
MPO = {"form": "mpo", "out_factors": [4, 8], "in_factors": [4, 8], "bonds": [4], "bias": False}
GPTQ = {"form": "gptq", "in_features": 32, "out_features": 32, "bits": 4, "group_size": 16, "zero_offset": 1, "bias": False}  # fmt: skip
BLOCKS = {"form": "block_diagonal", "in_features": 32, "out_features": 32, "block_count": 4, "bias": False}
HALF = {"form": "semi_structured", "in_features": 32, "out_features": 32, "bias": False}
REMOVED = {"form": "removed_attention", "out_features": 32, "values": 2}
RECIPE = {
    "name": "tiny",
    "model": {"source": "llama"},
    "data": {"calibration": {"source": "train.txt", "length": 32}, "evaluation": {"source": "test.txt", "length": 32}},
    "steps": {"quantize": {"use": "gptq", "after": "model", "group_size": 32}},
}


class Model:
    """The llama of `place`, to be changed."""

    def __init__(self, folder):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.tokenizer = json.loads((folder / "tokenizer.json").read_text())
        self.settings = json.loads((folder / "tokenizer_config.json").read_text())
        data = (folder / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        self.header, self.body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def write(self, name, content):
        data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()  # fmt: skip
        (self.folder / name).write_bytes(data)

    def configure(self, **fields):
        self.write("config.json", {**self.config, **fields})

    def specify(self, layers, **fields):
        self.configure(
            quantization_config={"quant_method": "tensorpress", "format_version": 1, "layers": layers, **fields}
        )

    def weights(self, header, body=None, length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(text) if length is None else length
        self.write("model.safetensors", struct.pack("<Q", size) + text + (self.body if body is None else body))

    def tensor(self, **fields):
        name = "model.layers.1.mlp.up_proj.weight"
        self.weights({**self.header, name: {**self.header[name], **fields}})


@pytest.fixture
def model(place):
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return Model(place / "llama")


CONFIGS = {
    **{f"{name} {value!r:.12}": {name: value}
       for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
       for value in (0, -1, 0.5, "x", [], {}, True, 10**6, 10**9, 10**12, 10**18, 10**30)},
    **{f"{name} {value!r:.12}": {name: value} for name in ("num_key_value_heads", "head_dim") for value in (-1, "x", 10**9, 10**18)},
    **{f"dtype {value!r:.12}": {"dtype": value} for value in ("x", "int8", 7, ["a"], "__class__", "save")},
    **{f"model_type {value!r:.12}": {"model_type": value} for value in ("", "no_such", 3, [], "../x", "x" * 5000, "bert", "t5", "whisper")},
    **{f"architectures {value!r:.12}": {"architectures": value} for value in (None, [], "x", 3, [3], ["NoSuchForCausalLM2"], ["os.system"])},
    **{f"hidden_act {value!r:.12}": {"hidden_act": value} for value in ("x", 3, [], "__class__")},
    **{f"rope {i}": {"rope_parameters": value} for i, value in enumerate((3, "x", [], {"rope_type": "x"}))},
    **{f"text_config {i}": {"text_config": value} for i, value in enumerate((3, "x", [], {"a": 1}))},
    **{f"quantization_config {i}": {"quantization_config": value} for i, value in enumerate((
        "x", 3, [1], {"quant_method": "x"}, {"quant_method": ["tensorpress"]}, {"quant_method": "gptq"},
        *({"quant_method": "gptq", "bits": bits, "group_size": group} for bits, group in (
            (5, 32), ("x", 32), (4, 0), (4, -5), (4, "x"), (None, None), (10**9, 128)))))},
    **{f"code of a hub {i}": value for i, value in enumerate((
        {"_attn_implementation_internal": "owner/kernel"}, {"attn_implementation": "owner/kernel"}, {"_attn_implementation": {"": "owner/kernel:f"}},
        {"experts_implementation": "../kernel"}, {"text_config": {"_attn_implementation": "owner/kernel"}}, {"trust_remote_code": True}))},
    "remote code of another kind": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(told, model, name):
    model.configure(**CONFIGS[name])
    assert told("validate", "recipe.yaml").code == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "{" * 9000, "[" * 900 + "]" * 900, "9" * 9000, '{"model_type": "llama"}', "\ufeff{}", "\0"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_configs_that_are_none(told, model, text):
    model.write("config.json", text)
    assert told("inspect", "llama").code == 2


def test_code_beside_a_model_is_not_run(told, model, place):
    """A kind that transformers knows needs no code of the folder's: its own is taken, and the folder's never looked at."""
    code = "import pathlib; pathlib.Path('ran').touch()\nclass Config: pass\nclass Model: pass\nclass Tok: pass\n"
    (place / "llama/evil.py").write_text(code)
    model.configure(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    model.write("tokenizer_config.json", {**model.settings, "auto_map": {"AutoTokenizer": ["evil.Tok", None]}})
    assert told("validate", "recipe.yaml").code == 0
    assert not (place / "ran").exists()


SPECS = {
    **{f"{base['form']} {key} {value!r:.14}": {Q: {**base, key: value}}
       for base in (MPO, GPTQ, BLOCKS, HALF, REMOVED) for key in base
       for value in (None, "x", -1, 0.5, [], {}, 10**9, 10**30, [10**9, 10**9], [-4, -8])},
    **{f"path {path:.14}": {path: REMOVED} for path in ("", "..", "x", "/etc/passwd", "model.layers.99", "__class__", Q + ".weight", "model..layers", "x" * 9000)},
    **{f"place {path}": {path: MPO} for path in ("model", "model.layers", "model.layers.0", "model.embed_tokens", "model.norm")},
    **{f"spec {i}": {Q: value} for i, value in enumerate((None, "x", {}, [], {"form": []}, {**MPO, "bonds": [4, 4]}, {**MPO, "more": 1}, {**BLOCKS, "block_count": 5}, {**HALF, "more": 1}))},
    **{f"layers {i}": value for i, value in enumerate(([1], "x", 3, {Q + ".x": None}))},
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_layers_of_an_artifact(told, model, name):
    model.specify(SPECS[name])
    assert told("inspect", "llama").code == 2


@pytest.mark.parametrize("version", [2, 10**30, -1, 0, "x", None, [], 1.5])
def test_versions_of_an_artifact(told, model, version):
    model.specify({}, format_version=version)
    assert told("validate", "recipe.yaml").code == 2


END = 4096
TENSORS = {
    **{f"{key} {value!r:.20}": {key: value} for key, values in {
        "dtype": ("F128", "", "f32", None, 3, [], "F64", "F32", "F8_E4M3", "F4", "BOOL", "U8", "I64", "C64", "F16 "),
        "shape": (None, [], [64], [32, 64], [64, 32, 1], [2**62, 4], [-64, -32], [10**30], ["x"], "x", [0, 10**18], [64.0, 32.0]),
        "data_offsets": (None, [], [0], [0, 0], [END, 0], [-1, 5], [0, 10**15], [0, 2**64], [10**30, 10**31], ["a", "b"], [2, 2 + END], [0, END]),
    }.items() for value in values},
    "float8": {"dtype": "F8_E4M3", "shape": [64, 64]}, "float4": {"dtype": "F4", "shape": [64, 128]},
    "complex": {"dtype": "C64", "shape": [8, 64]}, "another shape": {"shape": [32, 64]},
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_headers_of_tensors(told, model, name):
    model.tensor(**TENSORS[name])
    assert told("validate", "recipe.yaml").code == 2


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100 * 10**9, 10**8, 0, 1])
def test_lengths_of_headers(told, model, length):
    model.weights(model.header, length=length)
    assert told("inspect", "llama").code == 2


@pytest.mark.parametrize(
    "header",
    [{}, {"__metadata__": {"format": "pt"}}, b"[]", b"[" * 100_000, b'{"\xff": 3}', {"x\x1b[31m<script>" + "y" * 5000: 3}],
    ids=lambda header: str(header)[:20],
)  # fmt: skip
def test_headers_that_are_none(told, model, header):
    for body in (b"", None):
        model.weights(header, body)
        assert told("validate", "recipe.yaml").code == 2


def test_a_tensor_that_is_named_twice(told, model):
    model.weights(json.dumps(model.header).replace('"lm_head.weight"', '"model.norm.weight"').encode())
    assert told("validate", "recipe.yaml").code == 2


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "..", "", 7, None, ["x"], "a/../model.safetensors", "model-2.safetensors", "\0", "x" * 5000],
    ids=lambda name: str(name)[:20],
)  # fmt: skip
def test_indexes_that_lead_elsewhere(told, model, place, name):
    shutil.move(place / "llama/model.safetensors", place / "secret.safetensors")
    names = {key: name for key in model.header if key != "__metadata__"}
    model.write("model.safetensors.index.json", {"weight_map": names})
    assert told("validate", "recipe.yaml").code == 2


def test_a_folder_of_a_hub_cache_is_made_of_symlinks(told, model, place):
    """What the user named may lie anywhere, and be a link itself; what is in it may not lead elsewhere."""
    blobs, snapshot = place / "models--x/blobs", place / "models--x/snapshots/5a3f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in list((place / "llama").iterdir()):
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (place / "llama").rmdir()
    (place / "llama").symlink_to(snapshot)
    assert told("validate", "recipe.yaml").code == 0 and told("inspect", "llama").code == 0


@pytest.mark.parametrize("name", ["vocab.x", "tokenizer.json", "config.json", "model.safetensors", "notes"])
@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "nowhere/../../secret", "{name}"], ids=str)
def test_links_that_lead_out_of_the_folder(told, model, place, name, target):
    """A key of the user's would be carried into every artifact."""
    (place / "secret").write_text("a private key")
    file = place / "llama" / name
    if file.exists() and name != "notes":
        shutil.move(file, place / "secret")
    file.symlink_to(target.format(name=name))
    for command in (("validate", "recipe.yaml"), ("inspect", "llama")):
        answer = told(*command)
        assert answer.code == 2 and ("leads out of the folder" in answer.err or name == "config.json"), answer.err


def test_a_link_within_the_folder(told, model, place):
    (place / "llama/vocab.x").symlink_to("config.json")
    assert told("validate", "recipe.yaml").code == 0


TOKENIZERS = {
    **{f"text {text[:8]}": text for text in ("", "{", "[]", "null", "{}", '"x"', "[" * 100_000, '{"version": "1.0"}')},
    **{f"model {i}": {"model": value} for i, value in enumerate((
        None, [], {}, "x", {"type": "x"}, {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
        {"type": "BPE", "vocab": {"a": -1}, "merges": []}, {"type": "BPE", "vocab": {"a": 2**32}, "merges": []},
        {"type": "Unigram", "vocab": [], "unk_id": 5}, {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"},
        {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "zz"}))},
    **{f"pre_tokenizer {i}": {"pre_tokenizer": value} for i, value in enumerate((
        [], 3, {"type": "x"}, {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}))},
    "a decoder": {"decoder": {"type": "x"}}, "a normaliser": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A"}},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(told, model, name):
    value = TOKENIZERS[name]
    model.write("tokenizer.json", {**model.tokenizer, **value} if isinstance(value, dict) else value)
    assert told("validate", "recipe.yaml").code == 2


@pytest.mark.parametrize(
    "fields",
    [{"model_max_length": "x"}, {"model_max_length": []}, {"pad_token": 3}, {"added_tokens_decoder": {"0": "x"}}, {"tokenizer_class": 3}],
    ids=str,
)  # fmt: skip
def test_settings_of_tokenizers(told, model, fields):
    model.write("tokenizer_config.json", {**model.settings, **fields})
    assert told("validate", "recipe.yaml").code == 2


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json", "special_tokens_map.json"])
@pytest.mark.timeout(60)
def test_files_that_have_no_end(told, model, place, name):
    path = place / "llama" / name
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(600_000_000)  # takes no room
    assert told("validate", "recipe.yaml").code == 2
    path.unlink()
    os.mkfifo(path)
    assert told("validate", "recipe.yaml").code == 2


RECORDS = {
    **{f"text {text[:8]}": text for text in ("", "{", "[]", "null", "3", "[" * 100_000)},
    **{f"{key} {value!r:.16}": {key: value} for key, values in {
        "files": (None, [], {}, "x", {"../x": {"bytes": 1, "sha256": "x"}}, {"/etc/passwd": {"bytes": 1, "sha256": "x"}},
                  {"config.json": None}, {"config.json": {"bytes": "x", "sha256": 3}}, {"..": {"bytes": 1, "sha256": "x"}}, {"config.json": {"bytes": 1, "sha256": "x"}}),
        "digest": (None, 3, "", "../x", "x" * 5000, []), "format_version": (0, "x", None, [], 1.5),
        "chain": (None, 3, "x", [3], [{}], [{"step": 3}], [{"step": "q", "use": "gptq", "config": [], "digest": "x"}]),
        "base": (3, [], "x" * 20_000), "seconds": ("x", []),
    }.items() for value in values},
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_artifacts(told, model, place, name):
    value = RECORDS[name]
    size = (place / "llama/config.json").stat().st_size
    whole = {
        "format_version": 1, "digest": "abcdef0123456789", "chain": [],
        "files": {"config.json": {"bytes": size, "sha256": "0" * 64}},
    }  # fmt: skip
    model.write("tensorpress.json", {**whole, **value} if isinstance(value, dict) else value)
    assert told("eval", "llama", "--text", "test.txt", "--length", "32").code == 2


def test_there_are_many():
    assert len(CONFIGS) + len(SPECS) + len(TENSORS) + len(TOKENIZERS) + len(RECORDS) > 350


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@HERE
@given(data=st.data())
def test_any_value_in_any_file(told, model, data):
    name = data.draw(
        st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
    )
    path = model.folder / name
    whole = path.read_bytes()
    fields = json.loads(whole)
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(JSON)
    try:
        path.write_text(json.dumps(fields))
        told("validate", "recipe.yaml")
    finally:
        path.write_bytes(whole)


@HERE
@given(seed=st.integers(0, 2**32))
def test_any_bytes_in_any_file(told, model, seed):
    chosen = random.Random(seed)
    path = model.folder / chosen.choice(["config.json", "tokenizer.json", "model.safetensors"])
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for _ in range(chosen.randint(1, 8)):  # of the header, where there is one
        damaged[chosen.randrange(min(len(damaged), 3000))] = chosen.randrange(256)
    try:
        path.write_bytes(damaged[: chosen.choice([len(damaged), chosen.randrange(len(damaged))])])
        told("validate", "recipe.yaml")
    finally:
        path.write_bytes(whole)


@HERE
@given(
    spec=st.dictionaries(st.sampled_from([*MPO, *GPTQ, "values"]), JSON | st.sampled_from(["mpo", "gptq", "removed"]))
)
def test_any_layer(told, model, spec):
    model.specify({Q: spec})
    assert told("inspect", "llama").code == 2


def test_weights_that_are_not_finite_in_an_odd_type_are_no_crash(told, model, place):
    tensors = load_file(place / "llama/model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int16)
    save_file(tensors, place / "llama/model.safetensors", {"format": "pt"})
    assert told("validate", "recipe.yaml").code in (0, 2)
