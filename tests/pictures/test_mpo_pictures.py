"""The pictures of matrix product operators: sensitivity profile, bond spectra, size-quality curve."""

from __future__ import annotations

import itertools
import json
import math
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import LogNorm, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tensorpress.pictures.curve import SERIES, draw_curve, series, spread
from tensorpress.pictures.graph import svg
from tensorpress.pictures.report import render, step_pictures
from tensorpress.pictures.sensitivity import LABEL, _height, draw_sensitivity, profile_of
from tensorpress.pictures.spectra import BLOCK_COLORS, LINES_SHOWN, bonds_of, draw_spectra

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PROBES = (0.1, 0.3, 0.5, 0.8)
HOSTILE = "<script>alert('x')</script> & $x_{1$ \x1b[31m\x00"


def texts(figure: Figure) -> list[str]:
    root = ET.fromstring(svg(figure).encode())
    return ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]


def report(blocks: int = 8, bonds: int = 1, dense: tuple[int, ...] = ()) -> dict[str, Any]:
    """What a step of a Llama with a measured profile reports, as JSON gives it; the first kind is dense in some blocks."""
    layers, profile = [], {}
    for b, (i, kind) in itertools.product(range(blocks), enumerate(KINDS)):
        path = f"model.layers.{b}.{kind}"
        profile[path] = {share: 0.01 * (1 + i + b / blocks) * ((1 - share) / share) ** 2 for share in PROBES}
        shares = np.exp(-np.arange(32) * (0.1 + 0.02 * i + 0.05 * b / blocks))
        shares /= shares.sum()
        detail: dict[str, Any] = {}
        if not (i == 0 and b in dense):
            detail = {"spectra": [(shares * 0.9**k).tolist() for k in range(bonds)]}
            detail["entropies"] = [3.0 - 0.2 * i + 0.1 * k for k in range(bonds)]
        layers.append({"layer": path, "action": "mpo", "bytes_before": 8, "bytes_after": 4, "detail": detail})
    return json.loads(json.dumps({"layers": layers, "summary": {"kept": 0.5, "profile": profile}}))


def cells(figure: Figure) -> list[Rectangle]:
    """The filled cells of the heat map, without those of its legend."""
    found = [artist for artist in figure.axes[0].get_children() if isinstance(artist, Rectangle)]
    return [cell for cell in found if 0.15 < cell.get_height() < 0.3]


def holds_its_texts(figure: Figure) -> None:
    """Every text is inside the picture, and no two of one pair of axes cover each other."""
    width, height = figure.get_size_inches() * 72
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        for box in boxes:
            assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height
        assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# sensitivity


@pytest.mark.parametrize("loss", [1e-4, 3e-4, 0.02, 1.0, 0.0, 7.0])
def test_sensitivity_scale_is_that_of_the_legend(loss):
    norm = LogNorm(1e-4, 1.0, clip=True)
    assert _height(loss, norm) == pytest.approx(float(norm(max(loss, 1e-4))))


def test_sensitivity_has_a_cell_for_each_layer_and_share():
    figure = draw_sensitivity(report(), "decompose")
    found = texts(figure)
    assert len(cells(figure)) == 8 * len(KINDS) * len(PROBES)
    assert {"decompose", "q_proj", "down_proj", "0", "7", "kept · block", LABEL.format("nats a token")} <= set(found)
    assert "56 layers at 4 shares of their bytes" in found
    assert all(found.count(f"{share} %") == len(KINDS) for share in (10, 30, 50, 80))
    assert "0.81" in found  # q_proj of block 0 at a tenth: 0.01 * 9^2
    holds_its_texts(figure)


def test_sensitivity_goes_from_small_shares_to_large_and_gets_paler():
    figure = draw_sensitivity(report(blocks=1), "one block")
    first = sorted(cells(figure), key=Rectangle.get_y)[: len(PROBES)]
    lightness = [sum(to_rgb(cell.get_facecolor())) for cell in first]
    assert lightness == sorted(lightness) and len(set(lightness)) == len(PROBES)
    places = [text.get_position()[1] for text in figure.axes[0].texts if text.get_text() in ("10 %", "80 %")]
    assert places[0] < places[1]


def test_sensitivity_colours_are_logarithmic():
    profile = {f"model.layers.{b}.fc": {"0.5": 10.0**-b} for b in range(5)}
    reds = [
        cell.get_facecolor()[:3]
        for cell in sorted(cells(draw_sensitivity({"summary": {"profile": profile}}, "x")), key=Rectangle.get_x)
    ]
    steps = [math.dist(a, b) for a, b in itertools.pairwise(reds)]
    assert len(set(reds)) == 5 and min(steps) > 0.1  # each power of ten is a step that can be seen


def test_sensitivity_says_the_same_of_keys_as_numbers_and_as_texts():
    losses = {0.8: 0.01, 0.1: 0.5}
    number = {"summary": {"profile": {"h.0.fc": losses}}}
    text = {"summary": {"profile": {"h.0.fc": {str(share): loss for share, loss in losses.items()}}}}
    assert profile_of(number) == profile_of(text) == {"fc": {0.1: {0: 0.5}, 0.8: {0: 0.01}}}
    assert svg(draw_sensitivity(number, "x")) == svg(draw_sensitivity(text, "x"))


def test_sensitivity_marks_what_is_no_number_and_takes_nothing_as_least():
    losses = {"0.1": float("nan"), "0.3": None, "0.5": "much", "0.8": 0.0, "0.9": 0.2, "nan": 1.0, "2": 1.0, "x": 1.0}
    figure = draw_sensitivity({"summary": {"profile": {HOSTILE: losses, "model.layers.0.fc": 3}}}, HOSTILE)
    found = cells(figure)
    assert len(found) == 5
    assert len([cell for cell in found if cell.get_hatch()]) == 3
    filled = [to_hex(cell.get_facecolor()) for cell in found if not cell.get_hatch()]
    assert len(set(filled)) == 2
    assert "0" in texts(figure) and "0.20" in texts(figure)
    assert "1 layer at 5 shares of their bytes · hatched: no number" in texts(figure)
    assert not any(c in text for text in texts(figure) for c in "\x1b\x00")


@pytest.mark.parametrize("losses", [{"0.5": 0.0}, {"0.5": 1e-12}, {"0.5": 1e300, "0.1": 1e-300}, {"0.5": -1.0}])
def test_sensitivity_of_one_layer(losses):
    figure = draw_sensitivity({"summary": {"profile": {"model.layers.3.mlp.up_proj": losses}}}, "one")
    assert len(cells(figure)) == len(losses)
    assert {"up_proj", "3", "50 %"} <= set(texts(figure))
    assert f"1 layer at {len(losses)} share{'s' * (len(losses) > 1)} of their bytes" in texts(figure)
    holds_its_texts(figure)


@pytest.mark.parametrize(
    "broken", [{}, {"summary": None}, {"summary": {"profile": [1, 2]}}, {"summary": {"profile": {"a": {}}}}]
)
def test_sensitivity_of_nothing(broken):
    figure = draw_sensitivity(broken, "nothing")
    assert "no sensitivity was measured" in texts(figure) and not cells(figure)


def test_sensitivity_of_200_blocks_fits():
    figure = draw_sensitivity(report(200), "deep")
    assert len(cells(figure)) == 200 * len(KINDS) * len(PROBES)
    assert figure.get_figwidth() < 13
    assert "0" in texts(figure) and "0.81" not in texts(figure)  # no room for figures
    holds_its_texts(figure)


def test_sensitivity_says_that_it_leaves_kinds_out():
    profile = {f"model.layers.0.experts.fc{k}.w{k}": {"0.5": 0.1} for k in range(60)}
    figure = draw_sensitivity({"summary": {"profile": profile}}, "experts")
    assert len(cells(figure)) == 48
    assert "60 layers at 1 share of their bytes · 12 more kinds not shown" in texts(figure)


# spectra


def test_spectra_has_a_panel_for_each_kind_and_a_line_for_each_block():
    figure = draw_spectra(report(dense=(0, 3)), "decompose")
    page, *panels, entropies = figure.axes
    assert [len(axes.lines) for axes in panels] == [6] + [8] * 6  # q_proj is dense in two blocks
    assert all(axes.get_yscale() == "log" for axes in panels)
    heads = [text.get_text() for text in page.texts if text.get_weight() == "bold"]
    assert heads[1:8] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(entropies.lines) == len(KINDS)
    found = texts(figure)
    assert {"decompose", "block 0 to 7", "entanglement entropy by block", "nats", "share of the squared norm"} <= set(
        found
    )
    assert found.count("q_proj") == 2  # over its panel and at the end of its line
    holds_its_texts(figure)


def test_spectra_draws_the_values():
    figure = draw_spectra(report(2), "values")
    expected = report(2)["layers"][0]["detail"]["spectra"][0]
    assert figure.axes[1].lines[0].get_ydata() == pytest.approx(expected)
    assert list(figure.axes[1].lines[0].get_xdata()) == list(range(1, 33))
    assert figure.axes[-1].lines[2].get_ydata() == pytest.approx([2.6, 2.6])


def test_spectra_colours_go_from_the_first_block_to_the_last():
    colors = [line.get_color() for line in draw_spectra(report(), "x").axes[1].lines]
    assert len(set(colors)) == 8
    assert (colors[0], colors[-1]) == (to_hex(BLOCK_COLORS(0.0)), to_hex(BLOCK_COLORS(1.0)))


def test_spectra_takes_the_middle_bond_and_says_so():
    bond = bonds_of(report(bonds=3))["mlp.up_proj"][0]
    assert (bond.index, bond.bonds, bond.entropy) == (1, 3, pytest.approx(2.1))
    figure = draw_spectra(report(bonds=3), "three")
    assert texts(figure).count("bond 2 of 3") == len(KINDS)
    assert not any("bond 1" in text for text in texts(draw_spectra(report(), "one")))
    holds_its_texts(figure)


def test_spectra_leaves_gaps_where_a_layer_is_dense():
    line = draw_spectra(report(dense=(0, 3)), "x").axes[-1].lines[0]
    assert [i for i, value in enumerate(line.get_ydata()) if np.isnan(value)] == [0, 3]


@pytest.mark.parametrize("blocks", [1, 80, 200])
def test_spectra_of_few_and_many_blocks(blocks):
    figure = draw_spectra(report(blocks), "deep")
    assert all(len(axes.lines) == min(blocks, LINES_SHOWN) for axes in figure.axes[1:-1])
    assert len(figure.axes[-1].lines[0].get_ydata()) == blocks
    said = {1: "block 0", 80: "block 0 to 79, 40 of them drawn", 200: "block 0 to 199, 40 of them drawn"}
    assert said[blocks] in texts(figure)
    holds_its_texts(figure)


@pytest.mark.parametrize(
    "layers",
    [
        None, "text", [], [None, 3], [{"layer": "h.0.fc"}], [{"layer": "h.0.fc", "detail": "x"}],
        [{"layer": "h.0.fc", "detail": {"spectra": []}}], [{"layer": "h.0.fc", "detail": {"spectra": ["x"]}}],
        [{"layer": "h.0.fc", "detail": {"spectra": [[float("nan"), 0.0, -1.0, "x", None, True]]}}],
    ],
)  # fmt: skip
def test_spectra_of_nothing(layers):
    figure = draw_spectra({"layers": layers}, "nothing")
    assert "no layer has a bond spectrum" in texts(figure) and len(figure.axes) == 1


def test_spectra_without_entropies_and_with_odd_values():
    details = [
        {"spectra": [[0.9, float("nan"), 0.1, 0.0, "x"]], "entropies": [float("nan")]},
        {"spectra": [[5.0, 3.0]]},
        {"spectra": [[1.0]], "entropies": "none"},
    ]
    layers = [{"layer": HOSTILE, "detail": details[0]}] + [{"detail": detail} for detail in details[1:]]
    figure = draw_spectra({"layers": layers}, HOSTILE)
    assert [list(line.get_ydata()) for axes in figure.axes[1:] for line in axes.lines] == [[0.9, 0.1], [1.0]]
    assert "no entanglement entropy reported" in texts(figure)
    assert figure.axes[-1].lines[0].get_marker() == "o"  # a single value is a point, not an invisible line


# curve


def rows(**forms: dict[float, float]) -> list[dict[str, Any]]:
    return [{"name": n, "bytes": x, "ratio": y} for n, points in forms.items() for x, y in points.items()]


FORMS = rows(
    low_rank={0.8: 1.006, 0.2: 1.4, 0.5: 1.05}, measured={0.2: 1.3, 0.5: 1.04, 0.8: 1.005}, tt_svd={0.3: 5.0, 0.8: 1.2}
)
GPTQ = [
    {"name": f"GPTQ {bits} bits", "bytes": size, "ratio": ratio}
    for bits, size, ratio in ((8, 0.52, 1.0004), (4, 0.27, 1.012), (3, 0.21, 1.06), (2, 0.145, 1.9))
]


def test_curve_joins_the_points_of_a_form_in_order_of_bytes():
    figure = draw_curve(FORMS, GPTQ, "curve")
    axes = figure.axes[1]
    lines = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert set(lines) == {"low_rank", "measured", "tt_svd"}
    assert list(lines["low_rank"].get_xdata()) == [0.2, 0.5, 0.8]
    assert lines["low_rank"].get_ydata() == pytest.approx([0.4, 0.05, 0.006])
    assert axes.get_yscale() == "log"
    assert len({line.get_color() for line in lines.values()}) == 3
    assert len([line for line in axes.lines if line.get_marker() == "o"]) == len(FORMS)
    found = texts(figure)
    assert {"curve", "low_rank", "measured", "tt_svd", "GPTQ 8 bits", "GPTQ 2 bits"} <= set(found)
    assert "perplexity ratio to the original − 1" in found


def test_curve_draws_a_dashed_line_and_a_mark_for_each_reference():
    axes = draw_curve(FORMS, GPTQ, "curve").axes[1]
    marks = [line for line in axes.lines if line.get_marker() == "D"]
    assert [line.get_xdata()[0] for line in marks] == [0.52, 0.27, 0.21, 0.145]
    across = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert across == pytest.approx([0.0004, 0.012, 0.06, 0.9])


@pytest.mark.parametrize("forms", [1, 6, 12])
@pytest.mark.parametrize("same", [True, False])
def test_curve_labels_cover_each_other_nowhere(forms, same):
    """Where all lines end at one place as well."""
    made = [{"name": f"form number {k}", "bytes": s, "ratio": 1 + (1 if same else k + 1) * 0.1 / s**3}
            for k in range(forms) for s in (0.2, 0.5, 0.8)]  # fmt: skip
    close = [{"name": f"GPTQ {k}", "bytes": 0.3, "ratio": 1.05 + 0.001 * k} for k in range(5)]
    figure = draw_curve(made, close, "crowd")
    assert len(figure.axes[1].texts) == forms
    holds_its_texts(figure)
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts if text.get_text()]
    assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_curve_says_what_is_no_worse_than_the_original():
    better = [{**GPTQ[0], "ratio": 0.999}, *GPTQ[1:]]
    figure = draw_curve([*FORMS, {"name": "free", "bytes": 0.9, "ratio": 1.0}], better, "better")
    hollow = [line for line in figure.axes[1].lines if line.get_marker() == "v"]
    bottom = figure.axes[1].get_ylim()[0]
    assert [line.get_ydata()[0] for line in hollow] == [bottom, bottom]
    assert "▽ no worse than the original: free, GPTQ 8 bits" in texts(figure)
    assert "GPTQ 8 bits" in texts(figure)


def test_curve_of_growth_that_is_rounding():
    figure = draw_curve(rows(low={0.5: 1.1, 0.9: 1 + 3e-16}), GPTQ, "rounding")
    assert figure.axes[1].get_ylim()[0] > 1e-5  # no ten powers of ten for it
    assert "▽ no worse than the original: low" in texts(figure)


def test_curve_names_what_it_cannot_place():
    bad: list[Any] = [
        {"name": "lost", "bytes": 0.5, "ratio": float("nan")}, {"name": "text", "bytes": "half", "ratio": 1.1},
        {"name": "empty"}, {"name": "zero", "bytes": 0.0, "ratio": 1.1}, "row", {"bytes": 1, "ratio": None},
    ]  # fmt: skip
    figure = draw_curve([*FORMS, *bad], [], HOSTILE)
    assert "points not shown, not measured: lost, text, empty, zero, ?" in texts(figure)
    assert len([line for line in figure.axes[1].lines if line.get_marker() == "o"]) == len(FORMS)


def test_curve_of_nothing_of_one_and_of_ruin():
    assert "no form has both a size and a quality" in texts(draw_curve([], [], "x"))
    assert "no form has both a size and a quality" in texts(draw_curve([{"name": "a"}], "abc", "x"))  # type: ignore[arg-type]
    one = draw_curve(rows(only={0.5: 1.1}), [], "one")
    assert "only" in texts(one) and len(one.axes[1].lines) == 2
    ruin = draw_curve(rows(ruin={0.1: math.exp(700), 0.5: 1.1}), GPTQ, "ruin")  # the most that a perplexity can be
    low, high = ruin.axes[1].get_ylim()
    assert low < 0.0004 and high < 10  # the others keep their room
    assert [line.get_ydata()[0] for line in ruin.axes[1].lines if line.get_marker() == "^"] == [high]
    assert "△ perplexity grew more than 10,000 times: ruin" in texts(ruin)


def test_spread():
    assert spread([], 10, 0, 100) == []
    assert spread([50.0, 10.0], 10, 0, 100) == [50, 10]
    assert spread([50.0, 50.0, 50.0], 10, 0, 100) == [40, 50, 60]
    assert spread([99.0, 100.0], 10, 0, 100) == [90, 100]
    assert spread([0.0] * 11, 50, 0, 100) == pytest.approx(list(range(0, 101, 10)))


# colours, and where the pictures stand


def contrast(a: str, b: str) -> float:
    def light(color: str) -> float:
        parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))

    bright, dark = sorted((light(a), light(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("paper", ["#ffffff", "#15181d"])
def test_lines_stand_out_on_light_and_dark_paper(paper):
    for color in (*SERIES, *(to_hex(BLOCK_COLORS(i / 20)) for i in range(21))):
        assert contrast(color, paper) >= 3, color


def test_many_lines_differ_in_colour_or_style():
    assert len({series(i) for i in range(24)}) == 24


def test_pictures_of_a_step():
    assert list(step_pictures(report(), "a")) == ["layers", "sensitivity", "spectra"]
    plain = report()
    del plain["summary"]["profile"]
    assert list(step_pictures(plain, "a")) == ["layers", "spectra"]
    for layer in plain["layers"]:
        layer["detail"] = {}
    assert list(step_pictures(plain, "a")) == ["layers"]
    assert step_pictures({"layers": [], "summary": {}}, "a") == {}


def test_report_page_shows_them_once(quickstart):
    before = render(quickstart).count("<svg")
    quickstart["artifacts"][5]["report"] = report()
    page = render(quickstart)
    assert page.count("<svg") == before + 2
    assert "decompose · mpo: sensitivity of each layer" in page and "decompose · mpo: bond spectra" in page
    assert "<dt>kept</dt>" in page and "<dt>profile</dt>" not in page  # drawn, not told
    assert "http" not in page
    quickstart["artifacts"][5]["report"]["summary"]["profile"] = "none"
    assert "<dt>profile</dt>" in render(quickstart)
