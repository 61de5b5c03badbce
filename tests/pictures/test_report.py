"""The HTML page: whole, escaped, and asking nothing of the network."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from tensorpress.pictures.report import render

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and ids, and checks that elements are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", ["quickstart", "failed", "hostile", "thirty", "single"])
def test_page_is_whole_and_self_contained(name, request):
    html = render(request.getfixturevalue(name))
    page = Page(html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "img" not in page.tags
    assert "http" not in html
    assert "@import" not in html
    assert not [key for key, _ in page.attributes if key.startswith("on") or key == "src"]
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:url\(#|href="#)([^)"]+)', html):
        assert target in ids


def test_page_escapes(hostile):
    html = render(hostile)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "\x00" not in html
    assert "<i>" not in html
    assert "[31m" not in html.partition("Recipe</h2>")[0]


def test_page_says_what_happened(quickstart):
    html = render(quickstart)
    text = Page(html).text
    assert "ACCEPT" in text
    assert (
        "4 of 4 branches hold every gate. The smallest of them, quantize2, has 0.243 of the original’s size (3.57 MB)"
        in text
    )
    for part in (
        "perplexity ratio",
        "≤ 1.250",
        "holds",
        "demo (test split)",
        "51,200",
        "cpu int4 (C++)",
        "def add(a, b):",
    ):
        assert part in text
    assert "use: finercut" in text
    assert "2.11.0" in text
    assert "56 layers as a table" in text
    assert "behind three_bit bits=3" in text  # quantize: larger and worse
    assert html.count("<svg") == 2 + 6
    assert "prefers-color-scheme: dark" in html
    assert "var(--ink)" in html


def test_page_of_a_failed_run(failed):
    text = Page(render(failed)).text
    assert "heal2 failed, and 1 more did not finish." in text
    assert "OutOfMemory: <b>no room</b> for the teacher" in text
    assert render(failed).count("<details open>") == 2


def test_same_run_same_page(quickstart):
    assert render(quickstart) == render(quickstart)


@pytest.mark.parametrize("name", ["single", "hostile"])
def test_page_without_measurements_has_no_front(name, request):
    assert "Size and quality" not in render(request.getfixturevalue(name))


def test_empty_run():
    Page(render({}))
