from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pared_bench.store import ResultStore

Pared = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Put a zoo of two models in the place of the real one and return the trainings that were asked for."""
    runs: list[tuple[str, dict[str, Any]]] = []
    zoo, train = types.ModuleType("pared_zoo"), types.ModuleType("pared_zoo.train")

    def path(name: str) -> Path:
        if name == "vae-world":
            return tmp_path / name
        raise FileNotFoundError("no weights")

    def card(name: str) -> str:
        path(name)
        return f"# {name}\n\nA [card]."

    zoo.models, zoo.path, zoo.card = lambda: ["sd-world", "vae-world"], path, card  # type: ignore[attr-defined]
    train.run = lambda name, **options: runs.append((name, options))  # type: ignore[attr-defined]
    zoo.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pared_zoo", zoo)
    monkeypatch.setitem(sys.modules, "pared_zoo.train", train)
    return runs


def test_zoo_ls_tells_which_models_are_here(trainings: list, run_pared: Pared, tmp_path: Path) -> None:
    code, out, _ = run_pared("zoo", "ls")
    assert code == 0
    assert out.splitlines()[0].split(maxsplit=1) == ["sd-world", "not trained here; pared zoo train sd-world"]
    assert out.splitlines()[1].split() == ["vae-world", str(tmp_path / "vae-world")]


def test_zoo_show_prints_the_card(trainings: list, run_pared: Pared) -> None:
    assert run_pared("zoo", "show", "vae-world") == (0, "# vae-world\n\nA [card].\n", "")


def test_zoo_show_of_an_untrained_model_says_what_is_wrong(trainings: list, run_pared: Pared) -> None:
    assert run_pared("zoo", "show", "sd-world") == (1, "", "pared: no weights\n")


def test_zoo_train_hands_its_options_over(trainings: list, run_pared: Pared, tmp_path: Path) -> None:
    options = ["--resume", "--size", "base", "--seed", "3", "--steps", "10", "--out", str(tmp_path)]
    assert run_pared("zoo", "train", "sd-world", *options)[0] == 0
    assert trainings == [
        ("sd-world", {"resume": True, "size": "base", "out": tmp_path, "seed": 3, "steps": 10}),
    ]


def test_an_unknown_model_suggests_the_nearest(trainings: list, run_pared: Pared) -> None:
    code, _, err = run_pared("zoo", "train", "sd-wrld")
    assert code == 2
    assert "no model 'sd-wrld'. Did you mean 'sd-world'? Models: sd-world, vae-world." in err
    assert trainings == []


def test_a_missing_zoo_shows_the_pip_line(run_pared: Pared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pared_zoo", None)
    code, _, err = run_pared("zoo", "ls")
    assert code == 1
    assert "pip install pared-zoo" in err


@dataclass
class Facts:
    name: str = "gather"
    functions: tuple[str, ...] = ("gather_rows",)
    backends: tuple[str, ...] = ("reference", "triton")
    summary: str = "Gathers rows."


@dataclass
class Outcome:
    operator: str
    backend: str
    case: str
    status: str
    reason: str = ""


@dataclass
class Measurement:
    operator: str = "gather"
    case: str = "large"
    dtype: str = "float16"
    way: str = "triton"
    microseconds: float = 20.0
    spread: float = 0.1
    roofline: float = 0.85
    speedup: float | None = 3.5


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Put kernels of one operator in the place of the real ones; `outcomes` is what its check finds."""
    state = types.SimpleNamespace(outcomes=[Outcome("gather", "reference", "small", "passed")], asked=[])
    room, check, bench = (types.ModuleType(f"pared_kernels{part}") for part in ("", ".check", ".bench"))
    room.ls = lambda: [Facts()]  # type: ignore[attr-defined]

    def run_check(ops: Any, backend: Any, *, device: Any, seed: int) -> list[Outcome]:
        state.asked.append((ops, backend, str(device), seed))
        if ops and "gather" not in ops:
            raise ValueError(f"operator {ops[0]!r} does not exist; there are: gather")
        return state.outcomes

    check.run = run_check  # type: ignore[attr-defined]
    bench.run = lambda ops, device, *, full: [Measurement(), Measurement(way="torch", speedup=None)]  # type: ignore[attr-defined]
    room.check, room.bench = check, bench  # type: ignore[attr-defined]
    for module in (room, check, bench):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return state


def test_kernels_ls_lists_operators_and_backends(kernels: types.SimpleNamespace, run_pared: Pared) -> None:
    code, out, _ = run_pared("kernels", "ls")
    assert code == 0
    assert "reference triton" in out
    assert "gather_rows" in out


def test_kernels_check_counts_and_passes(kernels: types.SimpleNamespace, run_pared: Pared) -> None:
    options = ["gather", "--backend", "triton", "--device", "cpu", "--seed", "4"]
    code, out, _ = run_pared("kernels", "check", *options)
    assert code == 0
    assert "passed" in out
    assert kernels.asked == [(["gather"], "triton", "cpu", 4)]


def test_kernels_check_fails_with_the_case_that_failed(kernels: types.SimpleNamespace, run_pared: Pared) -> None:
    kernels.outcomes.append(Outcome("gather", "triton", "odd shape", "failed", "off by 1"))
    kernels.outcomes.append(Outcome("gather", "cpu", "small", "skipped", "needs AVX"))
    code, out, err = run_pared("kernels", "check", "--device", "cpu")
    assert code == 1
    assert "gather, triton, odd shape: off by 1" in err
    assert "gather, cpu skipped: needs AVX" in out


def test_an_unknown_operator_lists_those_there_are(kernels: types.SimpleNamespace, run_pared: Pared) -> None:
    code, _, err = run_pared("kernels", "check", "scatter", "--device", "cpu")
    assert (code, err) == (2, "pared: operator 'scatter' does not exist; there are: gather\n")


def test_kernels_bench_prints_and_stores(kernels: types.SimpleNamespace, run_pared: Pared, tmp_path: Path) -> None:
    code, out, _ = run_pared("kernels", "bench", "--device", "cpu", "--results", str(tmp_path))
    assert code == 0
    assert "20 (19 to 21)" in out
    stored = ResultStore(tmp_path).load("pared-kernels")
    assert [(s.record.variant, s.record.metric, s.record.value) for s in stored] == [
        ("triton", "time", 20.0),
        ("triton", "roofline", 85.0),
        ("triton", "speed-up over torch", 3.5),
        ("torch", "time", 20.0),
        ("torch", "roofline", 85.0),
    ]


def test_new_creates_a_package_in_the_workspace(
    run_pared: Pared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    creator = types.ModuleType("pared_bench.new")
    creator.create = lambda name, root: root / "packages" / name  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pared_bench.new", creator)
    code, out, _ = run_pared("new", "my-method", "--root", str(tmp_path))
    assert code == 0
    assert str(tmp_path / "packages" / "my-method") in out


def test_new_outside_a_workspace_is_told(run_pared: Pared, tmp_path: Path) -> None:
    code, _, err = run_pared("new", "my-method", "--root", str(tmp_path))
    assert code == 2
    assert "is not a uv workspace" in err
    assert "--root DIR" in err
