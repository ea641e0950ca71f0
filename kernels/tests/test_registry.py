from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pared_kernels
import pytest
import torch
from pared_kernels import bench, check, dispatch, ops, registry

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

BENCH = """
import torch
from pared_kernels.bench import BenchCase


def cases(device, full):
    x = torch.ones(1024, device=device)
    yield BenchCase("ones", (x,), 8192, 1024, x.dtype, matrix=False, baselines={"torch": lambda x: x + x})
"""

AOT = """
import triton
import triton.language as tl
from pared_kernels.aot import Specialization


@triton.jit
def twice_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, index < count, other=0.0)
    tl.store(out_ptr + index, 2 * x, index < count)


def kernels():
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32"}
    yield Specialization(twice_kernel, "fp32", types, {"BLOCK": 128}, {"num_warps": 4})
"""


def forget(name: str) -> None:
    """Unregister an operator that a test has defined."""
    operator = registry._operators.pop(name, None)
    if operator is not None:
        operator._library._destroy()


def forget_folder(name: str, function: str) -> None:
    """Unregister the operator of a folder that a test has added."""
    registry._folders.pop(name, None)
    forget(name)
    vars(pared_kernels).pop(function, None)
    for module in [module for module in sys.modules if module.startswith(f"pared_kernels.ops.{name}")]:
        del sys.modules[module]


@pytest.fixture
def added_folder(tmp_path, monkeypatch):
    """A folder with one more operator, `added_twice`, on the path of the operators; forgotten afterwards."""
    folder = tmp_path / "added_twice"
    folder.mkdir()
    texts = {"__init__": INIT, "reference": REFERENCE, "cases": CASES, "bench": BENCH, "aot": AOT}
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    yield folder
    forget_folder("added_twice", "twice")


def test_an_added_folder_is_an_operator(added_folder):
    from pared_kernels import twice

    assert twice(torch.ones(2)).tolist() == [2.0, 2.0]
    info = next(info for info in pared_kernels.ls() if info.name == "added_twice")
    assert info == registry.OperatorInfo("added_twice", ("twice",), ("reference",), "Twice the input.")
    assert [outcome.status for outcome in check.run(["added_twice"], device="cpu")] == ["passed"]
    ways = [row.way for row in bench.run(["added_twice"], "cpu", seconds=0.0)]
    assert ways == ["reference", "torch"]
    with pared_kernels.use(added_twice="reference"):
        compiled = torch.compile(lambda x: twice(x) + 1, fullgraph=True, backend="aot_eager")
        assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]


@pytest.mark.skipif(not dispatch.has_triton(), reason="no triton")
def test_an_added_folder_is_compiled_ahead_of_time(added_folder):
    script = f"""
    from pared_kernels import aot, ops
    ops.__path__ = [*ops.__path__, {str(added_folder.parent)!r}]
    raise SystemExit(aot.main(["cuda-90", "--op", "added_twice"]))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "added_twice.twice_kernel [fp32]" in done.stdout
    assert "1 compiled, 0 failed" in done.stdout


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
        for part in ("cases", "bench", *(["aot"] if "triton" in info.backends else [])):
            assert registry.operators()[info.name].has_part(part)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_operator"):
        _ = pared_kernels.no_such_operator


def test_a_mutating_operator_bumps_the_version_of_its_argument():
    def add_one_(x: torch.Tensor) -> None:
        x.add_(1)

    add_one_.__module__ = "pared_kernels.ops.test_add_one.reference"
    try:
        operator = registry.define(add_one_, lambda x: None, mutates=["x"])
        x = torch.zeros(2)
        y = torch.ones(2, requires_grad=True) * x
        with pared_kernels.use("reference"):
            operator(x)
        assert x.tolist() == [1.0, 1.0]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    finally:
        forget("test_add_one")


APPEND_INIT = """
from torch import Tensor

from pared_kernels.registry import define

from . import reference

__all__ = ["append"]

_operator = define(reference.append, lambda rows, cache, start: None, mutates=["cache"])


def append(rows, cache, start):
    _operator(rows, cache, start)
"""

APPEND = """
from torch import Tensor


def append(rows: Tensor, cache: Tensor, start: int) -> None:
    cache[start : start + rows.shape[0]] = rows{change}
"""

APPEND_CASES = """
import torch
from pared_kernels.check import FLOATS, Case, every_layout


def cases(seed):
    for dtype in FLOATS:
        for layout, cache in every_layout(torch.zeros(5, 3, dtype=dtype)):
            yield Case(f"{dtype} {layout}", (torch.ones(2, 3, dtype=dtype), cache, 2))
"""


@pytest.mark.parametrize(("change", "status"), [("", "passed"), (" + 0.5", "failed")])
def test_what_an_operator_writes_in_place_is_checked(change, status, tmp_path, monkeypatch):
    folder = tmp_path / "added_append"
    folder.mkdir()
    texts = {"__init__": APPEND_INIT, "reference": APPEND.format(change=""), "cases": APPEND_CASES}
    for name, text in {**texts, "cpu": APPEND.format(change=change)}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    try:
        outcomes = check.run(["added_append"], "cpu", device="cpu")
        assert len(outcomes) == 16
        assert {outcome.status for outcome in outcomes} == {status}
        arguments = next(iter(registry.operators()["added_append"].part("cases").cases(0))).arguments
        torch.library.opcheck(registry.operators()["added_append"].op, arguments)
    finally:
        forget_folder("added_append", "append")


@pytest.mark.parametrize(
    ("reference", "mutates", "message"),
    [
        ("def op(x: Tensor) -> Tensor: return x + 1", ["out"], "'out' is no argument of op"),
        ("def op(x: Tensor, *, scale: float) -> Tensor: return x * scale", [], "keyword-only"),
        ("def op(x: Tensor) -> Tensor: return x", [], "there is an operator 'dato_match' already"),
    ],
)
def test_a_reference_that_cannot_be_an_operator_is_refused(reference, mutates, message):
    folder = "dato_match" if "already" in message else "test_refused"
    names = {"Tensor": torch.Tensor, "__name__": f"pared_kernels.ops.{folder}.reference"}
    exec(reference, names)
    with pytest.raises(ValueError, match=message):
        registry.define(names["op"], lambda *arguments: None, mutates=mutates)
    assert "test_refused" not in registry.operators()


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
