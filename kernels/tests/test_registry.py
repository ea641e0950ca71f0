from __future__ import annotations

import subprocess
import sys
import textwrap

import pared_kernels
import pytest
import torch
from pared_kernels import check, ops, registry

INIT = '''
"""Twice the input."""

from pared_kernels.registry import define

from . import reference

__all__ = ["twice"]

_operator = define(reference.twice, lambda x: x.new_empty(x.shape))


def twice(x):
    return _operator(x)
'''

REFERENCE = """
from torch import Tensor


def twice(x: Tensor) -> Tensor:
    return 2 * x
"""

CASES = """
import torch
from pared_kernels.check import Case


def cases(seed):
    yield Case("ones", (torch.ones(3),))
"""


def forget(name: str) -> None:
    """Unregister an operator that a test has defined."""
    operator = registry._operators.pop(name, None)
    if operator is not None:
        operator._library._destroy()


@pytest.fixture
def added_folder(tmp_path, monkeypatch):
    """A folder with one more operator, `added_twice`, on the path of the operators; forgotten afterwards."""
    folder = tmp_path / "added_twice"
    folder.mkdir()
    for name, text in (("__init__", INIT), ("reference", REFERENCE), ("cases", CASES)):
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    yield folder
    registry._folders.pop("added_twice", None)
    forget("added_twice")
    vars(pared_kernels).pop("twice", None)
    for name in [name for name in sys.modules if name.startswith("pared_kernels.ops.added_twice")]:
        del sys.modules[name]


def test_an_added_folder_is_an_operator(added_folder):
    from pared_kernels import twice

    assert twice(torch.ones(2)).tolist() == [2.0, 2.0]
    info = next(info for info in pared_kernels.ls() if info.name == "added_twice")
    assert info == registry.OperatorInfo("added_twice", ("twice",), ("reference",), "Twice the input.")
    assert [outcome.status for outcome in check.run(["added_twice"], device="cpu")] == ["passed"]


def test_two_folders_cannot_publish_one_function(added_folder):
    init = added_folder / "__init__.py"
    init.write_text(init.read_text().replace("twice", "best_match").replace("reference.best_match", "reference.twice"))
    with pytest.raises(ValueError, match=r"best_match.*two operator folders"):
        registry.public_functions()


def test_every_operator_publishes_its_functions_and_has_cases():
    for info in pared_kernels.ls():
        assert info.backends[0] == "reference"
        assert info.summary.endswith(".")
        for name in info.functions:
            assert callable(getattr(pared_kernels, name))
            assert getattr(pared_kernels, name).__doc__
        for part in ("cases", "bench", "aot"):
            assert registry.operators()[info.name].has_part(part)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_operator"):
        _ = pared_kernels.no_such_operator


def test_a_mutating_operator_bumps_the_version_of_its_argument():
    def add_one_(x: torch.Tensor) -> None:
        x.add_(1)

    add_one_.__module__ = "pared_kernels.ops.dato_match.reference"
    try:
        operator = registry.define(add_one_, lambda x: None, name="test_add_one", mutates=["x"])
        x = torch.zeros(2)
        y = torch.ones(2, requires_grad=True) * x
        with pared_kernels.use("reference"):
            operator(x)
        assert x.tolist() == [1.0, 1.0]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    finally:
        forget("test_add_one")


def test_imports_and_runs_without_triton():
    script = """
    import sys
    sys.modules["triton"] = None
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
    import torch
    import pared_kernels
    from pared_kernels import best_match
    index = torch.tensor([[0, 1]])
    assert best_match(torch.eye(2)[None], index, index)[1].tolist() == [[0, 1]]
    assert pared_kernels.ls()
    from pared_kernels import aot, bench, check
    statuses = {outcome.status for outcome in check.run(["dato_match"], "triton", device="cpu")}
    assert statuses == {"skipped"}, statuses
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
