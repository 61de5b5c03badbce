"""The model card."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tensorpress.pictures.card import render_card

LINK = {
    "step": "quantize",
    "use": "gptq",
    "config": {"use": "gptq", "bits": 4},
    "digest": "0123456789abcdef",
    "seconds": 12.2,
}


def card(**more: Any) -> str:
    info = {"title": "quickstart", "base": "demo", "chain": [LINK],
            "metrics": {"size_ratio": 0.33, "perplexity_ratio": 1.01},
            "recipe_yaml": "name: quickstart\n", "how_to_load": "tensorpress", "licence": "Apache-2.0"}  # fmt: skip
    return render_card({**info, **more})


def matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))


def test_card():
    text = card()
    assert matter(text) == {
        "library_name": "tensorpress", "license": "apache-2.0",
        "tags": ["tensorpress", "compression", "gptq"],
    }  # fmt: skip
    assert "| quantize | gptq | bits=4 | 12 s | 0123456789ab |" in text
    assert "| size ratio | 0.330 |" in text
    assert "It has 0.330 of the size of the 16-bit original, at 1.010 times its perplexity." in text
    assert "import tensorpress" in text
    assert "```yaml\nname: quickstart\n```" in text


def test_plain_card_needs_no_tensorpress():
    assert "import tensorpress" not in card(how_to_load="plain")
    assert "AutoModel.from_pretrained" in card(kind="encoder")


def test_folder_of_this_machine_stays_private():
    text = card(base="/home/someone/secret/models/llama")
    assert "someone" not in text
    assert "base_model" not in matter(text)
    assert "of llama," in text


@pytest.mark.parametrize(
    "name", ["a\n---\nevil: yes", "<script>x</script>", "a | b", "# `x` *y* [z](q)", "\x00\x1b[31m", "x: y", ""]
)
def test_names_do_not_break_the_card(name):
    link = {"step": name, "use": name, "config": {name: name}, "digest": name, "seconds": None}
    text = card(title=name, base=name, chain=[link], metrics={name or "m": 1.0}, licence=name)
    found = matter(text)
    assert set(found) <= {"library_name", "base_model", "license", "license_name", "tags"}
    assert text.count("\n---\n") == 1
    assert "<script" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {6, 3}


def test_recipe_with_backticks_stays_in_its_block():
    text = card(recipe_yaml="description: |\n  ```\n  # no heading\n  ```\n")
    assert "````yaml" in text


def test_card_of_next_to_nothing():
    text = render_card({})
    assert "No step has changed the model." in text
    assert "Nothing was measured." in text
