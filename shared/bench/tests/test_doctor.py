from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pared_bench import doctor

Pared = Callable[..., tuple[int, str, str]]


def _states(folder: Path) -> dict[str, tuple[str, str]]:
    return {finding.topic: (finding.state, finding.text) for finding in doctor.examine(folder)}


def test_this_machine_is_fit(tmp_path: Path) -> None:
    found = _states(tmp_path)
    assert found["torch"] == ("good", doctor.metadata.version("torch"))
    assert found["processor"][0] == "good"
    assert "GiB free" in found["disk"][1]


def test_an_old_library_is_bad_and_says_how_to_renew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.9.1" if name == "torch" else "99.0")
    state, text = _states(tmp_path)["torch"]
    assert state == "bad"
    assert "2.9.1 is older than 2.11; type: pip install -U torch" in text


def test_without_triton_kernels_run_as_plain_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = doctor.util.find_spec
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert _states(tmp_path)["kernels"] == ("note", "plain torch (triton is not installed)")


def test_without_a_gpu_it_says_what_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state, text = _states(tmp_path)["gpu"]
    assert state == "note"
    assert "full-size speed cannot be measured" in text


def test_a_method_without_its_demo_extra_shows_the_pip_line(tmp_path: Path, make_method: Callable[..., Path]) -> None:
    make_method("poor", requires=("absent-zoo",), demo="")
    make_method("rich-enough", requires=("torch",), demo="")
    found = _states(tmp_path)
    assert found["poor"] == ("note", "without absent-zoo; for the demo type: pip install 'poor[demo]'")
    assert found["rich-enough"] == ("good", "1.2: demo")


@pytest.mark.parametrize(("version", "numbers"), [("2.15.0+cpu", (2, 15)), ("5.23.0.dev0", (5, 23)), ("3", (3, 0))])
def test_versions_are_compared_by_their_first_two_numbers(version: str, numbers: tuple[int, int]) -> None:
    assert doctor._leading(version) == numbers


def test_the_command_ends_with_1_only_when_something_needed_is_wrong(
    run_pared: Pared, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = doctor.Finding("gpu", "note", "none")
    monkeypatch.setattr(doctor, "examine", lambda: [finding])
    code, out, _ = run_pared("doctor", "--json")
    assert (code, json.loads(out)) == (0, [{"topic": "gpu", "state": "note", "text": "none"}])
    monkeypatch.setattr(doctor, "examine", lambda: [finding, doctor.Finding("torch", "bad", "too old")])
    code, out, _ = run_pared("doctor")
    assert code == 1
    assert "too old" in out
