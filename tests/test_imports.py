"""Who may import whom: every import statement of every member, at any depth, is walked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from workspace import ROOT, Member, members

SHARED_BELOW = {"pared_hooks", "pared_kernels"}
SHARED_ABOVE = {"pared_zoo", "pared_bench"}
ECOSYSTEM_ADAPTED = {"transformers", "diffusers"}
#: Files of a package that belong to its extra `demo`.
DEMO_FILES = {"demo.py", "bench.py", "cli.py"}


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield every imported top-level module and whether the import runs when the file is imported.

    Imports below `if TYPE_CHECKING:` never run, and those inside a function run later.
    """

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], not lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0], not lazy
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__", "optional_import"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and not name.value.startswith("."):
                yield name.value.split(".")[0], not lazy
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, True)
            for child in node.orelse:
                yield from walk(child, inside)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, inside)

    yield from walk(tree, False)


def called_name(call: ast.Call) -> str:
    """Return the last name of what is called."""
    return ast.unparse(call.func).rsplit(".", maxsplit=1)[-1]


def forbidden_arrows(one: Member, path: Path, source: str, everybody: list[Member]) -> list[str]:
    """Return a sentence for each import of a file that DESIGN's arrows do not allow."""
    packages = {other.module for other in everybody if other.is_package}
    inside = path.relative_to(one.path / "src" / one.module)
    is_demo = one.is_package and inside.parts[0] in DEMO_FILES | {"cli", "bench"}
    found = []
    for module, at_import in imports(ast.parse(source, str(path))):
        reason = None
        if module == one.module:
            continue
        if module in packages:
            reason = "a package is found by its entry point, never imported"
        elif module in SHARED_ABOVE and one.module in SHARED_BELOW:
            reason = "hooks and kernels stand below the zoo and the bench"
        elif module in SHARED_ABOVE and one.is_package and not is_demo:
            reason = f"only {', '.join(sorted(DEMO_FILES))} and tests use the zoo and the bench"
        elif module == "pared_bench" and one.module == "pared_zoo":
            reason = "the bench uses the zoo, not the other way round"
        elif module in ECOSYSTEM_ADAPTED and one.module in SHARED_BELOW and at_import:
            reason = "hooks and kernels import it inside functions only"
        elif module == "triton" and at_import and inside.name != "triton.py" and "triton" not in inside.parts:
            reason = "triton is optional: only a file named triton.py imports it when it is imported"
        if reason:
            found.append(f"{one.module}/{inside} imports {module}: {reason}")
    return found


@pytest.fixture(scope="module")
def everybody() -> list[Member]:
    return members()


def test_no_member_imports_against_the_arrows(everybody: list[Member]) -> None:
    found = []
    for one in everybody:
        for path in sorted(one.source.rglob("*.py")):
            found += forbidden_arrows(one, path, path.read_text(encoding="utf-8"), everybody)
    assert not found, "\n".join(found)


def test_every_shared_room_is_walked(everybody: list[Member]) -> None:
    assert {one.module for one in everybody if not one.is_package} == SHARED_BELOW | SHARED_ABOVE


@pytest.mark.parametrize(
    ("member_name", "file", "line"),
    [
        ("pared-hooks", "patch.py", "import pared_zoo"),
        ("pared-hooks", "views/decoder.py", "from transformers import LlamaForCausalLM"),
        ("pared-hooks", "patch.py", "import dato"),
        ("pared-kernels", "op/__init__.py", "from pared_bench.measure import flops"),
        ("pared-kernels", "op/__init__.py", "import triton"),
        ("pared-bench", "registry.py", "from dato.demo import run"),
        ("pared-bench", "registry.py", "import importlib\nimportlib.import_module('dato')"),
        ("pared-zoo", "models.py", "def load():\n    import pared_bench"),
        ("dato", "apply.py", "import pared_zoo.world"),
        ("dato", "functional.py", "try:\n    import triton\nexcept ImportError:\n    triton = None"),
    ],
)
def test_a_planted_import_against_the_arrows_is_caught(
    everybody: list[Member], member_name: str, file: str, line: str
) -> None:
    one = next(other for other in everybody if other.name == member_name)
    assert len(forbidden_arrows(one, one.source / file, line, everybody)) == 1


def test_a_planted_import_of_one_package_by_another_is_caught(everybody: list[Member]) -> None:
    other = Member("mbq", "0.1.0", "", ROOT / "packages" / "mbq", "mbq", (), (), "mbq")
    found = forbidden_arrows(
        other, other.source / "apply.py", "def f():\n    from dato import apply", [*everybody, other]
    )
    assert len(found) == 1


@pytest.mark.parametrize(
    ("member_name", "file", "line"),
    [
        ("pared-hooks", "views/decoder.py", "def of(model):\n    from transformers import LlamaForCausalLM"),
        (
            "pared-hooks",
            "views/decoder.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers",
        ),
        ("pared-kernels", "op/triton.py", "import triton"),
        ("pared-zoo", "models.py", "import diffusers, transformers, pared_hooks"),
        ("pared-bench", "demo.py", "import pared_zoo"),
        ("dato", "demo.py", "import pared_zoo, pared_bench"),
        (
            "dato",
            "apply.py",
            "import diffusers, pared_hooks, pared_kernels\nfrom dato import config\nfrom . import functional",
        ),
    ],
)
def test_an_import_along_the_arrows_passes(everybody: list[Member], member_name: str, file: str, line: str) -> None:
    one = next(other for other in everybody if other.name == member_name)
    assert forbidden_arrows(one, one.source / file, line, everybody) == []
