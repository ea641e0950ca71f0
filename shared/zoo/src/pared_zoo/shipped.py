"""The trained models inside the wheel: names, directories, cards, loading."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "weights"
#: Largest size of one shipped model's weights.
MAX_BYTES = 8 * 1024 * 1024


def models() -> list[str]:
    """Names of the models that have a recipe, shipped or not."""
    from pared_zoo.recipes import RECIPES

    return sorted(RECIPES)


def path(name: str) -> Path:
    """The ``from_pretrained`` directory of a shipped model.

    Raises:
        ValueError: if there is no model of that name; the message lists those there are.
        FileNotFoundError: if the model has no trained weights here; the message gives the training command.
    """
    if name not in models():
        raise ValueError(f"name={name!r} must be one of {models()}")
    folder = FOLDER / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} has no trained weights here; train it with: pared zoo train {name}")
    return folder


def load(name: str) -> Any:
    """A shipped model, in float32 and evaluation mode: a diffusers pipeline or a model of a real class.

    Raises:
        ValueError, FileNotFoundError: as ``path``.
    """
    folder = path(name)
    from pared_zoo.recipes import recipe

    return recipe(name).load(folder)


def card(name: str) -> str:
    """The model card of a shipped model in Markdown.

    Raises:
        ValueError, FileNotFoundError: as ``path``.
    """
    return (path(name) / "README.md").read_text(encoding="utf-8")


def ship(exported: Path, name: str) -> Path:
    """Copy an exported and measured model into the package, from where the wheel takes it; returns its folder.

    Raises:
        ValueError: for an unknown name, a model without measurements, or weights beyond ``MAX_BYTES``.
    """
    if name not in models():
        raise ValueError(f"name={name!r} must be one of {models()}")
    if not (exported / "metrics.json").exists():
        raise ValueError(f"exported={str(exported)!r} has no metrics.json; train with evaluation first")
    size = sum(f.stat().st_size for f in exported.rglob("*.safetensors"))
    if size > MAX_BYTES:
        raise ValueError(f"exported={str(exported)!r} holds {size} bytes of weights; at most {MAX_BYTES} are shipped")
    with replace_folder(FOLDER / name) as target:
        shutil.copytree(exported, target, dirs_exist_ok=True)
        for file in target.rglob("config.json"):
            config = json.loads(file.read_text(encoding="utf-8"), object_hook=_as_shipped)
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return FOLDER / name


def _as_shipped(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, or one within it, without what only holds where it was trained."""
    # The libraries note where a part was loaded from: a folder of the machine that trained it.
    config.pop("_name_or_path", None)
    # transformers loads in the noted precision and diffusers in float32: a pipeline of both would not run.
    return config | {"dtype": "float32"} if "dtype" in config else config


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``target`` when the block ends well, and vanishes when it does not."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.exists():
            target.replace(old)
        try:
            temporary.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
