"""Markdown tables: what is in a cell is shown as it is, whatever it holds."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from tensorpress.pictures.markdown import escaped, table
from tensorpress.pictures.report import render

EVIL = [
    "<script>alert(1)</script>", "a | b", "`code`", "[x](javascript:alert(1))", "![x](http://h/x.png)", "https://evil.example/x",
    "www.evil.example", "**bold** _it_ ~~no~~", "# head", "x\n| y | z |\n\n<b>", '" onload="x', "\x1b[31mred\x1b[0m", "&lt;b&gt;", "\\| x",
]  # fmt: skip


@pytest.mark.parametrize("text", EVIL)
def test_a_cell_stays_a_cell(text):
    lines = table(["a", text], [[text, "plain"]]).splitlines()
    assert len(lines) == 3 and lines[1] == "| --- | --- |"
    for line in lines:
        assert len(re.findall(r"(?<!\\)\|", re.sub(r"\\\\", "", line))) == 3
        assert not re.search(r"[<>\x1b]|://|(?<!\\)[`*\[\]()!]", line) and "www." not in line


def test_plain_text_is_left_alone():
    assert escaped("quantize.bits 4, 0.243 of 16 bits") == "quantize.bits 4, 0.243 of 16 bits"
    assert len(escaped("x" * 10_000)) <= 1000


@pytest.mark.parametrize("text", EVIL)
def test_the_report_has_no_markup_of_names_and_errors(text):
    step = {
        "node": text, "step": text, "branch": text, "use": text, "parent": "model", "leaf": True, "error": text, "metrics": {},
        "report": {"layers": [{"layer": text, "action": text}], "summary": {"note": text, text: text}}, "conditions": {text: text}, "digest": text,
    }  # fmt: skip
    page = render({
        "name": text, "verdict": text, "artifacts": [step], "original": {}, "gates": {text: {"branch": text}}, "samples": {text: text},
        "recipe": {"description": text}, "versions": {text: text}, "flow_run_id": text,
    })  # fmt: skip
    tags: list[str] = []
    attributes: list[tuple[str, str | None]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            attributes.extend(attrs)

    Reader().feed(page)
    assert "svg" in tags and not {"script", "a", "img", "iframe", "form", "object"} & set(tags)
    assert not [name for name, _ in attributes if name.startswith("on")]
    assert all(value.startswith("#") for name, value in attributes if name in ("href", "src", "xlink:href"))
