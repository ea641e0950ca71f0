"""What a recipe of a zoo model has to say; the training loop in ``pared_zoo.train`` does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

Batch = dict[str, torch.Tensor]
Track = Callable[[Iterable[Any], str, int | None], Iterable[Any]]


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train.

    Attributes:
        steps: optimizer steps.
        batch_size: samples of one step over all processes.
        learning_rate: peak of a linear warm-up followed by a cosine to zero.
        warmup: steps of the warm-up.
        ema_decay: decay of the averaged weights that are exported.
        muon_learning_rate: the same peak for the recipe's ``muon_parameters``.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    ema_decay: float = 0.999
    muon_learning_rate: float | None = None


class Recipe(ABC):
    """One model of the zoo: its architecture, data, loss, export and measurement.

    A batch depends only on the seed, the step and the rank: a resumed run sees the data of an uninterrupted one.
    """

    name: ClassVar[str]
    #: The library whose class the model is of.
    library: ClassVar[str] = "diffusers"
    schedules: ClassVar[dict[str, Schedule]]

    def __init__(self, size: str = "small", seed: int = 0) -> None:
        if size not in self.schedules:
            raise ValueError(f"size={size!r} must be one of {sorted(self.schedules)}")
        self.size, self.seed, self.schedule = size, seed, self.schedules[size]

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """The trainable module, freshly initialised from ``seed``."""

    def prepare(self, folder: Path, device: torch.device, track: Track) -> None:  # noqa: B027
        """Make what every batch needs, once; what costs time is kept in ``folder`` so that resuming finds it."""

    @abstractmethod
    def batch(self, step: int, rank: int, size: int) -> Batch:
        """``size`` samples for process ``rank`` at ``step``, on the CPU."""

    @abstractmethod
    def loss(self, module: torch.nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Named terms; ``"loss"`` is minimised, the others are logged."""

    def muon_parameters(self, module: torch.nn.Module) -> list[torch.nn.Parameter]:
        """Matrices of ``module`` that Muon (Jordan et al. 2024) steps instead of AdamW; none unless a recipe says so.

        Transformers learn from half the samples so; embeddings and the last layer stay with AdamW.
        """
        return []

    @abstractmethod
    def save(self, module: torch.nn.Module, folder: Path) -> None:
        """Write the directory that ``from_pretrained`` of the real class reads."""

    @abstractmethod
    def evaluate(self, folder: Path, device: torch.device, track: Track) -> dict[str, float]:
        """Measure an exported directory; the numbers of the model card."""

    def seed_of(self, *stream: int) -> int:
        """A seed for one use of randomness, unrelated to those of other uses."""
        return int(np.random.SeedSequence([self.seed, *stream]).generate_state(1, np.uint32)[0])

    @staticmethod
    @abstractmethod
    def load(folder: Path) -> Any:
        """Read an exported directory back, in float32 and evaluation mode."""
