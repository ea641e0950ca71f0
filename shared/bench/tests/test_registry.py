from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pared_bench import registry
from pared_bench.errors import MissingExtraError, MissingPartError, UnknownMethodError

MakeMethod = Callable[..., Path]


def test_methods_are_found_by_their_entry_points(fake_method: Path) -> None:
    (method,) = registry.methods().values()
    assert (method.name, method.module, method.version) == ("fake", "fake", "1.2")
    assert method.summary == "What fake does."


def test_what_a_package_offers_is_told_without_importing_it(fake_method: Path) -> None:
    assert registry.find("fake").parts() == ("demo", "bench", "cli")
    assert "fake" not in sys.modules


def test_an_unknown_name_suggests_the_nearest(make_method: MakeMethod) -> None:
    make_method("framefusion")
    make_method("dato")
    with pytest.raises(UnknownMethodError, match="Did you mean 'framefusion'") as caught:
        registry.find("framefusoin")
    assert "Installed: dato, framefusion." in str(caught.value)


def test_with_nothing_installed_an_unknown_name_says_so(make_method: MakeMethod) -> None:
    with pytest.raises(UnknownMethodError, match="None is installed: pip install"):
        registry.find("dato")


def test_a_module_name_finds_the_method_too(make_method: MakeMethod) -> None:
    make_method("dlfr-vae")
    assert registry.find("dlfr_vae").name == "dlfr-vae"


def test_a_package_without_a_demo_says_what_it_offers(make_method: MakeMethod) -> None:
    make_method("fake", bench="")
    with pytest.raises(MissingPartError, match="fake has no demo; it offers bench"):
        registry.find("fake").load("demo")


def test_a_missing_extra_gives_the_pip_line(make_method: MakeMethod) -> None:
    make_method("fake", requires=("absent-zoo>=1",), demo="import absent_zoo.world")
    with pytest.raises(MissingExtraError, match=r"needs 'absent_zoo'.* Type: pip install 'fake\[demo\]'"):
        registry.find("fake").load("demo")


def test_the_pip_line_never_names_a_project_of_somebody_else(make_method: MakeMethod) -> None:
    make_method("dato", requires=("absent-zoo>=1", "pared-bench"), demo="import absent_zoo")
    with pytest.raises(MissingExtraError, match="pip install absent-zoo pared-bench") as caught:
        registry.find("dato").load("demo")
    assert "pip install 'dato" not in str(caught.value)


def test_a_missing_import_outside_any_extra_is_named_itself(make_method: MakeMethod) -> None:
    make_method("fake", demo="import absent_library")
    with pytest.raises(MissingExtraError, match="pip install absent-library"):
        registry.find("fake").load("demo")


def test_no_name_selects_every_method_with_that_part(make_method: MakeMethod) -> None:
    make_method("one", demo="")
    make_method("two", bench="")
    assert [method.name for method in registry.select([], "demo")] == ["one"]


def test_folders_of_a_checkout_are_read_where_nothing_is_installed(
    tmp_path: Path, make_method: MakeMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "shy"
    (package / "src" / "shy").mkdir(parents=True)
    (package / "src" / "shy" / "bench.py").write_text("")
    (package / "pyproject.toml").write_text(
        '[project]\nname = "shy"\nversion = "0.3"\n[project.entry-points."pared.methods"]\nshy = "shy"\n'
    )
    monkeypatch.setattr(registry, "workspace_root", lambda: tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (method,) = registry.methods().values()
    assert (method.name, method.version, method.parts()) == ("shy", "0.3", ("bench",))


def test_this_checkout_is_recognised() -> None:
    root = registry.workspace_root()
    assert root is None or (root / "shared" / "bench" / "pyproject.toml").is_file()
