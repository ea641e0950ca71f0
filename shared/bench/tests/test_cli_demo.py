from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
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
    make_method("torn", demo="from json import no_such_name\n")
    code, out, err = run_pared("demo", "--device", "cpu", "--out", str(tmp_path / "report"))
    page = (tmp_path / "report" / "index.html").read_text()
    assert code == 1
    assert "Fake at work" in out
    assert "broken: RuntimeError: the model exploded" in err
    assert "poor: poor's demo needs 'absent_zoo'" in err
    assert "torn: ImportError: cannot import name 'no_such_name'" in err
    assert "demos: 4 steps" in err
    assert "pip install &#x27;poor[demo]&#x27;" in page
    assert 'id="fake"' in page
    assert 'id="silent"' not in page
    assert "Traceback" not in err


def test_an_unknown_method_suggests_the_nearest_and_leaves_nothing(
    fake_method: Path, run_pared: Pared, tmp_path: Path
) -> None:
    code, _, err = run_pared("demo", "fakke", "--out", str(tmp_path / "report"))
    assert (code, err) == (2, "pared: no installed method is called 'fakke'. Did you mean 'fake'? Installed: fake.\n")
    assert not (tmp_path / "report").exists()


def test_an_unknown_option_lists_the_valid_ones_and_leaves_nothing(
    fake_method: Path, run_pared: Pared, tmp_path: Path
) -> None:
    code, _, err = run_pared("demo", "fake", "--promt", "x", "--device", "cpu", "--out", str(tmp_path / "report"))
    assert code == 2
    assert "Did you mean '--prompt'?" in err
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


@pytest.mark.parametrize("place", ["closed", "closed/report"])
def test_no_write_permission_is_told_before_the_demo_runs(
    fake_method: Path, run_pared: Pared, tmp_path: Path, forbid_writing: Callable[[Path], None], place: str
) -> None:
    forbid_writing(tmp_path / "closed")
    code, out, err = run_pared("demo", "fake", "--device", "cpu", "--out", str(tmp_path / place))
    assert code == 1
    assert err.startswith(f"pared: no permission: {tmp_path / place}.")
    assert "--out DIR" in err
    assert "sampling" not in err
    assert out == ""
    assert list((tmp_path / "closed").iterdir()) == []


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
    assert list((tmp_path / "report").iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_stops_the_real_command_cleanly(make_method: Callable[..., Path], tmp_path: Path) -> None:
    source = "import time\ndef run(context):\n    context.log('at work')\n    time.sleep(60)\n"
    site = make_method("long", demo=source).parent
    # a fresh interpreter: background jobs of some shells, and what they start, ignore the signal
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from pared_bench.cli import main; main()"
    command = [sys.executable, "-c", program, "demo", "long", "--device", "cpu", "--out", str(tmp_path / "report")]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as done:
        assert done.stderr is not None
        seen = ""
        while "at work" not in seen:
            line = done.stderr.readline()
            assert line, seen
            seen += line
        done.send_signal(signal.SIGINT)
        out, err = done.communicate(timeout=60)
    assert (done.returncode, out) == (130, "")
    assert "stopped; no half-written file was left behind" in err
    assert "Traceback" not in err
    assert list((tmp_path / "report").iterdir()) == []


def test_what_a_demo_prints_does_not_spoil_the_json(
    make_method: Callable[..., Path], run_pared: Pared, tmp_path: Path
) -> None:
    source = (
        "from pared_bench import DemoResult, Table\n"
        "import numpy as np\n"
        "def run(context):\n"
        "    print('chatter')\n"
        "    table = Table('t', ['a', 'b'], [[np.float32(1.5), float('inf')]])\n"
        "    return DemoResult('t', 's', [table], metrics={'psnr': float('inf')})\n"
    )
    make_method("talker", demo=source)
    code, out, err = run_pared("demo", "talker", "--device", "cpu", "--json", "--out", str(tmp_path / "report"))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (demo,) = json.loads(out, parse_constant=refuse)["demos"]
    assert code == 0
    assert "chatter" in err
    assert demo["tables"][0]["rows"] == [[1.5, None]]
    assert demo["metrics"] == {"psnr": None}


def test_a_method_named_twice_is_shown_once(fake_method: Path, run_pared: Pared, tmp_path: Path) -> None:
    _, out, _ = run_pared("demo", "fake", "fake", "--device", "cpu", "--json", "--out", str(tmp_path / "report"))
    assert [demo["name"] for demo in json.loads(out)["demos"]] == ["fake"]


def test_a_negative_seed_is_refused(fake_method: Path, run_pared: Pared) -> None:
    code, _, err = run_pared("demo", "fake", "--seed", "-1")
    assert code == 2
    assert "--seed" in err


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
