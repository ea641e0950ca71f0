"""`pared new`: what it makes works, and a name that cannot be is refused before anything is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pared_bench import new
from workspace import ROOT, member

#: Names of all lengths: the generated lines must be well formatted with each, and imports sorted.
NAMES = ("q7", "planted-sample", "zz-long-method-name2")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace with the root files of this one and no member."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    for name in ("docs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_new_package_is_a_member_with_all_its_files(workspace: Path, name: str) -> None:
    folder = new.create(name, workspace)
    one = member(name, workspace)
    assert folder == workspace / "packages" / name == one.path
    assert (one.method, one.requires, one.demo_requires) == (name, (), ())
    assert one.source.is_dir()
    assert (one.path / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    text = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file())
    assert "@@" not in text


def test_a_new_package_is_entered_in_the_workspace_and_its_tables(workspace: Path) -> None:
    new.create("planted-sample", workspace)
    project = tomllib.loads((workspace / "pyproject.toml").read_text(encoding="utf-8"))
    assert "planted-sample[demo]" in project["project"]["dependencies"]
    assert project["tool"]["uv"]["sources"]["planted-sample"] == {"workspace": True}
    assert "[`planted-sample`](packages/planted-sample/)" in (workspace / "README.md").read_text(encoding="utf-8")
    assert "[planted-sample](../packages/planted-sample/)" in (workspace / "docs/choosing.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_new_package_passes_lint(workspace: Path, name: str) -> None:
    folder = new.create(name, workspace)
    run(sys.executable, "-m", "ruff", "check", "--no-cache", folder, cwd=workspace)
    run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", folder, cwd=workspace)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("My-Method", "lower-case words"),
        ("two--dashes", "lower-case words"),
        ("../escape", "lower-case words"),
        ("a-name-that-is-far-too-long", "at most 20 characters"),
        ("lambda", "a word of the Python language"),
        ("torch", "would hide the module 'torch'"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_written(workspace: Path, name: str, reason: str) -> None:
    before = contents(workspace)
    with pytest.raises(new.NewPackageError, match=reason):
        new.create(name, workspace)
    assert contents(workspace) == before


def test_a_package_that_exists_is_not_overwritten(workspace: Path) -> None:
    new.create("planted-sample", workspace)
    before = contents(workspace)
    with pytest.raises(new.NewPackageError, match="exists already"):
        new.create("planted-sample", workspace)
    assert contents(workspace) == before


def test_a_folder_that_is_no_workspace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(new.NewPackageError, match="not a uv workspace"):
        new.create("planted-sample", tmp_path)
    assert contents(tmp_path) == {}


def test_a_workspace_that_cannot_be_written_to_is_named_and_stays_as_it_was(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(workspace)

    def refuse(path: object, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for call in ("open", "mkdir"):
        monkeypatch.setattr(os, call, refuse)
    with pytest.raises(PermissionError) as caught:
        new.create("planted-sample", workspace)
    monkeypatch.undo()
    assert caught.value.filename == str(workspace)
    assert contents(workspace) == before


def test_a_failure_while_entering_the_package_leaves_nothing_behind(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(workspace)
    write = new.atomic_write

    def fail_at_the_tables(path: Path, data: str) -> None:
        if path.name == "choosing.md":
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(new, "atomic_write", fail_at_the_tables)
    with pytest.raises(OSError, match="No space left"):
        new.create("planted-sample", workspace)
    assert contents(workspace) == before


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_new_package_passes_types_tests_proof_and_docs(workspace: Path) -> None:
    folder = new.create("planted-sample", workspace)
    # With the cache of the session `types`, torch is not read anew.
    run(sys.executable, "-m", "mypy", "--cache-dir", ROOT / ".mypy_cache", "packages/planted-sample/src", cwd=workspace)
    env = os.environ | {"PYTHONPATH": str(folder / "src"), "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    run(
        sys.executable,
        "-m",
        "pytest",
        "packages/planted-sample/tests",
        "-q",
        "-p",
        "no:cacheprovider",
        cwd=workspace,
        env=env,
    )
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "-f", folder / "mkdocs.yml", cwd=workspace, env=env)
    assert (workspace / "site/planted-sample/index.html").is_file()
    assert "round_to_bits" in (workspace / "site/planted-sample/api/index.html").read_text(encoding="utf-8")
