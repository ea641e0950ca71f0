"""Pictures painted from prompts, and what the detector finds of the prompts in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pared_zoo.recipes.base import Track
from pared_zoo.world import Scene, attribute_accuracy, caption

BLOCK = 50


def load_pipeline(kind: Any, folder: Path) -> Any:
    """Read a pipeline of class ``kind`` back, in float32 and without progress bars."""
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def painted_accuracy(
    paint: Callable[[list[str], int], np.ndarray], scenes: Sequence[Scene], seed: int, track: Track
) -> dict[str, float]:
    """Attribute accuracy of a generator under the canonical captions of ``scenes``.

    Args:
        paint: gives uint8 pictures (prompts, side, side, 3) of up to ``BLOCK`` prompts and a seed.
        scenes: what is asked for.
        seed: the seed of a block of prompts is this plus the number of prompts before it.
        track: progress display.

    Returns:
        ``attribute_accuracy`` with ``accuracy_`` before each aspect.
    """
    pictures = [
        paint([caption(s) for s in scenes[start : start + BLOCK]], seed + start)
        for start in track(range(0, len(scenes), BLOCK), "paint", None)
    ]
    return {f"accuracy_{k}": float(v) for k, v in attribute_accuracy(np.concatenate(pictures), scenes).items()}
