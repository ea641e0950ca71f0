from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

Pared = Callable[..., tuple[int, str, str]]


def test_a_demo_prints_its_numbers_and_writes_one_page(fake_method: Path, run_pared: Pared, tmp_path: Path) -> None:
    out_folder = tmp_path / "report"
    code, out, err = run_pared("demo", "fake", "--device", "cpu", "--out", str(out_folder))
    assert code == 0
    assert "Fake at work" in out
    assert "1.25" in out
    assert "speed-up" in out
    assert "sampling: 2 steps" in err
    assert [path.name for path in out_folder.iterdir()] == ["index.html"]


def test_options_after_the_name_reach_the_demo(fake_method: Path, run_pared: Pared, tmp_path: Path) -> None:
    options = ["--prompt", "two squares", "--steps=4", "--mode", "good", "--no-guidance"]
    code, out, _ = run_pared("demo", "fake", *options, "--device", "cpu", "--json", "--out", str(tmp_path / "report"))
    assert code == 0
    (demo,) = json.loads(out)["demos"]
    assert demo["summary"] == "Prompt `two squares` in good mode & <more>."
    assert demo["metrics"]["steps"] == 4.0
    assert demo["options"] == {"prompt": "two squares", "steps": "4", "mode": "good", "guidance": "False"}


def test_json_holds_environment_tables_and_the_place_of_the_page(
    fake_method: Path, run_pared: Pared, tmp_path: Path
) -> None:
    _, out, _ = run_pared("demo", "--seed", "3", "--device", "cpu", "--json", "--out", str(tmp_path / "report"))
    data = json.loads(out)
    assert data["schema"] == "pared.demo/1"
    assert data["environment"]["seed"] == 3
    assert data["environment"]["versions"]["fake"] == "1.2"
    assert data["report"] == str(tmp_path / "report" / "index.html")
    assert data["demos"][0]["tables"][0]["rows"] == [["base", 1.25], ["fake", None]]


def test_no_name_runs_every_demo_and_one_failure_does_not_stop_the_others(
    fake_method: Path, make_method: Callable[..., Path], run_pared: Pared, tmp_path: Path
) -> None:
    make_method("broken", demo="def run(context):\n    raise RuntimeError('the model exploded')\n")
    make_method("poor", requires=("absent-zoo",), demo="import absent_zoo\n")
    make_method("silent", bench="")
    code, out, err = run_pared("demo", "--device", "cpu", "--out", str(tmp_path / "report"))
    page = (tmp_path / "report" / "index.html").read_text()
    assert code == 1
    assert "Fake at work" in out
    assert "broken: RuntimeError: the model exploded" in err
    assert "poor: poor's demo needs 'absent_zoo'" in err
    assert "pip install &#x27;poor[demo]&#x27;" in page
    assert 'id="fake"' in page
    assert 'id="silent"' not in page
    assert "Traceback" not in err


def test_an_unknown_method_suggests_the_nearest_and_leaves_nothing(
    fake_method: Path, run_pared: Pared, tmp_path: Path
) -> None:
    code, _, err = run_pared("demo", "fakke", "--out", str(tmp_path / "report"))
    assert (code, err) == (2, "pared: no installed method is called 'fakke'; did you mean 'fake'? Installed: fake.\n")
    assert not (tmp_path / "report").exists()


def test_an_unknown_option_lists_the_valid_ones_and_leaves_nothing(
    fake_method: Path, run_pared: Pared, tmp_path: Path
) -> None:
    code, _, err = run_pared("demo", "fake", "--promt", "x", "--device", "cpu", "--out", str(tmp_path / "report"))
    assert code == 2
    assert "Did you mean --prompt?" in err
    assert "--steps" in err
    assert not (tmp_path / "report").exists()


def test_a_missing_extra_shows_the_pip_line(make_method: Callable[..., Path], run_pared: Pared, tmp_path: Path) -> None:
    make_method("poor", requires=("absent-zoo",), demo="import absent_zoo\n")
    code, _, err = run_pared("demo", "poor", "--device", "cpu", "--out", str(tmp_path / "report"))
    assert code == 1
    assert "Type: pip install 'poor[demo]'" in err


def test_an_import_that_fails_only_when_the_demo_runs_shows_the_pip_line_too(
    make_method: Callable[..., Path], run_pared: Pared, tmp_path: Path
) -> None:
    make_method("late", requires=("absent-zoo",), demo="def run(context):\n    import absent_zoo\n")
    code, _, err = run_pared("demo", "late", "--device", "cpu", "--out", str(tmp_path / "report"))
    assert code == 1
    assert "Type: pip install 'late[demo]'" in err


def test_a_device_that_is_not_here_is_told(fake_method: Path, run_pared: Pared, tmp_path: Path) -> None:
    code, _, err = run_pared("demo", "fake", "--device", "cuda:99", "--out", str(tmp_path / "report"))
    assert code == 2
    assert "device 'cuda:99' is not here" in err


def test_no_write_permission_is_told_before_the_demo_runs(
    fake_method: Path, run_pared: Pared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "report"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, out, err = run_pared("demo", "fake", "--device", "cpu", "--out", str(tmp_path / "report"))
    assert code == 1
    assert err.startswith(f"pared: no permission: {tmp_path / 'report'}.")
    assert "sampling" not in err
    assert out == ""


def test_a_full_disk_is_told_and_leaves_no_half_page(
    fake_method: Path, run_pared: Pared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run_pared("demo", "fake", "--device", "cpu", "--out", str(tmp_path / "report"))
    assert code == 1
    assert f"pared: the disk is full: could not write {tmp_path / 'report' / 'index.html'}" in err
    assert "Traceback" not in err
    assert list((tmp_path / "report").iterdir()) == []


def test_ctrl_c_ends_with_130_and_leaves_no_half_page(
    make_method: Callable[..., Path], run_pared: Pared, tmp_path: Path
) -> None:
    make_method("long", demo="def run(context):\n    raise KeyboardInterrupt\n")
    code, _, err = run_pared("demo", "long", "--device", "cpu", "--out", str(tmp_path / "report"))
    assert code == 130
    assert "stopped" in err
    assert "Traceback" not in err
    assert not (tmp_path / "report" / "index.html").exists()


def test_a_demo_that_returns_something_else_is_told(
    make_method: Callable[..., Path], run_pared: Pared, tmp_path: Path
) -> None:
    make_method("odd", demo="def run(context):\n    return 3\n")
    code, _, err = run_pared("demo", "odd", "--device", "cpu", "--out", str(tmp_path / "report"))
    assert code == 1
    assert "odd's demo returned int, not a DemoResult" in err


def test_a_message_of_the_projects_own_errors_is_shown_as_it_is(
    make_method: Callable[..., Path], run_pared: Pared, tmp_path: Path
) -> None:
    raising = (
        "def run(context):\n    from pared_hooks import ParedError\n    raise ParedError('ratio must be below 1')\n"
    )
    make_method("picky", demo=raising)
    _, _, err = run_pared("demo", "picky", "--device", "cpu", "--out", str(tmp_path / "report"))
    assert "pared: picky: ratio must be below 1\n" in err


def test_files_that_a_demo_writes_stay_beside_the_page(
    make_method: Callable[..., Path], run_pared: Pared, tmp_path: Path
) -> None:
    source = (
        "from pared_bench import DemoResult\n"
        "def run(context):\n"
        "    (context.out / 'clip.txt').write_text('x')\n"
        "    return DemoResult('t', 's')\n"
    )
    make_method("writer", demo=source)
    run_pared("demo", "writer", "--device", "cpu", "--out", str(tmp_path / "report"))
    assert (tmp_path / "report" / "writer" / "clip.txt").read_text() == "x"
