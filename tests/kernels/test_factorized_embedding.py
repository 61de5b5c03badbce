"""Factorized embeddings: the dense table's rows without the table, heads that are tied to them, one tensor in memory, in training and on disk."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from tensorpress.artifact import save_model
from tensorpress.compressors.decompose.tensor_train import decompose, full_bonds
from tensorpress.errors import InputError
from tensorpress.kernels import registry
from tensorpress.kernels.factorized_embedding import FactorizedEmbedding, TiedHead, tie_heads
from tensorpress.loading import layers_of, load, outline
from tensorpress.structure import find_structure, set_module

SHAPES = [
    (60, (60, 1), (1, 24), (5,)),
    (61, (8, 8), (4, 6), (7,)),
    (53, (4, 4, 4), (2, 4, 3), (5, 6)),
    (59, (4, 1, 5, 3), (2, 3, 1, 4), (3, 9, 5)),
    (31, (31,), (24,), ()),
    (17, (1, 17, 1), (2, 3, 4), (2, 4)),
]


def embedding_of(count, rows, columns, bonds, **fields):
    edges = (1, *bonds, 1)
    sites = zip(edges[:-1], rows, columns, edges[1:], strict=True)
    cores = [torch.randn(site, dtype=torch.float64) for site in sites]
    return FactorizedEmbedding.from_cores(cores, count, **fields)


def factorized(model, rows, columns, bonds):
    """A model's embedding made of cores, and its head tied to it, or dense."""
    path = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    made = embedding_of(table.num_embeddings, rows, columns, bonds, padding_idx=table.padding_idx)
    made.scale = float(getattr(table, "embed_scale", 1.0))
    made = made.to(table.weight.dtype)
    for core in made.cores:
        core.data *= 0.3
    if head is not None and head.weight is table.weight:
        set_module(model, "lm_head", TiedHead.from_embedding(made, path, head.bias))
    set_module(model, path, made)
    tie_heads(model)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_lookups_are_rows_of_the_dense_table(seed, shape):
    made = embedding_of(*shape)
    dense = made.dense_weight()
    assert dense.shape == (shape[0], math.prod(shape[2])) == (made.num_embeddings, made.embedding_dim)
    for size in [(3, 40), (1,), (), (0,), (2, 0)]:
        ids = torch.randint(0, shape[0], size)
        for asked in (ids, ids.int()):
            found = made(asked)
            assert found.shape == (*size, made.embedding_dim)
            torch.testing.assert_close(found, dense[ids], rtol=1e-12, atol=1e-12)
    everything = torch.arange(shape[0]).flip(0)
    torch.testing.assert_close(made(everything), dense.flip(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_no_token_has_are_refused(seed, shape):
    made = embedding_of(*shape)
    for wrong in (shape[0], math.prod(shape[1]) - 1 + (math.prod(shape[1]) == shape[0]), -1, 10**9):
        with pytest.raises(IndexError):
            made(torch.tensor([0, wrong]))


@pytest.mark.parametrize(("rows", "columns"), [((8, 8), (4, 6)), ((4, 4, 4), (2, 4, 3)), ((61, 1), (1, 24))])
def test_at_full_bonds_nothing_is_lost(seed, rows, columns):
    table = torch.randn(61, 24, dtype=torch.float64)
    padded = nn.functional.pad(table, (0, 0, 0, math.prod(rows) - 61))
    made = FactorizedEmbedding.from_cores(decompose(padded, rows, columns, full_bonds(rows, columns)), 61)
    torch.testing.assert_close(made(torch.arange(61)), table, rtol=1e-10, atol=1e-10)
    h = torch.randn(2, 5, 24, dtype=torch.float64)
    head = TiedHead.from_embedding(made, "there", None)
    torch.testing.assert_close(head(h), h @ table.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tied_head_by_every_kernel(seed, shape):
    made, bias = embedding_of(*shape).float(), torch.randn(shape[0])
    head, h = TiedHead.from_embedding(made, "there", bias), torch.randn(2, 5, made.embedding_dim)
    expected = (h.double() @ made.dense_weight().double().T + bias).detach()
    assert head.table.cores is made.cores
    torch.testing.assert_close(head.dense_weight(), made.dense_weight(), rtol=0, atol=0)
    for name, backend in registry.backends("mpo_linear").items():
        if backend.can_run(head.table):
            head.table.kernel = name
            with torch.no_grad():
                torch.testing.assert_close(head(h).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_both_uses_add_up(seed, shape):
    """Those of the cores are those of a dense tied table, taken through the contraction."""
    made = embedding_of(*shape, scale=1.7)
    head, twin = TiedHead.from_embedding(made, "there", None), copy.deepcopy(made)
    ids, mixing = torch.randint(0, shape[0], (3, 7)), torch.randn(made.embedding_dim, made.embedding_dim).double()
    labels = torch.randint(0, shape[0], (21,))

    def loss(vectors, logits_of):
        return nn.functional.cross_entropy(logits_of((vectors @ mixing).tanh()).flatten(0, 1), labels)

    loss(made(ids), head).backward()
    dense = twin.dense_weight()
    loss(1.7 * nn.functional.embedding(ids, dense), lambda h: h @ dense.T).backward()
    for own, other in zip(made.cores, twin.cores, strict=True):
        assert own.grad.abs().sum() > 0
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_lookups_of_padding_give_no_gradient(seed, shape):
    made = embedding_of(*shape, padding_idx=3)
    ids = torch.randint(4, shape[0], (20,))
    weights = torch.randn(40, made.embedding_dim, dtype=torch.float64)
    (made(torch.cat((ids, torch.full((20,), 3)))) * weights).sum().backward()
    padded = [core.grad.clone() for core in made.cores]
    made.zero_grad()
    (made(ids) * weights[:20]).sum().backward()
    for one, core in zip(padded, made.cores, strict=True):
        torch.testing.assert_close(one, core.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi", "opt", "gpt_neox"])
def test_folders_open_again(make_model, make_ids, outputs, tmp_path, plain_kernels, name, tied):
    model, ids = make_model(name, tie_word_embeddings=tied, vocab_size=61), make_ids(2, 9) % 61
    model = factorized(model, (4, 4, 4), (4, 4, 2), (5, 6))
    expected = outputs(model, ids)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    save_model(model, tmp_path / "a", torch.float32)
    opened = load(tmp_path / "a")
    assert layers_of(opened) == layers_of(model) and len(layers_of(model)) == 1 + tied
    torch.testing.assert_close(outputs(opened, ids), expected, rtol=0, atol=1e-5)
    if tied:
        embedding = opened.get_input_embeddings()
        assert all(a is b for a, b in zip(opened.lm_head.table.cores, embedding.cores, strict=True))
        stored = json.loads((tmp_path / "a" / "config.json").read_text())
        assert not stored["tie_word_embeddings"]
    assert opened.num_parameters() == sum(p.numel() for p in model.parameters())
    opened.tie_weights()  # as others may do
    opened.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(outputs(load(tmp_path / "b"), ids), expected, rtol=0, atol=1e-5)
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("a", "b")]
    numbers = 4 * sum(p.numel() for p in model.parameters())
    assert all(numbers < size < numbers + 20_000 for size in sizes)
    find_structure(outline(tmp_path / "a"))


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_encoders_open_again_with_what_lies_beside_the_table(make_model, make_ids, outputs, tmp_path, name):
    model, ids = factorized(make_model(name), (8, 8), (4, 8), (7,)), make_ids(2, 9)
    expected = outputs(model, ids)
    save_model(model, tmp_path, torch.float32)
    opened = load(tmp_path)
    for (buffer, found), (_, wanted) in zip(opened.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(found, wanted), buffer
    torch.testing.assert_close(outputs(opened, ids), expected, rtol=0, atol=1e-5)


def test_it_stays_tied_where_the_model_goes(make_model, make_ids, outputs, tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = factorized(make_model("llama", tie_word_embeddings=True), (8, 8), (4, 8), (7,)), make_ids(2, 9)
    save_model(model, tmp_path, torch.float32)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    for one in (copy.deepcopy(opened), copy.deepcopy(model).to(torch.bfloat16), opened.double()):
        for core, other in zip(one.lm_head.table.cores, one.model.embed_tokens.cores, strict=True):
            assert core is other
    names = [name for name, _ in opened.named_parameters() if "cores" in name]
    assert names == [f"model.embed_tokens.cores.{k}" for k in range(2)]
    before = opened.model.embed_tokens.dense_weight().detach().clone()
    optimizer = torch.optim.SGD(opened.parameters(), lr=0.1)
    opened.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = opened.model.embed_tokens.dense_weight()
    assert not torch.allclose(before, after)
    h = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(opened.lm_head(h), h @ after.T)


def test_the_compiled_form_and_exports(seed):
    for shape in SHAPES[:4]:
        made, ids = embedding_of(*shape, scale=2.5), torch.randint(0, shape[0], (3, 7))
        exported = torch.export.export(nn.Sequential(made), (ids,))
        torch.testing.assert_close(exported.module()(ids), made(ids))
        again = torch.randint(0, shape[0], (3, 7))
        torch.testing.assert_close(exported.module()(again), made(again))


def test_bad_specs_and_heads_without_their_embedding(make_model, one_line, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match="fewer than 5"):
        FactorizedEmbedding(5, (2, 2), (2, 2), (2,))
    with pytest.raises(ValueError, match="n - 1 bonds"):
        FactorizedEmbedding(4, (2, 2), (2, 2), ())
    model = factorized(make_model("llama", tie_word_embeddings=True), (8, 8), (4, 8), (7,))
    save_model(model, tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(words, path, **changes):
        changed = copy.deepcopy(config)
        changed["quantization_config"]["layers"][path] |= changes
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError) as caught:
            load(tmp_path)
        one_line(caught, words)

    refused("as many rows as there are tokens", "model.embed_tokens", out_factors=[8, 7])
    refused("less than twice as many", "model.embed_tokens", out_factors=[8, 16])
    refused("n - 1 bonds", "model.embed_tokens", bonds=[])
    refused("padding_idx among the tokens", "model.embed_tokens", padding_idx=64)
    refused("scale", "model.embed_tokens", scale="large")
    refused(r"has the shape \[64, 64\]; the model's is \[64, 32\]", "model.embed_tokens", in_factors=[8, 8])
    refused("lm_head is tied to model.norm, which is no factorized embedding", "lm_head", of="model.norm")
    refused("lm_head is tied to no.where, which is no factorized embedding", "lm_head", of="no.where")
    refused(r"has the shape \[32, 32\]; the model's is \[64, 32\]", "lm_head", out_features=32)
    changed = copy.deepcopy(config)
    del changed["quantization_config"]["layers"]["model.embed_tokens"]
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    one_line(caught, "lm_head is tied to model.embed_tokens, which is no factorized embedding")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    names = [name for name in tensors if name.endswith("cores.1")]
    assert names == ["model.embed_tokens.cores.1"]
    del tensors[names[0]]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="its weights lack"):
        load(tmp_path)
