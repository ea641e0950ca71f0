from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from pared_bench import gpu, registry
from pared_bench.store import ResultStore

PYPROJECT = '[project]\nname = "{0}"\nversion = "0.3"\n[project.entry-points."pared.methods"]\n{0} = "{0}"\n'
BENCH = "from pared_bench import Record\ndef run(context, *, size: int = 1):\n    return [{0}]\n"
BEYOND_A_BARE_MACHINE = (
    *("typer", "rich", "pydantic", "jsonschema", "matplotlib", "PIL", "pynvml"),
    *("nox", "pytest", "diffusers", "transformers", "triton"),
)
GOOD = 'Record("quick", "ours", "time", 1.0, "ms", {"size": size, "device": str(context.device)})'


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the method "quick", whose bench works, and "shaky", whose bench fails."""
    root = tmp_path / "checkout"
    for name, record in (("quick", GOOD), ("shaky", "1 / 0")):
        source = root / "packages" / name / "src" / name
        source.mkdir(parents=True)
        (source / "__init__.py").write_text("")
        (source / "bench.py").write_text(BENCH.format(record))
        (root / "packages" / name / "pyproject.toml").write_text(PYPROJECT.format(name))
    monkeypatch.setattr(registry, "workspace_root", lambda: root)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] in ("quick", "shaky")]:
        del sys.modules[name]


def test_a_bench_runs_from_its_folder_and_its_records_are_stored(checkout: Path, tmp_path: Path) -> None:
    arguments = ["quick", "--steps", "bench", "--device", "cpu", "--out", str(tmp_path / "out"), "--commit", "abc"]
    assert gpu.main([*arguments, "--option=--size=3"]) == 0
    (entry,) = ResultStore(tmp_path / "out").load("quick")
    assert entry.record.settings == {"size": 3, "device": "cpu"}
    assert entry.environment.commit == "abc"


def test_one_failing_bench_does_not_stop_the_others(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--steps", "bench", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert gpu.main(["shaky", "quick", *arguments]) == 1
    assert len(ResultStore(tmp_path / "out").load("quick")) == 1
    out = capsys.readouterr().out
    assert "shaky: ZeroDivisionError" in out
    assert "failed: bench shaky" in out


def test_only_tests_marked_gpu_run_and_their_failure_is_told(
    checkout: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, holds in (("quick", "True"), ("shaky", "False")):
        folder = checkout / "packages" / name / "tests"
        folder.mkdir()
        (folder / "test_it.py").write_text(
            f"import pytest, {name}\n@pytest.mark.gpu\ndef test_it():\n    assert {holds}\n"
            "def test_without_gpu():\n    assert False\n"
        )
    code = gpu.main(["--steps", "tests", "--device", "cpu", "--out", str(tmp_path / "out")])
    out = capfd.readouterr().out
    assert code == 1
    assert "failed: tests of shaky\n" in out
    assert "1 passed, 1 deselected" in out


def test_files_without_gpu_tests_are_not_even_imported(checkout: Path, tmp_path: Path) -> None:
    folder = checkout / "packages" / "quick" / "tests"
    folder.mkdir()
    (folder / "test_plain.py").write_text("import a_plugin_that_is_not_here\n")
    assert gpu.main(["quick", "--steps", "tests", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0


def test_files_that_a_bench_keeps_are_not_taken_for_results(checkout: Path, tmp_path: Path) -> None:
    bench = checkout / "packages" / "quick" / "src" / "quick" / "bench.py"
    bench.write_text(
        bench.read_text().replace("    return", "    (context.out / 'front.json').write_text('[]')\n    return")
    )
    arguments = ["quick", "--steps", "bench", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert gpu.main(arguments) == 0
    assert (tmp_path / "out" / "files" / "quick" / "front.json").read_text() == "[]"
    assert [entry.package for entry in ResultStore(tmp_path / "out").load()] == ["quick"]


def test_ctrl_c_ends_with_130_and_keeps_what_was_measured(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = checkout / "packages" / "shaky" / "src" / "shaky" / "bench.py"
    bench.write_text("def run(context):\n    raise KeyboardInterrupt\n")
    arguments = ["--steps", "bench", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert gpu.main(["quick", "shaky", *arguments]) == 130
    assert "stopped" in capsys.readouterr().err
    assert ResultStore(tmp_path / "out").packages() == ["quick"]
    assert not (tmp_path / "out" / "files").exists()


def test_kernels_are_checked_timed_and_stored(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"operator": "gather", "case": "large", "dtype": "float16", "way": "triton"}
    broken = types.SimpleNamespace(operator="gather", backend="triton", case="odd", status="failed", reason="off by 1")
    timed = types.SimpleNamespace(**facts, microseconds=20.0, spread=0.1, roofline=0.5, speedup=2.0)
    check, bench = types.ModuleType("pared_kernels.check"), types.ModuleType("pared_kernels.bench")
    check.run = lambda *, device, seed: [broken]  # type: ignore[attr-defined]
    bench.run = lambda *, device: [timed]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pared_kernels.check", check)
    monkeypatch.setitem(sys.modules, "pared_kernels.bench", bench)
    assert gpu.main(["--steps", "kernels", "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    assert "failed: kernel gather (triton, odd): off by 1" in capsys.readouterr().out
    assert [entry.record.value for entry in ResultStore(tmp_path / "out").load("pared-kernels")] == [20.0, 50.0, 2.0]


def test_an_unknown_method_is_told(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["quik", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "Did you mean 'quick'" in capsys.readouterr().err


def test_the_results_go_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu._parser().parse_args([]).out == tmp_path


def test_it_runs_with_nothing_but_the_path_and_without_the_terminal_libraries(tmp_path: Path) -> None:
    """The command line's libraries are hidden; what remains is what a bare machine has."""
    source = Path(gpu.__file__).parents[1]
    program = (
        "import sys, runpy\n"
        f"for name in {BEYOND_A_BARE_MACHINE!r}:\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = ['gpu', '--steps', 'bench', '--device', 'cpu', '--out', {str(tmp_path)!r}]\n"
        "from pared_bench import registry\n"
        f"registry.folder_methods = lambda root: [registry.Method('quick', 'quick')]\n"
        "sys.exit(runpy.run_module('pared_bench.gpu', run_name='__main__'))\n"
    )
    package = tmp_path / "src" / "quick"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "bench.py").write_text(BENCH.format(GOOD))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(tmp_path / "src")])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/quick.json")
    assert json.loads(path.read_text())["records"][0]["settings"]["device"] == "cpu"
