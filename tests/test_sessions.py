"""The sessions that people, pages and workflows count on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from workspace import ROOT, members

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
AOT_TARGETS = ("cuda-80", "cuda-86", "cuda-89", "cuda-90", "cuda-100", "cuda-120", "hip-gfx942", "hip-gfx1100")


@pytest.fixture(scope="module")
def sessions() -> set[str]:
    command = [sys.executable, "-m", "nox", "--list", "--nocolor", "-f", str(ROOT / "noxfile.py")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return set(re.findall(r"^[*-] ([a-z0-9-]+)", done.stdout, re.MULTILINE))


def jobs(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"])


def test_every_member_has_its_sessions(sessions: set[str]) -> None:
    for one in members():
        kinds = ["gpu", "isolated", "proof", *(["bench"] if one.is_package else [])]
        assert {f"{kind}-{one.name}" for kind in kinds} <= sessions
        assert ("kernels-interpret" if one.name == "pared-kernels" else f"tests-{one.name}") in sessions


def test_every_hardware_target_is_compiled_for(sessions: set[str]) -> None:
    from pared_kernels.aot import TARGETS

    assert set(TARGETS) == set(AOT_TARGETS)
    assert {name for name in sessions if name.startswith("kernels-aot-")} == {f"kernels-aot-{t}" for t in AOT_TARGETS}


def test_every_session_that_a_workflow_names_exists(sessions: set[str]) -> None:
    for path in WORKFLOWS:
        for name in re.findall(r"nox -s ([a-z0-9-]+)", path.read_text(encoding="utf-8")):
            # What ends in a dash is completed by the matrix or by the tag.
            assert name in sessions or (name.endswith("-") and any(one.startswith(name) for one in sessions)), name


def test_the_readme_and_the_ci_script_run_the_same_command() -> None:
    assert "pip install uv && uv run nox\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").endswith("-m pip install uv\npython3 -m uv run nox\n")
    assert (ROOT / ".ci/run").stat().st_mode & 0o111 == 0o111


def test_the_page_of_the_house_names_every_kind_of_session(sessions: set[str]) -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = text[text.index("## Sessions") : text.index("## Names on")]
    named = re.findall(r"`([a-z-]+(?:<[a-z]+>)?)`(?=[^|]*\|.*\| (?:yes|no|the kernels))", table)
    patterns = [re.compile(re.sub("<[a-z]+>", "[a-z0-9-]+", name)) for name in named]
    assert sorted(session for session in sessions if not any(p.fullmatch(session) for p in patterns)) == []
    assert [p.pattern for p in patterns if not any(p.fullmatch(session) for session in sessions)] == []


def test_the_cpu_workflow_covers_every_supported_python() -> None:
    versions = jobs(ROOT / ".github/workflows/ci.yml")["tests"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13", "3.14"]


def test_the_gpu_workflow_picks_a_self_hosted_runner_by_target_and_never_runs_for_a_fork() -> None:
    path = ROOT / ".github/workflows/gpu.yml"
    job = jobs(path)["gpu"]
    assert job["runs-on"] == ["self-hosted", "linux", "gpu", "${{ matrix.target }}"]
    assert all(f'"{target}"' in job["strategy"]["matrix"]["target"] for target in AOT_TARGETS)
    assert "pull_request" not in path.read_text(encoding="utf-8")


def test_rocm_machines_use_their_own_torch_and_cuda_machines_the_lock() -> None:
    steps = jobs(ROOT / ".github/workflows/gpu.yml")["gpu"]["steps"]
    locked, bare = (step for step in steps if "pared_bench.gpu" in step.get("run", ""))
    assert locked["if"] == "startsWith(matrix.target, 'cuda-')"
    assert locked["run"].startswith("uv run --frozen ")
    assert bare["if"] == "startsWith(matrix.target, 'hip-')"
    assert "uv" not in bare["run"]
    assert (ROOT / bare["env"]["PYTHONPATH"] / "pared_bench" / "gpu.py").is_file()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_grants_no_more_than_reading_by_default(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}
