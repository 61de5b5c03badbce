"""FinerCut: its distances against float64, its choices against brute force, and sublayers that are really gone."""

import copy
import math

import pytest
import torch

from tensorpress.compressors.distances import CHUNK, DISTANCES, KLDivergence, total_distance
from tensorpress.compressors.prune.finercut import FinerCut, masked, outputs
from tensorpress.errors import InputError
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.structure import find_structure, remove_sublayer, set_module


def naive_js(a, b):
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


def weaken(model, sublayer, share=0.0):
    """Let the sublayer add this share of what it adds, so that it is the first to go."""
    with torch.no_grad():
        for parameter in model.get_submodule(sublayer.paths[-1]).parameters():
            parameter.mul_(share)


def mean_js(model, batch, structure, reference):
    return naive_js(reference, outputs(model, batch, structure)).mean().item()


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_jensen_shannon_is_the_true_one(seed, scale):
    a = torch.randn(50, 301) * 3
    b = a + torch.randn_like(a) * scale
    found = DISTANCES["js"](a, b)
    torch.testing.assert_close(found.double(), naive_js(a, b), atol=3e-7, rtol=1e-5)
    assert found.min() >= 0 and found.max() <= math.log(2) + 1e-7
    torch.testing.assert_close(found, DISTANCES["js"](b, a), atol=3e-7, rtol=1e-5)
    assert DISTANCES["js"](a, a).max() < 1e-7


def test_disjoint_distributions_are_ln_2_apart():
    a, b = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert DISTANCES["js"](a, b).item() == pytest.approx(math.log(2))


def test_other_distances_against_float64(seed):
    a, b = torch.randn(40, 97), torch.randn(40, 97)
    x, y = a.double(), b.double()
    kl = (x.softmax(-1) * (x.log_softmax(-1) - y.log_softmax(-1))).sum(-1)
    angle = torch.arccos((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))) / math.pi
    norm = (x - y).norm(dim=-1) / x.norm(dim=-1)
    for name, oracle in {"kl": kl, "angular": angle, "norm": norm}.items():
        torch.testing.assert_close(DISTANCES[name](a, b).double(), oracle, atol=1e-6, rtol=1e-5)
        assert total_distance(name, a, b) == pytest.approx(oracle.sum().item(), rel=1e-5)
        assert total_distance(name, a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["js", "kl", "angular", "norm"])
def test_chunks_change_nothing(seed, name, monkeypatch):
    a, b = torch.randn(23, 64), torch.randn(23, 64)
    whole = total_distance(name, a, b)
    monkeypatch.setattr("tensorpress.compressors.distances.CHUNK", 5 * 64)
    assert total_distance(name, a, b) == pytest.approx(whole, rel=1e-6)
    assert CHUNK > 23 * 64


def test_kl_loss_has_the_gradient_of_autograd(seed, monkeypatch):
    monkeypatch.setattr("tensorpress.compressors.distances.CHUNK", 3 * 33)
    student = torch.randn(10, 33, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(10, 33, dtype=torch.float64)
    loss = KLDivergence.apply(student, teacher, 1.7)
    (found,) = torch.autograd.grad(2 * loss, student)
    p, q = (teacher / 1.7).softmax(-1), (student / 1.7).log_softmax(-1)
    plain = 1.7**2 * (p * (p.log() - q)).sum()
    (expected,) = torch.autograd.grad(2 * plain, student)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen2", "bert"])
def test_masked_is_sliced_and_unmasked_is_the_model(make_model, make_ids, kind):
    model = make_model(kind, num_hidden_layers=2)
    structure, ids = find_structure(model), make_ids(2, 9)
    before = outputs(model, ids, structure)
    assert len(structure.sublayers) == 4
    for sublayer in structure.sublayers:
        with masked(model, [sublayer]):
            hidden = outputs(model, ids, structure)
        assert torch.equal(outputs(model, ids, structure), before)
        sliced = copy.deepcopy(model)
        remove_sublayer(sliced, sublayer)
        torch.testing.assert_close(outputs(sliced, ids, structure), hidden, atol=1e-5, rtol=0)
        assert (hidden - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_choices_equal_brute_force(make_model, make_calibration, kind):
    model = make_model(kind)
    original = copy.deepcopy(model)
    structure = find_structure(original)
    calibration = make_calibration(4, 12)
    reference = outputs(original, calibration.windows, structure)
    expected, values = [], []
    for _ in range(2):
        scores = {}
        for sublayer in structure.sublayers:
            if sublayer not in expected:
                with masked(original, [*expected, sublayer]):
                    scores[sublayer] = mean_js(original, calibration.windows, structure, reference)
        expected.append(min(scores, key=scores.get))
        values.append(min(scores.values()))
    pruned, report = FinerCut(remove=0.3).compress(model, calibration)
    assert report.summary["order"] == [s.name for s in expected] == [row.layer for row in report.layers]
    assert [row.error_after for row in report.layers] == pytest.approx(values, rel=1e-3, abs=1e-6)
    assert [row.error_before for row in report.layers] == pytest.approx([0, values[0]], rel=1e-3, abs=1e-6)
    assert report.summary["evaluations"] == 6 + 5
    # What the report says is what the model has become, and every other choice of two would have been possible.
    assert mean_js(pruned, calibration.windows, structure, reference) == pytest.approx(values[1], rel=1e-3)


def test_greedy_knows_of_earlier_choices(make_model, make_calibration):
    """Feed-forwards that add 0.9 g, -g and 0.6 g: alone the second is missed most, but behind the third it has to go."""
    model = make_model("gpt2")
    first = model.transformer.h[0]
    with torch.no_grad():
        norm, forward = (copy.deepcopy(part.state_dict()) for part in (first.ln_2, first.mlp))
        for block, share in zip(model.transformer.h, (0.9, -1.0, 0.6), strict=True):
            block.ln_2.load_state_dict(norm)
            block.mlp.load_state_dict(forward)
            for parameter in block.attn.c_proj.parameters():
                parameter.zero_()
            for parameter in block.mlp.c_proj.parameters():
                parameter.mul_(0.02 * share)
    structure, calibration = find_structure(model), make_calibration(4, 12)
    reference = outputs(model, calibration.windows, structure)
    forwards = [s for s in structure.sublayers if s.kind == "feed_forward"]
    alone = {}
    for sublayer in forwards:
        with masked(model, [sublayer]):
            alone[sublayer] = mean_js(model, calibration.windows, structure, reference)
    with masked(model, sorted(forwards, key=alone.get)[:2]):
        one_shot = mean_js(model, calibration.windows, structure, reference)
    _, report = FinerCut(remove=0.67, candidates="feed_forward").compress(model, calibration)
    assert report.summary["order"] == ["block 2 feed_forward", "block 1 feed_forward"]
    assert report.summary["divergence"] < 0.5 * one_shot


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "bert"])
def test_parameters_are_really_gone(make_model, make_calibration, kind):
    model = make_model(kind)
    before = sum(p.numel() for p in model.parameters())
    structure = find_structure(model)
    model, report = FinerCut(remove=0.5).compress(model, make_calibration(4, 12))
    after = sum(p.numel() for p in model.parameters())
    left = find_structure(model).sublayers
    assert len(report.layers) == 3 and len(left) == 3
    assert before - after == sum(row.parameters_before - row.parameters_after for row in report.layers)
    assert all(row.action == "removed" and row.parameters_after == row.bytes_after == 0 for row in report.layers)
    assert all(row.bytes_before == 2 * row.parameters_before for row in report.layers)
    gone = [s for s in structure.sublayers if s.name in report.summary["order"]]
    assert not {s.name for s in left} & {s.name for s in gone}
    names = {name for name, _ in model.named_parameters()}
    assert not [n for s in gone for path in s.paths for n in names if n.startswith(path + ".")]


def test_both_sublayers_of_a_parallel_block_take_their_norms(make_model, make_calibration):
    model = make_model("gpt_neox", num_hidden_layers=2, use_parallel_residual=True)
    for sublayer in find_structure(model).sublayers[2:]:
        weaken(model, sublayer, 1e-4)
    model, report = FinerCut(remove=0.5).compress(model, make_calibration(4, 12))
    assert {row.layer for row in report.layers} == {"block 1 attention", "block 1 feed_forward"}
    assert sum(p.numel() for p in model.gpt_neox.layers[1].parameters()) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_cached_decoding_without_the_first_attention(make_model, make_ids, make_calibration, kind):
    model = make_model(kind)
    weaken(model, find_structure(model).blocks[0].attention)
    model, report = FinerCut(remove=0.34, candidates="attention", samples=2).compress(model, make_calibration(4, 12))
    assert report.summary["order"] == ["block 0 attention"]
    ids = make_ids(1, 5)
    settings = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **settings)
    plain = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-5, rtol=1e-5)


def test_the_same_twice_and_independent_of_batches(make_model, make_calibration, monkeypatch):
    first = make_model("llama")
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    calibration = make_calibration(4, 12)
    a, report_a = FinerCut(remove=0.5).compress(first, calibration)
    b, report_b = FinerCut(remove=0.5).compress(second, calibration)
    monkeypatch.setattr("tensorpress.compressors.prune.finercut.BATCH", 1)
    _, report_c = FinerCut(remove=0.5).compress(third, calibration)
    assert report_a.summary == report_b.summary and report_a.summary["order"] == report_c.summary["order"]
    assert report_c.summary["divergence"] == pytest.approx(report_a.summary["divergence"], rel=1e-4)
    ids = calibration.windows
    assert torch.equal(a(input_ids=ids).logits, b(input_ids=ids).logits)


def test_a_tie_goes_to_the_later_one(make_model, make_calibration):
    model = make_model("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
    _, report = FinerCut(remove=0.5).compress(model, make_calibration(4, 12))
    assert report.summary["order"] == ["block 2 feed_forward", "block 2 attention", "block 1 feed_forward"]
    assert report.summary["divergence"] < 1e-7


def test_protected_blocks_and_kinds_stay(make_model, make_calibration):
    model = make_model("llama", num_hidden_layers=4)
    _, report = FinerCut(remove=0.25, protect=0.5, candidates="feed_forward").compress(model, make_calibration(4, 12))
    assert len(report.layers) == 1 and report.layers[0].layer in ("block 2 feed_forward", "block 3 feed_forward")
    assert report.summary["candidates"] == 2


def test_one_attention_stays_for_the_cache(make_model, make_calibration):
    model = make_model("llama", num_hidden_layers=2)
    for share, block in zip((0.0, 0.01), find_structure(model).blocks, strict=True):  # both would go first
        weaken(model, block.attention, share)
    model, report = FinerCut(remove=0.8).compress(model, make_calibration(4, 12))
    assert report.layers[0].layer == "block 0 attention" and len(report.layers) == 3
    (left,) = find_structure(model).sublayers
    assert left.name == "block 1 attention" and model.get_submodule(left.stubs[0][0]).layer_idx == 0


def test_the_last_full_attention_stays_beside_sliding_ones(make_model, make_calibration):
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    model = make_model("qwen2", layer_types=types, sliding_window=4, use_sliding_window=True)
    weaken(model, find_structure(model).blocks[0].attention)  # it would go first
    model, report = FinerCut(remove=0.6, candidates="attention").compress(model, make_calibration(4, 12))
    assert {row.layer for row in report.layers} == {"block 1 attention", "block 2 attention"}


def test_works_on_a_quantized_model(make_model, make_calibration):
    model = make_model("llama", num_hidden_layers=2)
    for path in find_structure(model).linear_paths:
        inputs, outs = model.get_submodule(path).in_features, model.get_submodule(path).out_features
        layer = QuantizedLinear.from_integers(
            torch.randint(0, 16, (inputs, outs)),
            torch.full((inputs // 16, outs), 8),
            torch.full((inputs // 16, outs), 0.02),
            torch.arange(inputs) // 16,
            4,
            16,
            None,
        )
        set_module(model, path, layer)
    _, report = FinerCut(remove=0.5, candidates="feed_forward").compress(model, make_calibration(4, 12))
    (row,) = report.layers
    assert row.parameters_before == 3 * 32 * 48 + 32
    assert 3 * 32 * 48 / 2 < row.bytes_before < 3 * 32 * 48


@pytest.mark.parametrize(
    ("kind", "fields", "line"),
    [
        ("bert", {"distance": "js"}, "distance js needs a causal model; for an encoder use angular or norm"),
        ("bert", {"distance": "kl"}, "distance kl needs a causal model"),
        ("llama", {"remove": 0.01}, "the smallest share that removes one is 0.084"),
        ("llama", {"remove": 0.99}, r"takes 6 of 6 sublayers, but only 5 can go \(one attention"),
        ("llama", {"remove": 0.5, "protect": 0.6}, "takes 3 of 6 sublayers, but only 2 can go .* protect 0.6 bars 4"),
        ("llama", {"remove": 0.9, "candidates": "attention"}, "takes 3 of 3 attention sublayers, but only 2 can go"),
    ],
)
def test_refusals(make_model, kind, fields, line):
    model = make_model(kind)
    method = FinerCut(**{"remove": 0.3} | fields)
    with pytest.raises(InputError, match=line) as caught:
        method.check(model, find_structure(model))
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    method_that_fits = FinerCut(remove=0.084)
    assert method_that_fits._plan(model, find_structure(model))[0] == 1


def test_encoder_default_is_the_angle_and_progress_is_told(make_model, make_calibration):
    model, calibration, told = make_model("bert"), make_calibration(4, 12), []
    calibration.progress = lambda *what: told.append(what)
    _, report = FinerCut(remove=0.34).compress(model, calibration)
    assert report.summary["distance"] == "angular" and 0 < report.summary["divergence"] < 1
    assert told[0] == ("finercut", 0, 11) and told[-1] == ("finercut", 11, 11) and len(told) == 12


def test_training_mode_and_weights_that_stay_are_untouched(make_model, make_calibration):
    model = make_model("llama").train()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model, _ = FinerCut(remove=0.3).compress(model, make_calibration(4, 12))
    assert model.training
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
