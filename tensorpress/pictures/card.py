"""The model card of an artifact: what it is, how it was made, what was measured, how it is opened."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tensorpress.pictures.tables import NOTHING, clean, finite, human_seconds, present, write

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def render_card(info: Mapping[str, Any]) -> str:
    """Markdown with YAML front matter.

    `info`: `title`, `base`, `chain` (a list of `step`, `use`, `config`, `digest`, `seconds`), `metrics`, `recipe_yaml`,
    `how_to_load` ("plain" or "tensorpress"), `licence`; and `kind` ("causal" or "encoder"), causal where it is missing.
    A base that is a folder of this machine is named by its last part alone.
    """
    parts = [
        _front_matter(info),
        f"# {_inline(info.get('title') or 'A compressed model')}",
        _what(info),
        "## How it was made",
        _chain(info.get("chain") or []),
        "## Measured",
        _metrics(info.get("metrics") or {}),
        "## How to load it",
        _loading(info),
    ]
    if info.get("recipe_yaml"):
        parts += ["## Recipe", _fenced(str(info["recipe_yaml"]), "yaml")]
    return "\n\n".join(parts) + "\n"


def _base(info: Mapping[str, Any]) -> str:
    base = clean(info.get("base") or "", 200)
    local = base.startswith(("/", "~", ".")) or "\\" in base
    return re.split(r"[/\\]", base.rstrip("/\\"))[-1] if local else base


def _front_matter(info: Mapping[str, Any]) -> str:
    methods = [clean(link.get("use"), 40) for link in info.get("chain") or [] if link.get("use")]
    matter: dict[str, Any] = {"library_name": "tensorpress"}
    base = clean(info.get("base") or "", 200)
    if HUB_ID.fullmatch(base):
        matter["base_model"] = base
    if info.get("licence"):
        licence = re.sub(r"[<>]", "", clean(info["licence"], 80))
        known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence.lower())
        matter |= {"license": licence.lower()} if known else {"license": "other", "license_name": licence}
    tags = [re.sub(r"[^A-Za-z0-9._-]+", "-", method).strip("-") for method in methods]
    matter["tags"] = list(dict.fromkeys(["tensorpress", "compression", *filter(None, tags)]))
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=10_000)}---"


def _what(info: Mapping[str, Any]) -> str:
    base, metrics = _base(info), info.get("metrics") or {}
    methods = list(dict.fromkeys(_inline(link["use"]) for link in info.get("chain") or [] if link.get("use")))
    named = f" of {_inline(base)}" if base else ""
    words = f"A compressed version{named}"
    words += f", made with {', '.join(methods)}" if methods else ""
    words += " by `tensorpress`."
    if finite(metrics.get("size_ratio")):
        words += f" It has {write('size_ratio', metrics['size_ratio'])} of the size of the 16-bit original"
        if finite(metrics.get("perplexity_ratio")):
            words += f", at {write('perplexity_ratio', metrics['perplexity_ratio'])} times its perplexity"
        words += "."
    return words


def _chain(chain: Sequence[Mapping[str, Any]]) -> str:
    if not chain:
        return "No step has changed the model."
    rows = []
    for link in chain:
        config = link.get("config") or {}
        settings = ", ".join(f"{key}={value}" for key, value in config.items() if key != "use" and value is not None)
        seconds = human_seconds(link["seconds"]) if finite(link.get("seconds")) else NOTHING
        digest = clean(link.get("digest") or "")[:12]
        rows.append([link.get("step"), link.get("use"), settings or NOTHING, seconds, digest or NOTHING])
    return _table(["step", "method", "settings", "time", "digest"], rows, "lllrl")


def _metrics(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return "Nothing was measured."
    rows = [[shown.label, write(shown.key, metrics[shown.key])] for shown in present([metrics])]
    note = "Ratios are to the 16-bit original, measured by the same code on the same text."
    return f"{_table(['metric', 'value'], rows, 'lr')}\n\n{note}"


def _loading(info: Mapping[str, Any]) -> str:
    auto = "AutoModel" if info.get("kind") == "encoder" else "AutoModelForCausalLM"
    plain = info.get("how_to_load") == "plain"
    lines = [
        *([] if plain else ["import tensorpress  # lets transformers open this model"]),
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        f"model = {auto}.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    note = (
        "The weights are in the standard GPTQ layout: this model opens without tensorpress, "
        "in transformers (with a GPTQ backend installed) and in whatever else reads that layout. "
        "With tensorpress installed, `tensorpress.load(folder)` opens it with tensorpress's own layers."
        if plain
        else "`tensorpress.load(folder)` does the same, and takes the kernels that are asked for."
    )
    return f"{_fenced(chr(10).join(lines), 'python')}\n\n{note}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]], align: str) -> str:
    rule = ["---:" if side == "r" else "---" for side in align]
    lines = [heads, rule, *([_inline(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _inline(text: Any) -> str:
    """One line that Markdown shows as it is: no HTML, links, emphasis or table cells come out of a name."""
    line = clean(NOTHING if text is None else text, 300)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    runs = [len(run) for run in re.findall(r"`+", text)]
    fence = "`" * max(3, 1 + max(runs, default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
