from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pared_bench import DemoResult, Figure, Record, Table
from pared_bench.environment import Environment
from pared_bench.html import write_demo_page, write_results_page
from pared_bench.registry import Method
from pared_bench.runner import DemoOutcome
from pared_bench.store import StoredRecord

RESULT = DemoResult(
    "Title <b>",
    "First `code` & more.\n\nSecond.",
    [Table("Numbers", ["variant", "x"], [["<script>", 1.5]], "a note")],
    [Figure.from_image("Pictures", np.zeros((4, 4, 3), np.uint8), "left, right")],
    {"speed-up": 2.5},
)


class _Links(HTMLParser):
    """Collects every tag, and every address that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]


@pytest.fixture
def page(tmp_path: Path, environment: Environment) -> str:
    outcomes = [
        DemoOutcome(Method("fake", "fake", version="1.2"), 3.21, RESULT, options={"num_steps": 5}),
        DemoOutcome(Method("broken", "broken"), 0.5, error="it needs <more> memory"),
    ]
    return write_demo_page(tmp_path / "index.html", outcomes, environment).read_text(encoding="utf-8")


def test_the_page_needs_nothing_beside_itself(page: str) -> None:
    links = _Links()
    links.feed(page)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in links.addresses)
    assert not {"script", "link", "iframe"} & set(links.tags)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "url(" not in page
    assert "@import" not in page


def test_pictures_are_inside_the_page_byte_for_byte(page: str) -> None:
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(data) == RESULT.figures[0].png


def test_text_is_escaped_and_backticks_become_code(page: str) -> None:
    assert "Title &lt;b&gt;" in page
    assert "<td>&lt;script&gt;</td>" in page
    assert "<p>First <code>code</code> &amp; more.</p><p>Second.</p>" in page


def test_numbers_options_and_environment_are_shown(page: str) -> None:
    assert "<dt>speed-up</dt><dd>2.5</dd>" in page
    assert "<td class=num>1.5</td>" in page
    assert "<code>--num-steps 5</code>" in page
    assert "NVIDIA H200 · 2026-01-02T03:04:05Z · seed 7 · commit 0123456789ab" in page


def test_a_failed_demo_shows_its_error_in_its_place(page: str) -> None:
    assert "<p class=error>it needs &lt;more&gt; memory</p>" in page
    assert '<a href="#broken">' in page


def test_the_page_knows_light_and_dark(page: str) -> None:
    assert "prefers-color-scheme: dark" in page


def test_stored_results_become_a_page_of_tables(tmp_path: Path, environment: Environment) -> None:
    stored = [StoredRecord("dato", Record("dato", "ours", "time", 1.5, "ms"), environment)]
    text = write_results_page(tmp_path / "results.html", stored).read_text(encoding="utf-8")
    assert "<th class=num>time [ms]</th>" in text
    assert "<td class=num>1.5</td>" in text
