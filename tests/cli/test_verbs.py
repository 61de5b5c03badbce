"""The verbs on models, runs and recipes, through the command line's own entry, on models made here."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tensorpress.cli.doctor as doctor
import tensorpress.cli.recipes as recipes
from tensorpress import digest
from tensorpress.artifact import RECORD, Store, save_model
from tensorpress.cli import main
from tensorpress.cli.structure import dense_parameters
from tensorpress.compressors.catalog import METHODS
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.evaluators.catalog import MEASURES
from tensorpress.evaluators.size import original_parameters
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.recipe import parse
from tensorpress.source import folder_digest
from tensorpress.structure import find_structure, linear_shape, remove_sublayer, set_module
from tensorpress.tasks.estimate import estimate, short_config
from tensorpress.tasks.planning import make_plan

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 128,
}
DIGEST = "abcdef0123456789abcdef0123456789"
TEXT = "the quick brown fox jumps over the lazy dog and runs away from 17 bears.\n" * 40


def byte_tokenizer():
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def original(place):
    torch.manual_seed(0)
    return save(llama(), place / "original")


@pytest.fixture(scope="module")
def encoder(place):
    changes = {key: value for key, value in SIZES.items() if key != "max_position_embeddings"}
    return save(BertModel(BertConfig(**changes, max_position_embeddings=128)).eval(), place / "encoder")


@pytest.fixture(scope="module")
def text(place):
    (place / "text.txt").write_text(TEXT)
    return place / "text.txt"


def quantize(model, paths, bits=4):
    for path in paths:
        rows, columns = linear_shape(model.get_submodule(path))
        layer = QuantizedLinear(columns, rows, bits, 16, bias=False)
        layer.scales.fill_(0.01)
        layer.qweight.random_()
        set_module(model, path, layer)


def write_artifact(model, root, name, original, **record):
    """An artifact as the store has them, without the fresh process that checks one."""
    folder = root / "models" / name
    folder.mkdir(parents=True)
    save_model(model, folder, torch.float32)
    byte_tokenizer().save_pretrained(folder)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest.of_file(p)} for p in folder.iterdir()}
    config = {"use": "gptq", "bits": 4, "group_size": 16}
    full = {
        "digest": name, "root": folder_digest(original), "base": original.name, "seconds": 2.5,
        "chain": [{"step": "quantize", "use": "gptq", "config": config, "digest": name, "seconds": 2.5}], "files": files,
    }  # fmt: skip
    (folder / RECORD).write_text(json.dumps(full | record))
    return folder


@pytest.fixture
def store(tmp_path, original):
    """A store with one artifact: block 0 decomposed, block 1 without feed-forward, the rest 4 bits."""
    model = LlamaForCausalLM.from_pretrained(original)
    remove_sublayer(model, find_structure(model).blocks[1].feed_forward)
    blocks = find_structure(model).blocks
    MPO(keep=0.5, layers=("model.layers.0.*",)).compress(model, SimpleNamespace(progress=lambda *_: None))
    quantize(model, [path for block in blocks[1:] for path in block.linear_paths])
    write_artifact(model.eval(), tmp_path / "store", DIGEST, original)
    return tmp_path / "store"


@pytest.fixture
def plain(store, original):
    """An artifact that is GPTQ throughout."""
    model = LlamaForCausalLM.from_pretrained(original)
    quantize(model, find_structure(model).linear_paths)
    return write_artifact(model.eval(), store, DIGEST[::-1], original)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """`call("eval", folder)`: (exit code, standard output, standard error) of the command line, in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tensorpress", *map(str, arguments)])
        capsys.readouterr()  # what making the models printed
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture
def refused(call, tmp_path):
    """`refused("eval", "nothing")`: the one error line; nothing was written anywhere."""

    def run(*arguments):
        before = everything(tmp_path)
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert err.count("error:") == 1 and err.count("\n") == 1, err
        assert everything(tmp_path) == before
        return err

    return run


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() or path.is_dir()}


def test_eval_alone(call, original, text, tmp_path):
    store = tmp_path / "fresh"
    asked = ("eval", original, "--text", text, "--length", 64, "--samples", 4, "--store", store, "--json", "e.json")
    code, out, _ = call(*asked)
    assert code == 0 and "perplexity" in out
    answer = json.loads((tmp_path / "work" / "e.json").read_text())
    assert answer["model"] == str(original)
    assert answer["metrics"]["perplexity"] == pytest.approx(260, rel=0.2)  # the weights are random
    assert answer["metrics"]["size_ratio"] == pytest.approx(2, rel=0.1)
    assert not [key for key in answer["metrics"] if "perplexity_ratio" in key or "speedup" in key]
    assert answer["conditions"]["window"] == 64 and answer["conditions"]["dataset"] == "text.txt"
    remembered = list((store / "evaluations").iterdir())
    call(*asked)
    assert sorted((store / "evaluations").iterdir()) == sorted(remembered)
    again = json.loads((tmp_path / "work" / "e.json").read_text())
    assert again == answer


def test_eval_against_the_original(call, original, text, store, tmp_path):
    code, out, _ = call(
        "eval", DIGEST[:7], "--text", text, "--length", 32, "--samples", 3, "--store", store, "--json", "e.json",
        "--against", original, "--other", text, "--measure", "perplexity", "--measure", "fidelity", "--measure", "size",
    )  # fmt: skip
    assert code == 0 and "original" in out
    answer = json.loads((tmp_path / "work" / "e.json").read_text())
    metrics = answer["metrics"]
    assert metrics["perplexity_ratio"] == pytest.approx(metrics["perplexity"] / answer["original"]["perplexity"])
    assert metrics["kl_divergence"] > 0 == answer["original"]["kl_divergence"]
    assert metrics["size_ratio"] < answer["original"]["size_ratio"]
    assert "perplexity_ratio_other" in metrics


def test_eval_of_an_artifact_alone_counts_the_dense_parameters(call, original, store, text, tmp_path):
    assert (
        call("eval", DIGEST, "--text", text, "--length", 32, "--measure", "size", "--store", store, "--json", "e.json")[
            0
        ]
        == 0
    )
    answer = json.loads((tmp_path / "work" / "e.json").read_text())
    dense = original_parameters(original)
    assert answer["metrics"]["bits_per_parameter"] == pytest.approx(8 * answer["metrics"]["weight_bytes"] / dense)
    assert answer["conditions"]["original_parameters"] == dense > answer["metrics"]["parameters"]


def test_eval_of_an_encoder(call, encoder, text, tmp_path):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("score,sentence1,sentence2\n5,a cat,a cat\n1,a cat,the moon\n3,a dog,a cat\n")
    asked = (
        "eval",
        encoder,
        "--text",
        text,
        "--length",
        32,
        "--pairs",
        pairs,
        "--store",
        tmp_path / "s",
        "--json",
        "e.json",
    )
    assert call(*asked)[0] == 0
    metrics = json.loads((tmp_path / "work" / "e.json").read_text())["metrics"]
    assert -100 <= metrics["sts_spearman"] <= 100
    assert "bytes" in metrics and "perplexity" not in metrics


def test_generation_shows_samples_where_it_is_asked_for(call, original, text, tmp_path):
    asked = ("eval", original, "--text", text, "--length", 32, "--samples", 2, "--store", tmp_path / "s")
    code, out, _ = call(*asked, "--measure", "generation")
    assert code == 0 and "===== continuation" in out and "quick brown" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--text", "missing.txt"), "no such file"),
        (("--length", 4096), "128 tokens at most"),
        (("--length", 4), "--length"),
        (("--measure", "perplexty"), "did you mean perplexity"),
        (("--measure", "sts"), "kind causal"),
        (("--measure", "fidelity"), "--against"),
        (("--pairs", "pairs.csv"), "kind causal"),
        (("--other", "missing.txt"), "--other"),
        (("--dtype", "int3"), "int3"),
        (("--json", "no/such/folder.json"), "--json"),
        (("--against", "no/such/original"), "no such folder"),
        (("--nonsense",), "nonsense"),
    ],
)
def test_eval_refuses(refused, original, text, tmp_path, more, said):
    assert said in refused("eval", original, "--text", text, "--length", 64, "--store", tmp_path / "none", *more)


def test_eval_refuses_a_short_text_and_other_kinds(refused, original, encoder, text, place, tmp_path):
    short = place / "short.txt"
    short.write_text("too short")
    none = ("--store", tmp_path / "none", "--length", 64)
    assert "fewer than one window" in refused("eval", original, "--text", short, *none)
    assert "not its original" in refused("eval", original, "--text", text, "--against", encoder, *none)
    assert "--pairs" in refused("eval", encoder, "--text", text, "--measure", "sts", *none)
    assert "--pairs: nowhere.csv: no such file" in refused(
        "eval", encoder, "--text", text, "--pairs", "nowhere.csv", *none
    )


@pytest.mark.parametrize("verb", ["eval", "bench", "inspect", "generate", "export"])
def test_models_that_are_none(refused, tmp_path, store, verb):
    more = {"generate": ("text",), "export": ("target",)}.get(verb, ())
    options = ("--store", store)
    empty, pickled = tmp_path / "empty", tmp_path / "pickled"
    empty.mkdir()
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "llama"}')
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "no such folder" in refused(verb, "nowhere", *more, *options)
    assert "no config.json" in refused(verb, empty, *more, *options)
    assert "pickled" in refused(verb, pickled, *more, *options)
    assert "begins no digest" in refused(verb, "fedcba", *more, *options)
    (store / "models" / (DIGEST[:8] + "0" * 24)).mkdir()
    assert "begins several" in refused(verb, DIGEST[:6], *more, *options)


def test_a_damaged_artifact(call, refused, store, text):
    folder = store / "models" / DIGEST
    file = folder / "config.json"
    file.write_text(file.read_text() + "\n")
    said = refused("eval", folder, "--text", text, "--length", 32, "--store", store)
    assert "not whole" in said and "config.json" in said
    code, out, _ = call("inspect", folder)
    assert code == 1 and "not whole" in out


def test_bench(call, original, store, tmp_path):
    threads = torch.get_num_threads()
    asked = ("bench", DIGEST, "--against", original, "--prompt", 16, "--tokens", 3, "--repeats", 2, "--threads", 1)
    code, out, _ = call(*asked, "--store", store, "--json", "b.json")
    assert code == 0 and "quantized_linear:" in out and "prefill" in out
    answer = json.loads((tmp_path / "work" / "b.json").read_text())
    metrics, conditions = answer["metrics"], answer["conditions"]
    assert metrics["decode_speedup"] == pytest.approx(
        metrics["decode_tokens_per_second"] / metrics["original_decode_tokens_per_second"]
    )
    assert (conditions["prompt_tokens"], conditions["decode_tokens"], conditions["repeats"]) == (16, 3, 2)
    assert conditions["threads"] == 1 and conditions["speed_dtype"] == "float32"
    assert any(name.startswith("mpo_linear:") for name in conditions["kernels"])
    assert conditions["original_kernels"].keys() == {"dense:torch"}
    assert torch.get_num_threads() == threads


def test_bench_alone_claims_no_speedup(call, store, encoder, tmp_path):
    code, out, _ = call(
        "bench", DIGEST, "--repeats", 1, "--tokens", 2, "--kernels", "reference", "--store", store, "--json", "b.json"
    )
    assert code == 0 and "--against" in out
    answer = json.loads((tmp_path / "work" / "b.json").read_text())
    assert answer["metrics"].keys() == {"prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes"}
    assert "original_kernels" not in answer["conditions"]
    assert call("bench", encoder, "--repeats", 1, "--json", "b.json")[0] == 0
    assert "decode_tokens_per_second" not in json.loads((tmp_path / "work" / "b.json").read_text())["metrics"]


def test_bench_refuses(refused, original, encoder):
    assert "known: auto" in refused("bench", original, "--kernels", "magic")
    assert "--repeats" in refused("bench", original, "--repeats", 0)
    assert "not its original" in refused("bench", original, "--against", encoder)
    assert "--threads" in refused("bench", original, "--threads", 0)


def test_inspect(call, store, original, tmp_path):
    code, out, _ = call("inspect", DIGEST[:6], "--layers", "--store", store, "--json", "i.json")
    assert code == 0
    found = json.loads((tmp_path / "work" / "i.json").read_text())
    assert (found["blocks"], found["sublayers"], found["whole"]) == (3, 5, True)
    assert found["removed"] == [{"block": 1, "sublayer": "feed_forward"}]
    assert found["original_parameters"] == original_parameters(original) > found["parameters"]
    forms = {(layer["block"], layer["form"]) for layer in found["layers"]}
    assert forms == {(0, "mpo"), (1, "4 bits"), (2, "4 bits")}
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("mlp", "self_attn"))}
    assert rows["mlp.up_proj"] == ["▦", "×", "4"] and rows["self_attn.q_proj"] == ["▦", "4", "4"]
    assert "quantize (gptq 4 bits, g16" in out and "whole" in out and "model.layers.2.mlp.down_proj" in out
    stored = sum(layer["bytes"] for layer in found["layers"])
    assert stored < found["weight_bytes"] <= found["bytes"]


def test_inspect_a_dense_model(call, original, encoder, tmp_path):
    for folder in (original, encoder):
        code, out, _ = call("inspect", folder, "--json", "i.json")
        found = json.loads((tmp_path / "work" / "i.json").read_text())
        assert code == 0 and "■ dense" in out and "×" not in out
        assert found["parameters"] == found["original_parameters"] and found["whole"] is None
    assert call("inspect", original, "--store", "not there")[0] == 0
    assert not (tmp_path / "work" / "not there").exists()


def test_inspect_a_plain_gptq_model(call, plain, original, tmp_path):
    assert call("inspect", plain, "--json", "i.json")[0] == 0
    found = json.loads((tmp_path / "work" / "i.json").read_text())
    assert {layer["form"] for layer in found["layers"]} == {"4 bits"}
    assert found["parameters"] == found["original_parameters"] == original_parameters(original)


def test_many_blocks_are_numbered_by_fives(call, place):
    _, out, _ = call("inspect", save(llama(num_hidden_layers=12, hidden_size=16, intermediate_size=16), place / "deep"))
    header = next(line for line in out.splitlines() if line.startswith("block"))
    row = next(line for line in out.splitlines() if line.startswith("mlp.up_proj"))
    assert header.split() == ["block", "0", "5", "10"]
    assert row.count("■") == 12 and row[header.index("5")] == "■" and header.index("5") - header.index("0") == 10


@pytest.mark.parametrize("tied", [False, True])
def test_dense_parameters(tied, tmp_path):
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert dense_parameters(model.config) == sum(p.numel() for p in model.parameters()) == original_parameters(tmp_path)


def test_generate(call, original, store):
    code, out, _ = call("generate", original, "  the cat\n\tsat", "--tokens", 12)
    assert code == 0 and out.startswith("  the cat\n\tsat") and len(out) > len("  the cat\n\tsat\n")
    assert "\x1b" not in out
    assert call("generate", original, "  the cat\n\tsat", "--tokens", 12, "--seed", 5)[1] == out
    drawn = [call("generate", original, "the cat", "--temperature", 1.0, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert call("generate", DIGEST, "the cat", "--tokens", 3, "--kernels", "reference", "--store", store)[0] == 0


def test_generate_refuses(refused, original, encoder):
    assert "encoder" in refused("generate", encoder, "the cat")
    assert "empty" in refused("generate", original, "")
    assert "128 in all" in refused("generate", original, "the cat", "--tokens", 200)
    assert "--temperature" in refused("generate", original, "the cat", "--temperature", -1)
    assert "known: auto" in refused("generate", original, "the cat", "--kernels", "magic")


def test_export(call, refused, plain, store, original, tmp_path):
    code, out, _ = call("export", plain, "out", "--format", "gptq")
    assert code == 0 and out == "out\n"
    config = json.loads((tmp_path / "work" / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert "exists already" in refused("export", plain, "out")
    assert "not quantized" in refused("export", original, "other")
    assert "decomposed" in refused("export", DIGEST, "other", "--store", store)
    for layout in ("gguf", "compressed-tensors", "onnx"):
        assert "not built yet; there is: gptq" in refused("export", plain, "other", "--format", layout)
    assert "did you mean gptq" in refused("export", plain, "other", "--format", "gtpq")


def document(name, run_id, bits, **more):
    leaf = {
        "node": "quantize", "step": "quantize", "branch": f"quantize.bits={bits}", "use": "gptq", "leaf": True,
        "config": {"use": "gptq", "bits": bits, "group_size": 128}, "parent": "prune", "cached": False, "seconds": 1.0,
        "metrics": {"perplexity": 10.0 + bits, "bytes": 1000.0 * bits}, "error": None, "conditions": {}, "digest": "ab",
        "path": None, "report": {"layers": [], "summary": {}},
    }  # fmt: skip
    inner = {
        **leaf,
        "node": "prune",
        "step": "prune",
        "use": "finercut",
        "parent": "model",
        "leaf": False,
        "branch": "",
    }
    return {
        "name": name, "mlflow_run_id": run_id, "flow_run_id": f"flow-{name}", "verdict": "ACCEPT", "gates": {},
        "original": {"perplexity": 9.0, "bytes": 16000.0}, "original_digest": "feed", "original_path": "models/tiny",
        "artifacts": [inner, leaf], "conditions": {"window": 256}, "seconds": 3.0, "overhead_seconds": 1.0,
        "recipe": {"name": name, "steps": {}}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A store with two runs in its database, and their ids."""
    from tensorpress.tasks.tracking import open_client

    store = tmp_path_factory.mktemp("tracked")
    client = open_client(store)
    experiment = client.create_experiment("tiny", artifact_location=(store / "artifacts").as_uri())
    ids = []
    for name, bits, window in (("first", 4, 256), ("second", 3, 128)):
        tags = {"tensorpress.recipe": name, "tensorpress.flow_run_id": f"flow-{name}"}
        run_id = client.create_run(experiment, tags=tags).info.run_id
        run = document(name, run_id, bits, conditions={"window": window})
        client.log_text(run_id, json.dumps(run), "run.json")
        ids.append(run_id)
    return store, ids


def test_compare(call, tracked, tmp_path):
    store, (first, second) = tracked
    code, out, _ = call("compare", first, "flow-second", first[:10], "--store", store, "--json", "c.json")
    assert code == 0
    answer = json.loads((tmp_path / "work" / "c.json").read_text())
    rows = answer["rows"]
    assert answer["runs"] == [first, second]
    assert [row["metrics"]["perplexity"] for row in rows] == [9.0, 14.0, 13.0]  # the original once, and first
    assert [row["params"] for row in rows] == [{}, {"bits": 4}, {"bits": 3}]
    assert answer["differing_conditions"] == ["window: 256, 128"]
    assert "original tiny" in " ".join(out.split()) and "different conditions" in out


def test_compare_one_run(call, tracked):
    store, (_, second) = tracked
    code, out, _ = call("compare", "latest", "--store", store)
    assert code == 0 and "different conditions" not in out and second[:8] not in out


def test_report(call, tracked, tmp_path):
    store, (first, _) = tracked
    code, out, _ = call("report", first[:8], "--store", store)
    assert code == 0 and out == f"report-{first[:8]}.html\n"
    page = (tmp_path / "work" / f"report-{first[:8]}.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "first" in page
    assert call("report", "latest", "--out", "page.html", "--store", store)[0] == 0
    assert (tmp_path / "work" / "page.html").is_file()


def test_runs_that_are_none(refused, tracked, tmp_path):
    store, _ = tracked
    for verb in ("compare", "report"):
        assert "no such run" in refused(verb, "0123456789", "--store", store)
        assert "no tracking database" in refused(verb, "latest", "--store", tmp_path / "none")
        (tmp_path / verb).mkdir()
        assert "no tracking database" in refused(verb, "latest", "--store", tmp_path / verb)
    assert "--out" in refused("report", "latest", "--store", store, "--out", "no/such/page.html")
    assert "is a folder" in refused("report", "latest", "--store", store, "--out", tmp_path)
    assert "--json" in refused("compare", "latest", "--store", store, "--json", tmp_path)


@pytest.fixture
def two_recipes(tmp_path, monkeypatch):
    folder = tmp_path / "packaged"
    folder.mkdir()
    (folder / "quick.yaml").write_text("name: quick\ndescription: four bits\nsteps: {}\n# ends [here]\n")
    (folder / "slow.yaml").write_text("name: slow\nsteps: {}\n")
    monkeypatch.setattr(recipes, "packaged", lambda: {p.stem: p for p in sorted(folder.glob("*.yaml"))})
    return folder


def test_recipes(call, refused, two_recipes, tmp_path):
    code, out, _ = call("recipes", "list")
    assert code == 0 and out.split() == ["quick", "four", "bits", "slow"]
    whole = (two_recipes / "quick.yaml").read_text()
    assert call("recipes", "show", "quick")[:2] == (0, whole)
    assert call("recipes", "copy", "quick")[:2] == (0, "quick.yaml\n")
    (tmp_path / "work" / "folder").mkdir()
    assert call("recipes", "copy", "quick", "folder")[0] == call("recipes", "copy", "quick", "mine.yml")[0] == 0
    for name in ("quick.yaml", "folder/quick.yaml", "mine.yml"):
        assert (tmp_path / "work" / name).read_text() == whole
        assert "exists already" in refused("recipes", "copy", "quick", name)
    assert "did you mean quick" in refused("recipes", "show", "quik")
    assert "no folder" in refused("recipes", "copy", "quick", "no/such/folder.yaml")


def test_doctor(call, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "hub_answer", lambda: "no hub answers; local models work")
    monkeypatch.setattr(doctor, "installed", lambda names: {"fastapi": "0.139.2", "sqlalchemy": "2.0.44"})
    code, out, err = call("doctor", "--json", "d.json")
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "work" / "d.json").read_text())
    assert "usable" in out and found["usable"]
    assert found["kernels"]["mpo_linear"] and found["processor"]["cores"] >= 1
    assert found["ports"].keys() == {"4200", "5000"} and found["extras"].keys() == {"gptq", "eval", "dask", "ray"}
    assert found["store"]["writable"] and not found["store"]["exists"]
    assert not (tmp_path / "work" / "mlruns").exists()
    monkeypatch.setattr(doctor, "installed", lambda names: {"fastapi": "0.151.0", "sqlalchemy": "2.1.0b1"})
    code, out, _ = call("doctor")
    assert code == 1 and "fastapi<0.151" in out and "sqlalchemy<2.1" in out
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(doctor, "installed", lambda names: {})
    code, out, _ = call("doctor", "--store", tmp_path / "file" / "store")
    assert code == 1 and "cannot be written" in " ".join(out.split())


def test_doctor_refuses_a_json_file_that_cannot_be_written(refused):
    assert "--json" in refused("doctor", "--json", "no/such/folder.json")


def test_known_bad_versions():
    assert doctor.known_bad({"fastapi": "0.150.9", "sqlalchemy": "2.0.99"}) == []
    assert len(doctor.known_bad({"fastapi": "1.0", "sqlalchemy": "2.1"})) == 2


def test_who_answers_at_a_port():
    import http.server
    import socket
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = b"3.17.2" if self.path == "/version" else b"<html>"
            self.send_response(200 if self.path == "/version" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert doctor.port_answer(server.server_port) == "MLflow 3.17.2"
    server.shutdown()
    server.server_close()
    assert doctor.port_answer(server.server_port) == "free"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert doctor.port_answer(silent.getsockname()[1]) == "something else"


def test_the_hub_has_two_seconds(monkeypatch):
    import time

    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.1)
    monkeypatch.setattr(httpx, "head", lambda *a, **k: time.sleep(5))
    start = time.monotonic()
    assert "no hub answers" in doctor.hub_answer()
    assert time.monotonic() - start < 2


def make(original, text, store, **changes):
    data = {
        "name": "tiny",
        "model": {"source": str(original)},
        "data": {
            "calibration": {"source": str(text), "samples": 4, "length": 32},
            "evaluation": {"source": str(text.with_name("held.txt")), "length": 32},
        },
        "steps": {
            "prune": {"use": "finercut", "after": "model", "remove": 0.2},
            "quantize": {"use": "gptq", "after": "prune", "bits": {"each": [4, 3]}, "group_size": 16},
        },
        "evaluate": ["size"],
        **changes,
    }
    text.with_name("held.txt").write_text(TEXT[::-1])
    return make_plan(parse(data, METHODS, MEASURES), Store(store))


def test_estimate_of_what_was_never_done(original, text, tmp_path):
    plan = make(original, text, tmp_path / "none")
    expected = estimate(plan)
    assert [node["node"] for node in expected["nodes"]] == list(plan.jobs)
    assert [node["note"] for node in expected["nodes"]] == ["remove 0.2", "4 bits, g16", "3 bits, g16"]
    assert expected["seconds"] is None and "not measured before for finercut, gptq" in expected["summary"]
    model = 4 * original_parameters(original)
    assert expected["memory_bytes"] == model + 2 * 4 * 32 * 32 * 4
    assert not (tmp_path / "none").exists()
    assert json.loads(json.dumps(expected)) == expected


def test_estimate_from_earlier_artifacts(original, text, tmp_path):
    root = tmp_path / "store"
    plan = make(original, text, root)

    def leave(name, node, seconds, root_digest=plan.root.digest):
        folder = root / "models" / name
        folder.mkdir(parents=True)
        job = plan.jobs[node]
        link = {"use": job.use, "config": job.config}
        (folder / RECORD).write_text(json.dumps({"root": root_digest, "chain": [link], "seconds": seconds}))

    quantize4, quantize3 = (name for name in plan.jobs if name.startswith("quantize"))
    leave("a", "prune", 10.0)
    leave("b", quantize4, 3.0)
    leave("c", quantize4, 5.0)
    leave("d", quantize4, 500.0, "another model")
    (root / "models" / "e").mkdir()
    (root / "models" / "e" / RECORD).write_text("{half")
    expected = estimate(plan)
    seconds = {node["node"]: node["seconds"] for node in expected["nodes"]}
    assert seconds == {"prune": 10.0, quantize4: 4.0, quantize3: 4.0}  # the same settings first, else the same method
    assert expected["seconds"] == 18.0 and "18 s" in expected["summary"]


def test_estimate_of_what_is_cached(original, text, tmp_path):
    root = tmp_path / "store"
    plan = make(original, text, root)
    write_artifact(llama(), root, plan.jobs["prune"].digest, original)
    again = make(original, text, root)
    first = estimate(again)["nodes"][0]
    assert first["cached"] and first["seconds"] == 0 and "kB" in first["note"]
    assert "2 of 3 steps to do, 1 cached" in estimate(again)["summary"]


def test_memory_counts_the_original_and_training(original, text, tmp_path):
    model = 4 * original_parameters(original)
    beside = estimate(make(original, text, tmp_path / "a", evaluate=["size", "speed"]))
    assert beside["memory_bytes"] == 2 * model
    half = estimate(make(original, text, tmp_path / "a", model={"source": str(original), "dtype": "bfloat16"}))
    assert half["memory_bytes"] == model / 2 + 2 * 4 * 32 * 32 * 2
    steps = {"heal": {"use": "distill", "after": "model", "tokens": 1_000}}
    trained = estimate(make(original, text, tmp_path / "a", steps=steps))
    assert trained["memory_bytes"] > 5 * model and "training" in trained["summary"]
    assert trained["nodes"][0]["note"] == "1,000 tokens"


def test_short_config():
    assert short_config("gptq", {"use": "gptq", "bits": 4, "group_size": -1}) == "4 bits, whole rows"
    assert short_config("mpo", {"use": "mpo", "keep": 0.7, "bond_dimension": None, "sites": 2}) == "keep 0.7, 2 sites"
    assert short_config("new", {"use": "new", "share": 0.5}) == "share 0.5"
