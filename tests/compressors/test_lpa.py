"""Low-dimensional projected attention: attentions alone change, to the best layers of their rank for what they see."""

import copy

import pytest
import torch
from pydantic import ValidationError

from tensorpress.artifact import save_model
from tensorpress.compressors.base import Calibration
from tensorpress.compressors.calibration import walk
from tensorpress.compressors.decompose.weighted_low_rank import weighted_svd
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.compressors.recover.distill import Distill
from tensorpress.compressors.recover.lpa import LPA
from tensorpress.errors import InputError
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.loading import load
from tensorpress.structure import find_structure, linear_shape, linear_weight, remove_sublayer


def attention_paths(model):
    return [path for block in find_structure(model).blocks for path in block.attention.paths]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma3", "opt", "gpt_neox", "phi3"])
def test_attentions_alone_change(make_model, make_calibration, make_ids, outputs, tmp_path, name):
    model, ids = make_model(name), make_ids(2, 9)
    paths, before = attention_paths(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    shapes = {path: linear_shape(model.get_submodule(path)) for path in paths}
    model, report = LPA(rank=6).compress(model, make_calibration(12, 16))
    assert [row.layer for row in report.layers] == paths and report.summary["rank"] == 6
    for row in report.layers:
        layer = model.get_submodule(row.layer)
        m, n = shapes[row.layer]
        assert (
            isinstance(layer, LowRankLinear) and layer.rank == 6 and layer.pivots is None and row.action == "low rank"
        )
        assert row.parameters_after == 6 * (m + n) < row.parameters_before == m * n
        assert row.bytes_after == 2 * row.parameters_after
        assert 0 <= row.error_after <= row.error_before + 1e-6 < 1
    for key, tensor in model.state_dict().items():
        if not any(key.startswith(f"{path}.") for path in paths) or key.endswith(".bias"):
            assert torch.equal(tensor, before[key]), key
    expected = outputs(model, ids)
    save_model(model, tmp_path, torch.float32)
    torch.testing.assert_close(outputs(load(tmp_path), ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_full_width_changes_nothing(make_model, make_calibration, name):
    model = make_model(name)
    twin, report = LPA(share=1.0).compress(copy.deepcopy(model), make_calibration())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(row.action == "dense" and row.error_after == 0 for row in report.layers)
    assert report.summary["kept"] == 1 and "stays dense" in report.summary["note"]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_weights_of_the_rank_are_kept(make_model, make_calibration, make_ids, outputs, name):
    model, ids = make_model(name).double(), make_ids(2, 9)
    for path in attention_paths(model):
        weight = linear_weight(model.get_submodule(path)).detach()
        m, n = weight.shape
        weight.copy_(torch.randn(m, 5).double() @ torch.randn(5, n).double() / n)
    before = outputs(model, ids)
    model, report = LPA(rank=5).compress(model, make_calibration(12, 16))
    assert all(row.action == "low rank" and row.error_after < 1e-4 for row in report.layers)
    torch.testing.assert_close(outputs(model, ids), before, rtol=1e-6, atol=1e-6)


def test_it_is_the_best_for_what_the_first_layer_sees(make_model, make_calibration):
    model, calibration = make_model("llama"), make_calibration(20, 16)
    path = attention_paths(model)[0]
    weight, seen = linear_weight(model.get_submodule(path)).detach().double().clone(), []

    def look(block, inputs):
        if block.index == 0:
            inputs.observe(model.get_submodule(path), seen.append)
        return []

    walk(model, find_structure(model), calibration.windows, look)
    x = torch.cat(seen).double()
    model, report = LPA(rank=7).compress(model, calibration)
    found = model.get_submodule(path).dense_weight().double()
    wanted = torch.linalg.svdvals(x @ weight.T)
    error = float(((x @ (found - weight).T).norm() / (x @ weight.T).norm()).detach())
    assert error == pytest.approx(float((wanted[7:].square().sum() / wanted.square().sum()).sqrt()), rel=1e-3)
    assert report.layers[0].error_after == pytest.approx(error, rel=1e-3)
    plain = weighted_svd(weight)
    other = float((x @ (plain.left[:, :7] @ plain.right[:7] - weight).T).norm() / (x @ weight.T).norm())
    assert report.layers[0].error_before == pytest.approx(other, rel=1e-3)


def test_the_share_of_the_paper(make_model, make_calibration):
    assert LPA().inner(1024) == 320 and LPA(share=0.5).inner(768) == 384 and LPA(rank=9).inner(768) == 9
    _, report = LPA().compress(make_model("llama"), make_calibration())
    assert report.summary["rank"] == 10
    assert all(row.action == "low rank" if row.parameters_before == 1024 else row.detail for row in report.layers)


def test_it_can_be_distilled_quantized_and_comes_after_pruning(make_model, seed, make_ids, outputs, tmp_path):
    teacher = make_model("llama")
    ids = torch.randint(5, 64, (2000,), generator=torch.Generator().manual_seed(seed))
    calibration = Calibration(ids[:256].view(16, 16), ids[256:320].view(4, 16), ids[320:], seed, lambda: teacher)
    model = copy.deepcopy(teacher)
    remove_sublayer(model, find_structure(model).blocks[1].attention)
    model, report = LPA(rank=6).compress(model, calibration)
    assert len(report.layers) == 8
    tokens = {
        "tokens": 8000,
        "batch_tokens": 256,
        "learning_rate": 3e-3,
        "precision": "float32",
        "validate_every": 0.25,
    }
    model, healed = Distill(**tokens).compress(model, calibration)
    assert healed.summary["improved"]
    model, _ = GPTQ(bits=8, group_size=-1).compress(model, calibration)
    save_model(model, tmp_path, torch.float32)
    ids = make_ids(2, 9)
    torch.testing.assert_close(outputs(load(tmp_path), ids), outputs(model, ids), rtol=0, atol=1e-4)


def test_the_same_twice_and_after_a_stop(make_model, make_calibration, tmp_path, monkeypatch):
    first, calibration = make_model("llama"), make_calibration(12, 16)
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    for model in (first, second):
        LPA(rank=6).compress(model, calibration)
    calibration.scratch = tmp_path / "scratch"
    from tensorpress.compressors.recover import lpa

    done, project = [], lpa._project

    def stop(model, path, *rest):
        done.append(path)
        if len(done) == 10:
            raise KeyboardInterrupt
        return project(model, path, *rest)

    monkeypatch.setattr(lpa, "walk", lambda *a, **named: walk(*a, **named, checkpoint_seconds=0))
    monkeypatch.setattr(lpa, "_project", stop)
    with pytest.raises(KeyboardInterrupt):
        LPA(rank=6).compress(copy.deepcopy(third), calibration)
    _, report = LPA(rank=6).compress(third, calibration)
    assert len(done) < 10 + 12 and len(report.layers) == 12
    states = [model.state_dict() for model in (first, second, third)]
    assert all(torch.equal(states[0][key], other[key]) for other in states[1:] for key in states[0])


def test_few_tokens_are_said_and_damped(make_model, make_calibration):
    """32 inputs that eight tokens do not show: what they lack counts by the damping."""
    _, report = LPA(rank=4).compress(make_model("llama"), make_calibration(1, 8))
    assert "calibration has 8 tokens, fewer than the 32 inputs of the widest layer" in report.summary["note"]
    _, report = LPA(rank=4).compress(make_model("llama"), make_calibration(12, 16))
    assert "note" not in report.summary
    model = make_model("llama")
    weight = linear_weight(model.get_submodule("model.layers.0.self_attn.q_proj")).clone()
    errors = []
    for damping in (1e-12, 1.0):
        found, _ = LPA(rank=12, damping=damping).compress(copy.deepcopy(model), make_calibration(1, 8))
        errors.append(float((found.model.layers[0].self_attn.q_proj.dense_weight().detach() - weight.detach()).norm()))
    assert errors[1] < errors[0]


def test_what_cannot_be_is_refused_before_any_work(make_model, make_calibration, one_line):
    model = make_model("llama")
    with pytest.raises(InputError) as caught:
        LPA(rank=33).check(model, find_structure(model))
    one_line(caught, "rank: 33 is more than the model's width of 32")
    model, _ = LPA(rank=4).compress(model, make_calibration())
    with pytest.raises(InputError) as caught:
        LPA(rank=4).check(model, find_structure(model))
    one_line(caught, "no attention of the model has a dense layer left")


@pytest.mark.parametrize("fields", [{"rank": 0}, {"share": 0}, {"share": 1.5}, {"rank": 4, "share": 0.5}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        LPA(**fields)
