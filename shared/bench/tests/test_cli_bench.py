from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pared_bench import Record
from pared_bench.environment import Environment
from pared_bench.store import ResultStore

Pared = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "files"), "--device", "cpu"]


def test_a_bench_prints_its_table_and_stores_its_records(
    fake_method: Path, run_pared: Pared, tmp_path: Path, folders: list[str]
) -> None:
    code, out, _ = run_pared("bench", "fake", *folders)
    stored = ResultStore(tmp_path / "results").load("fake")
    assert code == 0
    assert "1 (0.9 to 1.1)" in out
    assert [entry.record.value for entry in stored] == [2.0, 1.0, None]
    assert stored[0].environment.versions["fake"] == "1.2"


def test_a_second_bench_adds_other_settings_to_the_same_file(
    fake_method: Path, run_pared: Pared, tmp_path: Path, folders: list[str]
) -> None:
    run_pared("bench", "fake", *folders)
    run_pared("bench", "fake", "--size", "8", *folders)
    run_pared("bench", "fake", "--size", "8", *folders)
    sizes = [entry.record.settings["size"] for entry in ResultStore(tmp_path / "results").load("fake")]
    assert sizes == [4, 4, 4, 8, 8, 8]


def test_bench_prints_json(fake_method: Path, run_pared: Pared, folders: list[str]) -> None:
    _, out, _ = run_pared("bench", "fake", "--json", *folders)
    data = json.loads(out)
    assert Path(data["file"]).name == "fake.json"
    assert data["records"][1]["spread"] == [0.9, 1.1]


def test_bench_takes_one_method_at_a_time(fake_method: Path, run_pared: Pared) -> None:
    code, _, err = run_pared("bench", "fake", "other")
    assert code == 2
    assert "one method at a time" in err


def test_a_broken_result_file_is_told_before_the_bench_runs(
    make_method: Callable[..., Path], run_pared: Pared, tmp_path: Path, folders: list[str]
) -> None:
    make_method("never", bench="def run(context):\n    raise AssertionError('ran')\n")
    path = tmp_path / "results" / Environment.here("cpu").slug / "never.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    code, _, err = run_pared("bench", "never", *folders)
    assert code == 1
    assert "is not JSON" in err


def test_ctrl_c_during_a_bench_ends_with_130_and_stores_nothing(
    make_method: Callable[..., Path], run_pared: Pared, tmp_path: Path, folders: list[str]
) -> None:
    make_method("long", bench="def run(context):\n    raise KeyboardInterrupt\n")
    code, _, err = run_pared("bench", "long", *folders)
    assert code == 130
    assert "Traceback" not in err
    assert [path for path in (tmp_path / "results").rglob("*") if path.is_file()] == []


def test_a_full_disk_keeps_the_older_results(
    fake_method: Path, run_pared: Pared, tmp_path: Path, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pared("bench", "fake", *folders)
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run_pared("bench", "fake", "--size", "9", *folders)
    assert code == 1
    assert "the disk is full" in err
    assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()} == before


def test_a_bench_that_returns_something_else_is_told(
    make_method: Callable[..., Path], run_pared: Pared, folders: list[str]
) -> None:
    make_method("odd", bench="def run(context):\n    return [3]\n")
    code, _, err = run_pared("bench", "odd", *folders)
    assert code == 1
    assert "returned int among its records" in err


def test_a_bench_that_measures_nothing_is_told_and_leaves_no_file(
    make_method: Callable[..., Path], run_pared: Pared, folders: list[str], tmp_path: Path
) -> None:
    make_method("idle", bench="def run(context):\n    return []\n")
    code, _, err = run_pared("bench", "idle", *folders)
    assert code == 1
    assert "idle's bench measured nothing" in err
    assert list(tmp_path.rglob("*.json")) == []


def test_results_that_cannot_be_written_are_told_before_the_bench_runs(
    make_method: Callable[..., Path],
    run_pared: Pared,
    folders: list[str],
    tmp_path: Path,
    forbid_writing: Callable[[Path], None],
) -> None:
    make_method("never", bench="def run(context):\n    raise AssertionError('ran')\n")
    forbid_writing(tmp_path / "results")
    code, _, err = run_pared("bench", "never", *folders)
    assert code == 1
    assert err.startswith(f"pared: no permission: {tmp_path / 'results'}.")
    assert "--results DIR" in err


@pytest.fixture
def stored(tmp_path: Path, environment: Environment) -> str:
    folder = tmp_path / "results"
    ResultStore(folder).add("dato", [Record("dato", "ours", "time", 1.5, "ms")], environment)
    return str(folder)


def test_report_prints_the_stored_tables(run_pared: Pared, stored: str) -> None:
    code, out, _ = run_pared("report", "--results", stored)
    assert code == 0
    assert "time [ms]" in out
    assert "NVIDIA H200" in out


def test_report_writes_markdown_to_a_file(run_pared: Pared, stored: str, tmp_path: Path) -> None:
    code, _, _ = run_pared("report", "dato", "--results", stored, "--format", "markdown", "--out", f"{tmp_path}/e.md")
    assert code == 0
    assert (tmp_path / "e.md").read_text().startswith("## NVIDIA H200\n")


def test_report_writes_a_page(run_pared: Pared, stored: str, tmp_path: Path) -> None:
    code, _, _ = run_pared("report", "--results", stored, "--format", "html", "--out", f"{tmp_path}/r.html")
    assert code == 0
    assert "time [ms]" in (tmp_path / "r.html").read_text()


def test_report_of_an_unmeasured_package_says_how_to_measure(run_pared: Pared, stored: str) -> None:
    code, _, err = run_pared("report", "datto", "--results", stored)
    assert (code, err) == (
        1,
        f"pared: no results of 'datto' under {stored}. Did you mean 'dato'? Measure it with: pared bench datto\n",
    )


def test_report_on_an_unknown_device_suggests_the_nearest(run_pared: Pared, stored: str) -> None:
    code, _, err = run_pared("report", "--device", "nvidia-h20", "--results", stored)
    assert code == 1
    assert "no results on 'nvidia-h20'" in err
    assert "Did you mean 'nvidia-h200'? Devices: nvidia-h200." in err


def test_report_prints_json(run_pared: Pared, stored: str) -> None:
    code, out, _ = run_pared("report", "--results", stored, "--format", "json")
    assert code == 0
    (entry,) = json.loads(out)
    assert (entry["package"], entry["value"], entry["environment"]["slug"]) == ("dato", 1.5, "nvidia-h200")


def test_report_to_a_file_needs_a_format_for_files(run_pared: Pared, stored: str, tmp_path: Path) -> None:
    code, _, err = run_pared("report", "--results", stored, "--out", f"{tmp_path}/r.txt")
    assert code == 2
    assert "--out needs --format" in err


def test_report_without_any_results_says_how_to_begin(run_pared: Pared, tmp_path: Path) -> None:
    code, out, _ = run_pared("report", "--results", str(tmp_path / "absent"))
    assert code == 0
    assert f"Nothing has been measured yet under {tmp_path / 'absent'}. Start with: pared bench NAME" in out


@pytest.mark.parametrize("style", ["markdown", "html"])
def test_a_page_without_any_results_says_so(run_pared: Pared, tmp_path: Path, style: str) -> None:
    page = tmp_path / "page"
    code, _, _ = run_pared("report", "--results", str(tmp_path / "absent"), "--format", style, "--out", str(page))
    assert code == 0
    assert "Nothing has been measured yet." in page.read_text()


def test_merge_takes_over_the_files_of_another_machine(run_pared: Pared, stored: str, tmp_path: Path) -> None:
    code, out, _ = run_pared("merge", stored, "--results", str(tmp_path / "mine"))
    assert code == 0
    assert out.strip() == str(tmp_path / "mine" / "nvidia-h200" / "dato.json")
    assert ResultStore(tmp_path / "mine").load() == ResultStore(stored).load()


def test_merging_a_folder_without_results_is_told(run_pared: Pared, tmp_path: Path) -> None:
    code, _, err = run_pared("merge", str(tmp_path))
    assert code == 1
    assert "holds no result files" in err
