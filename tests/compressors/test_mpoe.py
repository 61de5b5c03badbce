"""Experts that share a central core: what they compute, how a mixture grows out of a dense feed-forward, and what its training masks."""

import copy

import pytest
import torch
import transformers
from pydantic import ValidationError

from tensorpress.artifact import save_model
from tensorpress.compressors.base import Calibration
from tensorpress.compressors.decompose.experts import dense_feed_forwards, mixtures
from tensorpress.compressors.decompose.mpoe import MPOE
from tensorpress.compressors.decompose.share import fit_shared
from tensorpress.compressors.decompose.tensor_train import decompose, factors, full_bonds
from tensorpress.compressors.prune.finercut import FinerCut
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.compressors.recover.distill import Distill
from tensorpress.errors import InputError
from tensorpress.kernels.mpoe import ACTIVATIONS, SharedExperts, SharedMatrices, SharedMixture
from tensorpress.loading import layers_of, load
from tensorpress.specs import module_from_spec
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


GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def grown(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, SharedMixture)}


def told_apart(model):
    """Experts that are no copies any more, and routers that favour some."""
    for module in grown(model).values():
        for parameter in (*module.gate_up.auxiliary, *module.down.auxiliary, module.router):
            parameter.data.add_(torch.randn_like(parameter) * 0.2)


@pytest.mark.parametrize("name", GATED)
def test_copies_of_the_feed_forward_change_nothing(make_model, make_calibration, make_ids, outputs, name):
    model, ids = make_model(name).double(), make_ids(2, 9)
    expected = outputs(model, ids)
    sites = 3 if name in ("gemma2", "phi3") else 5
    model, report = MPOE(experts=3, sites=sites, core_updates=0.5).compress(model, make_calibration())
    made = grown(model)
    assert len(made) == model.config.num_hidden_layers == report.summary["mixtures"]
    torch.testing.assert_close(outputs(model, ids), expected, rtol=1e-10, atol=1e-10)
    for module in made.values():
        module.router.data = 10 * torch.randn_like(module.router)
    torch.testing.assert_close(outputs(model, ids), expected, rtol=1e-10, atol=1e-10)
    assert all(row.error_after < 1e-10 for row in report.layers if row.action == "shared")


def test_a_token_goes_to_the_experts_of_its_largest_logits(make_model, make_calibration, seed):
    model, _ = MPOE(experts=5, active=3).compress(make_model().double(), make_calibration())
    told_apart(model)
    mixture = grown(model)["model.layers.1.mlp"]
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    found = mixture(x)
    for token, y in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        logits = mixture.router @ token
        chosen = logits.argsort(descending=True)[:3].tolist()
        weights = logits[chosen].exp() / logits[chosen].exp().sum()
        expected = torch.zeros(32, dtype=torch.float64)
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up = (mixture.gate_up.matrix(expert) @ token).chunk(2)
            expected += weight * (mixture.down.matrix(expert) @ (ACTIVATIONS["silu"](gate) * up))
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixture(x[0, 0]), found[0, 0], rtol=1e-9, atol=1e-9)


def test_the_report_says_what_is_stored(make_model, make_calibration, tmp_path):
    model = make_model()
    dense = copy.deepcopy(model)
    model, report = MPOE(experts=4, bond_dimension=6, layers=("*.[02].mlp",)).compress(model, make_calibration())
    paths = [f"model.layers.{block}.mlp" for block in (0, 2)]
    assert list(grown(model)) == paths
    assert [row.layer for row in report.layers] == [f"{p}.{n}" for p in paths for n in ("gate_up", "down", "router")]
    for row in report.layers:
        part = model.get_submodule(row.layer) if "router" not in row.layer else None
        numbers = sum(p.numel() for p in part.parameters()) if part else model.get_parameter(row.layer).numel()
        assert row.parameters_after == numbers and row.bytes_after == 2 * numbers
        assert row.bytes_before == 2 * row.parameters_before
        if part:
            names = ("gate_proj", "up_proj") if "gate_up" in row.layer else ("down_proj",)
            layers = [dense.get_submodule(row.layer.rpartition(".")[0]).get_submodule(n).weight for n in names]
            weight = torch.cat(layers).detach().double()
            assert row.parameters_before == weight.numel()
            for expert in range(4):
                error = (part.matrix(expert).detach().double() - weight).norm() / weight.norm()
                assert row.error_after == pytest.approx(float(error), rel=1e-4)
            assert 0 < row.error_after <= row.error_before + 1e-9
    numbers = sum(p.numel() for module in grown(model).values() for p in module.parameters())
    before, routers = 2 * 3 * 32 * 48, 2 * 4 * 32
    assert report.summary["kept_of_dense"] == pytest.approx(numbers / before)
    assert report.summary["kept_of_plain_mixture"] == pytest.approx(numbers / (4 * before + routers))
    sizes = {}
    for name, one in (("dense", dense), ("grown", model)):
        (tmp_path / name).mkdir()
        save_model(one, tmp_path / name, torch.float32)
        sizes[name] = (tmp_path / name / "model.safetensors").stat().st_size
    added = 2 * sum(row.bytes_after - row.bytes_before for row in report.layers)  # in 32 bits
    assert sizes["grown"] - sizes["dense"] == pytest.approx(added, abs=20_000)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_folders_of_grown_mixtures_open_again(make_model, make_calibration, make_ids, outputs, tmp_path, name):
    model, _ = MPOE(experts=3, bond_dimension=8, core_updates=0.25).compress(make_model(name), make_calibration())
    told_apart(model)
    ids = make_ids(2, 9)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    save_model(model, tmp_path / "a", torch.float32)
    opened = load(tmp_path / "a")
    assert layers_of(opened) == layers_of(model) and len(layers_of(model)) == model.config.num_hidden_layers
    torch.testing.assert_close(outputs(opened, ids), outputs(model, ids), rtol=0, atol=1e-5)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = load(tmp_path / "b")
    torch.testing.assert_close(outputs(again, ids), outputs(model, ids), rtol=0, atol=1e-5)
    for path, module in grown(again).items():
        assert isinstance(module, SharedMixture) and (module.active, module.core_updates) == (2, 0.25)
        first, second = ([one._centers_learn() for _ in range(40)] for one in (module, grown(model)[path]))
        assert first == second and 0 < sum(first) < 40


def test_masked_passes_give_the_core_no_gradient(make_model, make_calibration, seed):
    model, _ = MPOE(experts=4, core_updates=0.3, bond_dimension=8).compress(make_model().double(), make_calibration())
    told_apart(model)
    mixture = grown(model)["model.layers.0.mlp"].eval()
    free = copy.deepcopy(mixture)
    free.core_updates = 1.0
    centers = [(one.gate_up.center, one.down.center) for one in (mixture, free)]
    learnt, x = [], torch.randn(40, 32, dtype=torch.float64)
    free(x).square().sum().backward()
    with torch.no_grad():
        expected = free(x)
    for _ in range(60):
        mixture.zero_grad()
        y = mixture(x)
        y.square().sum().backward()
        assert torch.equal(y.detach(), expected)
        gradients = [center.grad for center in centers[0]]
        assert len({gradient is None for gradient in gradients}) == 1
        learnt.append(gradients[0] is not None)
        for (name, found), wanted in zip(mixture.named_parameters(), free.parameters(), strict=True):
            if learnt[-1] or not name.endswith("center"):
                torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-9)
    assert 0 < sum(learnt) < 60
    assert 500 < sum(mixture._centers_learn() for _ in range(2000)) < 700  # five standard deviations
    other = copy.deepcopy(mixture)
    with torch.no_grad():  # a measurement draws nothing
        other(x)
    assert [other._centers_learn() for _ in range(50)] == [mixture._centers_learn() for _ in range(50)]


def test_training_tells_the_copies_apart(make_model, seed):
    teacher = make_model()
    ids = torch.randint(5, 64, (2000,), generator=torch.Generator().manual_seed(seed))
    calibration = Calibration(ids[:64].view(4, 16), ids[64:128].view(4, 16), ids[128:], seed, lambda: teacher)
    config = MPOE(experts=3, bond_dimension=6, core_updates=0.5)
    model, _ = config.compress(copy.deepcopy(teacher), calibration)
    again, _ = config.compress(copy.deepcopy(teacher), calibration)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    before = copy.deepcopy(model)
    for module in grown(model).values():
        assert all(torch.equal(stack[0], other) for stack in module.down.auxiliary for other in stack)
    heal = Distill(tokens=8000, batch_tokens=256, learning_rate=2e-3, precision="float32", validate_every=0.25)
    model, report = heal.compress(model, calibration)
    assert report.summary["improved"] and not model.training
    for path, module in grown(model).items():
        assert not torch.equal(module.down.center, grown(before)[path].down.center)
        assert not torch.equal(module.router, grown(before)[path].router)
        for matrices in (module.gate_up, module.down):
            pairs = ((0, 1), (0, 2), (1, 2))
            assert all(not torch.equal(matrices.matrix(a), matrices.matrix(b)) for a, b in pairs)


def test_the_router_prefers_no_expert_for_what_all_tokens_have(make_model, make_calibration):
    model, calibration = make_model().double(), make_calibration()
    means = {}

    def seen(module, args):
        means[module] = args[0].flatten(0, 1).mean(0)

    handles = [layer.mlp.register_forward_pre_hook(seen) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=calibration.windows)
    for handle in handles:
        handle.remove()
    model, _ = MPOE(experts=4).compress(model, calibration)
    for mean, module in zip(means.values(), grown(model).values(), strict=True):
        assert (module.router @ mean).abs().max() < 1e-10 * module.router.norm() * mean.norm() + 1e-12
        assert module.router.norm() > 0.5


def test_generation_with_a_cache_and_steps_behind_it(make_model, make_calibration, make_ids):
    model, calibration = make_model().double(), make_calibration()
    ids = make_ids(1, 5)
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **settings)
    model, _ = MPOE(experts=3).compress(model, calibration)
    assert torch.equal(model.generate(ids, **settings), expected)
    told_apart(model)
    cached, whole = (model.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, whole)
    model = model.float()
    model, report = FinerCut(remove=0.2, samples=2).compress(model, calibration)
    assert report.layers and len(grown(model)) == 3
    model, report = GPTQ(bits=4, group_size=16).compress(model, calibration)
    assert report.layers and all("mlp" not in row.layer for row in report.layers)
    assert model(input_ids=ids)[0].isfinite().all()
    half = model.to(torch.bfloat16)(input_ids=ids)[0]
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_gate_and_up_are_known_by_what_they_compute(make_model):
    """Not by their names: here the layer that is called up goes through the activation."""
    model = make_model().double()

    class Other(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class Third(Other):
        def forward(self, x):
            return super().forward(x) + 0.5 * x

    model.model.layers[1].mlp.__class__ = Other
    found = dense_feed_forwards(model, find_structure(model), ["*"])
    orders = [[path.rpartition(".")[2] for path in one.gate_up] for one in found]
    assert orders == [["gate_proj", "up_proj"], ["up_proj", "gate_proj"], ["gate_proj", "up_proj"]]
    model.model.layers[2].mlp.__class__ = Third
    with pytest.raises(InputError, match=r"mpoe: model.layers.2.mlp computes something else than down"):
        dense_feed_forwards(model, find_structure(model), ["*"])


def test_what_cannot_grow_is_refused_before_any_work(make_model, make_mixture, make_calibration, one_line):
    quantized, _ = GPTQ(bits=4, group_size=16).compress(make_model(), make_calibration())
    grown_already, _ = MPOE(experts=2).compress(make_model(), make_calibration())
    for model, fields, match in (
        (make_mixture(), {}, "experts: the model has mixtures already; leave experts out"),
        (make_model(), {"sites": 7}, r"sites: 7 sites; gate_up of model.layers.0.mlp of 96 x 32 carries \d at most"),
        (make_model(), {"layers": ("*attn*",)}, r"layers: \*attn\* matches no dense feed-forward; the first is model"),
        (make_model(hidden_act="tanh"), {}, "activation 'tanh'; known: silu"),
        (make_model("gpt2"), {}, "mpoe: transformer.h.0.mlp is no gated feed-forward of gate, up and down"),
        (make_model("opt"), {}, "mpoe: model.decoder.layers.0.fc1 is no gated feed-forward"),
        (make_model(mlp_bias=True), {}, "mpoe: model.layers.0.mlp has biases"),
        (quantized, {}, "mpoe: model.layers.0.mlp.gate_proj is no dense layer"),
        (grown_already, {}, r"matches no dense feed-forward; the model has none"),
    ):
        with pytest.raises(InputError) as caught:
            MPOE(experts=4, **fields).check(model, find_structure(model))
        one_line(caught, match)
    assert {"gptq", "mpoe"} <= set(MPOE.may_not_follow)


def test_mixtures_that_compute_something_else_are_refused(make_mixture, one_line):
    model = make_mixture()
    path, experts = next(iter(mixtures(model).items()))
    MPOE().check(model, find_structure(model))

    class Clipped(type(experts)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate).clamp(max=1) * up

    experts.__class__ = Clipped
    with pytest.raises(InputError) as caught:
        MPOE().check(model, find_structure(model))
    one_line(caught, f"mpoe: {path}: Clipped computes something else than down")


@pytest.mark.parametrize(
    "change",
    [
        {"active": 4},
        {"active": 0},
        {"core_updates": 0.0},
        {"core_updates": "0.5"},
        {"core_updates": float("nan")},
        {"seed": 0.5},
        {"experts": 0},
        {"activation": "tanh"},
        {"more": 1},
        {"down": {"out_factors": [2, 4, 4], "in_factors": [4, 4, 2], "bonds": [4, 4]}},
        {"gate_up": {"out_factors": [4, 4, 8], "in_factors": [2, 4, 4], "bonds": [4, 4]}},
        {"gate_up": {"out_factors": [4, 6], "in_factors": [8, 4], "bonds": [4]}},
    ],
)
def test_specs_that_cannot_be(make_model, make_calibration, one_line, change):
    model = make_model()
    replaced = copy.deepcopy(model.model.layers[0].mlp)
    model, _ = MPOE(experts=3).compress(model, make_calibration())
    spec = layers_of(model)["model.layers.0.mlp"]
    assert module_from_spec(spec, "a", replaced).spec() == spec
    with pytest.raises(InputError) as caught:
        module_from_spec(spec | change, "a", replaced)
    one_line(caught, "artifact: layer a")
    with pytest.raises(InputError):
        module_from_spec(spec, "a", model.model.layers[0].self_attn)


def test_what_cannot_be_is_refused_before_any_work(make_model, make_mixture, one_line):
    for model, fields, match in (
        (make_model("llama"), {}, "the model has no mixture of experts"),
        (make_mixture(), {"sites": 7}, r"sites: 7 sites; .*gate_up_proj of 96 x 32 carries \d at most"),
        (make_mixture(hidden_act="tanh"), {}, "activation 'tanh'; known: silu"),
    ):
        with pytest.raises(InputError) as caught:
            MPOE(**fields).check(model, find_structure(model))
        one_line(caught, match)


def test_a_dead_expert_harms_no_other(make_mixture, make_calibration, make_ids, outputs):
    model = make_mixture()
    experts = next(
        m for m in model.modules() if getattr(m, "down_proj", None) is not None and hasattr(m, "gate_up_proj")
    )
    experts.down_proj.data[1] = 0
    model, report = MPOE(bond_dimension=3).compress(model, make_calibration())
    assert torch.isfinite(outputs(model, make_ids(1, 5))).all()
    assert all(0 < row.error_after < 1 for row in report.layers)


def test_a_bond_dimension_above_the_full_bond_is_said(make_model, make_mixture, make_calibration):
    for model, fields in ((make_mixture(), {}), (make_model("llama"), {"experts": 2})):
        for bond, said in ((100_000, True), (2, False)):
            _, report = MPOE(bond_dimension=bond, sweeps=0, **fields).compress(copy.deepcopy(model), make_calibration())
            matrices = sum(row.action != "added" for row in report.layers)
            note = f"the bond dimension of {matrices} layers is their full bond, below 100000"
            assert report.summary.get("note") == (note if said else None)


@pytest.mark.parametrize(
    "fields",
    [
        {"sites": 4},
        {"bond_dimension": 0},
        {"sweeps": -1},
        {"experts": 1},
        {"experts": 4, "sites": 4},
        {"experts": 3, "active": 4},
        {"experts": 3, "active": 0},
        {"experts": 3, "core_updates": 0},
        {"experts": 3, "core_updates": 1.5},
        {"active": 3},
        {"core_updates": 0.5},
        {"layers": ("*mlp*",)},
    ],
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        MPOE(**fields)
