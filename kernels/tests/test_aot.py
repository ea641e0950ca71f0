from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from pared_kernels import aot, dispatch, resources

needs_triton = pytest.mark.skipif(not dispatch.has_triton(), reason="no triton")


def compile_in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command without the interpreter, in which there is nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pared_kernels.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@needs_triton
def test_command_compiles_without_a_gpu_and_records_resources(tmp_path):
    out = tmp_path / "records.json"
    done = compile_in_a_process("cuda-90", "--op", "dato_recover_add", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert document["schema"] == aot.SCHEMA
    assert {record["target"] for record in document["records"]} == {"cuda-90"}
    for record in document["records"]:
        assert record["error"] is None
        assert record["registers"] > 0
        assert record["spill_bytes"] == 0
        assert 0 <= record["shared_bytes"] <= aot.TARGETS["cuda-90"].shared_limit
    assert [path.name for path in tmp_path.iterdir()] == ["records.json"]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", aot.TARGETS)
def test_every_operator_compiles_without_spills_for(name):
    done = compile_in_a_process(name)
    assert done.returncode == 0, done.stdout + done.stderr
    spilled = [line for line in done.stdout.splitlines() if "registers" in line and " 0 B spilled" not in line]
    assert spilled == []


@needs_triton
def test_command_fails_when_a_kernel_needs_too_much_shared_memory(monkeypatch, capsys):
    class Used(resources.Resources):
        pass

    monkeypatch.setattr(dispatch, "interprets", lambda: False)
    monkeypatch.setattr(aot, "compile_kernel", lambda specialization, place: None)
    monkeypatch.setattr(resources, "resources", lambda compiled, backend: Used(32, 0, 70_000))
    assert aot.main(["hip:gfx942", "--op", "dato_norm_gather"]) == 1
    assert "70000 bytes of shared memory; the target has 65536" in capsys.readouterr().out
    assert aot.main(["cuda:90", "--op", "dato_norm_gather"]) == 0


@needs_triton
def test_a_kernel_that_does_not_compile_is_a_failed_record(monkeypatch, capsys):
    def fail(specialization, place):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(dispatch, "interprets", lambda: False)
    monkeypatch.setattr(aot, "compile_kernel", fail)
    assert aot.main(["cuda:80", "--op", "dato_match"]) == 1
    assert "FAILED: RuntimeError: no such instruction" in capsys.readouterr().out


@needs_triton
def test_the_interpreter_is_refused_because_it_compiles_nothing(monkeypatch):
    monkeypatch.setattr(dispatch, "interprets", lambda: True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_all(["cuda-90"])


def test_unknown_target_is_refused_with_the_valid_ones(capsys):
    with pytest.raises(SystemExit):
        aot.main(["cuda-70"])
    assert "cuda-90" in capsys.readouterr().err


def test_resources_are_read_from_the_compilers_words():
    report = "ptxas info: 16 bytes stack frame, 12 bytes spill stores\nptxas info: Used 255 registers"
    assert resources._read_ptxas(report) == (255, 12)
    assembly = "    .vgpr_count:     64\n    .vgpr_spill_count: 3\n"
    assert resources._read_amdgcn(assembly) == (64, 12)
    with pytest.raises(ValueError, match="registers"):
        resources._read_ptxas("nothing here, 0 bytes spill stores")


def test_a_kernel_is_compiled_where_the_shared_memory_is_between_its_bounds():
    one = aot.Specialization(None, "", {}, {}, shared=64 * 1024, shared_below=160 * 1024, backend="cuda")
    assert [name for name, place in aot.TARGETS.items() if one.is_for(place)] == ["cuda-86", "cuda-89", "cuda-120"]
