"""What every verb on a model says of folders that are none, and of artifacts that are damaged."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("verb", ["eval", "bench", "inspect", "generate", "export"])
def test_models_that_are_none(refused, tmp_path, mixed, store, verb):
    more = {"generate": ("text",), "export": ("target",)}.get(verb, ())
    options = ("--store", store)
    empty, pickled = tmp_path / "empty", tmp_path / "pickled"
    empty.mkdir()
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "llama"}')
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "no such folder" in refused(verb, "nowhere", *more, *options)
    assert "no config.json" in refused(verb, empty, *more, *options)
    assert "pickled" in refused(verb, pickled, *more, *options)
    assert "begins no digest" in refused(verb, "fedcba", *more, *options)
    (store / "models" / (mixed.name[:8] + "0" * 24)).mkdir()
    assert "begins several" in refused(verb, mixed.name[:6], *more, *options)


def test_a_damaged_artifact(call, refused, mixed, store, text):
    file = mixed / "config.json"
    file.write_text(file.read_text() + "\n")
    said = refused("eval", mixed, "--text", text, "--length", 32, "--store", store)
    assert "not whole" in said and "config.json" in said
    code, out, _ = call("inspect", mixed)
    assert code == 1 and "not whole" in out
