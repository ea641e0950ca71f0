"""Model cards: written from the facts of a training run and the numbers of its evaluation, never by hand."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from pared_zoo.recipes import Recipe


def write_card(folder: Path, recipe: Recipe) -> Path:
    """Write ``README.md`` of an exported model from its ``training.json`` and ``metrics.json``."""
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    module = inspect.getmodule(type(recipe))
    title = (module.__doc__ or "").strip().splitlines()[0] if module else recipe.name
    schedule = facts["schedule"]
    samples = facts["steps"] * schedule["batch_size"]
    command = f"pared zoo train {recipe.name} --size {facts['size']} --seed {facts['seed']}"
    if facts["steps"] != recipe.schedule.steps:
        command += f" --steps {facts['steps']}"
    lines = [
        "---",
        "license: apache-2.0",
        f"library_name: {recipe.library}",
        "---",
        f"# {recipe.name}",
        "",
        title,
        "",
        f"Objective: {inspect.cleandoc(type(recipe).__doc__ or '')}",
        "",
        f"Load it with `pared_zoo.load({recipe.name!r})`, or with `from_pretrained(pared_zoo.path({recipe.name!r}))`.",
        "",
        "## Training",
        "",
        f"Size `{facts['size']}`, {facts['parameters']:,} trained parameters, seed {facts['seed']}: {facts['steps']:,} "
        f"steps of {schedule['batch_size']} samples ({samples:,} in all), peak learning rate "
        f"{schedule['learning_rate']:g}, averaged weights with decay {schedule['ema_decay']:g}. "
        f"Repeat it with `{command}`.",
        "",
        *_resumed(facts["starts"]),
        "![loss](loss.png)",
        "",
        "## Measured",
        "",
        "| quantity | value |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {_number(value)} |" for name, value in metrics.items()),
        "",
        "## Limits",
        "",
        "A small model of a toy world, made to measure acceleration methods on a real architecture.",
    ]
    target = folder / "README.md"
    temporary = target.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(target)
    return target


def _resumed(starts: list[list[int]]) -> list[str]:
    """A paragraph on a run whose length was changed on the way; ``starts`` are (first step, planned steps)."""
    if len(starts) == 1:
        return []
    parts = [f"from step {first:,} on it was planned for {steps:,} steps" for first, steps in starts]
    return [
        "The length of the run was changed on the way, and with it the learning rate: " + ", ".join(parts) + ".",
        "",
    ]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
