"""MkDocs hooks of the hub and of every package's site: generated pages, their navigation, evidence tables.

A page lists the packages where it says `<!-- packages -->`. It shows the numbers of one package where it says
`<!-- evidence: NAME -->`, and those of all where it says `<!-- evidence -->`: the contents of benchmarks/results/ at
the time of the build.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pared_bench import report
from pared_bench.store import ResultStore

sys.path.insert(0, str(Path(__file__).parent))

from workspace import ROOT, Member, members

#: A link to a member's folder or README, which works where the repository is browsed: from any page as
#: `packages/dato/`, between the READMEs of two neighbours as `../zoo/README.md`.
MEMBER_LINK = re.compile(
    r"\]\((?:(?:\.\./)*(?:packages|shared)/(?P<folder>[a-z0-9-]+)/(?:README\.md)?"
    r"|(?:\.\./)+(?P<neighbour>[a-z0-9-]+)/README\.md)\)"
)
PACKAGES = "<!-- packages -->"
MARKER = re.compile(r"<!-- evidence(?:: (?P<name>[a-z0-9-]+))? -->")
#: Pages of a package in the order a reader meets them; others come between `how-it-works` and `evidence`.
FIRST = ("index", "quickstart", "how-it-works")
LAST = ("evidence", "limits", "api", "changelog")
#: Modules that users import and that are single files; folders with an `__all__` are found by themselves.
API_FILES = {"pared-bench": ("quality", "store", "report")}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Tell the theme where the hub is, and build the navigation from the pages that exist."""
    is_hub = Path(config.config_file_path).resolve().parent == ROOT
    config.extra["hub"] = is_hub
    config.extra["packages"] = [one.name for one in members() if (one.path / "mkdocs.yml").is_file()]
    if is_hub:
        rooms: list[Any] = [
            {one.name: [{page_title(path): path} for path in room_pages(one)]} for one in rooms_of_hub()
        ]
        config.nav = [
            {"What there is": "index.md"},
            {"How to choose": "choosing.md"},
            {"The house": "architecture.md"},
            {"Evidence": "evidence.md"},
            {"Shared rooms": rooms},
        ]
    else:
        config.nav = [{page_title(path): path} for path in package_pages(package_of(config))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of the docs folder."""
    if config.extra["hub"]:
        for one in rooms_of_hub():
            for path in room_pages(one):
                files.append(File.generated(config, path, content=room_page(one, path)))
    else:
        one = package_of(config)
        present = {file.src_uri for file in files}
        if "changelog.md" not in present:
            files.append(File.generated(config, "changelog.md", content=read(one.path / "CHANGELOG.md")))
        if "api.md" not in present:
            files.append(File.generated(config, "api.md", content=api_page(one)))
        if "evidence.md" not in present:
            text = f"# Evidence\n\n<!-- evidence: {one.name} -->\n"
            files.append(File.generated(config, "evidence.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Put in what a page asks for, and lead links to a member's folder to its pages."""
    markdown = markdown.replace(PACKAGES, package_table())
    markdown = MARKER.sub(lambda match: evidence(match["name"]), markdown)
    hub = "../" * (page.url.count("/") + (0 if config.extra["hub"] else 1))
    return lead_to_pages(markdown, hub)


def lead_to_pages(markdown: str, hub: str) -> str:
    """Replace links to members' folders by links to their pages, which lie below `hub`, the way to the hub's root."""
    names = {one.path.name: one.name for one in members()}

    def page_of(match: re.Match[str]) -> str:
        folder = match["folder"] or match["neighbour"]
        return f"]({hub}{names[folder]}/)" if folder in names else match.group()

    return MEMBER_LINK.sub(page_of, markdown)


def evidence(package: str | None) -> str:
    """Return what was measured of a package, or of every package under a heading each."""
    store = ResultStore(ROOT / "benchmarks" / "results")
    if package is not None:
        return report.markdown(store.load(package))
    parts = [f"## {name}\n\n{report.markdown(store.load(name), heading=3)}" for name in store.packages()]
    return "\n".join(parts) or report.markdown([])


def package_table() -> str:
    """Return the packages with their descriptions, as a Markdown table."""
    rows = [f"| [{one.name}](../packages/{one.name}/) | {one.description} |" for one in members() if one.is_package]
    return "\n".join(["| Package | What it does |", "|---|---|", *rows])


def rooms_of_hub() -> list[Member]:
    """Return the shared rooms, whose pages are part of the hub."""
    return [one for one in members() if not one.is_package]


def room_pages(one: Member) -> list[str]:
    """Return the pages of a shared room: its README, its docs folder, its API, its changelog."""
    own = sorted(path.name for path in (one.path / "docs").glob("*.md"))
    return [f"{one.name}/{name}" for name in ("index.md", *own, "api.md", "changelog.md")]


def room_page(one: Member, path: str) -> str:
    """Return the text of one page of a shared room."""
    name = path.split("/")[1]
    if name == "index.md":
        return read(one.path / "README.md").replace("(docs/", "(").replace("(CHANGELOG.md)", "(changelog.md)")
    if name == "api.md":
        return api_page(one)
    if name == "changelog.md":
        return read(one.path / "CHANGELOG.md")
    return read(one.path / "docs" / name)


def api_page(one: Member) -> str:
    """Return the API page of a member: what its module exports, then what its public submodules do."""
    exported = set(public_names(one.source / "__init__.py"))
    modules = [f"{one.module}.{name}" for name in API_FILES.get(one.name, ())]
    for file in sorted(one.source.rglob("*/__init__.py")):
        names = set(public_names(file))
        if names and not names <= exported:
            modules.append(".".join(file.parent.relative_to(one.path / "src").parts))
    top = f"# API of `{one.module}`\n\n::: {one.module}\n    options:\n      show_root_heading: false\n"
    options = "    options:\n      show_root_heading: false\n      heading_level: 3\n"
    return "\n".join([top, *(f"## `{module}`\n\n::: {module}\n{options}" for module in modules)])


def public_names(file: Path) -> list[str]:
    """Return the literal `__all__` of a file, empty when it has none."""
    for node in ast.parse(read(file)).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def package_of(config: MkDocsConfig) -> Member:
    """Return the package whose site is being built."""
    folder = Path(config.config_file_path).resolve().parent
    return next(one for one in members() if one.path == folder)


def package_pages(one: Member) -> list[str]:
    """Return the pages of a package's site in reading order."""
    written = {path.stem for path in (one.path / "docs").glob("*.md")} | {"api", "changelog", "evidence"}
    middle = sorted(written - {*FIRST, *LAST})
    return [f"{stem}.md" for stem in (*FIRST, *middle, *LAST) if stem in written]


def page_title(path: str) -> str:
    """Return the name of a page in the navigation."""
    stem = Path(path).stem
    titles = {"index": "Start", "api": "API", "quickstart": "Quick start"}
    return titles.get(stem, stem.replace("-", " ").replace("_", " ").capitalize())


def read(path: Path) -> str:
    """Return the text of a file."""
    return path.read_text(encoding="utf-8")
