"""Artifacts of any mix of layers, opened by transformers and by tensorpress, with the logits of the model in memory."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import tensorpress
from tensorpress.artifact import plain_gptq, save_model
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.errors import InputError
from tensorpress.evaluators.size import original_parameters
from tensorpress.kernels import cpu_linear
from tensorpress.kernels.block_diagonal_linear import BlockDiagonalLinear
from tensorpress.kernels.kernel_layer import kernel_layers
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.kernels.semi_structured_linear import SemiStructuredLinear
from tensorpress.loading import apply_layers, layers_of, load, module_from_spec, outline, use_quick_kernels
from tensorpress.quantizer import register
from tensorpress.structure import find_structure, linear_weight, remove_sublayer, set_module

NAMES = ["llama", "gpt2", "bert", "gemma3", "opt", "gpt_neox"]


@pytest.fixture
def mixed(make_model, make_calibration):
    """A model with MPO layers, GPTQ layers, dense ones, and gaps where sublayers were."""

    def make(name, **changes):
        model, calibration = make_model(name, **changes), make_calibration(4, 10)
        structure = find_structure(model)
        MPO(
            metric="weights",
            keep=0.6,
            layers=(structure.blocks[1].linear_paths[-1], structure.blocks[0].linear_paths[-2]),
        ).compress(model, calibration)
        remove_sublayer(model, find_structure(model).blocks[0].attention)
        remove_sublayer(model, find_structure(model).blocks[2].feed_forward)
        GPTQ(bits=3, group_size=16).compress(model, calibration)
        return model

    return make


def auto(name):
    return AutoModel if name == "bert" else AutoModelForCausalLM


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_mix_opens_with_equal_logits(mixed, make_ids, outputs, tmp_path, name, tied, plain_kernels):
    model, ids = mixed(name, tie_word_embeddings=tied), make_ids(2, 9)
    kinds = {spec["form"] for spec in layers_of(model).values()}
    assert {"mpo", "gptq", "removed_attention"} <= kinds
    save_model(model, tmp_path, torch.float32)
    expected = outputs(model, ids)
    for opened in (load(tmp_path), auto(name).from_pretrained(tmp_path).eval()):
        assert type(opened) is type(model) and layers_of(opened) == layers_of(model)
        torch.testing.assert_close(outputs(opened, ids), expected, rtol=0, atol=1e-5)
    assert not load(tmp_path).training


@pytest.fixture
def structured(make_model):
    """A model with low-rank, block-diagonal and 2:4 layers, and dense ones."""

    def make(name):
        model = make_model(name)
        for place, path in enumerate(find_structure(model).linear_paths):
            dense = model.get_submodule(path)
            weight, bias = linear_weight(dense).detach(), dense.bias
            outputs, inputs = weight.shape
            if place % 4 == 0:
                left, _, right = torch.linalg.svd(weight)
                set_module(model, path, MPOLinear.from_low_rank(left[:, :5], right[:5], bias))
            if place % 4 == 1:
                blocks = torch.randn(2, outputs // 2, inputs // 2) / inputs**0.5
                set_module(model, path, BlockDiagonalLinear.from_blocks(blocks, bias))
            if place % 4 == 2:
                pruned = weight * torch.tensor([1, 0, 0, 1]).repeat(inputs // 4)
                set_module(model, path, SemiStructuredLinear.from_dense(pruned, bias))
        return model

    return make


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_structured_layers_open_with_equal_logits(structured, make_ids, outputs, tmp_path, name, stored, plain_kernels):
    model, ids = structured(name), make_ids(2, 9)
    assert {spec["form"] for spec in layers_of(model).values()} == {"mpo", "block_diagonal", "semi_structured"}
    save_model(model, tmp_path, stored)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.uint8}
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {stored, torch.uint8}
    expected = outputs(model, ids)
    for opened in (
        load(tmp_path, dtype=torch.float32),
        auto(name).from_pretrained(tmp_path, dtype=torch.float32).eval(),
    ):
        assert layers_of(opened) == layers_of(model) and {layer.kernel for layer in kernel_layers(opened)} == {"auto"}
        torch.testing.assert_close(outputs(opened, ids), expected, rtol=0, atol=1e-5)
    use_quick_kernels(opened)
    assert {layer.kernel for layer in kernel_layers(opened)} == {"matrix", "reference"}
    torch.testing.assert_close(outputs(opened, ids), expected, rtol=0, atol=1e-5)
    plain = load(tmp_path)
    assert {t.dtype for t in plain.state_dict().values()} == {stored, torch.uint8}
    assert original_parameters(tmp_path) == sum(p.numel() for p in model.parameters()) + sum(
        layer.parameter_count() for layer in kernel_layers(model) if isinstance(layer, SemiStructuredLinear)
    )
    assert plain_gptq(model) is None
    assert layers_of(outline(tmp_path)) == layers_of(model)


def test_structured_layers_that_choose_their_kernels(structured, make_ids, outputs, tmp_path):
    save_model(structured("llama"), tmp_path, torch.float32)
    opened, ids = load(tmp_path), make_ids(2, 9)
    found = outputs(opened, ids)
    assert all(layer.taken for layer in kernel_layers(opened))
    torch.testing.assert_close(found, outputs(load(tmp_path, kernels="reference"), ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32, torch.bool])
def test_indices_of_another_type(structured, tmp_path, one_line, dtype):
    save_model(structured("llama"), tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(".indices"))
    save_file({**tensors, name: tensors[name].to(dtype)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    one_line(caught, f"tensor {name} is stored as .*; packed integers are U8")


def test_indices_that_name_one_place_twice(structured, tmp_path, one_line):
    save_model(structured("llama"), tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(".indices"))
    tensors[name][1, 2] = 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    one_line(caught, f"{name.removesuffix('.indices')}: indices: row 1, inputs from 16: the place 0 is not before 0")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_bfloat16(mixed, make_ids, outputs, tmp_path, name, plain_kernels):
    """Stored in bfloat16: the model in memory is rounded, and both precisions of arithmetic agree with it."""
    model, ids = mixed(name), make_ids(2, 9)
    save_model(model, tmp_path, torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32
    worked = load(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(outputs(worked, ids), outputs(model, ids), rtol=0, atol=1e-5)
    stored = load(tmp_path)
    assert next(stored.parameters()).dtype == torch.bfloat16
    expected = outputs(copy.deepcopy(model).to(torch.bfloat16), ids)
    assert (outputs(stored, ids) - expected).abs().max() <= 1e-2 * max(1, float(expected.abs().max()))
    assert all(m.scales.dtype == torch.float16 for m in stored.modules() if isinstance(m, QuantizedLinear))
    floats = {n: t.dtype for n, t in load_file(tmp_path / "model.safetensors").items() if t.is_floating_point()}
    assert {d for n, d in floats.items() if not n.endswith((".scales", ".bias"))} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("plain", [True, False])
def test_saved_again_it_is_the_same_again(mixed, make_model, make_calibration, tmp_path, name, plain):
    if plain:
        model, _ = GPTQ(bits=4, group_size=16).compress(make_model(name), make_calibration())
    else:
        model = mixed(name)
    first, second, third = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    for folder in (first, second, third):
        folder.mkdir()
    save_model(model, first, torch.float32)
    load(first).save_pretrained(second)
    save_model(load(first), third, torch.float32)
    expected = load_file(first / "model.safetensors")
    for folder in (second, third):
        found = load_file(folder / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(
            torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in expected
        )
        opened = load(folder)
        assert layers_of(opened) == layers_of(load(first))
    method = json.loads((first / "config.json").read_text())["quantization_config"]["quant_method"]
    assert json.loads((third / "config.json").read_text())["quantization_config"]["quant_method"] == method
    assert method == ("gptq" if plain else "tensorpress")


def test_plain_gptq_opens_with_transformers_alone_in_the_call(
    make_model, make_calibration, make_ids, outputs, tmp_path, plain_kernels
):
    """In a fresh process that imports tensorpress and calls `AutoModelForCausalLM.from_pretrained`, without gptqmodel."""
    model, _ = GPTQ(bits=4, group_size=16).compress(make_model("llama"), make_calibration())
    save_model(model, tmp_path, torch.float32)
    ids = make_ids(1, 8)
    code = (
        "import sys, json, tensorpress, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "ids = torch.tensor(json.loads(sys.argv[2]))\n"
        "print(json.dumps(model(input_ids=ids).logits.tolist()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path, json.dumps(ids.tolist())], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = torch.tensor(json.loads(run.stdout.splitlines()[-1])).double()
    torch.testing.assert_close(found, outputs(model, ids), rtol=0, atol=1e-5)


def test_shards(make_model, make_calibration, make_ids, outputs, tmp_path, monkeypatch, plain_kernels):
    monkeypatch.setattr("tensorpress.artifact.SHARD", "20KB")
    model, _ = GPTQ(bits=4, group_size=16).compress(make_model("llama"), make_calibration())
    save_model(model, tmp_path, torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = make_ids(2, 7)
    torch.testing.assert_close(outputs(load(tmp_path), ids), outputs(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "dtype"),
    [("qweight", torch.int8), ("qzeros", torch.uint8), ("qweight", torch.int64), ("qzeros", torch.float32), ("scales", torch.int8),
     ("g_idx", torch.int64), ("scales", torch.bool), ("layernorm.weight", torch.int16)],
)  # fmt: skip
def test_types_that_code_would_read_wrongly(make_model, make_calibration, tmp_path, one_line, part, dtype):
    """Integers stay as they are stored: the compiled kernels would read behind the end of smaller ones."""
    model, _ = GPTQ(bits=4, group_size=16).compress(make_model("llama"), make_calibration())
    save_model(model, tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(part))
    save_file({**tensors, name: tensors[name].to(dtype)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    one_line(caught, f"tensor {name} is stored as ")


@pytest.mark.parametrize("group", [-1, 3, 2**31 - 1])
def test_inputs_of_groups_that_there_are_not(make_model, make_calibration, tmp_path, one_line, group):
    model, _ = GPTQ(bits=4, group_size=16).compress(make_model("llama"), make_calibration())
    save_model(model, tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("up_proj.g_idx"))
    tensors[name][5] = group
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    one_line(caught, f"{name.removesuffix('.g_idx')}: g_idx names groups from ")


def test_a_model_that_has_run_can_be_pickled_and_copied(make_model, make_calibration, make_ids, outputs, tmp_path):
    model, _ = GPTQ(bits=4, group_size=16).compress(make_model("llama"), make_calibration())
    save_model(model, tmp_path, torch.float32)
    opened, ids = load(tmp_path), make_ids(1, 8)
    expected = outputs(opened, ids)
    for other in (copy.deepcopy(opened), pickle.loads(pickle.dumps(opened))):
        torch.testing.assert_close(outputs(other, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_a_model_computes(make_model, make_calibration, make_ids, tmp_path):
    """What is recorded is the reference: calls of compiled code leave no trace."""
    model, _ = GPTQ(bits=4, group_size=16).compress(make_model("llama"), make_calibration())
    save_model(model, tmp_path, torch.float32)
    layer = next(module for module in load(tmp_path).modules() if isinstance(module, QuantizedLinear))
    x, other = torch.randn(2, 3, layer.in_features)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(other), layer(other), rtol=0, atol=1e-4)


def test_registration_twice_is_safe():
    before = dict(AUTO_QUANTIZER_MAPPING)
    register()
    register()
    assert before == AUTO_QUANTIZER_MAPPING and tensorpress.loading.METHOD in AUTO_QUANTIZER_MAPPING


@pytest.mark.parametrize(
    "lines",
    [
        "import tensorpress; from transformers import AutoModelForCausalLM as Model",
        "from transformers import AutoModelForCausalLM as Model; import tensorpress",
        "import tensorpress; from transformers import LlamaForCausalLM as Model",
        "import tensorpress; from transformers.models.llama.modeling_llama import LlamaForCausalLM as Model",
        "import transformers, tensorpress; Model = transformers.AutoModelForCausalLM",
        "from tensorpress.loading import load; from transformers import AutoModelForCausalLM as Model",
        "import tensorpress, importlib.util; importlib.util.find_spec('transformers.modeling_utils'); "
        "from transformers import AutoModelForCausalLM as Model",
        "from tensorpress.artifact import Artifact; from transformers import AutoModelForCausalLM as Model",
    ],
)
def test_any_order_of_imports_registers(mixed, tmp_path, lines):
    save_model(mixed("llama"), tmp_path, torch.float32)
    check = f"{lines}; model = Model.from_pretrained({str(tmp_path)!r})"
    check += "; assert any(type(m).__name__ == 'QuantizedLinear' for m in model.modules())"
    subprocess.run([sys.executable, "-W", "ignore", "-c", check], check=True, capture_output=True)


def test_importing_tensorpress_imports_nothing_heavy():
    check = "import sys, tensorpress, tensorpress.cli.main; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_cached_decoding_of_a_loaded_artifact(make_model, make_ids, tmp_path, name):
    """The cache's trap again, for the indices must come back with the folder."""
    model, ids = make_model(name), make_ids(2, 10)
    remove_sublayer(model, find_structure(model).blocks[0].attention)
    save_model(model, tmp_path, torch.float32)
    opened = load(tmp_path)
    with torch.no_grad():
        full = opened(input_ids=ids, use_cache=False).logits
        past = opened(input_ids=ids[:, :6], use_cache=True).past_key_values
        assert past.get_seq_length() == 6
        rest = opened(input_ids=ids[:, 6:], past_key_values=past).logits
    torch.testing.assert_close(rest, full[:, 6:], rtol=1e-4, atol=1e-4)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = [opened.generate(ids, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*texts)


@pytest.fixture
def saved(make_model, make_calibration, tmp_path):
    model, _ = MPO(metric="weights", keep=0.5).compress(make_model("llama"), make_calibration())
    save_model(model, tmp_path, torch.float32)

    def change(edit):
        config = json.loads((tmp_path / "config.json").read_text())
        edit(config["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return change


FIRST = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (
            lambda q: q["layers"][FIRST].update(form="tucker"),
            [
                "unknown form 'tucker'",
                "known: mpo, pivoted_mpo, shared_mpo, shared_experts, shared_mixture, low_rank, gptq, block_diagonal, semi_structured, sum, embedding, tied_head, removed",
            ],
        ),
        (lambda q: q.update(format_version=2), ["artifact format 2 is newer than this tensorpress reads .1."]),
        (
            lambda q: q["layers"].update({"model.layers.9.mlp": {"form": "removed"}}),
            ["layer model.layers.9.mlp is not in Llama"],
        ),
    ],
)
def test_artifacts_that_cannot_be_read(saved, one_line, edit, parts):
    folder = saved(edit)
    for open_it in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(InputError) as caught:
            open_it(folder)
        one_line(caught, *parts)


def test_forms_and_paths(make_model, one_line):
    model = make_model("llama")
    with pytest.raises(InputError) as caught:
        apply_layers(model, {"model.layers.0.mlp.side_proj": {"form": "removed", "out_features": 3}})
    one_line(caught, "layer model.layers.0.mlp.side_proj is not in LlamaForCausalLM")
    for spec in ({"form": None}, {}):
        with pytest.raises(InputError):
            module_from_spec(spec)
    before = layers_of(model)
    apply_layers(model, {FIRST: {"form": "removed", "out_features": 48}})
    assert before == {} and layers_of(model) == {FIRST: {"form": "removed", "out_features": 48}}


@pytest.mark.parametrize("make_it", ["missing", "file", "empty"])
def test_what_is_no_folder_is_one_line(tmp_path, one_line, make_it):
    path = tmp_path / "x"
    if make_it == "file":
        path.write_text("hello")
    if make_it == "empty":
        path.mkdir()
    with pytest.raises(InputError) as caught:
        load(path)
    one_line(caught, {"missing": "no such folder", "file": "is a file", "empty": "has no config.json"}[make_it])


def test_kernels_are_chosen_or_refused(saved, one_line):
    folder = saved(lambda q: None)
    for name in ("auto", "reference", "dense"):
        model = load(folder, kernels=name)
        assert {m.kernel for m in model.modules() if isinstance(m, MPOLinear)} == {name}
    with pytest.raises(InputError) as caught:
        load(folder, kernels="cuda9")
    one_line(caught, "kernels: 'cuda9' is not known; known: auto, ")


@pytest.mark.skipif(cpu_linear.compiled() is None, reason="the compiled kernels were not built")
def test_kernels_of_quantized_layers_are_chosen(make_model, make_calibration, make_ids, outputs, tmp_path):
    model = make_model("llama")
    GPTQ(bits=4, group_size=16).compress(model, make_calibration())
    save_model(model, tmp_path, torch.float32)
    ids = make_ids(1, 12)
    wanted = outputs(load(tmp_path, kernels="reference"), ids)
    for name, most in (("cpu", 1e-3), ("cpu_int8", 0.1)):
        model = load(tmp_path, kernels=name)
        assert {layer.kernel for layer in model.modules() if isinstance(layer, QuantizedLinear)} == {name}
        found = outputs(model, ids)
        assert 0 < (found - wanted).abs().max() < most * wanted.abs().max()


def test_kernels_of_the_environment_are_refused_at_the_start(saved, one_line, monkeypatch):
    folder = saved(lambda q: None)
    monkeypatch.setenv("TENSORPRESS_KERNELS", "cpuu")
    with pytest.raises(InputError) as caught:
        load(folder)
    one_line(caught, "TENSORPRESS_KERNELS: 'cpuu' is not known; known: auto, ")
