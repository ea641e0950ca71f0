from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from pared_bench import DemoResult, Figure, Record, Table
from pared_bench.charts import chart_svg
from pared_bench.environment import Environment
from pared_bench.html import write_demo_page, write_results_page
from pared_bench.registry import Method
from pared_bench.runner import DemoOutcome
from pared_bench.store import StoredRecord
from pared_bench.tables import Bar, Chart

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


def test_bars_are_as_long_as_their_numbers_and_show_the_spread() -> None:
    chart = Chart(
        "time [ms] <x>", [Bar("base & co", 2.0, None), Bar("ours", 1.0, (0.5, 2.0)), Bar("worse", -1.0, None)]
    )
    drawing = ElementTree.fromstring(re.sub(r"(\w+)=(\w+)(?=[ >])", r'\1="\2"', chart_svg(chart)))
    lengths = [float(bar.get("width", "")) for bar in drawing.iter("rect")]
    starts = [float(bar.get("x", "")) for bar in drawing.iter("rect")]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=0.2)
    assert lengths[1] == pytest.approx(lengths[2], abs=0.2)
    assert starts[2] + lengths[2] == pytest.approx(starts[0], abs=0.2)
    (line,) = drawing.iter("line")
    assert float(line.get("x2", "")) == pytest.approx(starts[0] + lengths[0], abs=0.2)
    assert [title.text for title in drawing.iter("title")] == ["base & co: 2", "ours: 1", "worse: -1"]


def test_a_chart_of_zeros_can_be_drawn() -> None:
    assert "<rect" in chart_svg(Chart("x", [Bar("a", 0.0, None), Bar("b", 0.0, (0.0, 0.0))]))


def test_the_page_of_results_draws_what_can_be_compared(tmp_path: Path, environment: Environment) -> None:
    records = [Record("dato", name, "time", value, "ms") for name, value in (("base", 2.0), ("ours", 1.0))]
    stored = [StoredRecord("dato", record, environment) for record in records]
    text = write_results_page(tmp_path / "results.html", stored).read_text(encoding="utf-8")
    assert text.count("<svg") == 1
    assert "http" not in text
