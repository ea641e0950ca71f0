"""The link checker of the documentation, the pages that send a reader somewhere, and what pages are filled with."""

from __future__ import annotations

import re
from pathlib import Path

import docs_hooks
import pytest
from build_docs import broken_links
from docs_hooks import lead_to_pages
from pared_bench import Record
from pared_bench.environment import Environment
from pared_bench.store import ResultStore
from workspace import ROOT, members

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "dato").mkdir()
    (tmp_path / "index.html").write_text('<a href="dato/">dato</a> <a href="dato/#api">api</a> <img src="dato/a.png">')
    (tmp_path / "dato/index.html").write_text('<h1 id="api">API</h1> <a href="..">hub</a> <a href="#api">here</a>')
    (tmp_path / "dato/a.png").write_bytes(b"")
    return tmp_path


def test_a_site_whose_links_lead_somewhere_has_no_broken_ones(site: Path) -> None:
    assert broken_links(site) == []


@pytest.mark.parametrize("link", ["mbq/", "dato/missing.html", "dato/#missing", "#missing", "../outside.html"])
def test_a_link_that_leads_nowhere_is_found(site: Path, link: str) -> None:
    (site / "page.html").write_text(f'<a href="{link}">x</a>')
    assert broken_links(site) == [f"page.html: {link}"]


def test_a_link_to_another_host_is_not_followed(site: Path) -> None:
    (site / "page.html").write_text('<a href="https://example.org/nowhere">x</a> <a href="mailto:a@example.org">y</a>')
    assert broken_links(site) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_links_only_to_files_that_exist(page: Path) -> None:
    generated = {f"{one.name}/index.md" for one in members() if not one.is_package}
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link and link not in generated]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("module", [one.module for one in members() if not one.is_package])
def test_the_picture_of_the_house_shows_every_shared_room(module: str) -> None:
    assert module in (ROOT / "docs/assets/house.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("hub", "link", "target"),
    [
        ("../", "packages/dato/", "../dato/"),
        ("../../", "../../../packages/dato/README.md", "../../dato/"),
        ("../", "../shared/hooks/", "../pared-hooks/"),
        ("../", "../zoo/README.md", "../pared-zoo/"),
        ("../", "../../kernels/README.md", "../pared-kernels/"),
        ("../", "../packages/unknown/", "../packages/unknown/"),
        ("../", "../docs/README.md", "../docs/README.md"),
        ("../", "measuring.md", "measuring.md"),
    ],
)
def test_a_link_to_a_members_folder_leads_to_its_pages(hub: str, link: str, target: str) -> None:
    assert lead_to_pages(f"see [it]({link}).", hub) == f"see [it]({target})."


def test_evidence_without_results_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_hooks, "ROOT", tmp_path)
    assert docs_hooks.evidence("dato") == docs_hooks.evidence(None) == "Nothing has been measured yet.\n"


def test_evidence_shows_what_the_bench_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Environment("NVIDIA H200", "nvidia-h200", {"torch": "2.11.0"}, "0123456789ab", "2026-01-02T03:04:05Z", 7)
    for name in ("dato", "mbq"):
        record = Record(name, "ours", "time", 1.5, "ms")
        ResultStore(tmp_path / "benchmarks" / "results").add(name, [record], here)
    monkeypatch.setattr(docs_hooks, "ROOT", tmp_path)
    assert docs_hooks.evidence("mbq").startswith("## NVIDIA H200\n\n### mbq\n")
    hub = docs_hooks.evidence(None)
    assert hub.index("## dato\n") < hub.index("### NVIDIA H200\n") < hub.index("## mbq\n")
