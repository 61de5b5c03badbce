"""MPO decomposition against what layers give: nearer outputs, plans that are chosen by the error, the same after a stop."""

import copy

import pytest
import torch

from tensorpress.artifact import save_model
from tensorpress.compressors.calibration import BlockInputs, walk
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.decompose.mpo_walk import Walk
from tensorpress.compressors.decompose.spending import Probe
from tensorpress.compressors.decompose.tensor_train import entropy
from tensorpress.compressors.decompose.weighted_low_rank import weighted_error
from tensorpress.compressors.moments import SecondMoment, output_moments
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear
from tensorpress.loading import load
from tensorpress.structure import find_structure, linear_weight


def weight_bytes(layer):
    """At 16 bits, without the bias."""
    held = [tensor for name, tensor in layer.named_parameters() if name != "bias"]
    return 2 * sum(tensor.numel() for tensor in held) + sum(b.numel() for b in layer.buffers())


@pytest.mark.parametrize("metric", ["inputs", "loss"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma3", "opt", "gpt_neox", "phi"])
def test_whole_model(make_model, make_calibration, make_ids, outputs, tmp_path, name, metric):
    model, told = make_model(name), []
    calibration = make_calibration(12, 16, progress=lambda *what: told.append(what))
    paths = find_structure(model).linear_paths
    weights = {path: linear_weight(model.get_submodule(path)).detach().clone() for path in paths}
    biases = {path: model.get_submodule(path).bias for path in paths}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model, report = MPO(keep=0.6, metric=metric, multiple=2).compress(model, calibration)
    assert [row.layer for row in report.layers] == paths
    assert told[-1][0] == "mpo" and {what for what, _, _ in told} >= {"sensitivity", "mpo"}
    for row in report.layers:
        layer, weight = model.get_submodule(row.layer), weights[row.layer]
        assert row.bytes_before == 2 * weight.numel() and row.bytes_after == weight_bytes(layer)
        if row.action == "dense":
            assert torch.equal(linear_weight(layer), weight) and row.error_after == 0
            continue
        assert isinstance(layer, (LowRankLinear, PivotedMPOLinear)) and row.bytes_after < row.bytes_before
        assert row.action == f"mpo {row.detail['plan']}" and row.detail["losses"][row.detail["plan"]] == min(
            row.detail["losses"].values()
        )
        assert 0 <= row.error_after < 1 and layer.dense_weight().shape == weight.shape
        assert (layer.bias is None) == (biases[row.layer] is None)
        assert len(row.detail["entropies"]) == len(row.detail["bonds"])
    before, after = (sum(getattr(row, f"bytes_{when}") for row in report.layers) for when in ("before", "after"))
    assert 0.5 * before < after <= 0.6 * before
    assert all(p.requires_grad == flags[name] for name, p in model.named_parameters() if name in flags)
    ids = make_ids(2, 9)
    expected = outputs(model, ids)
    save_model(model, tmp_path, torch.float32)
    torch.testing.assert_close(outputs(load(tmp_path), ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"plans": "low_rank"}, {"plans": "balanced"}, {"allocation": "measured"}])
def test_the_same_twice_and_after_a_stop(make_model, make_calibration, tmp_path, monkeypatch, fields):
    calibration = make_calibration(12, 16)
    first = make_model("llama")
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    method = MPO(keep=0.6, multiple=2, **fields)
    for model in (first, second):
        method.compress(model, calibration)
    states = [model.state_dict() for model in (first, second)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    calibration.scratch = tmp_path / "scratch"
    stopping, done = copy.deepcopy(third), []

    def save(*arguments, **named):
        return walk(*arguments, **named, checkpoint_seconds=0)

    monkeypatch.setattr("tensorpress.compressors.decompose.mpo_walk.walk", save)
    replace = Walk._replace

    def stop(self, model, path, *rest):
        done.append(path)
        if len(done) == 16:
            raise KeyboardInterrupt
        return replace(self, model, path, *rest)

    monkeypatch.setattr(Walk, "_replace", stop)
    with pytest.raises(KeyboardInterrupt):
        method.compress(stopping, calibration)
    method.compress(third, calibration)
    assert len(done) < 16 + len(find_structure(first).linear_paths)
    found = third.state_dict()
    assert found.keys() == states[0].keys() and all(torch.equal(states[0][n], found[n]) for n in found)


@pytest.mark.parametrize("seconds", [0, 1e9])
def test_a_stop_in_the_embeddings_does_not_repeat_the_blocks(
    make_model, make_calibration, tmp_path, monkeypatch, seconds
):
    method, calibration, done = MPO(keep=0.6, embeddings=0.6, multiple=1), make_calibration(12, 16), []
    model = make_model("llama")
    models = [copy.deepcopy(model) for _ in range(3)]
    layers = len(find_structure(models[0]).linear_paths)
    method.compress(models[0], calibration)
    calibration.scratch = tmp_path / "scratch"
    replace = Walk._replace

    def save(*arguments, **named):
        return walk(*arguments, **named, checkpoint_seconds=seconds)

    def count(self, *rest):
        done.append(rest)
        return replace(self, *rest)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("tensorpress.compressors.decompose.mpo_walk.walk", save)
    monkeypatch.setattr(Walk, "_replace", count)
    with monkeypatch.context() as patched:
        patched.setattr("tensorpress.compressors.decompose.mpo.decompose_embeddings", stop)
        with pytest.raises(KeyboardInterrupt):
            method.compress(models[1], calibration)
    assert len(done) == layers
    method.compress(models[2], calibration)
    assert len(done) == layers and not calibration.scratch.exists()
    expected, found = (model.state_dict() for model in (models[0], models[2]))
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in found)


def test_an_aware_decomposition_gives_outputs_that_are_nearer(make_model, make_calibration, outputs):
    """At no more bytes than plain TT-SVD, and than whitened SVD without pivots, on the windows it is made for."""
    original, calibration = make_model("llama"), make_calibration(40, 16)
    wanted = outputs(original, calibration.windows)
    distances = {}
    for name, fields in {
        "plain": {"metric": "weights", "keep": 0.6},
        "whitened": {"metric": "inputs", "keep": 0.6, "plans": "low_rank", "pivots": False, "allocation": "uniform", "compensation": 0},
        "ours": {"keep": 0.6, "compensation": 1.0},
    }.items():  # fmt: skip
        method = MPO(**fields) if name == "plain" else MPO(**fields, multiple=1)
        model, report = method.compress(copy.deepcopy(original), calibration)
        assert sum(r.bytes_after for r in report.layers) <= 0.6 * sum(r.bytes_before for r in report.layers)
        distances[name] = float((outputs(model, calibration.windows) - wanted).norm())
    assert distances["ours"] < distances["whitened"] < distances["plain"]


def test_uniform_low_rank_without_pivots_is_whitened_svd(make_model, make_calibration):
    """The first layers see the inputs of the original: their errors are those of the truncated SVD of W H^1/2."""
    model, calibration = make_model("llama"), make_calibration(40, 16)
    structure = find_structure(model)
    seen: list[SecondMoment] = []
    path = structure.blocks[0].linear_paths[0]
    weight = linear_weight(model.get_submodule(path)).detach().double()

    def look(block, inputs: BlockInputs):
        if block.index == 0:
            seen.append(SecondMoment(weight.shape[1]))
            inputs.observe(model.get_submodule(path), seen[0].add)
        return []

    walk(model, structure, calibration.windows, look)
    h = seen[0].matrix.double()
    values, vectors = torch.linalg.eigh(h)
    singular = torch.linalg.svdvals(weight @ (vectors * values.clamp(min=0).sqrt()))
    fields = {"metric": "inputs", "plans": "low_rank", "pivots": False, "allocation": "uniform", "compensation": 0}
    _, report = MPO(keep=0.5, multiple=1, damping=1e-9, **fields).compress(model, calibration)
    rank = int(0.5 * weight.numel() / sum(weight.shape))
    row = report.layers[0]
    assert row.detail["bonds"] == [rank] and row.bytes_after == 2 * rank * sum(weight.shape)
    expected = float((singular[rank:].square().sum() / singular.square().sum()).sqrt())
    assert row.error_after == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_predicted_losses_are_those_of_the_fisher_information(make_model, make_calibration, kind):
    """A change of one weight costs 0.5 tr(G D H D^T): measured as a KL divergence (half a squared distance for encoders) it is of that size."""
    model, calibration = make_model(kind), make_calibration(64, 16)
    calibration.validation = calibration.windows
    structure = find_structure(model)
    paths = structure.linear_paths
    moments = output_moments(model, structure, paths, calibration.windows.repeat(4, 1), 0)
    assert all(torch.equal(g, g.T) or torch.allclose(g, g.T, rtol=1e-4) for g in moments.values())
    probe = Probe(model, structure, calibration.windows)
    seen = {}

    def look(block, inputs):
        for path in block.linear_paths:
            seen[path] = SecondMoment(linear_weight(model.get_submodule(path)).shape[1])
            inputs.observe(model.get_submodule(path), seen[path].add)
        return []

    walk(model, structure, calibration.windows, look)
    before = [p.clone() for p in model.parameters()]
    ratios = []
    for path in paths:
        weight = linear_weight(model.get_submodule(path)).detach()
        change = 0.02 * weight.norm() * torch.nn.functional.normalize(torch.randn_like(weight), dim=(0, 1))
        expected = 0.5 * weighted_error(change, seen[path].matrix, moments[path])
        ratios.append(probe.loss(path, weight + change) / expected)
    assert 0.6 < torch.tensor(ratios).median() < 1.6
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_spectra_are_told_of_the_whole_weight(make_model, make_calibration):
    model = make_model("llama")
    weights = {path: linear_weight(model.get_submodule(path)).clone() for path in find_structure(model).linear_paths}
    _, report = MPO(keep=0.7, layers=("*mlp*",)).compress(model, make_calibration(12, 16))
    assert any(row.action == "mpo low rank" for row in report.layers)
    for row in report.layers:
        singular = torch.linalg.svdvals(weights[row.layer].detach().double())
        if row.detail.get("plan", "low rank") == "low rank":  # of the whole weight, whatever its layer was cut to
            expected = (singular.square() / singular.square().sum())[: len(row.detail["spectra"][0])].tolist()
            assert row.detail["spectra"][0] == pytest.approx(expected, rel=0.01, abs=1e-6)
            assert row.detail["entropies"][0] == pytest.approx(entropy(singular), abs=1e-3)
        assert row.detail["spectra"] and len(row.detail["entropies"]) == len(row.detail["spectra"])
        assert sum(row.detail["spectra"][0]) == pytest.approx(1, abs=0.02)


def test_the_walk_hands_out_the_original_stream(make_model, make_ids):
    """Of blocks that are changed, the inputs of the original stay those that the unchanged model has."""
    model, ids = make_model("llama"), make_ids(4, 8)
    structure = find_structure(model)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    seen, path = [], "mlp.up_proj"

    def visit(block, inputs):
        seen.append(torch.cat(inputs.original.hidden))
        own, original = [], []
        inputs.observe_both(path, lambda x, y: (own.append(x), original.append(y)))
        assert torch.equal(torch.cat(own), torch.cat(original)) == (block.index == 0)
        linear_weight(model.get_submodule(f"{block.path}.{path}")).data.mul_(0.5)
        return []

    walk(model, structure, ids, visit, with_original=True, batch_tokens=16)
    for index, stream in enumerate(seen):
        torch.testing.assert_close(stream, states[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_blocks_are_trained_and_neurons_arranged_on_request(make_model, make_calibration, make_ids, outputs, name):
    model, calibration = make_model(name), make_calibration(48, 16)
    structure = find_structure(model)
    fields = {"keep": 0.4, "metric": "inputs", "multiple": 1, "compensation": 0}
    plain, _ = MPO(**fields).compress(copy.deepcopy(model), calibration)
    trained, report = MPO(**fields, train_steps=80, learning_rate=1e-3).compress(copy.deepcopy(model), calibration)
    told = {row.layer: row.detail["block_training"] for row in report.layers if "block_training" in row.detail}
    assert list(told) == [block.linear_paths[0] for block in structure.blocks]
    assert all(one["loss_after"] <= one["loss_before"] for one in told.values())
    assert any(one["loss_after"] < 0.98 * one["loss_before"] and one["steps"] > 0 for one in told.values())
    expected = outputs(model, calibration.windows)
    losses = [float((outputs(one, calibration.windows) - expected).square().sum()) for one in (plain, trained)]
    assert losses[1] < losses[0]
    _, report = MPO(**fields, arrange=True).compress(copy.deepcopy(model), calibration)
    arranged, blocks = report.summary["arranged"], len(structure.blocks)
    assert arranged["ordered"] == blocks and (arranged["scaled"] == blocks or name != "llama")
