"""The graph, the front and the layer map."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest
from matplotlib.figure import Figure

from tensorpress.pictures.front import draw_front, pareto, points_of, quality_of
from tensorpress.pictures.graph import draw_graph, leaves_of, save, shorten, svg, text_width
from tensorpress.pictures.layers import _abbreviated, draw_layer_map, place

DOCUMENTS = ("quickstart", "failed", "hostile", "thirty", "single")


def texts(figure: Figure) -> list[str]:
    """All texts of the figure, read from its SVG (which must be well-formed)."""
    root = ET.fromstring(svg(figure).encode())
    return ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("draw", [draw_graph, draw_front])
def test_draws_any_document(name, draw, request):
    assert texts(draw(request.getfixturevalue(name)))


def test_draws_an_empty_run():
    assert "model" in texts(draw_graph({}))
    assert texts(draw_front({}))
    assert "no layers reported" in texts(draw_layer_map({}, "nothing"))


def test_graph_says_the_figures(quickstart):
    found = texts(draw_graph(quickstart))
    for text in (
        "four_bit",
        "gptq · bits=4",
        "4.85 MB",
        "×0.330",
        "ppl ×1.010",
        "12 s · cached",
        "14.7 MB",
        "3 min 02 s",
    ):
        assert text in found
    assert found.count("gptq") == 2


def test_graph_says_what_failed(failed):
    found = texts(draw_graph(failed))
    assert found.count("failed") == 2
    assert any(text.startswith("OutOfMemory: <b>no room") for text in found)


@pytest.mark.parametrize("name", ["quickstart", "thirty"])
def test_nodes_do_not_overlap_and_hold_their_texts(name, request):
    figure = draw_graph(request.getfixturevalue(name))
    axes = figure.axes[0]
    boxes = [patch.get_window_extent() for patch in axes.patches if type(patch).__name__ == "FancyBboxPatch"]
    assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for text in axes.texts:
        extent = text.get_window_extent()
        assert any(
            b.x0 <= extent.x0 and extent.x1 <= b.x1 and b.y0 <= extent.y0 and extent.y1 <= b.y1 for b in boxes
        ), text
    lines = [text.get_window_extent() for text in axes.texts]
    assert all(not a.overlaps(b) for i, a in enumerate(lines) for b in lines[:i])


def test_parents_stand_amid_their_children(thirty):
    figure = draw_graph(thirty)
    assert len([p for p in figure.axes[0].patches if type(p).__name__ == "FancyBboxPatch"]) == 41


def test_a_cycle_or_an_unknown_parent_hangs_on_the_model():
    nodes = [{"node": "a", "step": "a", "parent": "b"}, {"node": "b", "step": "b", "parent": "a"}]
    nodes.append({"node": "c", "step": "c", "parent": "gone"})
    found = texts(draw_graph({"artifacts": nodes}))
    assert {"a", "b", "c"} <= set(found)


def test_leaves(quickstart):
    assert [leaf["step"] for leaf in leaves_of(quickstart)] == ["four_bit", "three_bit", "quantize", "quantize2"]


def test_pareto():
    assert pareto([(1, 1), (0.3, 1.2), (0.4, 1.3), (0.2, 2), (0.3, 1.1)]) == [3, 4, 0]
    assert pareto([]) == []


def test_front_names_branches_paths_and_gates(quickstart):
    found = texts(draw_front(quickstart))
    for text in ("original", "four_bit bits=4", "quantize", "prune → heal", "decompose → prune2 → heal2"):
        assert text in found
    assert "gate: size ≤ 0.35" in found
    assert "gate: perplexity ratio ≤ 1.25" in found


@pytest.mark.parametrize("name", ["quickstart", "thirty"])
def test_front_labels_cover_neither_labels_nor_points(name, request):
    figure = draw_front(request.getfixturevalue(name))
    axes = figure.axes[0]
    labels = [text.get_window_extent() for text in axes.texts if not text.get_text().startswith("gate")]
    assert all(not a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])
    points = [line for line in axes.lines if line.get_marker() == "o"]
    for point in points:
        x, y = axes.transData.transform((point.get_xdata()[0], point.get_ydata()[0]))
        assert not any(label.x0 < x < label.x1 and label.y0 < y < label.y1 for label in labels)


def test_front_of_many_numbers_its_points(thirty):
    found = texts(draw_front(thirty))
    assert "30" in found
    assert "quantize bits=4 prune.remove=0.0" in found


def test_front_takes_a_logarithm_of_a_wide_range(quickstart):
    quickstart["artifacts"][1]["metrics"]["perplexity_ratio"] = 40.0
    assert draw_front(quickstart).axes[0].get_yscale() == "log"


@pytest.mark.parametrize(
    ("metric", "value", "scale", "y"),
    [
        ("sts_spearman", 0.8, "linear", 0.2),
        ("embedding_cosine", 0.97, "linear", 0.03),
        ("kl_divergence", 0.2, "linear", 0.2),
    ],
)
def test_front_without_perplexity(metric, value, scale, y):
    leaf = {"node": "a", "step": "a", "parent": "model", "metrics": {"size_ratio": 0.3, metric: value}}
    run = {"original": {"sts_spearman": 0.9}, "artifacts": [leaf]}
    points, missing = points_of(run, quality_of(run))
    assert points[-1].y == pytest.approx(y)
    assert points[0].name == "original"
    assert not missing
    assert draw_front(run).axes[0].get_yscale() == scale


def test_front_takes_symlog_where_the_original_is_zero():
    leaves = [
        {"node": n, "step": n, "parent": "model", "metrics": {"size_ratio": 0.3, "kl_divergence": kl}}
        for n, kl in (("a", 0.01), ("b", 3.0))
    ]
    assert draw_front({"artifacts": leaves}).axes[0].get_yscale() == "symlog"


def test_front_names_what_it_cannot_place(quickstart):
    quickstart["artifacts"][0]["metrics"]["perplexity_ratio"] = float("inf")
    assert "not shown, not measured: four_bit bits=4" in texts(draw_front(quickstart))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("transformer.h.0.attn.c_attn", (0, "attn.c_attn")),
        ("encoder.layer.11.attention.self.query", (11, "attention.self.query")),
        ("model.layers.2.mlp.experts.7.down_proj", (2, "mlp.experts.7.down_proj")),
        ("block 3 attention", (3, "attention")),
        ("block 12 feed_forward", (12, "feed_forward")),
        ("lm_head", (-1, "lm_head")),
        ("", (-1, "?")),
    ],
)
def test_place_of_a_layer(layer, expected):
    assert place(layer) == expected


def test_layer_map_says_kinds_blocks_and_actions(quickstart):
    found = texts(draw_layer_map(quickstart["artifacts"][5]["report"], "decompose"))
    assert {"q_proj", "down_proj", "0", "7", "mpo", "relative error after", "56 mpo"} <= set(found)
    found = texts(draw_layer_map(quickstart["artifacts"][2]["report"], "prune"))
    assert {"attention", "feed_forward", "removed", "dense", "share of bytes kept", "14 dense · 2 removed"} <= set(
        found
    )


def test_layer_map_of_a_deep_model_abbreviates():
    rows: list[dict[str, Any]] = [
        {
            "layer": f"model.layers.{b}.mlp.up_proj",
            "action": "removed" if b == 5 else "gptq 4",
            "error_after": 10.0 ** (b % 5),
        }
        for b in range(64)
    ]
    found = texts(draw_layer_map({"layers": [*rows, {"layer": "lm_head", "action": "dense"}]}, "deep"))
    assert "×" in found
    assert "relative error after (logarithmic)" in found
    assert "63 gptq 4 · 1 removed · 1 dense" in found


@pytest.mark.parametrize(
    ("action", "room", "expected"),
    [
        ("mpo low rank", 80, "mpo low rank"),
        ("mpo low rank", 30, "low rank"),
        ("mpo balanced 2 sites", 10, "b"),
        ("mpo balanced 2 sites", 32, "balanced"),
        ("gptq 4 bits", 12, "4"),
        ("dense", 9, "d"),
    ],
)
def test_actions_that_do_not_fit_say_what_tells_them_apart(action, room, expected):
    assert _abbreviated(action, room) == expected


def test_same_figure_same_svg(quickstart):
    first, second = svg(draw_graph(quickstart)), svg(draw_graph(quickstart))
    assert first == second
    assert "<metadata>" not in first


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_save(ending, tmp_path, single):
    path = save(draw_graph(single), tmp_path / f"graph.{ending}")
    again = save(draw_graph(single), tmp_path / f"again.{ending}")
    assert path.stat().st_size > 1000
    assert path.read_bytes() == again.read_bytes()


def test_shorten_fits():
    assert shorten("short", 100, 8) == "short"
    cut = shorten("a very long name of a step that nobody reads to its end", 60, 8)
    assert cut.endswith("…")
    assert text_width(cut, 8) <= 60
