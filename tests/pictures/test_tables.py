"""Numbers, rich tables and trees."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from tensorpress.pictures.tables import (
    clean,
    compare_table,
    human_bytes,
    human_count,
    human_seconds,
    label,
    metrics_table,
    plan_tree,
    write,
)


def shown(thing: Any) -> str:
    console = Console(width=220)
    with console.capture() as capture:
        console.print(thing)
    return capture.get()


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (human_bytes, 512, "512 B"), (human_bytes, 14.7e6, "14.7 MB"), (human_bytes, 999_900, "1.00 MB"),
        (human_bytes, 3.123e9, "3.12 GB"), (human_count, 7_340_000, "7.34 M"), (human_count, 12, "12"),
        (human_seconds, 0.0123, "12 ms"), (human_seconds, 1.26, "1.3 s"), (human_seconds, 9.96, "9.96 s"),
        (human_seconds, 41, "41 s"), (human_seconds, 99.7, "1 min 40 s"), (human_seconds, 182, "3 min 02 s"),
        (human_seconds, 7500, "2 h 05 min"), (human_seconds, 0, "0 ms"),
    ],
)  # fmt: skip
def test_numbers(form, value, text):
    assert form(value) == text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("perplexity", 3.8421, "3.842"), ("perplexity", 12345.6, "12,346"), ("perplexity_ratio", 1.0123, "1.012"),
        ("top1_agreement", 0.973, "97.3 %"), ("bytes", 4.85e6, "4.85 MB"),
        ("decode_tokens_per_second", 1234.5, "1,234"),
        ("decode_tokens_per_second", 45.67, "45.7"), ("kl_divergence", 0.0, "0"), ("kl_divergence", 3e-7, "3e-07"),
        ("perplexity", float("inf"), "∞"), ("perplexity", float("nan"), "nan"), ("perplexity", None, "–"),
        ("my_metric", 2.5, "2.500"), ("my_metric", "text", "text"),
    ],
)  # fmt: skip
def test_metrics_as_text(key, value, text):
    assert write(key, value) == text


def test_clean():
    assert clean("a\n\tb\x00\x1b[31mc\ud800") == "a bc"
    assert clean("abcdef", 4) == "abc…"


def test_label():
    artifact = {"step": "quantize", "branch": "prune.remove=0.1, quantize.bits=4"}
    assert label(artifact) == "quantize · bits=4 · prune.remove=0.1"


def test_metrics_table(quickstart):
    table = metrics_table(quickstart)
    text = shown(table)
    lines = text.splitlines()
    assert lines.index(next(x for x in lines if x.startswith("original"))) < lines.index(
        next(x for x in lines if x.startswith("four_bit · bits=4"))
    )
    assert "14.7 MB" in text
    assert "STS" not in text
    assert "heal" not in text  # it has no metrics
    assert "bits per byte" not in text
    assert "bits per byte" in shown(metrics_table(quickstart, every=True))
    assert any("[bold green]1.010[/]" in str(cell) for column in table.columns for cell in column._cells)


@pytest.mark.parametrize("name", ["hostile", "single", "thirty"])
def test_tables_take_names_literally(name, request):
    run = request.getfixturevalue(name)
    nodes = [{**a, "note": "[bold]note[/nonsense]"} for a in run["artifacts"]]
    for thing in (metrics_table(run), plan_tree(nodes, root="[/]")):
        shown(thing)
    if name == "hostile":
        assert "<script>" in shown(metrics_table(run))
        assert "[red]" in shown(plan_tree(nodes))


def test_plan_tree(quickstart):
    nodes = [{**a, "note": "about 40 s"} for a in quickstart["artifacts"]]
    text = shown(plan_tree(nodes[::-1]))
    assert text.startswith("model\n")
    assert "four_bit  gptq  bits=4  cached  about 40 s" in text
    assert "│   └── heal  distill" in text or "    └── heal  distill" in text
    assert "decompose" in shown(plan_tree(nodes))


def test_plan_tree_survives_a_cycle():
    nodes = [{"node": "a", "step": "a", "parent": "b"}, {"node": "b", "step": "b", "parent": "a"}]
    assert "a" in shown(plan_tree(nodes))


def test_compare_table_shows_the_parameters_that_differ():
    runs = [
        {"name": "one", "branch": "q", "params": {"bits": 4, "seed": 0}, "metrics": {"perplexity": 4.0}},
        {
            "name": "two",
            "branch": "[x]",
            "params": {"bits": 3, "seed": 0},
            "metrics": {"perplexity": 4.4, "bytes": 1e6},
        },
    ]
    text = shown(compare_table(runs))
    assert "bits" in text
    assert "seed" not in text
    assert "1.00 MB" in text
    assert "[x]" in text
    shown(compare_table([]))
