"""`pared new`: a package that works, to be turned into the one that is wanted."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shutil
import tempfile
import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from pared_bench.errors import UsageError
from pared_bench.files import atomic_write, writable_folder

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
#: Longer names would break the lines of the template.
LONGEST_NAME = 20
SUFFIX = ".tmpl"


class NewPackageError(UsageError, ValueError):
    """A package that cannot be made under this name or in this place."""


def create(name: str, root: Path) -> Path:
    """Make the package `name` in the workspace at `root` and return its folder.

    Enters it in the root's pyproject.toml and in the tables of README.md and docs/choosing.md; `uv lock` comes next.
    All or nothing: raises NewPackageError, with the reason, before anything is written, and leaves nothing behind when
    writing fails.
    """
    root = root.resolve()
    module = name.replace("-", "_")
    _check(name, module, root)
    words = {"name": name, "module": module, "Class": "".join(part.capitalize() for part in name.split("-"))}
    entries = _entries(name, root)
    folder = root / "packages" / name
    writable_folder(root)
    with tempfile.TemporaryDirectory(dir=root, prefix=".pared-new-") as temporary:
        made = Path(temporary) / name
        _fill(resources.files("pared_bench") / "template", made, words)
        shutil.copyfile(root / "LICENSE", made / "LICENSE")
        folder.parent.mkdir(exist_ok=True)
        made.rename(folder)
    before = {path: path.read_text(encoding="utf-8") for path in entries}
    try:
        for path, text in entries.items():
            atomic_write(path, text)
    except BaseException:
        shutil.rmtree(folder)
        for path, text in before.items():
            if path.read_text(encoding="utf-8") != text:
                atomic_write(path, text)
        raise
    return folder


def _check(name: str, module: str, root: Path) -> None:
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        valid = f"lower-case words joined by '-', at most {LONGEST_NAME} characters, such as dlfr-vae"
        raise NewPackageError(f"name {name!r} is not valid: {valid}")
    if not (root / "pyproject.toml").is_file() or "[tool.uv.workspace]" not in (root / "pyproject.toml").read_text(
        encoding="utf-8"
    ):
        raise NewPackageError(
            f"{root} is not a uv workspace: run this in a checkout of the repository, or name one with --root DIR"
        )
    if not (root / "LICENSE").is_file():
        raise NewPackageError(f"{root} has no LICENSE to give to the package")
    if (root / "packages" / name).exists():
        raise NewPackageError(f"packages/{name} exists already")
    if keyword.iskeyword(module):
        raise NewPackageError(f"name {name!r} is not valid: {module!r} is a word of the Python language")
    if importlib.util.find_spec(module) is not None:
        raise NewPackageError(f"name {name!r} is not valid: it would hide the module {module!r} that is installed here")


def _fill(source: Traversable, target: Path, words: dict[str, str]) -> None:
    """Copy a folder of the template, replacing `@@word@@` in names and contents."""
    target.mkdir()
    for item in source.iterdir():
        place = target / _replace(item.name, words).removesuffix(SUFFIX)
        if item.is_dir():
            _fill(item, place, words)
        elif item.name.endswith(SUFFIX):
            text = _replace(item.read_text(encoding="utf-8"), words)
            place.write_text(_sorted_imports(text) if place.suffix == ".py" else text, encoding="utf-8")


def _replace(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(f"@@{word}@@", value)
    return text


def _sorted_imports(text: str) -> str:
    """Sort each block of one-line imports at the top of a file: where the package's own stand depends on its name."""

    def block(match: re.Match[str]) -> str:
        lines = match.group().splitlines()
        return "\n".join(sorted(lines, key=lambda line: (line.startswith("from"), line.split()[1].lower()))) + "\n"

    return re.sub(r"(?:^(?:import|from) .*\n)+", block, text, flags=re.MULTILINE)


def _entries(name: str, root: Path) -> dict[Path, str]:
    """Return the files outside the package that must know it, with their new contents."""
    project = root / "pyproject.toml"
    text = _after_last(project, r'^  "[\w-]+(\[[\w,-]+\])?",$', f'  "{name}[demo]",')
    text = _after_last(project, r"^[\w-]+ = \{ workspace = true \}$", f"{name} = {{ workspace = true }}", text)
    parsed = tomllib.loads(text)
    if f"{name}[demo]" not in parsed["project"]["dependencies"] or name not in parsed["tool"]["uv"]["sources"]:
        raise NewPackageError(f"{project} could not be extended: its tables are not laid out as expected")
    found = {project: text}
    what, for_whom = "rounds what linear layers hand on, to fewer bits", "any model with linear layers"
    rows = {
        root / "README.md": (r"^\| \[`", f"| [`{name}`](packages/{name}/) | {what} | {for_whom} |"),
        root / "docs" / "choosing.md": (
            r"^\|.*\]\(\.\./packages/",
            f"| {for_whom} | wide activations | [{name}](../packages/{name}/) | precision |",
        ),
    }
    for path, (pattern, row) in rows.items():
        if path.is_file():
            found[path] = _after_last(path, pattern, row)
    return found


def _after_last(path: Path, pattern: str, line: str, text: str | None = None) -> str:
    """Return the file's text (or `text`) with `line` put after the last line that matches `pattern`."""
    lines = (path.read_text(encoding="utf-8") if text is None else text).split("\n")
    places = [index for index, found in enumerate(lines) if re.search(pattern, found)]
    if not places:
        raise NewPackageError(f"{path} could not be extended: no line looks like {pattern}")
    lines.insert(places[-1] + 1, line)
    return "\n".join(lines)
