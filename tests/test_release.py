"""What may be released, and what must be refused."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import release
from pared_bench.registry import FOREIGN_ON_PYPI
from workspace import ROOT, TAKEN_NAMES, Member, member, members


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace with one package that may be uploaded and one whose name belongs to somebody else."""
    (tmp_path / "LICENSE").write_text("licence")
    for name in ("framefusion", "dato"):
        folder = tmp_path / "packages" / name
        (folder / "src" / name).mkdir(parents=True)
        project = f'[project]\nname = "{name}"\nversion = "0.1.0"\ndescription = "A method."\n'
        (folder / "pyproject.toml").write_text(project)
        (folder / "src" / name / "__init__.py").write_text('__version__ = "0.1.0"\n')
        (folder / "CHANGELOG.md").write_text("# Changelog\n\n## 0.1.0\n\nFirst release.\n")
        (folder / "LICENSE").write_text("licence")
    return tmp_path


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The commands that would have been run."""
    seen: list[Any] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: seen.append(command))
    return seen


@pytest.fixture
def in_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(release, "member", lambda name: member(name, workspace))
    return workspace


def test_a_tag_names_a_member_and_its_version(workspace: Path) -> None:
    one = release.released_by("framefusion-v0.1.0", workspace)
    assert (one.name, one.version) == ("framefusion", "0.1.0")


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("v0.1.0", "not of the form"),
        ("framefusion-0.1.0", "not of the form"),
        ("framefusion-v0.1", "not of the form"),
        ("framefusion-v0.1.0; echo", "not of the form"),
        ("framefusion-v0.2.0", "pyproject.toml has 0.1.0"),
        ("unknown-v0.1.0", "no member is called 'unknown'"),
    ],
)
def test_a_tag_that_does_not_fit_is_refused_with_the_reason(workspace: Path, tag: str, reason: str) -> None:
    with pytest.raises(release.ReleaseError, match=reason):
        release.released_by(tag, workspace)


def test_a_tag_is_refused_when_the_changelog_has_no_section(workspace: Path) -> None:
    (workspace / "packages/framefusion/CHANGELOG.md").write_text("# Changelog\n")
    with pytest.raises(release.ReleaseError, match=r"no section '## 0\.1\.0'"):
        release.released_by("framefusion-v0.1.0", workspace)


def test_a_tag_is_refused_when_the_module_says_another_version(workspace: Path) -> None:
    (workspace / "packages/framefusion/src/framefusion/__init__.py").write_text('__version__ = "0.0.9"\n')
    with pytest.raises(release.ReleaseError, match=r"framefusion.__version__ is not 0\.1\.0"):
        release.released_by("framefusion-v0.1.0", workspace)


def test_exactly_four_names_belong_to_other_projects() -> None:
    assert set(TAKEN_NAMES) == {"dato", "dd", "deme", "cskv"}
    # the command line must not tell anybody to install them from there
    assert set(TAKEN_NAMES) == FOREIGN_ON_PYPI


@pytest.mark.parametrize("name", ["dato", "dd", "deme", "cskv", "DATO", "DeMe"])
def test_a_taken_name_is_refused_with_the_reason(name: str) -> None:
    assert "belongs to another project" in str(release.taken_reason(name))


@pytest.mark.parametrize("name", ["framefusion", "pared-hooks", "dlfr-vae", "mbq"])
def test_a_free_name_is_not_refused(name: str) -> None:
    assert release.taken_reason(name) is None


def test_a_tag_of_a_taken_name_is_released_but_not_uploaded(
    in_workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "released_by", lambda tag: Member("dato", "0.1.0", "", tmp_path, "dato", (), (), None))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    assert release.main(["tag", "dato-v0.1.0"]) == 0
    assert "upload=false" in (tmp_path / "output").read_text()
    assert "belongs to another project" in capsys.readouterr().err


def test_uploading_a_taken_name_is_refused_before_anything_is_sent(in_workspace: Path, commands: list[Any]) -> None:
    with pytest.raises(release.ReleaseError, match="never uploaded"):
        release.upload("dato", [Path("dato-0.1.0-py3-none-any.whl")])
    assert commands == []


def test_uploading_the_wheel_of_a_taken_name_under_another_is_refused(in_workspace: Path, commands: list[Any]) -> None:
    with pytest.raises(release.ReleaseError, match="never uploaded"):
        release.upload("framefusion", [Path("dato-0.1.0-py3-none-any.whl")])
    assert commands == []


@pytest.mark.parametrize(
    "file", ["mbq-0.1.0-py3-none-any.whl", "framefusion-0.2.0-py3-none-any.whl", "framefusion-0.2.0.tar.gz"]
)
def test_uploading_the_files_of_another_release_is_refused(in_workspace: Path, commands: list[Any], file: str) -> None:
    with pytest.raises(release.ReleaseError, match="its own files only"):
        release.upload("framefusion", [Path(file)])
    assert commands == []


def test_uploading_uses_trusted_publishing(in_workspace: Path, commands: list[Any]) -> None:
    release.upload("framefusion", [Path("framefusion-0.1.0-py3-none-any.whl"), Path("framefusion-0.1.0.tar.gz")])
    assert commands[0][1:4] == ["publish", "--trusted-publishing", "always"]


def test_the_workflow_uploads_only_through_the_tool_that_refuses() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert "tools/release.py upload" in text
    assert "uv publish" not in text
    assert "gh-action-pypi" not in text


def test_every_member_could_be_tagged_as_it_stands() -> None:
    problems = [problem for one in members() for problem in release.source_problems(one)]
    assert not problems, "\n".join(problems)


def write_wheel(folder: Path, entries: dict[str, int]) -> Path:
    wheel = folder / "framefusion-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, size in entries.items():
            archive.writestr(name, bytes(size))
    return wheel


GOOD = {"framefusion/__init__.py": 10, "framefusion-0.1.0.dist-info/licenses/LICENSE": 10}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"tests/test_apply.py": 10}, "installs outside framefusion/"),
        ({"framefusion/a.safetensors": 9 * 2**20}, "the limit for one model is 8"),
        ({f"framefusion/{i}.safetensors": 8 * 2**20 for i in range(5)}, "the limit is 36"),
    ],
)
def test_a_wheel_with_wrong_contents_is_a_problem(
    workspace: Path, tmp_path: Path, extra: dict[str, int], reason: str
) -> None:
    problems = release.wheel_problems(member("framefusion", workspace), write_wheel(tmp_path, GOOD | extra))
    assert len(problems) == 1
    assert reason in problems[0]


def test_a_wheel_without_licence_is_a_problem(workspace: Path, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, {"framefusion/__init__.py": 10})
    assert release.wheel_problems(member("framefusion", workspace), wheel) == [f"{wheel.name} carries no licence text"]


def test_a_wheel_with_right_contents_is_no_problem(workspace: Path, tmp_path: Path) -> None:
    assert release.wheel_problems(member("framefusion", workspace), write_wheel(tmp_path, GOOD)) == []
