from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Pared = Callable[..., tuple[int, str, str]]

WATCH = """
import sys
from pared_bench.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
heavy = {heavy!r}
print("loaded:", *sorted(heavy & set(sys.modules)))
"""


def test_list_shows_what_is_installed(fake_method: Path, run_pared: Pared) -> None:
    code, out, _ = run_pared("list")
    assert code == 0
    assert out.splitlines()[1].split() == ["fake", "1.2", "demo", "bench", "cli", "What", "fake", "does."]


def test_list_as_json(fake_method: Path, run_pared: Pared) -> None:
    _, out, _ = run_pared("list", "--json")
    assert json.loads(out) == [
        {"name": "fake", "version": "1.2", "offers": ["demo", "bench", "cli"], "summary": "What fake does."}
    ]


def test_list_with_nothing_installed_says_how_to_begin(make_method: Callable[..., Path], run_pared: Pared) -> None:
    code, out, _ = run_pared("list")
    assert code == 0
    assert "pip install" in out


LIBRARIES = {"torch", "numpy", "diffusers", "transformers", "matplotlib", "PIL", "jsonschema"}


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        # these two must answer at once
        (["list"], {*LIBRARIES, "pydantic", "rich"}),
        (["--help"], {*LIBRARIES, "pydantic", "rich"}),
        (["demo", "--help"], LIBRARIES),
        (["zoo", "--help"], LIBRARIES),
        (["kernels", "--help"], LIBRARIES),
    ],
)
def test_the_light_commands_import_nothing_heavy(arguments: list[str], heavy: set[str]) -> None:
    program = WATCH.format(arguments=arguments, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().splitlines()[-1] == "loaded:"


def test_an_unknown_command_suggests_the_nearest(fake_method: Path, run_pared: Pared) -> None:
    code, _, err = run_pared("lisst")
    assert code == 2
    assert "Did you mean 'list'" in err


def test_a_methods_own_commands_are_mounted_under_its_name(fake_method: Path, run_pared: Pared) -> None:
    assert run_pared("fake", "presets") == (0, "small large\n", "")
    code, out, _ = run_pared("fake", "--help")
    assert code == 0
    assert "List the presets." in out


def test_help_lists_methods_with_commands_without_importing_them(fake_method: Path, run_pared: Pared) -> None:
    _, out, _ = run_pared("--help")
    assert "What fake does." in out
    assert "fake.cli" not in sys.modules


def test_a_method_without_commands_says_what_it_offers(make_method: Callable[..., Path], run_pared: Pared) -> None:
    make_method("plain", demo="")
    code, _, err = run_pared("plain", "presets")
    assert code == 1
    assert "plain has no cli; it offers demo" in err


def test_the_version_is_told(run_pared: Pared) -> None:
    from pared_bench import __version__

    assert run_pared("--version") == (0, f"pared {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "expected"), [("pared de", "demo"), ("pared demo fa", "fake"), ("pared fake pre", "presets")]
)
def test_the_shell_completes_commands_and_methods(
    fake_method: Path, run_pared: Pared, monkeypatch: pytest.MonkeyPatch, words: str, expected: str
) -> None:
    monkeypatch.setenv("_PARED_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    code, out, _ = run_pared()
    assert code == 0
    assert expected in out.split()
