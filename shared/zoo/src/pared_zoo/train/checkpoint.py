"""Atomic checkpoints: a folder is written under a temporary name, renamed, and only then is the older one deleted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

PREFIX = "checkpoint-"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None."""
    found = sorted(p for p in folder.glob(f"{PREFIX}*") if p.suffix != ".tmp")
    return found[-1] if found else None


def save_checkpoint(folder: Path, step: int, module: torch.nn.Module, *states: Any) -> None:
    """Write weights and the state of optimizers, schedules and average after ``step`` steps."""
    from safetensors.torch import save_model

    target = folder / f"{PREFIX}{step:08d}"
    temporary = target.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_model(module, str(temporary / "model.safetensors"))
    torch.save({"step": step, "states": [s.state_dict() for s in states]}, temporary / "state.pt")
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    for older in folder.glob(f"{PREFIX}*"):
        if older != target:
            shutil.rmtree(older, ignore_errors=True)


def load_checkpoint(checkpoint: Path, module: torch.nn.Module, *states: Any) -> int:
    """Read a checkpoint back; returns the number of steps it holds."""
    from safetensors.torch import load_model

    load_model(module, str(checkpoint / "model.safetensors"))
    saved = torch.load(checkpoint / "state.pt", weights_only=True)
    for state, values in zip(states, saved["states"], strict=True):
        state.load_state_dict(values)
    return saved["step"]
