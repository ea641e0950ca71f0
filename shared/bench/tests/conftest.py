from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from pared_bench import registry
from pared_bench.environment import Environment

DEMO = """
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pared_bench import DemoResult, Figure, Table

if TYPE_CHECKING:
    from pared_bench import DemoContext


def run(
    context: DemoContext,
    *,
    prompt: str = "a red circle",
    steps: int = 2,
    scale: float | None = None,
    mode: Literal["fast", "good"] = "fast",
    guidance: bool = True,
    sizes: tuple[int, ...] = (1, 2),
    where: Path | None = None,
) -> DemoResult:
    for _ in context.track(range(steps), "sampling"):
        pass
    image = np.random.default_rng(context.seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return DemoResult(
        "Fake at work",
        f"Prompt `{prompt}` in {mode} mode & <more>.",
        [Table("Numbers", ["variant", "error"], [["base", 1.25], ["fake", None]], "a note")],
        [Figure.from_image("Pictures", image, "left, right")],
        {"speed-up": 2.5, "steps": float(steps)},
    )
"""

BENCH = """
from pared_bench import Record


def run(context, *, size: int = 4):
    return [
        Record("fake", "base", "time", 2.0, "ms", {"size": size}),
        Record("fake", "fake", "time", 1.0, "ms", {"size": size}, spread=(0.9, 1.1), samples=5),
        Record("fake", "fake", "energy", None, "J", {"size": size}, note="no counter here"),
    ]
"""

CLI = '''
import typer

app = typer.Typer(help="The fake method's own commands.")


@app.command()
def presets() -> None:
    """List the presets."""
    typer.echo("small large")
'''


@pytest.fixture
def make_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Install fake method packages, the only ones that the registry then sees."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    made: list[str] = []

    def entry_points(group: str) -> list[metadata.EntryPoint]:
        importlib.invalidate_caches()
        found = metadata.distributions(path=[str(site)])
        return [entry for dist in found for entry in dist.entry_points if entry.group == group]

    monkeypatch.setattr(registry.metadata, "entry_points", entry_points)
    monkeypatch.setattr(registry, "workspace_root", lambda: None)

    def make(name: str, requires: tuple[str, ...] = (), **parts: str) -> Path:
        module = name.replace("-", "_")
        made.append(module)
        package = site / module
        package.mkdir()
        (package / "__init__.py").write_text("")
        for part, source in parts.items():
            (package / f"{part}.py").write_text(source)
        info = site / f"{module}-1.2.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.2", f"Summary: What {name} does."]
        lines += [f'Requires-Dist: {need}; extra == "demo"' for need in requires]
        lines += ["Provides-Extra: demo"] if requires else []
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(f"[pared.methods]\n{name} = {module}\n")
        return package

    before = dict(sys.modules)
    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] in made]:
        del sys.modules[name]
    # A fake method may bear the name of a real one that other tests have imported.
    sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


@pytest.fixture
def fake_method(make_method: Callable[..., Path]) -> Path:
    """Install a method called "fake" with a demo, a bench and a command line, and return its package folder."""
    return make_method("fake", demo=DEMO, bench=BENCH, cli=CLI)


@pytest.fixture
def run_pared(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; returns exit code, standard output, standard error."""
    from pared_bench.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(arguments)
        except SystemExit as left:
            code = int(left.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def environment() -> Environment:
    return Environment(
        device="NVIDIA H200",
        slug="nvidia-h200",
        versions={"python": "3.12.1", "torch": "2.11.0"},
        commit="0123456789ab",
        date="2026-01-02T03:04:05Z",
        seed=7,
    )


@pytest.fixture
def forbid_writing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a folder refuse every new file, as it does to a user without permission: root's tests would write anyway."""
    opened, made = os.open, os.mkdir
    forbidden: list[Path] = []

    def check(path: object) -> None:
        if isinstance(path, (str, os.PathLike)) and any(Path(path).is_relative_to(folder) for folder in forbidden):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def refusing_open(path: object, flags: int, *rest: object, **options: object) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            check(path)
        return opened(path, flags, *rest, **options)  # type: ignore[arg-type]

    def refusing_mkdir(path: object, *rest: object, **options: object) -> None:
        check(path)
        made(path, *rest, **options)  # type: ignore[arg-type]

    def forbid(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        forbidden.append(folder)
        monkeypatch.setattr(os, "open", refusing_open)
        monkeypatch.setattr(os, "mkdir", refusing_mkdir)

    return forbid
