"""Blocks, sublayers and linear layers of every architecture, and sublayers that are gone when they are removed."""

import copy

import pytest
import torch
from torch import nn

from tensorpress.errors import InputError
from tensorpress.kernels.removed import RemovedNorm
from tensorpress.structure import (
    find_structure,
    iterate_linears,
    linear_shape,
    linear_weight,
    model_kind,
    remove_sublayer,
    set_module,
)

QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
LLAMA = [[QKV, ("o_proj",)], [GATED, ("down_proj",)]]
OPT = [[QKV, ("out_proj",)], [("fc1",), ("fc2",)]]
BERT = [[("query", "key", "value"), ("dense",)], [("dense",), ("dense",)]]
NEOX = [[("query_key_value",), ("dense",)], [("dense_h_to_4h",), ("dense_4h_to_h",)]]
PRE = ["input_layernorm", "post_attention_layernorm"]
# per architecture: groups of the attention and of the feed-forward, and the norms that feed them and nothing else
EXPECTED = {
    "llama": (LLAMA, PRE),
    "mistral": (LLAMA, PRE),
    "qwen2": (LLAMA, PRE),
    "qwen3": (LLAMA, PRE),
    "gemma2": (LLAMA, ["input_layernorm", "pre_feedforward_layernorm"]),
    "gemma3": (LLAMA, ["input_layernorm", "pre_feedforward_layernorm"]),
    "phi": ([[QKV, ("dense",)], [("fc1",), ("fc2",)]], [None, None]),  # one norm feeds both
    "phi3": ([[("qkv_proj",), ("o_proj",)], [("gate_up_proj",), ("down_proj",)]], PRE),
    "gpt2": ([[("c_attn",), ("c_proj",)], [("c_fc",), ("c_proj",)]], ["ln_1", "ln_2"]),
    "gpt_neox": (NEOX, PRE),
    "gpt_neox_sequential": (NEOX, PRE),
    "opt": (OPT, ["self_attn_layer_norm", "final_layer_norm"]),
    "opt_post": (OPT, None),
    "bert": (BERT, [None, None]),
    "distilbert": ([[("q_lin", "k_lin", "v_lin"), ("out_lin",)], [("lin1",), ("lin2",)]], None),
    "roberta": (BERT, [None, None]),
}
CAUSAL = [name for name in EXPECTED if "bert" not in name]


def last(path):
    return path and path.split(".")[-1]


def difference(model, other, ids):
    with torch.no_grad():
        return float((model(input_ids=ids)[0] - other(input_ids=ids)[0]).abs().max())


def with_output_projection_zero(model, sublayer):
    masked = copy.deepcopy(model)
    layer = masked.get_submodule(sublayer.paths[-1])
    layer.weight.data.zero_()
    if layer.bias is not None:
        layer.bias.data.zero_()
    return masked


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_in_order(make_model, name):
    model = make_model(name)
    structure = find_structure(model)
    groups, norms = EXPECTED[name]
    assert structure.kind == model_kind(model) == ("encoder" if "bert" in name else "causal")
    assert structure.hidden_size == 32
    assert len(structure.blocks) == model.config.get_text_config().num_hidden_layers
    for index, block in enumerate(structure.blocks):
        assert block.index == index and block.path.endswith(f".{index}")
        assert [[tuple(map(last, group)) for group in sublayer.linears] for sublayer in block.sublayers] == [
            [tuple(group) for group in part] for part in groups
        ]
        assert [sublayer.kind for sublayer in block.sublayers] == ["attention", "feed_forward"]
        assert all(sublayer.block == index for sublayer in block.sublayers)
        if norms is not None:
            assert [last(sublayer.norm) for sublayer in block.sublayers] == norms
    inside = [path for path, _ in iterate_linears(model) if path.startswith(structure.blocks[0].path.rsplit(".", 1)[0])]
    assert sorted(structure.linear_paths) == sorted(inside)
    for path in structure.linear_paths:
        assert linear_weight(model.get_submodule(path)).shape == linear_shape(model.get_submodule(path))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", EXPECTED)
def test_removed_is_masked_with_its_parameters_gone(make_model, make_ids, name, which):
    model = make_model(name)
    ids, index = make_ids(2, 9), 0
    for index in (0, len(find_structure(model).blocks) - 1):
        sublayer = find_structure(model).blocks[index].sublayers[which]
        masked, sliced = with_output_projection_zero(model, sublayer), copy.deepcopy(model)
        remove_sublayer(sliced, sublayer)
        assert difference(sliced, masked, ids) <= 1e-5
        assert difference(sliced, model, ids) > 1e-3
        held = sum(p.numel() for path in sublayer.paths for p in model.get_submodule(path).parameters())
        assert model.num_parameters() - sliced.num_parameters() >= held
        names = [n for n, _ in sliced.named_parameters()]
        assert not [n for path in sublayer.paths for n in names if n.startswith(path + ".")]
        block = find_structure(sliced).blocks[index]
        assert (block.attention, block.feed_forward)[which] is None
        assert (block.attention, block.feed_forward)[1 - which] is not None
        norms = EXPECTED[name][1]
        if norms and norms[which]:
            gone = isinstance(sliced.get_submodule(sublayer.norm), RemovedNorm)
            assert gone and model.num_parameters() - sliced.num_parameters() > held


@pytest.mark.parametrize("name", EXPECTED)
def test_everything_but_one_attention_can_go(make_model, make_ids, name):
    """Also in changing order, and found anew each time."""
    model = make_model(name, **({"n_layer": 2} if name == "gpt2" else {"n_layers": 2} if name == "distilbert" else {}))
    ids, structure = make_ids(2, 7), find_structure(model)
    full = getattr(model.config, "layer_types", None)
    keeper = next(i for i, kind in enumerate(full) if kind == full[0]) if full else 0
    masked = copy.deepcopy(model)
    for block in reversed(structure.blocks):
        for sublayer in block.sublayers:
            if block.index == keeper and sublayer.kind == "attention":
                continue
            masked = with_output_projection_zero(masked, sublayer)
            found = find_structure(model).blocks[block.index]
            remove_sublayer(model, found.attention if sublayer.kind == "attention" else found.feed_forward)
    assert difference(model, masked, ids) <= 1e-5
    assert [s.name for s in find_structure(model).sublayers] == [f"block {keeper} attention"]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kind", ["attention", "feed_forward"])
def test_cached_decoding_without_the_first_sublayer(make_model, make_ids, name, kind):
    """transformers reads the length of the past from the first entry of the cache, which must not stay empty."""
    model, ids = make_model(name), make_ids(2, 11)
    remove_sublayer(model, getattr(find_structure(model).blocks[0], kind))
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        step = model(input_ids=ids[:, :5], use_cache=True)
        found = [step.logits]
        for position in range(5, 11):
            step = model(
                input_ids=ids[:, position : position + 1], past_key_values=step.past_key_values, use_cache=True
            )
            found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, 1), full, rtol=1e-4, atol=1e-4)


def test_the_last_attention_of_the_first_kind_cannot_go(make_model, one_line):
    model = make_model("gemma2", layer_types=["full_attention", *["sliding_attention"] * 3])
    with pytest.raises(InputError) as caught:
        remove_sublayer(model, find_structure(model).blocks[0].attention)
    one_line(caught, "last full_attention attention cannot be removed")


def test_a_shared_norm_goes_with_its_last_reader(make_model, make_ids):
    """Phi's one norm feeds attention and feed-forward: it stays for the other, then it is gone."""
    model, ids = make_model("phi"), make_ids(2, 7)
    block = find_structure(model).blocks[1]
    masked = with_output_projection_zero(with_output_projection_zero(model, block.attention), block.feed_forward)
    remove_sublayer(model, block.attention)
    assert not isinstance(model.model.layers[1].input_layernorm, RemovedNorm)
    remove_sublayer(model, find_structure(model).blocks[1].feed_forward)
    assert isinstance(model.model.layers[1].input_layernorm, RemovedNorm)
    assert difference(model, masked, ids) <= 1e-5
    assert not list(model.model.layers[1].parameters())


def test_finding_changes_nothing(make_model, make_ids):
    model = make_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_structure(model)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_set_module_keeps_the_mode(make_model, training):
    model = make_model("llama").train(training)
    set_module(model, "model.layers.0.mlp.up_proj", nn.Linear(32, 48).train(not training))
    assert model.model.layers[0].mlp.up_proj.training == training


def test_a_model_without_blocks_is_refused(make_model, one_line):
    model = make_model("llama")
    model.model.layers = nn.ModuleList(list(model.model.layers)[:2])
    with pytest.raises(InputError) as caught:
        find_structure(model)
    one_line(caught, "LlamaForCausalLM: no list of 3 transformer blocks")
