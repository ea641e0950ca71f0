"""Build the hub and the site of every package into site/, strictly, and check every link between their pages."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from workspace import ROOT, members

SITE = ROOT / "site"


class Page(HTMLParser):
    """The links that leave a page and the anchors it offers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what the tag links to and which anchor it is."""
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and name in ("id", "name"):
                self.anchors.add(value)


def broken_links(site: Path) -> list[str]:
    """Return the links inside `site` that lead to no file or to no anchor, as `page: link`.

    Links to other hosts are not followed. The page for unknown addresses is left out: it is served from any depth.
    """
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            found = target.is_file() and target.is_relative_to(site.resolve())
            if found and parts.fragment and target in pages:
                # Fragments that begin with `__` belong to controls that the theme adds in the browser.
                found = parts.fragment.startswith("__") or unquote(parts.fragment) in pages[target].anchors
            if not found:
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    return sorted(set(broken))


def build(config: Path, folder: Path) -> None:
    """Build one site; a warning is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
    command += ["--config-file", str(config), "--site-dir", str(folder)]
    print(f"building {folder.relative_to(ROOT)}", flush=True)
    # The theme prints an advertisement for another generator unless told not to.
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})


def main() -> int:
    """Build everything; returns the exit status."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    shutil.rmtree(SITE, ignore_errors=True)
    try:
        build(ROOT / "mkdocs.yml", SITE)
        for one in members():
            if (one.path / "mkdocs.yml").is_file():
                build(one.path / "mkdocs.yml", SITE / one.name)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    broken = broken_links(SITE)
    print("\n".join(f"broken link: {line}" for line in broken) or "every link leads somewhere")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
