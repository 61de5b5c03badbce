"""Which backend computes what: preferences, the user's choice, refusals; and what stands where nothing is computed."""

import pytest
import torch
from torch import nn

from tensorpress.kernels import registry
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.kernels.removed import RemovedAttention, RemovedLinear, RemovedNorm


class Layer(nn.Module):
    operation = "test_operation"

    def __init__(self, kernel="auto", size=1):
        super().__init__()
        self.kernel, self.size = kernel, size


@pytest.fixture
def operation(monkeypatch):
    monkeypatch.setattr(registry, "_backends", {})
    registry.register("test_operation", "reference", lambda layer, x: x)
    registry.register("test_operation", "small", lambda layer, x: 2 * x, lambda layer: layer.size < 3)
    registry.register("test_operation", "tiny", lambda layer, x: 3 * x, lambda layer: layer.size < 2)


def test_the_last_that_can_is_taken(operation):
    assert [registry.chosen("test_operation", Layer(size=size)).name for size in (1, 2, 3)] == [
        "tiny",
        "small",
        "reference",
    ]
    run = registry.kernel_for("test_operation", Layer(size=2), torch.ones(1))
    assert run(Layer(), torch.ones(1)).item() == 2


def test_the_users_choice_is_kept_or_refused_never_replaced(operation):
    assert registry.chosen("test_operation", Layer("reference")).name == "reference"
    with pytest.raises(ValueError, match="'small' cannot run"):
        registry.chosen("test_operation", Layer("small", size=7))
    with pytest.raises(ValueError, match="'smal' is not known for test_operation; known: reference, small, tiny"):
        registry.chosen("test_operation", Layer("smal"))


def test_names_in_use_counts_layers_by_what_computes_them(operation):
    model = nn.Sequential(Layer(), Layer(size=5), Layer("reference"), nn.Linear(2, 2), nn.ReLU())
    assert registry.names_in_use(model) == {"test_operation:tiny": 1, "test_operation:reference": 2, "dense:torch": 1}


def test_references_are_always_there():
    assert {"mpo_linear", "quantized_linear"} <= set(registry.operations())
    for name, layer in {
        "mpo_linear": MPOLinear((2, 3), (3, 2), (2,), bias=False),
        "quantized_linear": QuantizedLinear(45, 7, 3, 15, bias=False),
    }.items():
        assert registry.backends(name)["reference"].can_run(layer)
        layer.kernel = "reference"
        assert registry.chosen(name, layer).name == "reference"
        assert f"{name}:reference" in registry.names_in_use(layer)
    copied = registry.backends("mpo_linear")
    copied.clear()
    assert registry.backends("mpo_linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removed_linear_gives_zeros_and_fills_no_memory(dtype):
    stub = RemovedLinear(11)
    out = stub(torch.full((2, 3, 7), float("nan"), dtype=dtype))
    assert out.shape == (2, 3, 11) and out.dtype == dtype and not out.any()
    assert out.untyped_storage().nbytes() == out.element_size()
    assert not list(stub.parameters()) and stub.spec() == {"form": "removed", "out_features": 11}
    assert torch.equal(torch.ones(2, 3, 11) + out.float(), torch.ones(2, 3, 11))


@pytest.mark.parametrize("values", [1, 2, 3])
def test_removed_attention_returns_as_many_values_as_the_attention_did(values):
    stub, x = RemovedAttention(11, values), torch.randn(2, 3, 11)
    for out in (stub(x), stub(hidden_states=x, attention_mask=None), stub(None, query=x)):
        first = out if values == 1 else out[0]
        assert first.shape == (2, 3, 11) and not first.any()
        if values > 1:
            assert isinstance(out, tuple) and out[1:] == (None,) * (values - 1)
    assert stub.spec() == {"form": "removed_attention", "out_features": 11, "values": values}


def test_removed_norm_passes_through():
    x = torch.randn(2, 3)
    assert RemovedNorm()(x) is x and RemovedNorm().spec() == {"form": "removed_norm"}
