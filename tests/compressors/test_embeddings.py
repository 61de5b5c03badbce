"""Embeddings and heads decomposed by `mpo`: what is minimised is what it costs, budgets hold, and the models open again."""

import copy
import math

import pytest
import torch
from torch import nn

from tensorpress.artifact import save_model
from tensorpress.compressors.decompose.embeddings import (
    Use,
    _fitted,
    check_embeddings,
    decompose_embeddings,
    even_factors,
    find_ends,
    metrics,
    observed,
    site_plans,
)
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.decompose.tensor_train import factors
from tensorpress.compressors.decompose.weighted_low_rank import weighted_error
from tensorpress.errors import InputError, StepError
from tensorpress.evaluators.base import EvaluationData, Subject
from tensorpress.evaluators.size import Size
from tensorpress.kernels.factorized_embedding import FactorizedEmbedding, TiedHead
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.mpo_linear import MPOLinear, mpo_to_matrix
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear
from tensorpress.loading import layers_of, load, outline
from tensorpress.structure import find_structure


def decomposed(model, calibration, **fields):
    """The embedding and the head alone; the blocks stay as they are."""
    method = MPO(**{"keep": 0.9, "embeddings": 0.6, "multiple": 1, **fields})
    check_embeddings(method, model)
    return decompose_embeddings(method, model, find_structure(model), calibration)


def size_of(folder, original):
    subject = Subject(None, lambda: None, folder, original, False)
    return Size().evaluate(subject, EvaluationData(torch.zeros(1, 2), 1, None, "none")).metrics


@pytest.mark.parametrize("metric", ["loss", "inputs", "weights"])
@pytest.mark.parametrize(
    ("name", "tied"),
    [("llama", True), ("llama", False), ("gpt2", True), ("gemma3", True), ("gemma2", False), ("phi", True), ("opt", True), ("bert", None)],
)  # fmt: skip
def test_whole_model(make_model, make_calibration, make_ids, outputs, tmp_path, plain_kernels, name, tied, metric):
    model = make_model(name) if tied is None else make_model(name, tie_word_embeddings=tied)
    ids, ends, blocks = make_ids(2, 9), find_ends(model), len(find_structure(model).linear_paths)
    dense = {ends.path: ends.embedding.weight.detach().clone()}
    if tied is False:
        dense[ends.head_path] = ends.head.weight.detach().clone()
    for folder in ("dense", "a", "b"):
        (tmp_path / folder).mkdir()
    save_model(model, tmp_path / "dense", torch.float32)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model, report = MPO(keep=0.6, embeddings=0.55, metric=metric, multiple=2).compress(model, make_calibration(12, 16))
    rows = report.layers[blocks:]
    assert [row.layer for row in rows] == list(dense) and report.summary["layers"] == blocks
    before, after = (sum(getattr(row, f"parameters_{when}") for row in rows) for when in ("before", "after"))
    assert report.summary["embeddings_kept"] == after / before
    for row in rows:
        module, table = model.get_submodule(row.layer), dense[row.layer]
        assert (
            row.bytes_before == 2 * table.numel()
            and 0.4 * row.bytes_before < row.bytes_after <= 0.55 * row.bytes_before
        )
        assert row.action == f"mpo {row.detail['plan']}" and row.detail["plan"] in ("low rank", "balanced 2 sites")
        assert row.detail["losses"][row.detail["plan"]] == min(row.detail["losses"].values())
        assert len(row.detail["losses"]) == 2 and 0 < row.error_after < 1
        assert len(row.detail["entropies"]) == len(row.detail["bonds"]) and row.seconds >= 0
        numbers = sum(p.numel() for name, p in module.named_parameters() if name != "bias")
        assert row.parameters_after == numbers
        assert row.bytes_after == 2 * numbers + sum(buffer.numel() for buffer in module.buffers())
        if metric == "weights":
            error = float((module.dense_weight().detach() - table).norm() / table.norm())
            assert row.error_after == pytest.approx(error, rel=1e-3)
    assert isinstance(model.get_input_embeddings(), FactorizedEmbedding)
    if tied is not None:
        kinds = TiedHead if tied else (LowRankLinear, MPOLinear, PivotedMPOLinear)
        assert isinstance(model.get_output_embeddings(), kinds)
    assert all(p.requires_grad == flags.get(name, True) for name, p in model.named_parameters())
    expected = outputs(model, ids)
    save_model(model, tmp_path / "a", torch.float32)
    opened = load(tmp_path / "a")
    assert layers_of(opened) == layers_of(model)
    torch.testing.assert_close(outputs(opened, ids), expected, rtol=0, atol=1e-5)
    opened.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(outputs(load(tmp_path / "b"), ids), expected, rtol=0, atol=1e-5)
    saved = 4 * sum(row.parameters_before - row.parameters_after for row in report.layers)
    sizes = {f: size_of(tmp_path / f, tmp_path / "dense") for f in ("dense", "a", "b")}
    for folder in ("a", "b"):
        assert sizes["dense"]["weight_bytes"] - sizes[folder]["weight_bytes"] == pytest.approx(saved, abs=20_000)
        assert sizes[folder]["parameters"] == sum(p.numel() for p in model.parameters())
    find_structure(outline(tmp_path / "a"))


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("bert", None)])
@pytest.mark.parametrize("plans", ["low_rank", "balanced"])
@pytest.mark.parametrize("metric", ["loss", "inputs"])
def test_tables_that_have_the_form_lose_nothing(
    make_model, make_calibration, make_ids, outputs, name, tied, plans, metric
):
    """A vocabulary of 63, tables of the bonds that the share has room for, in float64."""
    model = make_model(name, vocab_size=63, **({} if tied is None else {"tie_word_embeddings": tied})).double()
    ends, ids = find_ends(model), make_ids(3, 9) % 63
    for module in (ends.embedding, ends.head) if tied is False else (ends.embedding,):
        (plan,) = site_plans(MPO(keep=0.5, plans=plans), 63, 32, padded=True)
        shapes = zip((1, 3), plan.rows, plan.columns, (3, 1), strict=True)
        module.weight.data = 0.3 * mpo_to_matrix([torch.randn(shape, dtype=torch.float64) for shape in shapes])
    expected = outputs(model, ids)
    calibration = make_calibration(12, 16)
    calibration.windows %= 63
    rows = decomposed(model, calibration, plans=plans, embeddings=0.5, metric=metric)
    torch.testing.assert_close(outputs(model, ids), expected, rtol=1e-6, atol=1e-6)
    assert all(row.error_after < 1e-6 for row in rows)


@pytest.mark.parametrize("count", [53, 59, 61])
@pytest.mark.parametrize("sites", [2, 3])
def test_a_prime_vocabulary_is_padded_and_counted(
    make_model, make_calibration, make_ids, outputs, tmp_path, count, sites
):
    model, ids = make_model("llama", vocab_size=count, tie_word_embeddings=True), make_ids(2, 9) % count
    calibration = make_calibration(12, 16)
    calibration.windows %= count
    (row,) = decomposed(model, calibration, plans="balanced", sites=sites, embeddings=0.7)
    embedding = model.model.embed_tokens
    assert row.action == f"mpo balanced {sites} sites" and row.detail["shape"] == (count, 32)
    assert math.prod(embedding.out_factors) > count == embedding.num_embeddings == len(embedding.dense_weight())
    assert row.parameters_after == sum(core.numel() for core in embedding.cores) <= 0.7 * row.parameters_before
    logits = outputs(model, ids)
    assert logits.shape[-1] == count
    save_model(model, tmp_path, torch.float32)
    torch.testing.assert_close(outputs(load(tmp_path), ids), logits, rtol=0, atol=1e-4)


def test_auto_tries_every_number_of_sites():
    def sites(**fields):
        return [len(plan.rows) for plan in site_plans(MPO(keep=0.5, **fields), 32_000, 288, padded=True)]

    assert sites(sites=5) == [2, 2, 3, 4, 5] and sites(sites=2) == [2, 2]
    assert sites(sites=5, plans="balanced") == [5] and sites(sites=5, plans="low_rank") == [2]


def test_even_factors():
    assert even_factors(4096, 2) == (64, 64) and even_factors(4096, 3) == (16, 16, 16)
    for size in (50257, 151936, 32003, 128256, 61, 97):
        for sites in (2, 3):
            found = even_factors(size, sites)
            assert size <= math.prod(found) < 1.3 * size and max(found) <= 2 * min(found)
    assert math.prod(even_factors(50257, 2)) < 1.001 * 50257
    assert factors(50257, 2) == (29, 1733)
    assert even_factors(20, 5) == (2, 2, 2, 2, 2) and even_factors(20, 6) is None


@pytest.mark.parametrize("plans", ["low_rank", "balanced"])
def test_a_weighted_fit_loses_less_than_a_plain_one_of_the_same_bytes(seed, plans):
    table = torch.randn(96, 24, dtype=torch.float64)
    root = torch.randn(24, 24, dtype=torch.float64) * torch.logspace(0, -1.5, 24, dtype=torch.float64)
    use = Use(torch.rand(96, dtype=torch.float64) ** 4, root @ root.T)
    method = MPO(keep=0.5, embeddings=0.4, multiple=1, plans=plans)
    losses = {}
    for name, uses in (("weighted", [use]), ("plain", [])):
        best, row = _fitted(method, "table", table, None, uses, padded=True)
        losses[name] = (
            weighted_error(best.layer.dense_weight().detach() - table, use.columns, use.rows),
            row.bytes_after,
        )
    assert losses["weighted"][1] == losses["plain"][1]
    assert losses["weighted"][0] < 0.9 * losses["plain"][0]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "gpt2", "bert"])
def test_predicted_losses_are_what_changes_cost(make_model, make_calibration, outputs, name):
    """In nats a token, as a KL divergence (half a squared distance for encoders): with a scaled embedding, and with capped logits."""
    model = make_model(name) if name == "bert" else make_model(name, tie_word_embeddings=False)
    if name == "gemma2":
        model.config.final_logit_softcapping = 5.0
    calibration = make_calibration(64, 16)
    windows = calibration.windows
    calibration.windows = windows.repeat(4, 1)
    ends = find_ends(model)
    assert ends.scale == (pytest.approx(32**0.5) if name.startswith("gemma") else 1)
    uses = observed(MPO(keep=0.5, embeddings=0.5), model, find_structure(model), ends, calibration)
    assert set(uses) == ({"embedding"} if name == "bert" else {"embedding", "head"})
    before = outputs(model, windows)
    for use, module in (("embedding", ends.embedding), ("head", ends.head)):
        if module is None:
            continue
        ratios, table = [], module.weight.data
        for _ in range(7):
            change = 0.05 * table.norm() / table.numel() ** 0.5 * torch.randn_like(table)
            module.weight.data = table + change
            after = outputs(model, windows)
            module.weight.data = table
            if name == "bert":
                cost = 0.5 * (after - before).square().sum(-1).mean()
            else:
                cost = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean()
            expected = 0.5 * weighted_error(change, uses[use].columns, uses[use].rows)
            ratios.append(float(cost) / expected)
        assert 0.7 < torch.tensor(ratios).median() < 1.4, use


@pytest.mark.parametrize("metric", ["loss", "inputs"])
def test_what_is_observed(make_model, make_calibration, outputs, metric):
    model, calibration = make_model("llama", tie_word_embeddings=True), make_calibration(10, 16)
    windows, ends = calibration.windows, find_ends(model)
    seen = []
    handle = ends.head.register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(0, -2)))
    shares = outputs(model, windows).softmax(-1).flatten(0, 1)
    handle.remove()
    flags = [p.requires_grad for p in model.parameters()]
    uses = observed(MPO(keep=0.5, embeddings=0.5, metric=metric), model, find_structure(model), ends, calibration)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()
    counts = windows.flatten().bincount(minlength=64)
    rows = uses["embedding"].rows
    once = max(float((counts == 1).sum()) / windows.numel(), 1e-3)
    assert float(rows[counts == 0].sum()) == pytest.approx(once) and (rows > 0).all()
    shown = rows[counts > 0] / counts[counts > 0]
    torch.testing.assert_close(shown, torch.full_like(shown, (1 - once) / windows.numel()))
    torch.testing.assert_close(uses["head"].rows, (shares * (1 - shares)).mean(0), rtol=1e-3, atol=1e-6)
    states = torch.cat(seen)
    torch.testing.assert_close(uses["head"].columns, states.T @ states / len(states), rtol=1e-4, atol=1e-5)
    if metric == "inputs":
        assert torch.equal(uses["embedding"].columns, torch.eye(32))
    for relative in (True, False):
        found, columns = metrics([*uses.values()], ends.embedding.weight.detach(), relative)
        assert float(found.sum()) == pytest.approx(1) and torch.linalg.eigvalsh(columns.double()).min() > -1e-6
    # A tied table pays for both uses, which the joint metrics sum up but for the difference of their rows.
    found, columns = metrics([*uses.values()], ends.embedding.weight.detach(), False)
    change = torch.randn(64, 32)
    apart = sum(weighted_error(change, use.columns, use.rows) for use in uses.values())
    assert weighted_error(change, columns, found) == pytest.approx(apart, rel=0.35)
    one = Use(uses["head"].rows, uses["head"].columns)
    found, columns = metrics([one], ends.embedding.weight.detach(), True)
    assert weighted_error(change, columns, found) == pytest.approx(weighted_error(change, one.columns, one.rows))


def test_the_same_twice(make_model, make_calibration):
    first, calibration = make_model("llama", tie_word_embeddings=True), make_calibration(12, 16)
    second = copy.deepcopy(first)
    for model in (first, second):
        MPO(keep=0.6, embeddings=0.5, multiple=2).compress(model, calibration)
    states = [model.state_dict() for model in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_plain_weights_ask_nothing_of_the_calibration(make_model):
    model = make_model("llama", tie_word_embeddings=True)
    table = model.lm_head.weight.detach().double()
    (row,) = decomposed(model, None, metric="weights", plans=None)
    assert set(row.detail["losses"]) == {"low rank", "balanced 2 sites"}
    rank = int(0.6 * 64 * 32 / (64 + 32))
    singular = torch.linalg.svdvals(table)
    assert row.detail["losses"]["low rank"] == pytest.approx(float(singular[rank:].square().sum()), rel=1e-4)


def test_an_encoder_by_inputs_is_weighted_by_frequency_alone(make_model, make_calibration):
    model, calibration = make_model("bert"), make_calibration(12, 16)
    model.forward = lambda **_: pytest.fail("not run")
    ends = find_ends(model)
    uses = observed(MPO(keep=0.5, embeddings=0.5, metric="inputs"), model, None, ends, calibration)
    assert set(uses) == {"embedding"} and torch.equal(uses["embedding"].columns, torch.eye(32))


def test_what_is_not_finite(make_model, make_calibration):
    model = make_model("llama", tie_word_embeddings=True)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(StepError, match="outputs are not finite"):
        decomposed(model, make_calibration())


class Normed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"embeddings": 0.01}, r"embeddings: 0\.01 cannot be met; the smallest is 0\.0469"),
        ({"embeddings": 0.01, "plans": "balanced"}, r"embeddings: 0\.01 cannot be met; the smallest is 0\.\d+"),
        (
            {"embeddings": 0.5, "plans": "balanced", "sites": 7},
            r"sites: 7 sites; model\.embed_tokens of 64 x 32 has no",
        ),
    ],
)
def test_shares_and_sites_that_cannot_be(make_model, one_line, fields, match):
    model = make_model("llama", tie_word_embeddings=True)
    with pytest.raises(InputError) as caught:
        MPO(keep=0.5, **fields).check(model, find_structure(model))
    one_line(caught, match)


def test_the_smallest_share_can_be_met(make_model, make_calibration, one_line):
    for tied in (True, False):
        model = make_model("llama", tie_word_embeddings=tied)
        with pytest.raises(InputError) as caught:
            check_embeddings(MPO(keep=0.5, embeddings=1e-4), model)
        least = float(one_line(caught).rpartition(" ")[2])
        rows = decomposed(model, make_calibration(), embeddings=least)
        assert all(row.bytes_after <= least * row.bytes_before and max(row.detail["bonds"]) == 1 for row in rows)


def test_embeddings_and_heads_that_do_more(make_model, make_calibration, one_line):
    method = MPO(keep=0.5, embeddings=0.5)

    def refused(model, match):
        with pytest.raises(InputError) as caught:
            method.check(model, find_structure(model))
        one_line(caught, match)

    model = make_model("llama")
    model.model.embed_tokens = Normed(64, 32)
    refused(model, "model.embed_tokens, a Normed, does more than look up rows and scale them")
    model = make_model("llama")
    model.model.embed_tokens.max_norm = 1.0
    refused(model, "model.embed_tokens, a Embedding, does more")
    model = make_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    refused(model, "the head is a Sequential, no linear layer")
    model = make_model("llama")
    model.model.other = nn.Module()
    model.model.other.weight = model.model.embed_tokens.weight
    refused(model, "model.other.weight is model.embed_tokens.weight, too")
    model = make_model("llama", tie_word_embeddings=True)
    decomposed(model, make_calibration(12, 16))
    refused(model, "model.embed_tokens is a FactorizedEmbedding, no table of rows")
    model = make_model("llama", vocab_size=67)
    method = MPO(keep=0.5, embeddings=0.5, plans="balanced")
    refused(model, "lm_head of 67 x 32 has no even split of its rows into as many; take plans: low_rank")


def test_it_can_be_checked_by_its_outline(make_model, make_folder):
    for name, tied in (("llama", True), ("gemma3", True), ("llama", False)):
        model = outline(make_folder(name, tie_word_embeddings=tied))
        MPO(keep=0.5, embeddings=0.5).check(model, find_structure(model))
        assert find_ends(model).tied == tied


@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5])
def test_bad_shares(value):
    with pytest.raises(ValueError, match="embeddings"):
        MPO(keep=0.5, embeddings=value)


def test_on_the_demo_model():
    """Real text: a tied table of half its numbers costs far less perplexity by the loss than by the weights."""
    from tensorpress.compressors.base import Calibration
    from tensorpress.evaluators.perplexity import nll
    from tensorpress.source import read_tokenizer
    from tensorpress.text import demo_folder, random_windows, read_text, tokenise, windows

    tokenizer = read_tokenizer(demo_folder())
    train = tokenise(read_text("demo", "train", ""), tokenizer)
    held_out = windows(tokenise(read_text("demo", "test", ""), tokenizer), 256, 8, "")
    found = {}
    for metric in (None, "weights", "loss"):
        model = load(demo_folder(), dtype=torch.float32)
        chosen = random_windows(train, 256, 24, 0, "")
        calibration = Calibration(chosen, held_out[:0], train, 0, lambda: pytest.fail("not asked for"))
        if metric is not None:
            (row,) = decomposed(model, calibration, metric=metric, embeddings=0.5, multiple=16)
            assert row.bytes_after <= 0.5 * row.bytes_before
        nats, tokens = nll(model, held_out)
        found[metric] = nats / tokens
    assert found["loss"] - found[None] < 0.6 * (found["weights"] - found[None])
