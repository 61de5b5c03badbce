"""Experts that share a central core: the mixture computes what its matrices say, and the core is one tensor."""

import copy

import pytest
import torch
import transformers
from pydantic import ValidationError

from tensorpress.artifact import save_model
from tensorpress.compressors.base import Calibration
from tensorpress.compressors.decompose.mpoe import MPOE, mixtures
from tensorpress.compressors.decompose.share import fit_shared
from tensorpress.compressors.decompose.tensor_train import decompose, factors, full_bonds
from tensorpress.compressors.recover.distill import Distill
from tensorpress.errors import InputError
from tensorpress.kernels.mpoe import SharedExperts, SharedMatrices
from tensorpress.loading import layers_of, load
from tensorpress.structure import find_structure

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24},
}


@pytest.fixture
def make_mixture(seed):
    def make(family="Mixtral", **changes):
        config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | changes)
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return make


def make_alike(model, spread=0.0):
    """The experts of each mixture one expert, and something of their own."""
    for experts in mixtures(model).values():
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name).data
            weight.copy_(weight[:1] + spread * torch.randn_like(weight))


def contracted(model, shared):
    """The model with fused weights that are what the shared experts stand for."""
    for path, experts in mixtures(model).items():
        made = shared.get_submodule(path)
        for name, matrices in (("gate_up_proj", made.gate_up), ("down_proj", made.down)):
            weight = torch.stack([matrices.matrix(e) for e in range(made.num_experts)])
            getattr(experts, name).data.copy_(weight.detach())
    return model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_mixture_computes_what_its_matrices_say(make_mixture, make_calibration, make_ids, outputs, family):
    model, ids = make_mixture(family).double(), make_ids(2, 9)
    shared, report = MPOE(sites=3).compress(copy.deepcopy(model), make_calibration())
    assert not mixtures(shared) and report.summary["mixtures"] == 2 and report.summary["left_dense"] == 0
    numbers = sum(p.numel() for m in shared.modules() if isinstance(m, SharedExperts) for p in m.parameters())
    assert sum(row.parameters_after for row in report.layers) == numbers
    assert sum(row.bytes_after for row in report.layers) == 2 * numbers < sum(r.bytes_before for r in report.layers)
    for row in report.layers:
        stack = model.get_parameter(row.layer).detach()
        made = shared.get_submodule(row.layer.rpartition(".")[0])
        matrices = made.gate_up if row.layer.endswith("gate_up_proj") else made.down
        found = torch.stack([matrices.matrix(e) for e in range(len(stack))])
        assert row.error_after == pytest.approx(float((found.detach() - stack).norm() / stack.norm()), rel=1e-6)
        assert row.error_before < 1e-10 < row.error_after < 1
    torch.testing.assert_close(outputs(shared, ids), outputs(contracted(model, shared), ids), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("sites", [3, 5])
def test_experts_that_are_alike_lose_nothing(make_mixture, make_calibration, make_ids, outputs, family, sites):
    model, ids = make_mixture(family).double(), make_ids(2, 9)
    make_alike(model)
    before = outputs(model, ids)
    if sites > 3 and family != "Mixtral":
        sites = 3  # 24 carries four
    model, report = MPOE(sites=sites).compress(model, make_calibration())
    assert all(row.error_after < 1e-7 for row in report.layers)
    torch.testing.assert_close(outputs(model, ids), before, rtol=1e-6, atol=1e-6)


def test_one_expert_is_a_plain_mpo(seed):
    weight = torch.randn(24, 36, dtype=torch.float64)
    rows, columns = factors(24, 3), factors(36, 3)
    separate = [decompose(weight, rows, columns, full_bonds(rows, columns))]
    matrices = SharedMatrices.from_cores(fit_shared([weight], separate, 0))
    torch.testing.assert_close(matrices.matrix(0), weight, rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in matrices.parameters()) == sum(core.numel() for core in separate[0])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_folders_open_again(make_mixture, make_calibration, make_ids, outputs, tmp_path, family):
    model, ids = make_mixture(family), make_ids(2, 9)
    make_alike(model, 0.05)
    model, _ = MPOE().compress(model, make_calibration())
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    save_model(model, tmp_path / "a", torch.float32)
    opened = load(tmp_path / "a")
    assert layers_of(opened) == layers_of(model) and len(layers_of(model)) == 2
    torch.testing.assert_close(outputs(opened, ids), outputs(model, ids), rtol=0, atol=1e-5)
    opened.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(outputs(load(tmp_path / "b"), ids), outputs(model, ids), rtol=0, atol=1e-5)


def test_the_core_is_trained_by_all_experts(make_mixture, seed):
    teacher = make_mixture()
    make_alike(teacher, 0.2)
    ids = torch.randint(5, 64, (2000,), generator=torch.Generator().manual_seed(seed))
    calibration = Calibration(ids[:64].view(4, 16), ids[64:128].view(4, 16), ids[128:], seed, lambda: teacher)
    model, _ = MPOE().compress(copy.deepcopy(teacher), calibration)
    made = next(module for module in model.modules() if isinstance(module, SharedExperts))
    x, gradients = torch.randn(7, 32), []
    for expert in range(made.num_experts):
        made.zero_grad()
        chosen = torch.full((7, 1), expert)
        made(x, chosen, torch.ones(7, 1)).square().sum().backward()
        gradients.append(made.down.center.grad.clone())
        own = made.down.auxiliary[0].grad.flatten(1).abs().sum(1)
        assert own[expert] > 0 and all(own[other] == 0 for other in range(made.num_experts) if other != expert)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    made.zero_grad()
    for expert in range(made.num_experts):
        made(x, torch.full((7, 1), expert), torch.ones(7, 1)).square().sum().backward()
    torch.testing.assert_close(made.down.center.grad, torch.stack(gradients).sum(0), rtol=1e-4, atol=1e-4)
    model.zero_grad()
    tokens = {
        "tokens": 6000,
        "batch_tokens": 256,
        "learning_rate": 1e-3,
        "precision": "float32",
        "validate_every": 0.25,
    }
    _, report = Distill(**tokens).compress(model, calibration)
    assert report.summary["improved"]


def test_what_cannot_be_is_refused_before_any_work(make_model, make_mixture, one_line):
    for model, fields, match in (
        (make_model("llama"), {}, "the model has no mixture of experts"),
        (make_mixture(), {"sites": 7}, r"sites: 7 sites; .*gate_up_proj of 96 x 32 carries \d at most"),
        (make_mixture(hidden_act="tanh"), {}, "activation 'tanh'; known: silu"),
    ):
        with pytest.raises(InputError) as caught:
            MPOE(**fields).check(model, find_structure(model))
        one_line(caught, match)


@pytest.mark.parametrize("fields", [{"sites": 4}, {"bond_dimension": 0}, {"sweeps": -1}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        MPOE(**fields)
