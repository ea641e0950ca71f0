"""Sessions for people and for CI, all in uv's locked environment: `uv run nox` is what to run before a push."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from workspace import UV, Member, members  # noqa: E402

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "none"

MEMBERS = members(ROOT)
AOT_TARGETS = ("cuda-80", "cuda-86", "cuda-89", "cuda-90", "cuda-100", "cuda-120", "hip-gfx942", "hip-gfx1100")
QUICK = "not slow and not gpu and not proof and not network"
WORKERS = str(min(os.cpu_count() or 1, 4))
HAS_GPU = shutil.which("nvidia-smi") is not None or shutil.which("rocm-smi") is not None
# One thread a worker: the tensors of the tests are tiny, and two workers fill two cores.
TEST_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
NO_TESTS_COLLECTED = 5


def uv_run(
    session: nox.Session, *command: str, env: dict[str, str] | None = None, codes: tuple[int, ...] = (0,)
) -> None:
    """Run a command in the locked environment."""
    session.run(UV, "run", "--frozen", *command, env=env, external=True, success_codes=codes)


def run_tests(session: nox.Session, folder: Path, marks: str, *options: str, env: dict[str, str] | None = None) -> None:
    """Run the tests of one folder that carry the marks; a folder without such tests is fine."""
    if not folder.is_dir():
        session.skip(f"{folder.relative_to(ROOT)} does not exist")
    arguments = ("pytest", str(folder.relative_to(ROOT)), "-m", marks, *options, *session.posargs)
    uv_run(session, *arguments, env=TEST_ENV | (env or {}), codes=(0, NO_TESTS_COLLECTED))


def add(name: str, doc: str, function: Callable[[nox.Session], None], *, default: bool = False, tag: str = "") -> None:
    """Register a session whose name is only known from the folders."""
    function.__doc__ = doc
    nox.session(name=name, default=default, tags=[tag] if tag else None)(function)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting, workflow files, shell syntax and an up-to-date lock."""
    uv_run(session, "ruff", "check", ".")
    uv_run(session, "ruff", "format", "--check", ".")
    workflows = sorted(str(path.relative_to(ROOT)) for path in (ROOT / ".github/workflows").glob("*.yml"))
    uv_run(session, "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    uv_run(session, "check-jsonschema", "--builtin-schema", "custom.github-workflows-require-timeout", *workflows)
    session.run("bash", "-n", ".ci/run", external=True)
    session.run(UV, "lock", "--check", external=True)


@nox.session
def types(session: nox.Session) -> None:
    """The type checker over every `src`, the tools and this file."""
    sources = [str((one.path / "src").relative_to(ROOT)) for one in MEMBERS]
    uv_run(session, "mypy", *sources, "tools", "noxfile.py")


@nox.session(name="tests-workspace")
def tests_workspace(session: nox.Session) -> None:
    """What holds for the whole workspace: import arrows, names, release rules, `pared new`."""
    run_tests(session, ROOT / "tests", QUICK)


def add_member_sessions(one: Member) -> None:
    """Register the sessions that every member has, and those that only a package has."""

    is_kernels = one.name == "pared-kernels"

    def tests(session: nox.Session) -> None:
        env = {"TRITON_INTERPRET": "1"} if is_kernels else None
        run_tests(session, one.tests, QUICK, "-n", WORKERS, "--dist", "worksteal", env=env)

    def gpu(session: nox.Session) -> None:
        run_tests(session, one.tests, "gpu")

    def isolated(session: nox.Session) -> None:
        uv_run(session, "python", "tools/isolated.py", one.name, *session.posargs)

    def proof(session: nox.Session) -> None:
        run_tests(session, one.tests, "proof or slow", "--timeout", "3600")

    def bench(session: nox.Session) -> None:
        extra = ("--package", one.name, "--extra", "bench") if "bench" in one.extras else ()
        uv_run(session, *extra, "pared", "bench", one.method or one.name, *session.posargs)

    if is_kernels:
        add(
            "kernels-interpret",
            "Every kernel against its reference, on the CPU through Triton's interpreter.",
            tests,
            default=True,
        )
    else:
        add(f"tests-{one.name}", f"Quick tests of {one.name}.", tests, default=True)
    add(f"gpu-{one.name}", f"Tests of {one.name} that need a GPU.", gpu, default=is_kernels and HAS_GPU, tag="gpu")
    add(f"isolated-{one.name}", f"Wheel of {one.name} alone in a clean environment: import and demo.", isolated)
    add(f"proof-{one.name}", f"The slow tests of {one.name}: its claims in miniature.", proof, tag="proof")
    if one.is_package:
        add(f"bench-{one.name}", f"Measure {one.name} and store the numbers.", bench)


for _member in MEMBERS:
    add_member_sessions(_member)


def add_aot_session(target: str) -> None:
    """Register the session that compiles every kernel for one hardware target, without that hardware."""

    def aot(session: nox.Session) -> None:
        uv_run(session, "python", "-m", "pared_kernels.aot", target, *session.posargs)

    add(f"kernels-aot-{target}", f"Compile every kernel for {target} without a GPU.", aot, tag="aot")


for _target in AOT_TARGETS:
    add_aot_session(_target)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Hub and one site per package, strictly, into one tree whose links are checked: site/."""
    uv_run(session, "python", "tools/build_docs.py", *session.posargs)


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Wheel and source distribution of every member into dist/, or elsewhere with `-- --out-dir DIR`."""
    session.run(UV, "build", "--all-packages", *session.posargs, external=True)


@nox.session(name="release-check", default=False)
def release_check(session: nox.Session) -> None:
    """Versions, changelogs, licences and wheel contents of every member, ready to be tagged."""
    uv_run(session, "python", "tools/release.py", "check", *session.posargs)


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Quick tests of everything under coverage, with a report."""
    folders = [str(one.tests.relative_to(ROOT)) for one in MEMBERS if one.tests.is_dir()]
    uv_run(session, "coverage", "run", "-m", "pytest", "-m", QUICK, *folders, "tests", env=TEST_ENV)
    uv_run(session, "coverage", "report", *session.posargs)
