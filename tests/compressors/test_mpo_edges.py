"""MPO decomposition of what is degenerate, not finite or already quantized."""

import copy
import math

import pytest
import torch

from tensorpress.compressors.decompose.factorize import Factorize
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.decompose.mpoe import MPOE
from tensorpress.compressors.decompose.share import Share
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.compressors.recover.lpa import LPA
from tensorpress.compressors.recover.mpo_tune import MPOTune
from tensorpress.compressors.recover.pela import PELA
from tensorpress.compressors.recover.squeeze import Squeeze
from tensorpress.errors import InputError, StepError
from tensorpress.kernels.mpoe import SharedMatrices
from tensorpress.kernels.pivoted_mpo_linear import PivotedMPOLinear
from tensorpress.kernels.shared_mpo_linear import SharedMPOLinear
from tensorpress.structure import find_structure, set_module


def test_few_tokens_are_said(make_model, make_calibration):
    model, report = MPO(keep=0.5, multiple=1).compress(make_model("llama"), make_calibration(2, 12))
    assert "calibration has 24 tokens, fewer than the 48 inputs of the widest layer" in report.summary["note"]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_inputs_that_are_never_anything_but_zero(make_model, make_calibration, make_ids, outputs):
    model = make_model("llama")
    model.model.layers[1].input_layernorm.weight.data.zero_()
    model, _ = MPO(keep=0.5, multiple=1).compress(model, make_calibration(12, 16))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(outputs(model, make_ids(1, 5))).all()


@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize("allocation", ["uniform", "predicted"])
def test_weights_that_are_all_zero(make_model, make_calibration, make_ids, outputs, sites, allocation):
    """As the output projections of blocks that were added to a trained model."""
    model = make_model("llama")
    layer = model.model.layers[1].self_attn.o_proj
    layer.weight.data.zero_()
    model, _ = MPO(keep=0.5, sites=sites, allocation=allocation).compress(model, make_calibration(12, 16))
    assert not model.model.layers[1].self_attn.o_proj.dense_weight().any()
    assert torch.isfinite(outputs(model, make_ids(1, 5))).all()


@pytest.mark.parametrize("plans", ["auto", "low_rank"])
@pytest.mark.parametrize("pivots", [True, False])
@pytest.mark.parametrize("nothing", ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj", "lm_head"])
def test_layers_whose_outputs_the_loss_does_not_see(
    make_model, make_calibration, make_ids, outputs, nothing, pivots, plans
):
    """What is in front of zero weights has gradients of nothing but zero."""
    model = make_model("llama")
    model.get_submodule(nothing).weight.data.zero_()
    model, report = MPO(keep=0.5, plans=plans, pivots=pivots, multiple=1).compress(model, make_calibration(12, 16))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(outputs(model, make_ids(1, 5))).all()
    assert sum(row.bytes_after for row in report.layers) <= 0.5 * sum(row.bytes_before for row in report.layers)
    assert all(math.isfinite(row.error_after) for row in report.layers if row.error_after is not None)


@pytest.mark.parametrize("metric", ["inputs", "loss"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_moments_that_are_not_finite_end_the_step(make_model, make_calibration, name, metric):
    model = make_model(name)
    next(p for n, p in model.named_parameters() if "norm" in n or "ln_1" in n).data[0] = float("inf")
    with pytest.raises(StepError, match="not finite"):
        MPO(keep=0.5, metric=metric).compress(model, make_calibration(12, 16))


@pytest.mark.parametrize(
    "method",
    [MPO(keep=0.5), MPO(keep=0.5, metric="weights"), Factorize(keep=0.5, form="svd"), Share(), LPA(), PELA(c=2)],
)
def test_quantized_layers_are_refused_with_the_order_that_works(make_model, make_calibration, one_line, method):
    model, _ = GPTQ(bits=4, group_size=16).compress(make_model("llama"), make_calibration())
    with pytest.raises(InputError) as caught:
        method.check(model, find_structure(model))
    one_line(caught, rf"{method.use}: .*_proj is quantized; decompose first, then quantize")


@pytest.mark.parametrize("method", [MPO(keep=0.5), Share(), LPA(), PELA(c=2)])
def test_one_quantized_layer_among_others_is_refused_too(make_model, make_calibration, one_line, method):
    model, _ = GPTQ(bits=4, group_size=16).compress(make_model("llama"), make_calibration())
    plain = make_model("llama")
    quantized = "model.layers.1.self_attn.v_proj"
    set_module(plain, quantized, model.get_submodule(quantized))
    with pytest.raises(InputError) as caught:
        method.check(plain, find_structure(plain))
    one_line(caught, f"{method.use}: {quantized} is quantized; decompose first, then quantize")


def test_quantized_cores_are_neither_tuned_nor_squeezed(make_model, make_calibration, one_line):
    calibration = make_calibration(12, 16)
    model, _ = MPO(keep=0.6, plans="balanced", sites=3, layers=("*mlp*",), multiple=1).compress(
        make_model("llama"), calibration
    )
    model, report = GPTQ(bits=4, group_size=16).compress(model, calibration)
    cores = sum(isinstance(module, PivotedMPOLinear) for module in model.modules())
    assert cores and f"the cores of {cores} layers stay at 16 bits; mpo with plans: low_rank" in report.summary["note"]
    for method in (MPOTune(tokens=100), Squeeze(keep=0.5)):
        with pytest.raises(InputError) as caught:
            method.compress(copy.deepcopy(model), calibration)
        one_line(caught, "quantized weights cannot be trained; put it before the quantization")


@pytest.mark.parametrize("method", [Share(layers=("*mlp*",)), MPOE(experts=2)])
def test_shared_cores_are_said_to_stay(make_model, make_calibration, method):
    model, _ = method.compress(make_model("llama"), make_calibration(12, 16))
    shared = sum(isinstance(module, (SharedMPOLinear, SharedMatrices)) for module in model.modules())
    _, report = GPTQ(bits=4, group_size=16).compress(model, make_calibration(12, 16))
    assert shared and report.layers
    assert report.summary["note"] == f"the cores of {shared} layers stay at 16 bits"


def test_gradients_that_are_not_finite(make_model, make_calibration):
    model = make_model("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(StepError, match="outputs are not finite"):
        MPO(keep=0.5).compress(model, make_calibration())
