"""Sharing across blocks: one central core that is one tensor, in memory, in training and on disk."""

import copy
import itertools

import pytest
import torch
from pydantic import ValidationError

from tensorpress.artifact import save_model
from tensorpress.compressors.base import Calibration
from tensorpress.compressors.decompose.share import Share, _relative_error, fit_shared, shared_error
from tensorpress.compressors.decompose.tensor_train import capped_bonds, decompose, factors
from tensorpress.compressors.prune.finercut import FinerCut
from tensorpress.compressors.recover.distill import Distill
from tensorpress.errors import InputError
from tensorpress.kernels import registry
from tensorpress.kernels.kernel_layer import KernelLayer
from tensorpress.kernels.mpo_linear import MPOLinear, mpo_to_matrix
from tensorpress.kernels.shared_mpo_linear import SharedCore, SharedMPOLinear, tie_cores
from tensorpress.loading import layers_of, load
from tensorpress.structure import find_structure, linear_weight, remove_sublayer


def alike(count, outputs, inputs, spread):
    """Weights that are one matrix and something of their own."""
    common = torch.randn(outputs, inputs, dtype=torch.float64)
    return [common + spread * torch.randn(outputs, inputs, dtype=torch.float64) for _ in range(count)]


def trains(weights, sites, bond=None):
    outputs, inputs = weights[0].shape
    rows, columns = factors(outputs, sites), factors(inputs, sites)
    bonds = capped_bonds(rows, columns, bond or outputs * inputs)
    return [decompose(weight, rows, columns, bonds) for weight in weights]


def shared_layers(model):
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, SharedMPOLinear)}


def calibration_of(seed, teacher, length=16):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, teacher.config.vocab_size, (2000,), generator=generator)
    return Calibration(ids[:64].view(4, length), ids[64:128].view(4, length), ids[128:], seed, lambda: teacher)


@pytest.mark.parametrize(("outputs", "inputs", "sites"), [(24, 36, 3), (30, 12, 3), (64, 32, 5), (48, 48, 3)])
def test_one_layer_in_a_group_is_the_plain_mpo(seed, outputs, inputs, sites):
    (weight,) = weights = alike(1, outputs, inputs, 0)
    (full,) = fit_shared(weights, trains(weights, sites), sweeps=0)
    torch.testing.assert_close(mpo_to_matrix(full), weight, rtol=1e-10, atol=1e-10)
    (plain,) = separate = trains(weights, sites, 3)
    (same,) = fit_shared(weights, separate, sweeps=0)
    torch.testing.assert_close(mpo_to_matrix(same), mpo_to_matrix(plain), rtol=1e-10, atol=1e-10)
    (better,) = fit_shared(weights, separate, sweeps=3)
    assert _relative_error(better, weight) <= _relative_error(plain, weight) + 1e-12
    middle, layer = sites // 2, MPOLinear.from_cores(same, None)
    shared = SharedMPOLinear.from_cores(same[:middle] + same[middle + 1 :], SharedCore(same[middle]), "a", None)
    x = torch.randn(3, 4, inputs, dtype=torch.float64)
    torch.testing.assert_close(shared(x), layer(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shared(x), x @ shared.dense_weight().T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("outputs", "inputs", "sites", "bond"), [(24, 36, 3, None), (32, 64, 5, 6), (30, 42, 3, 4)])
def test_the_joint_error_falls_with_every_sweep(seed, outputs, inputs, sites, bond):
    weights = alike(4, outputs, inputs, 0.5)
    separate = trains(weights, sites, bond)
    errors = [shared_error(fit_shared(weights, separate, sweeps), weights) for sweeps in (0, 1, 2, 4, 8)]
    assert all(after <= before + 1e-10 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0] and shared_error(separate, weights) <= errors[-1] + 1e-9
    fitted = fit_shared(weights, separate, 2)
    assert all(cores[sites // 2] is fitted[0][sites // 2] for cores in fitted)
    assert [core.shape for core in fitted[1]] == [core.shape for core in separate[1]]


def test_what_does_share_is_found_again(seed):
    """Layers made of one central core and other cores of their own, in gauges that do not show it, at scales far apart."""
    rows, columns, bonds = (3, 4, 3), (2, 5, 3), (4, 5)
    edges = (1, *bonds, 1)
    shapes = [(edges[k], rows[k], columns[k], edges[k + 1]) for k in range(3)]
    center = torch.randn(shapes[1], dtype=torch.float64)
    weights = []
    for scale in (1.0, 30.0, 0.01):
        left, right = (
            torch.linalg.qr(torch.randn(6, 6).double())[0][:, :4],
            torch.linalg.qr(torch.randn(9, 9).double())[0][:5],
        )
        cores = [left.reshape(shapes[0]), center, right.reshape(shapes[2])]
        weights.append(scale * mpo_to_matrix(cores))
    separate = [decompose(weight, rows, columns, bonds) for weight in weights]
    assert shared_error(fit_shared(weights, separate, sweeps=8), weights) < 1e-8
    equal = [weights[0], 7 * weights[0]]
    fitted = fit_shared(equal, [separate[0], [separate[0][0] * 7, *separate[0][1:]]], sweeps=0)
    assert shared_error(fitted, equal) < 1e-20


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma3", "opt"])
def test_a_model_shares_and_opens_again(make_model, make_calibration, make_ids, outputs, tmp_path, name):
    model, ids = make_model(name), make_ids(2, 9)
    dense = copy.deepcopy(model)
    model, report = Share(sites=3).compress(model, make_calibration())
    layers = shared_layers(model)
    paths = find_structure(model).linear_paths
    assert [row.layer for row in report.layers] == paths and set(layers) == set(paths)
    groups = {}
    for path, layer in layers.items():
        groups.setdefault(layer.group, set()).add(layer.center.core.data_ptr())
        assert layer.bias is None or torch.equal(layer.bias, dense.get_submodule(path).bias)
    assert report.summary["groups"] == len(groups) and all(len(places) == 1 for places in groups.values())
    numbers = sum(p.numel() for name, p in model.named_parameters() if ".core" in name or "auxiliary" in name)
    assert sum(row.parameters_after for row in report.layers) == numbers
    assert sum(row.bytes_after for row in report.layers) == 2 * numbers < sum(row.bytes_before for row in report.layers)
    for row in report.layers:
        weight, found = (
            linear_weight(dense.get_submodule(row.layer)).detach(),
            layers[row.layer].dense_weight().detach(),
        )
        assert row.error_after == pytest.approx(float((weight - found).norm() / weight.norm()), rel=1e-3, abs=1e-5)
        assert row.error_before <= row.error_after + 1e-5
    expected = outputs(model, ids)
    for folder in ("a", "b", "dense"):
        (tmp_path / folder).mkdir()
    save_model(model, tmp_path / "a", torch.float32)
    opened = load(tmp_path / "a")
    torch.testing.assert_close(outputs(opened, ids), expected, rtol=0, atol=1e-5)
    assert layers_of(opened) == layers_of(model)
    again = shared_layers(opened)
    assert all(again[path].center is again[layer.group].center for path, layer in layers.items())
    opened.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(outputs(load(tmp_path / "b"), ids), expected, rtol=0, atol=1e-5)
    save_model(dense, tmp_path / "dense", torch.float32)
    sizes = {f: (tmp_path / f / "model.safetensors").stat().st_size for f in ("a", "b", "dense")}
    saved = 2 * sum(row.bytes_before - row.bytes_after for row in report.layers)  # in 32 bits
    assert sizes["dense"] - sizes["a"] == pytest.approx(saved, abs=20_000) and abs(sizes["a"] - sizes["b"]) < 1000


def test_transformers_opens_it_and_the_core_stays_one_in_training(make_model, make_ids, outputs, seed, tmp_path):
    from transformers import AutoModelForCausalLM

    teacher = make_model("llama", num_hidden_layers=4)
    model, _ = Share(blocks=2, layers=("*mlp*",)).compress(copy.deepcopy(teacher), calibration_of(seed, teacher))
    assert len({layer.group for layer in shared_layers(model).values()}) == 6
    before = {path: layer.center.core.detach().clone() for path, layer in shared_layers(model).items()}
    tokens = {
        "tokens": 6000,
        "batch_tokens": 256,
        "learning_rate": 1e-3,
        "precision": "float32",
        "validate_every": 0.25,
    }
    model, report = Distill(**tokens).compress(model, calibration_of(seed, teacher))
    assert report.summary["improved"]
    layers = shared_layers(model)
    for path, layer in layers.items():
        assert layer.center.core.data_ptr() == layers[layer.group].center.core.data_ptr()
        assert not torch.equal(layer.center.core, before[path])
    save_model(model, tmp_path, torch.float32)
    opened, ids = AutoModelForCausalLM.from_pretrained(tmp_path), make_ids(2, 9)
    torch.testing.assert_close(outputs(opened, ids), outputs(model, ids), rtol=0, atol=1e-5)
    places = {layer.center.core.data_ptr() for layer in shared_layers(opened).values()}
    assert len(places) == 6
    copied = copy.deepcopy(model).to(torch.bfloat16)
    assert len({layer.center.core.data_ptr() for layer in shared_layers(copied).values()}) == 6
    copied.load_state_dict(model.state_dict())


@pytest.mark.parametrize("block", [0, 1, 2])
def test_members_of_a_group_can_be_removed(make_model, make_calibration, make_ids, outputs, tmp_path, block):
    model, _ = Share().compress(make_model("llama"), make_calibration())
    remove_sublayer(model, find_structure(model).blocks[block].feed_forward)
    remove_sublayer(model, find_structure(model).blocks[block].attention)
    ids = make_ids(2, 9)
    expected = outputs(model, ids)
    save_model(model, tmp_path, torch.float32)
    opened = load(tmp_path)
    torch.testing.assert_close(outputs(opened, ids), expected, rtol=0, atol=1e-5)
    places = {}
    for layer in shared_layers(opened).values():
        places.setdefault(layer.group, set()).add(layer.center.core.data_ptr())
    assert all(len(found) == 1 for found in places.values())
    FinerCut(remove=0.2, samples=2).compress(opened, make_calibration())


def test_a_core_that_is_missing_is_missed(make_model, make_calibration, tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = Share().compress(make_model("llama"), make_calibration())
    save_model(model, tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    names = [name for name in tensors if name.endswith("q_proj.center.core")]
    assert len(names) == 1
    del tensors[names[0]]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="its weights lack"):
        load(tmp_path)


def test_cores_of_other_shapes_are_not_tied(seed):
    layers = [SharedMPOLinear((2, i, 2), (2, 3, 2), (4, 4), "a", bias=False) for i in (3, 5)]
    with pytest.raises(ValueError, match="has the shape"):
        tie_cores(torch.nn.ModuleList(layers))


def test_kernels_and_graphs(seed):
    weights = alike(1, 24, 36, 0)
    (cores,) = fit_shared(weights, trains(weights, 3, 5), sweeps=0)
    layer = SharedMPOLinear.from_cores([cores[0], cores[2]], SharedCore(cores[1]), "a", torch.randn(24).double())
    x = torch.randn(2, 3, 36, dtype=torch.float64)
    expected = x @ layer.dense_weight().T + layer.bias
    for name, backend in registry.backends("shared_mpo_linear").items():
        layer.kernel = name
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
            torch.testing.assert_close(backend.run(layer, x[:1, :1]), expected[:1, :1])
    layer.center.core.data.mul_(2)
    layer.release()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), 2 * (expected - layer.bias) + layer.bias)
    again = KernelLayer.kinds["shared_mpo_linear"].from_numbers(layer.numbers())
    again.place(layer.stored())
    torch.testing.assert_close(again.dense_weight(), layer.dense_weight())
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_what_would_not_shrink_stays_dense(make_model, make_calibration):
    model = make_model("llama", num_hidden_layers=2, hidden_size=8, intermediate_size=8)
    model, report = Share(sites=3, layers=("*down*",)).compress(model, make_calibration())
    for row in report.layers:
        assert (row.action == "dense") == (row.bytes_after == row.bytes_before)
    total = sum(row.bytes_after for row in report.layers)
    assert total <= sum(row.bytes_before for row in report.layers)


@pytest.mark.parametrize("zeros", [1, 3])
@pytest.mark.parametrize("first", [True, False])
def test_without_sweeps_a_zero_layer_changes_nothing(seed, zeros, first):
    weights = alike(2, 24, 36, 0.5)
    none = [torch.zeros(24, 36, dtype=torch.float64)] * zeros
    mixed = [*none, *weights] if first else [*weights, *none]
    found = fit_shared(mixed, trains(mixed, 3, 5), sweeps=0)
    kept, gone = (found[zeros:], found[:zeros]) if first else (found[:2], found[2:])
    alone = fit_shared(weights, trains(weights, 3, 5), sweeps=0)
    for with_zeros, without in zip(kept, alone, strict=True):
        torch.testing.assert_close(mpo_to_matrix(with_zeros), mpo_to_matrix(without), rtol=1e-9, atol=1e-9)
    assert all(float(mpo_to_matrix(cores).abs().max()) < 1e-200 for cores in gone)


@pytest.mark.parametrize("sweeps", [0, 4])
def test_a_zero_layer_harms_none_of_its_group(make_model, make_calibration, make_ids, outputs, sweeps):
    model = make_model("llama")
    path = "model.layers.1.mlp.down_proj"
    model.get_submodule(path).weight.data.zero_()
    weights = {p: linear_weight(model.get_submodule(p)).clone() for p in find_structure(model).linear_paths}
    model, report = Share(bond_dimension=6, layers=("*down_proj",), sweeps=sweeps).compress(model, make_calibration())
    assert torch.isfinite(outputs(model, make_ids(1, 5))).all()
    assert not bool(model.get_submodule(path).dense_weight().any())
    for row in report.layers:
        assert row.action == "shared"
        weight, found = weights[row.layer], model.get_submodule(row.layer).dense_weight().detach()
        if row.layer != path:
            error = float((found - weight.detach()).norm() / weight.detach().norm())
            assert row.error_after == pytest.approx(error, rel=1e-4) and error < 1
    model.get_submodule(path).dense_weight().sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.get_submodule(path).parameters())


def test_a_bond_dimension_above_the_full_bond_is_said(make_model, make_calibration):
    for bond, said in ((1000, True), (2, False)):
        _, report = Share(sites=3, bond_dimension=bond).compress(make_model("llama"), make_calibration())
        note = "the bond dimension of 21 layers is their full bond, below 1000"
        assert (note in report.summary.get("note", "")) == said


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"sites": 7}, r"sites: 7 sites; .* carries 5 at most"),
        ({"layers": ("*nothing*",)}, r"layers: \*nothing\* matches no dense layers"),
        (
            {"layers": ("*layers.1.*",)},
            r"layers: \*layers.1.\* matches no dense layers of one kind and shape in several",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(make_model, one_line, fields, match):
    model = make_model("llama")
    with pytest.raises(InputError) as caught:
        Share(**fields).check(model, find_structure(model))
    one_line(caught, match)


@pytest.mark.parametrize("fields", [{"sites": 4}, {"sites": 1}, {"blocks": 1}, {"bond_dimension": 0}, {"sweeps": -1}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        Share(**fields)
