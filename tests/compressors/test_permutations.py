"""Heads and neurons in another order, neurons of another scale: the same outputs, neighbours that are alike, hands off what is no plain block."""

import copy
import re
from collections import UserDict

import pytest
import torch
import transformers
from torch import nn

from tensorpress.compressors.calibration import walk
from tensorpress.compressors.decompose import permutations
from tensorpress.compressors.decompose.permutations import (
    alike,
    arrange_blocks,
    permute_heads,
    permute_neurons,
    scale_neurons,
)
from tensorpress.compressors.decompose.site_plans import fit, plans
from tensorpress.compressors.decompose.weighted_low_rank import low_rank_layer
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.structure import find_structure, linear_shape, linear_weight, set_module

NAMES = [
    "llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3", "gpt2", "gpt_neox", "gpt_neox_sequential", "opt", "opt_post", "bert",
    "distilbert", "roberta",
]  # fmt: skip
MIXTURE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
MIXTURES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
}


PROPORTIONAL = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "opt_post")
"""Gated neurons, and ReLU."""


def visited(model, act):
    """What `act` says of each block; the model is changed."""
    found = []

    def visit(block, inputs):
        found.append(act(block, inputs))
        return []

    walk(model, find_structure(model), torch.tensor([[5, 6, 7, 6]]), visit)
    return found


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_stay_what_they_are(make_model, make_ids, outputs, name):
    model, ids = make_model(name).double(), make_ids(3, 11)
    before, expected = state(model), outputs(model, ids)
    count = len(find_structure(model).blocks)
    scaled = count if name in PROPORTIONAL else 0
    found = arrange_blocks(model, find_structure(model))
    assert found == {"heads": found["heads"], "ordered": count, "scaled": scaled}
    assert not same(model, before)
    torch.testing.assert_close(outputs(model, ids), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "fields"), [("llama", {"mlp_bias": True}), ("gpt2", {}), ("bert", {}), ("phi3", {}), ("opt", {})]
)
def test_rows_and_biases_and_columns_follow_the_order(make_model, name, fields):
    model = make_model(name, **fields)
    before, structure = copy.deepcopy(model), find_structure(model)
    orders = visited(model, permute_neurons)
    moved = set()
    for block, order in zip(structure.blocks, orders, strict=True):
        assert order.sort().values.equal(torch.arange(len(order)))
        into, (out,) = block.feed_forward.linears
        for path in into:
            ours, theirs = model.get_submodule(path), before.get_submodule(path)
            halves = linear_shape(ours)[0] // len(order)
            rows = torch.cat([order + half * len(order) for half in range(halves)])
            assert torch.equal(linear_weight(ours), linear_weight(theirs)[rows])
            assert ours.bias is None or torch.equal(ours.bias, theirs.bias[rows])
            moved |= {path + ".weight", path + ".bias"}
        assert torch.equal(linear_weight(model.get_submodule(out)), linear_weight(before.get_submodule(out))[:, order])
        moved.add(out + ".weight")
    theirs = before.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items() if key not in moved)


HEADS = {  # the heads of the tiny models with keys of their own, and what the outputs of each layer that leads in are
    "llama": (2, [["q q"], ["k"], ["v"]]),
    "phi3": (2, [["q q", "k", "v"]]),
    "gpt2": (4, [["q", "k", "v"]]),
    "gpt_neox": (4, [["qkv"]]),
    "bert": (4, [["q"], ["k"], ["v"]]),
}


@pytest.fixture
def turned_round(monkeypatch):
    """The order of two heads is what it is, and that of four may be; any other than the one there is has to be right as well."""
    monkeypatch.setattr(permutations, "alike", lambda vectors: torch.arange(len(vectors)).flip(0))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_stay_what_they_are_when_heads_are_turned_round(make_model, make_ids, outputs, turned_round, name):
    model, ids = make_model(name).double(), make_ids(3, 11)
    before, expected = state(model), outputs(model, ids)
    blocks = find_structure(model).blocks
    assert arrange_blocks(model, find_structure(model))["heads"] == len(blocks)
    for block in blocks:
        layers = [path for group in block.attention.linears for path in group]
        assert not any(torch.equal(model.state_dict()[f"{path}.weight"], before[f"{path}.weight"]) for path in layers)
    torch.testing.assert_close(outputs(model, ids), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", HEADS)
def test_heads_move_whole(make_model, turned_round, name):
    model = make_model(name)
    before, structure = copy.deepcopy(model), find_structure(model)
    heads, layers = HEADS[name]
    orders = visited(model, lambda block, inputs: permute_heads(block, inputs, heads))
    moved, theirs = set(), before.state_dict()
    for block, order in zip(structure.blocks, orders, strict=True):
        assert order.sort().values.equal(torch.arange(heads))
        into, (out,) = block.attention.linears
        for path, parts in zip(into, layers, strict=True):
            ours, old = model.get_submodule(path), before.get_submodule(path)
            sizes = [heads * 8 * len(part.replace(" ", "")) for part in parts]
            pieces = zip(linear_weight(ours).split(sizes), linear_weight(old).split(sizes), strict=True)
            assert all(torch.equal(a, torch.cat([b.chunk(heads)[head] for head in order])) for a, b in pieces)
            moved |= {path + ".weight", path + ".bias"}
        columns = linear_weight(before.get_submodule(out)).chunk(heads, 1)
        assert torch.equal(linear_weight(model.get_submodule(out)), torch.cat([columns[head] for head in order], 1))
        moved.add(out + ".weight")
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items() if key not in moved)


def test_heads_that_are_alike_stand_together(make_model):
    model = make_model("llama", num_attention_heads=8, num_key_value_heads=8)
    block = find_structure(model).blocks[0]
    columns = linear_weight(model.get_submodule(block.attention.linears[1][0])).data.view(32, 8, 4)
    columns[:, 4:] = columns[:, :4] * 2 + 0.01 * torch.randn(32, 4, 4)
    order = visited(model, lambda block, inputs: permute_heads(block, inputs, 8))[0]
    assert all(pair.remainder(4).unique().numel() == 1 for pair in order.view(4, 2))


def test_heads_that_are_told_apart_are_left_alone(make_model, turned_round):
    model = make_model("llama")
    structure = find_structure(model)
    out = structure.blocks[1].attention.linears[1][0]
    model.get_submodule(out).register_forward_pre_hook(lambda _, args: (args[0] * torch.linspace(0.5, 2, 32),))
    before = state(model.get_submodule(structure.blocks[1].path))
    orders = visited(model, lambda block, inputs: permute_heads(block, inputs, 2))
    assert orders[1] is None and orders[0] is not None and orders[2] is not None
    assert same(model.get_submodule(structure.blocks[1].path), before)


def shared_keys():
    config = transformers.Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
        global_head_dim=8, num_kv_shared_layers=2, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_use_the_keys_of_others(seed, turned_round, outputs, make_ids, dtype):
    """No head is moved: its queries in another block would not follow."""
    model = shared_keys().to(dtype)
    ids = make_ids(2, 9)
    expected = outputs(model, ids)
    assert arrange_blocks(model, find_structure(model))["heads"] == 0
    assert torch.equal(outputs(model, ids), expected)


def test_blocks_that_use_the_keys_of_others_by_layers_of_low_rank(seed, turned_round):
    """Which do not look like queries any more."""
    model = shared_keys()
    structure = find_structure(model)
    queries = [path for path in structure.linear_paths if re.search(r"layers\.[23]\..*q_proj", path)]
    for path in queries:
        left, right = torch.randn(32, 3), torch.randn(3, 32)
        set_module(model, path, low_rank_layer(left, right, None, torch.float32, pivoted=False))
    assert len(queries) == 2 and arrange_blocks(model, find_structure(model))["heads"] == 0


def test_layers_that_some_inputs_alone_use(make_model, turned_round):
    """As those of Longformer for global attention: what leads out would move, they would not."""
    model = make_model("bert")
    structure = find_structure(model)
    model.get_submodule(structure.blocks[1].path).attention.self.query_global = nn.Linear(32, 32)
    assert [order is None for order in visited(model, lambda block, inputs: permute_heads(block, inputs, 4))] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_an_output_that_does_not_tell_how_queries_keys_and_values_are_joined(make_model, turned_round, size):
    model = make_model("gpt_neox")
    out = find_structure(model).blocks[1].attention.linears[1][0]
    model.get_submodule(out).weight.data.mul_(size)
    before = state(model.get_submodule(find_structure(model).blocks[1].path))
    orders = visited(model, lambda block, inputs: permute_heads(block, inputs, 4))
    assert orders[0] is not None and orders[1] is None
    assert same(model.get_submodule(find_structure(model).blocks[1].path), before)


def test_what_would_not_move_is_not_counted(make_model):
    """Two heads are neighbours in any order."""
    model = make_model("llama")
    assert arrange_blocks(model, find_structure(model))["heads"] == 0


@pytest.mark.parametrize("heads", [1, 3, 64])
def test_numbers_of_heads_that_do_not_divide(make_model, heads):
    model = make_model("llama")
    before = state(model)
    assert visited(model, lambda block, inputs: permute_heads(block, inputs, heads)) == [None] * 3
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_scales_change_no_bit_of_the_outputs(make_model, make_ids, outputs, name, dtype):
    model, ids = make_model(name, **({"mlp_bias": True} if name == "llama" else {})), make_ids(3, 11)
    paths = [block.feed_forward.linears[1][0] for block in find_structure(model).blocks]
    for path in paths:
        weight = linear_weight(model.get_submodule(path)).data
        weight.mul_(torch.logspace(-1, 0.5, weight.shape[1]))
        weight[:, 3] = 0
    model = model.to(dtype)
    before, expected = copy.deepcopy(model), outputs(model, ids)
    found = visited(model, scale_neurons)
    assert torch.equal(outputs(model, ids), expected)
    for path, powers in zip(paths, found, strict=True):
        norms = linear_weight(before.get_submodule(path)).float().norm(dim=0)
        usual = norms[norms > 0].log2().mean().exp2()
        after = linear_weight(model.get_submodule(path)).float().norm(dim=0)
        assert powers[3] == 0 and powers.max() > 2 and powers.min() < 0
        inside = after[norms > 0] / usual
        assert inside.min() > 1 - 1e-5 and inside.max() < 2 + 1e-5
        torch.testing.assert_close(after, norms * 2.0**powers)


@pytest.mark.parametrize("name", ["gpt2", "bert", "phi"])
def test_neurons_that_are_not_proportional_to_a_row_keep_their_scale(make_model, name):
    model = make_model(name)
    before = state(model)
    assert visited(model, scale_neurons) == [None] * 3 and same(model, before)


def test_the_stored_precision_stays_and_the_same_twice(make_model, make_ids, outputs):
    model, ids = make_model("llama").bfloat16(), make_ids(3, 11)
    twin, expected = copy.deepcopy(model), outputs(model, ids)
    for one in (model, twin):
        arrange_blocks(one, find_structure(one))
    assert same(model, state(twin)) and all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert (outputs(model, ids) - expected).norm() < 0.05 * expected.norm()


def test_a_model_in_training_is_arranged_as_well_and_stays_in_training(make_model):
    model = make_model("gpt2").train()
    assert arrange_blocks(model, find_structure(model))["ordered"] == 3 and all(m.training for m in model.modules())


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_are_left_alone(seed, turned_round, family):
    """But for the heads of their attention."""
    config = getattr(transformers, f"{family}Config")(**MIXTURE, **MIXTURES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = state(model)
    assert arrange_blocks(model, find_structure(model)) == {"heads": 2, "ordered": 0, "scaled": 0}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if re.search(r"self_attn\.[qkvo]_proj\.weight", name)}


class Mixing(nn.Module):
    """No two neurons are treated alike."""

    def forward(self, x):
        return x * torch.linspace(0.5, 2.0, x.shape[-1])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_activations_that_tell_neurons_apart(make_model, name):
    model = make_model(name)
    second = find_structure(model).blocks[1].path
    set_module(model, f"{second}.mlp.act" + ("_fn" if name == "llama" else ""), Mixing())
    before = state(model.get_submodule(second))
    first, middle, last = visited(model, permute_neurons)
    assert middle is None and first is not None and last is not None
    assert same(model.get_submodule(second), before)


def test_what_is_decomposed_already_or_not_there_is_left_alone(make_model):
    model = make_model("llama")
    blocks = find_structure(model).blocks
    up = f"{blocks[0].path}.mlp.up_proj"
    set_module(
        model, up, MPOLinear.from_cores([linear_weight(model.get_submodule(up)).detach()[None, ..., None]], None)
    )
    model.get_submodule(f"{blocks[1].path}.mlp.down_proj").weight.data.fill_(float("nan"))
    before = state(model)
    orders = visited(model, permute_neurons)
    assert orders[0] is None and orders[1] is None
    assert all(
        torch.equal(t, before[n])
        for n, t in model.state_dict().items()
        if ".layers.2." not in n and "layers.1" not in n
    )
    assert torch.equal(
        model.state_dict()[f"{blocks[1].path}.mlp.up_proj.weight"], before[f"{blocks[1].path}.mlp.up_proj.weight"]
    )


def test_arguments_in_float32_are_others():
    """A block may write what it keeps for others into a dictionary that it gets."""
    kept = UserDict({0: torch.ones(2, dtype=torch.bfloat16)})
    found = permutations._float({"kept": kept, "mask": None, "pair": (torch.ones(1).half(), 3)})
    assert found["kept"] is not kept and found["kept"][0].dtype == torch.float32 and kept[0].dtype == torch.bfloat16
    assert isinstance(found["kept"], UserDict) and found["mask"] is None
    assert found["pair"][0].dtype == torch.float32 and found["pair"][1] == 3


# --- the order


@pytest.mark.parametrize("chunk", [3, 2048])
def test_families_stand_together(seed, monkeypatch, chunk):
    """Vectors of any length that point in 9 directions, 8 of each, at random places."""
    monkeypatch.setattr(permutations, "CHUNK", chunk)
    directions = nn.functional.normalize(torch.randn(9, 64), dim=1)
    family = torch.randperm(72) % 9
    vectors = (directions[family] + 0.01 * torch.randn(72, 64)) * (0.1 + torch.rand(72, 1))
    for group in family[alike(vectors)].split(8):
        assert len(set(group.tolist())) == 1


def test_pairs_are_those_of_greedy_matching(seed):
    unit = nn.functional.normalize(torch.randn(40, 6), dim=1)
    cosines = (unit @ unit.T).triu(1) - 2 * torch.ones(40, 40).tril()
    expected = set()
    for _ in range(20):
        i, j = divmod(int(cosines.argmax()), 40)
        expected.add((i, j))
        cosines[[i, j]] = cosines[:, [i, j]] = -3
    first, second = permutations._matched(unit)
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    "vectors", [torch.zeros(16, 4), torch.full((16, 4), float("nan")), torch.ones(16, 4), torch.randn(11, 4), torch.randn(1, 4)]
)  # fmt: skip
def test_an_order_for_whatever_comes(vectors):
    assert alike(vectors).sort().values.equal(torch.arange(len(vectors)))


def test_a_structure_that_was_shuffled_is_found_again(seed):
    """Columns that are sums of Kronecker products of 16 x 8 are of small bonds in the right order alone; families of neighbours are most of it."""
    shared, own = torch.randn(8, 24), torch.randn(16, 1, 24)
    vectors = (own + 0.3 * shared).reshape(128, 24)  # neuron (i, j): own[i] + 0.3 shared[j]
    shuffled = vectors[torch.randperm(128)].T
    plan = next(plan for plan in plans(24, 128, 2, "auto") if plan.kind == "balanced")

    def loss(weight):
        return fit(plan, 8, weight, None, None, None, pivoted=False, sweeps=0, damping=1e-3).loss

    assert loss(shuffled[:, alike(shuffled.T)]) < 0.7 * loss(shuffled)
