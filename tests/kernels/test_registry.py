"""Which backend computes what: the fastest, the user's choice, refusals; and what stands where nothing is computed."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tensorpress.kernels import measured, registry
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.kernels.quantized_linear import QuantizedLinear
from tensorpress.kernels.removed import RemovedAttention, RemovedLinear, RemovedNorm


class Layer(nn.Module):
    operation = "test_operation"

    def __init__(self, kernel="auto", size=1):
        super().__init__()
        self.kernel, self.size = kernel, size

    def kernel_key(self):
        return f"of {self.size}"

    def release(self, names):
        self.keeps = set(names)


def slow(seconds, factor):
    """A backend that takes so long, and multiplies by `factor`."""

    def run(layer, x):
        time.sleep(seconds)
        run.calls += 1
        return factor * x

    run.calls = 0
    return run


@pytest.fixture
def operation(monkeypatch, tmp_path):
    """Backends by name, of which `auto` may take `reference`, `middling` and (up to size 2) `quick`."""
    monkeypatch.setattr(registry, "_backends", {})
    monkeypatch.setenv("TENSORPRESS_CACHE", str(tmp_path / "cache"))
    runs = {"quick": slow(0, 4), "middling": slow(0.01, 3), "rounded": slow(0, 2), "reference": slow(0.06, 1)}
    registry.register("test_operation", "quick", runs["quick"], lambda layer: layer.size < 3)
    registry.register("test_operation", "middling", runs["middling"])
    registry.register("test_operation", "rounded", runs["rounded"], automatic=False)
    registry.register("test_operation", "reference", runs["reference"])
    return runs


def call(layer, rows=1):
    return registry.kernel_for("test_operation", layer, torch.ones(rows, 2))(layer, torch.ones(1)).item()


def test_the_fastest_that_can_is_taken_and_remembered(operation):
    assert [call(Layer(size=size)) for size in (1, 2, 3)] == [4, 4, 3]
    assert operation["rounded"].calls == 0
    layer = Layer(size=1)
    assert call(layer) == 4 and layer.keeps == {"quick"}
    assert operation["reference"].calls == 6  # hopeless after two runs, for each size
    counts = {name: run.calls for name, run in operation.items()}
    layer = Layer(size=3)
    assert call(layer) == call(layer) == 3  # another layer of the size: no measuring
    assert operation["middling"].calls == counts["middling"] + 2
    assert operation["reference"].calls == counts["reference"]
    call(layer, rows=9)  # another batch
    assert operation["reference"].calls == counts["reference"] + 2


def test_choices_are_remembered_in_a_file_that_another_process_reads(operation):
    assert call(Layer(size=3)) == 3
    (machine,) = json.loads(measured.notes_file().read_text()).values()
    ((key, found),) = machine.items()
    assert key == "test_operation of 3, float32, rows to 1"
    assert found["fastest"] == "middling" and found["seconds"]["middling"] >= 0.01
    measured._notes.cache_clear()  # as another process is
    calls = operation["reference"].calls
    assert call(Layer(size=3)) == 3 and operation["reference"].calls == calls


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"MACHINE": 3}', '{"MACHINE": {"KEY": {"fastest": "gone", "of": []}}}']
)
def test_a_file_that_says_nonsense_is_measured_over(operation, text):
    key, machine = "test_operation of 3, float32, rows to 1", measured._machine("cpu", torch.get_num_threads())
    file = measured.notes_file()
    file.parent.mkdir()
    file.write_text(text.replace("MACHINE", machine).replace("KEY", key))
    assert call(Layer(size=3)) == 3
    assert json.loads(file.read_text())[machine][key]["fastest"] == "middling"


def test_where_nothing_can_be_written_choices_are_measured_by_each_process(operation, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert call(Layer(size=3)) == 3 and call(Layer(size=3)) == 3
    assert operation["reference"].calls == 2


def test_a_backend_without_room_is_not_tried(operation):
    registry.register("test_operation", "reference", operation["reference"], room=lambda layer: 1 << 60)
    assert call(Layer(size=3)) == 3 and operation["reference"].calls == 0


def test_a_backend_that_is_predicted_to_take_far_longer_is_not_tried(operation):
    registry.register("test_operation", "reference", operation["reference"], expected=lambda layer, x: 0.2)
    assert call(Layer(size=3)) == 3 and operation["reference"].calls == 0
    measured._notes.cache_clear()
    assert (
        call(Layer(size=3)) == 3 and operation["middling"].calls == 6
    )  # four to measure, one for each call: remembered
    registry.register("test_operation", "reference", operation["reference"], expected=lambda layer, x: 0.05)
    assert call(Layer(size=3), rows=9) == 3 and operation["reference"].calls == 2  # not so far


def test_calls_at_once_measure_once(operation):
    layers = [Layer(size=3) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(call, layers)) == [3] * 6
    assert operation["reference"].calls == 2


def test_gradients_are_the_references(operation):
    x = torch.ones(1, 2, requires_grad=True)
    assert registry.kernel_for("test_operation", Layer(), x) is operation["reference"]
    with torch.no_grad():
        assert registry.kernel_for("test_operation", Layer(), x) is operation["quick"]


def test_the_users_choice_is_kept_or_refused_never_replaced(operation):
    assert registry.named("test_operation", Layer("reference")).name == "reference"
    with pytest.raises(ValueError, match="'quick' cannot run"):
        registry.named("test_operation", Layer("quick", size=7))
    with pytest.raises(
        ValueError, match="'quic' is not known for test_operation; known: quick, middling, rounded, ref"
    ):
        registry.named("test_operation", Layer("quic"))


def test_the_environment_takes_the_place_of_auto_alone(operation, monkeypatch):
    registry.register("another", "special", lambda layer, x: x)
    monkeypatch.setenv("TENSORPRESS_KERNELS", "rounded")
    assert call(Layer()) == 2 and call(Layer("quick")) == 4
    monkeypatch.setenv("TENSORPRESS_KERNELS", "special")  # of another operation
    assert call(Layer()) == 4
    monkeypatch.setenv("TENSORPRESS_KERNELS", "speciall")
    with pytest.raises(ValueError, match="'speciall' is not known for test_operation"):
        call(Layer())


def test_names_in_use_counts_layers_by_what_computes_them(operation):
    model = nn.Sequential(Layer(size=2), Layer(size=5), Layer("reference"), nn.Linear(2, 2), nn.ReLU())
    assert registry.names_in_use(model) == {"test_operation:auto": 2, "test_operation:reference": 1, "dense:torch": 1}
    for layer in model[:2]:
        call(layer)
    found = {"test_operation:quick": 1, "test_operation:middling": 1, "test_operation:reference": 1, "dense:torch": 1}
    assert registry.names_in_use(model) == found
    model[0].taken["other batch"] = "middling"
    assert registry.names_in_use(model[0]) == {"test_operation:middling+quick": 1}


def test_references_are_always_there():
    assert {"mpo_linear", "quantized_linear"} <= set(registry.operations())
    for name, layer in {
        "mpo_linear": MPOLinear((2, 3), (3, 2), (2,), bias=False),
        "quantized_linear": QuantizedLinear(45, 7, 3, 15, bias=False),
    }.items():
        assert registry.backends(name)["reference"].can_run(layer)
        layer.kernel = "reference"
        assert registry.named(name, layer).name == "reference"
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
