"""What every member has, and what no file of the repository says."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from workspace import ROOT, TAKEN_NAMES, Member, members, requirement_name

EVERY_MEMBER = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")
EVERY_PACKAGE = ("mkdocs.yml", "docs/index.md", "tests")
#: Assembled here so that this file does not contain what it looks for.
INDEX_HOSTS = tuple(
    ".".join(parts) for parts in [("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"), ("npmjs", "org")]
)
MEMBERS = members()
PACKAGES = [one for one in MEMBERS if one.is_package]


def names(one: Member) -> str:
    return one.name


def repository_files() -> list[Path]:
    """Return the files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_only_the_lock_names_the_host_of_a_package_index() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    found = []
    for path in repository_files():
        if path != ROOT / "uv.lock":
            content = path.read_bytes()
            found += [f"{path.relative_to(ROOT)}: {host}" for host in INDEX_HOSTS if host.encode() in content]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("one", MEMBERS, ids=names)
def test_a_member_has_its_files(one: Member) -> None:
    wanted = EVERY_MEMBER + (EVERY_PACKAGE if one.is_package else ())
    assert [name for name in wanted if not (one.path / name).exists()] == []


@pytest.mark.parametrize("one", MEMBERS, ids=names)
def test_folder_distribution_and_module_agree(one: Member) -> None:
    assert (one.source / "__init__.py").is_file()
    assert one.path.name == (one.name if one.is_package else one.name.removeprefix("pared-"))


@pytest.mark.parametrize("one", MEMBERS, ids=names)
def test_a_member_states_licence_and_supported_versions(one: Member) -> None:
    project = tomllib.loads((one.path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == workspace["requires-python"]
    assert (one.path / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("one", MEMBERS, ids=names)
def test_a_member_has_typed_imports_for_its_users(one: Member) -> None:
    assert (one.source / "py.typed").is_file()


@pytest.mark.parametrize("one", PACKAGES, ids=names)
def test_the_workspace_installs_every_package_with_its_demo(one: Member) -> None:
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = {
        requirement_name(needed): re.findall(r"[\w-]+", needed.partition("[")[2])
        for needed in workspace["project"]["dependencies"]
    }
    assert "demo" in extras[one.name]
    assert workspace["tool"]["uv"]["sources"][one.name] == {"workspace": True}


@pytest.mark.parametrize("one", PACKAGES, ids=names)
def test_a_package_is_listed_where_people_look_for_it(one: Member) -> None:
    for page in ("README.md", "docs/choosing.md"):
        assert re.search(rf"\[`?{re.escape(one.name)}`?\]\(", (ROOT / page).read_text(encoding="utf-8")), page


@pytest.mark.parametrize("one", PACKAGES, ids=names)
def test_a_package_registers_its_method_under_its_own_name(one: Member) -> None:
    project = tomllib.loads((one.path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pared.methods"] == {one.name: one.module}
    assert {"pared-zoo", "pared-bench"} <= set(one.demo_requires)


@pytest.mark.parametrize("one", [one for one in PACKAGES if one.name in TAKEN_NAMES], ids=names)
def test_a_package_whose_name_is_taken_says_so_in_its_readme(one: Member) -> None:
    text = (one.path / "README.md").read_text(encoding="utf-8")
    assert f"pip install {one.name}\n" not in text
    assert "belongs to another project" in text
