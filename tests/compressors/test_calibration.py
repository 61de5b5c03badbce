"""The walk: each block sees what the compressed blocks before it give, and a walk that died goes on to the same bits."""

import copy

import pytest
import torch

from tensorpress.compressors.base import LayerReport
from tensorpress.compressors.calibration import BlockInputs, walk
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.errors import StepError
from tensorpress.structure import LINEAR, find_structure, linear_weight, remove_sublayer

NAMES = [
    "llama", "mistral", "qwen3", "gemma2", "gemma3", "phi", "phi3", "gpt2", "gpt_neox", "opt", "opt_post", "bert",
    "distilbert", "roberta",
]  # fmt: skip
SIZES = {"samples": 7, "length": 12, "batch_tokens": 3 * 12}  # batches of 3, 3 and 1


def plain_inputs(model, structure, windows, count):
    """What every block, and every linear layer in it, gets in ordinary forward passes; [windows, length, width]."""
    seen, handles = {}, []
    watched = [block.path for block in structure.blocks]
    watched += [name for name, module in model.named_modules() if isinstance(module, LINEAR)]

    def hook(path):
        def run(module, args, kwargs):
            seen.setdefault(path, []).append((args[0] if args else kwargs["hidden_states"]).detach().clone())

        return run

    for path in watched:
        handles.append(model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True))
    with torch.no_grad():
        for batch in windows.split(count):
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


HEADLESS = [(name, way) for name in NAMES[:-3] for way in ("default", "eager")]
"""Decoders as models of embeddings are: they keep keys and values unless they are told not to, which blocks that run again would find."""


@pytest.mark.parametrize(("name", "headless"), [*((name, None) for name in NAMES), *HEADLESS])
def test_blocks_get_what_the_changed_model_gives_them(make_model, make_ids, name, headless):
    model = make_model(name)
    if headless:
        model = model.base_model
        if headless == "eager":
            model.set_attn_implementation("eager")
    structure, windows = find_structure(model), make_ids(SIZES["samples"], SIZES["length"])
    hidden, observed, told = {}, {}, []

    def visit(block, inputs):
        assert isinstance(inputs, BlockInputs) and inputs.module is model.get_submodule(block.path)
        hidden[block.path] = torch.cat([states.clone() for states in inputs.hidden])
        assert [len(states) for states in inputs.hidden] == [3, 3, 1]
        for group in block.linear_groups:
            parts = []
            inputs.observe(model.get_submodule(group[0]), parts.append)
            observed[group[0]] = torch.cat([part.clone() for part in parts])
            assert observed[group[0]].dim() == 2 and len(observed[group[0]]) == 7 * 12
            for path in group:  # what the next layer sees must know of this
                weight = linear_weight(model.get_submodule(path))
                weight.data.mul_(1 + 0.3 * torch.randn_like(weight))
        return [LayerReport(block.path, "shaken", 1, 1, 2, 2)]

    rows = walk(
        model,
        structure,
        windows,
        visit,
        what="shaking",
        progress=lambda *what: told.append(what),
        batch_tokens=SIZES["batch_tokens"],
    )
    assert [row.layer for row in rows] == [block.path for block in structure.blocks]
    count = len(structure.blocks)
    assert told == [("shaking", done, count) for done in range(count + 1)]
    expected = plain_inputs(model, structure, windows, 3)
    for path, found in hidden.items():
        torch.testing.assert_close(found, expected[path], rtol=1e-5, atol=1e-5)
    for path, found in observed.items():
        wanted = expected[path].reshape(-1, expected[path].shape[-1])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_windows_matter_as_sliding_attention_sees_them(make_model, make_ids):
    """In Gemma's sliding layers a token four back is out of sight: the walk must hand each block its own mask."""
    model = make_model("gemma3", layer_types=["sliding_attention", "full_attention"] * 2)
    structure, windows = find_structure(model), make_ids(2, 12)
    outputs = []

    def visit(block, inputs):
        outputs.append(torch.cat(list(inputs.run())))
        return []

    walk(model, structure, windows, visit)
    expected = plain_inputs(model, structure, windows, 2)
    for block, found in zip(structure.blocks[1:], outputs[:-1], strict=True):
        torch.testing.assert_close(found, expected[block.path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_batches_change_nothing(make_model, make_ids, samples):
    model = make_model("gemma2")
    structure, windows = find_structure(model), make_ids(samples, 10)

    def last(batch_tokens):
        found = []

        def visit(block, inputs):
            found[:] = [torch.cat(list(inputs.run()))]
            return []

        walk(model, structure, windows, visit, batch_tokens=batch_tokens)
        return found[0]

    whole = last(10_000)
    assert whole.shape == (samples, 10, 32)
    for batch_tokens in (1, 20, 40):
        torch.testing.assert_close(last(batch_tokens), whole, rtol=1e-5, atol=1e-5)


def test_blocks_with_removed_sublayers_and_on_training_models(make_model, make_ids):
    model = make_model("llama")
    structure = find_structure(model)
    remove_sublayer(model, structure.blocks[0].attention)
    remove_sublayer(model, structure.blocks[2].feed_forward)
    structure, windows = find_structure(model), make_ids(3, 8)
    hidden = {}

    def visit(block, inputs):
        hidden[block.path] = torch.cat(inputs.hidden)
        return []

    walk(model, structure, windows, visit)
    for path, wanted in plain_inputs(model, structure, windows, 3).items():
        if path in hidden:
            torch.testing.assert_close(hidden[path], wanted, rtol=1e-5, atol=1e-5)


# --- checkpoints


class Died(Exception):
    """What ends a walk in these tests."""


def quantizing(method, model, visited, die_at=None):
    def visit(block, inputs):
        if block.index == die_at:
            raise Died
        visited.append(block.index)
        return method._visit(model, block, inputs)

    return visit


def rows_without_seconds(rows):
    return [{key: value for key, value in vars(row).items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize(
    ("name", "die_at", "symmetric"),
    [
        ("llama", 0, True),
        ("llama", 1, False),
        ("llama", 3, True),
        ("gpt2", 2, True),
        ("bert", 2, False),
        ("gemma3", 2, True),
    ],
)
def test_goes_on_after_death_to_the_same_bits(make_model, make_calibration, tmp_path, name, die_at, symmetric):
    layers = {"n_layer": 4} if name == "gpt2" else {"num_hidden_layers": 4}
    original = make_model(name, **layers)
    windows, method = make_calibration(7, 12).windows, GPTQ(bits=3, group_size=16, symmetric=symmetric)
    structure, scratch = find_structure(original), tmp_path / "scratch"
    settings = {"batch_tokens": 36, "checkpoint_seconds": 0}
    whole, visited = copy.deepcopy(original), []
    expected = walk(whole, structure, windows, quantizing(method, whole, visited), **settings)
    assert visited == [0, 1, 2, 3]

    first, visited = copy.deepcopy(original), []
    with pytest.raises(Died):
        walk(first, structure, windows, quantizing(method, first, visited, die_at), scratch=scratch, **settings)
    assert visited == list(range(die_at)) and scratch.exists() == (die_at > 0)

    second, visited = copy.deepcopy(original), []
    rows = walk(second, structure, windows, quantizing(method, second, visited), scratch=scratch, **settings)
    assert visited == list(range(die_at, 4))
    assert rows_without_seconds(rows) == rows_without_seconds(expected)
    ours, theirs = second.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
    with torch.no_grad():
        assert torch.equal(second(input_ids=windows)[0], whole(input_ids=windows)[0])
    assert not scratch.exists()


def test_a_checkpoint_is_written_only_now_and_then(make_model, make_calibration, tmp_path, monkeypatch):
    """Blocks done since the last save are lost with the process and done again; those before are not."""
    original, method = make_model("llama", num_hidden_layers=4), GPTQ(bits=4, group_size=16)
    windows, structure = make_calibration().windows, find_structure(original)
    clock = [0.0]
    monkeypatch.setattr("tensorpress.compressors.calibration.time.monotonic", lambda: clock[0])
    visited = []

    def timed(model, die_at):
        inner = quantizing(method, model, visited, die_at)

        def visit(block, inputs):
            clock[0] += 40
            return inner(block, inputs)

        return visit

    whole = copy.deepcopy(original)
    walk(whole, structure, windows, timed(whole, None))
    visited.clear()
    first = copy.deepcopy(original)
    with pytest.raises(Died):
        walk(first, structure, windows, timed(first, 3), scratch=tmp_path / "s")
    visited.clear()
    second = copy.deepcopy(original)
    walk(second, structure, windows, timed(second, None), scratch=tmp_path / "s")
    assert visited == [2, 3]
    ours, theirs = second.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_other_layers_come_back_too(make_model, make_calibration, tmp_path):
    """A model that holds MPO layers and gaps before the walk has them after it was gone on with."""
    original, calibration = make_model("llama", num_hidden_layers=3), make_calibration()
    MPO(metric="weights", keep=0.5, layers=("*up_proj",)).compress(original, calibration)
    remove_sublayer(original, find_structure(original).blocks[0].attention)
    method, structure = GPTQ(bits=4, group_size=16), find_structure(original)
    settings = {"scratch": tmp_path / "s", "checkpoint_seconds": 0}
    whole = copy.deepcopy(original)
    walk(whole, structure, calibration.windows, quantizing(method, whole, []))
    first, second = copy.deepcopy(original), copy.deepcopy(original)
    with pytest.raises(Died):
        walk(first, structure, calibration.windows, quantizing(method, first, [], 2), **settings)
    walk(second, structure, calibration.windows, quantizing(method, second, []), **settings)
    ours, theirs = second.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ids = calibration.windows
    with torch.no_grad():
        full = second(input_ids=ids).logits
        past = second(input_ids=ids[:, :5], use_cache=True).past_key_values
        rest = second(input_ids=ids[:, 5:], past_key_values=past).logits
    torch.testing.assert_close(rest, full[:, 5:], rtol=1e-4, atol=1e-4)


def test_compress_clears_its_scratch(make_model, make_calibration, tmp_path):
    model = make_model("llama")
    GPTQ(group_size=16).compress(model, make_calibration(scratch=tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_weights_that_are_not_finite_stop_the_walk(make_model, make_calibration):
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[10:40] = float("nan")
    with pytest.raises(StepError, match="not finite"):
        GPTQ(group_size=16).compress(model, make_calibration())
