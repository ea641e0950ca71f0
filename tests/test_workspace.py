"""What the tools know about the workspace, read from its folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from workspace import closure, member, members, requirement_name


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace of hooks, a zoo above them, and a package that needs the zoo for its demo only."""
    projects = {
        "shared/hooks": ("pared-hooks", [], []),
        "shared/zoo": ("pared-zoo", ["Pared_Hooks>=0.1", "torch"], []),
        "packages/mbq": ("mbq", ["torch>=2.11"], ["pared-zoo[real]"]),
    }
    for folder, (name, needs, demo) in projects.items():
        (tmp_path / folder).mkdir(parents=True)
        text = f'[project]\nname = "{name}"\nversion = "0.1.0"\ndescription = ""\ndependencies = {needs}\n'
        text += f"[project.optional-dependencies]\ndemo = {demo}\n"
        (tmp_path / folder / "pyproject.toml").write_text(text)
    return tmp_path


def test_shared_rooms_come_first_and_only_packages_are_packages(workspace: Path) -> None:
    assert [(one.name, one.is_package) for one in members(workspace)] == [
        ("pared-hooks", False),
        ("pared-zoo", False),
        ("mbq", True),
    ]


def test_a_package_stands_alone_and_its_demo_brings_the_rooms_it_needs(workspace: Path) -> None:
    one = member("mbq", workspace)
    assert [other.name for other in closure(one, workspace)] == ["mbq"]
    assert {other.name for other in closure(one, workspace, demo=True)} == {"mbq", "pared-zoo", "pared-hooks"}


def test_an_unknown_member_is_answered_with_those_there_are(workspace: Path) -> None:
    with pytest.raises(LookupError, match="no member is called 'mbp'; the workspace has pared-hooks, pared-zoo, mbq"):
        member("mbp", workspace)


@pytest.mark.parametrize(
    "text", ["dato", "dato[demo]>=0.1", "dato ; python_version > '3'", "dato @ file:///x", "Da_To"]
)
def test_a_requirement_begins_with_its_name(text: str) -> None:
    assert requirement_name(text) == ("da-to" if text == "Da_To" else "dato")
