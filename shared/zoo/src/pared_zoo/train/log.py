"""The loss log of a training run: a CSV file that resuming continues, and its plot."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

#: Steps averaged into one row.
ROW_STEPS = 20


class LossLog:
    """Means of every loss term over windows of ``ROW_STEPS`` steps, in ``folder/loss.csv``.

    Args:
        folder: where the file lies.
        start: steps already done; rows of later steps, which an interrupted run may have left, are dropped.
        enabled: whether this process writes the file.
    """

    def __init__(self, folder: Path, start: int, enabled: bool = True) -> None:
        self.path = folder / "loss.csv"
        self.enabled = enabled
        self._window: list[tuple[int, float, dict[str, torch.Tensor]]] = []
        self._rows = [r for r in _read(self.path) if int(r["step"]) <= start] if start else []
        self._before = float(self._rows[-1]["seconds"]) if self._rows else 0.0

    def add(self, step: int, seconds: float, terms: dict[str, torch.Tensor]) -> None:
        """Remember the scalar terms of one step, numbered from 0, without waiting for the device.

        ``seconds`` are counted from the start of this process's run.
        """
        self._window.append((step, seconds, {k: v.detach() for k, v in terms.items()}))
        if len(self._window) == ROW_STEPS:
            self._close_window()

    def flush(self) -> None:
        """Write the file, whole, under a temporary name first."""
        if self._window:
            self._close_window()
        if not self.enabled or not self._rows:
            return
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(self._rows[0]))
            writer.writeheader()
            writer.writerows(self._rows)
        temporary.replace(self.path)

    def copy(self, target: Path) -> None:
        """Keep the log beside an exported model."""
        self.flush()
        if self.path.exists():
            shutil.copyfile(self.path, target)

    def plot(self, target: Path) -> None:
        """Draw every term over steps."""
        names = [n for n in (self._rows[0] if self._rows else {}) if n not in ("step", "seconds")]
        with matplotlib.rc_context({"font.size": 8}):
            figure = Figure(figsize=(2.6 * max(1, len(names)), 2.2), layout="constrained")
            panels = figure.subplots(1, len(names), squeeze=False)[0] if names else ()
            for axes, name in zip(panels, names, strict=True):
                axes.plot([int(r["step"]) for r in self._rows], [float(r[name]) for r in self._rows], linewidth=0.8)
                axes.set(title=name, xlabel="step", yscale="log")
            figure.savefig(target, dpi=90)

    def _close_window(self) -> None:
        step, seconds, _ = self._window[-1]
        row = {"step": str(step + 1), "seconds": f"{self._before + seconds:.1f}"}
        for name in self._window[0][2]:
            row[name] = f"{torch.stack([terms[name] for _, _, terms in self._window]).float().mean().item():.6g}"
        self._rows.append(row)
        self._window.clear()


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
