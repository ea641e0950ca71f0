from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from pared_bench import environment
from pared_bench.environment import Environment, resolve_device, slug
from pared_bench.errors import DeviceError


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("CPU Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu-intel-xeon-cpu-2-20ghz"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ],
)
def test_a_device_name_becomes_a_folder_name(name: str, folder: str) -> None:
    assert slug(name) == folder


def test_this_machine_is_described_with_versions_date_and_seed() -> None:
    here = Environment.here("cpu", seed=5, packages=("pytest",), commit="abc")
    assert here.device.startswith("CPU ")
    assert here.slug.startswith("cpu-")
    assert {"python", "torch", "pytest"} <= set(here.versions)
    assert (here.seed, here.commit) == (5, "abc")
    assert here.date.endswith("Z")


def test_auto_takes_the_processor_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps", "gpu", "meta"])
def test_a_device_that_is_not_here_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (torch.cuda, torch.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=repr(name)):
        resolve_device(name)


def test_a_checkout_with_changed_source_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(environment, "workspace_root", lambda: tmp_path)
    git("init")
    for name in ("source.py", "benchmarks/results.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    clean = environment.checkout_commit()
    assert clean is not None
    assert len(clean) == 12
    (tmp_path / "benchmarks" / "results.json").write_text("2")
    assert environment.checkout_commit() == clean
    (tmp_path / "source.py").write_text("2")
    assert environment.checkout_commit() == f"{clean}+changes"


def test_outside_a_checkout_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "workspace_root", lambda: None)
    assert environment.checkout_commit() is None
