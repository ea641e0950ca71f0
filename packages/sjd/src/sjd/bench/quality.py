"""Whether pictures are as good as those of plain sampling: Frechet distance and attributes, and a lossy control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.quality import attribute_accuracy, bootstrap, frechet_distance
from torch import Tensor

from sjd.bench.world import PLAIN, Arm, World

REFERENCE_SEED = 30_000
STAGE = 3
"""Stage of EfficientNet-Lite0 whose pooled channels the Frechet distance compares."""
BATCH = 64
RESAMPLES = 50
AGAIN = Arm("plain, another seed")
"""What differs from plain sampling by chance alone."""
LOSSY = Arm("relax 0.2, maximal, 16", 16, relax=0.2)
"""What must be told apart, or nothing is shown by what is not."""
ARMS = (
    PLAIN,
    AGAIN,
    Arm("independent, 16", 16, "independent", "random"),
    Arm("maximal, 16", 16),
    Arm("maximal, 32", 32),
    Arm("gumbel, 16", 16, "gumbel"),
    Arm("gumbel, match, 16", 16, "gumbel", verify="match"),
    LOSSY,
)


@dataclass
class Judged:
    """Features (images, channels) of an arm's pictures, and the share of attributes found in each (images,)."""

    features: Tensor
    right: Tensor


def run(context: BenchContext, world: World, images: int, arms: Sequence[Arm] = ARMS) -> list[Record]:
    """Each arm against rendered scenes; then its difference to plain sampling, the first arm, in standard errors.

    Pictures of the same scene are compared with each other: scenes are resampled, and arms with them.
    """
    from pared_zoo.recipes.sd_world import RESOLUTION, SCENES
    from pared_zoo.world import render, sample_scenes

    scenes = [world.scenes[i % len(world.scenes)] for i in range(images)]
    reference = features(render(sample_scenes(images, REFERENCE_SEED, SCENES), RESOLUTION))
    settings = {"experiment": "quality", "model": "ar-world", "images": images}
    records: list[Record] = []
    plain: Judged | None = None
    for number, arm in enumerate(context.track(arms, "drawing")):
        pictures = world.pictures(world.draw(arm, images, context.seed + 1 + number, batch=BATCH).tokens)
        found = Judged(
            features((pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()),
            _accuracies(pictures, scenes),
        )
        plain = found if plain is None else plain
        for metric, value, low, high in _levels(found, reference):
            records.append(Record("sjd", arm.name, metric, value, "", settings, (low, high), images))
        if found is not plain:
            for metric, value in differences(found, plain, reference).items():
                name = f"{metric} against plain"
                records.append(Record("sjd", arm.name, name, value, "standard errors", settings, samples=images))
    return records


def differences(found: Judged, plain: Judged, reference: Tensor) -> dict[str, float]:
    """Frechet distance and attribute accuracy of an arm minus those of plain sampling, in standard errors."""

    def distance(rows: Sequence[int]) -> float:
        first, second = (frechet_distance(one.features[list(rows)], reference) for one in (found, plain))
        return first - second

    every = range(len(found.features))
    error = bootstrap(distance, list(every), resamples=RESAMPLES).standard_error
    more = found.right - plain.right
    return {
        "Frechet distance": distance(every) / max(error, 1e-12),
        "attribute accuracy": float(more.mean() / (more.std() / len(more) ** 0.5).clamp(min=1e-12)),
    }


def _levels(found: Judged, reference: Tensor) -> list[tuple[str, float, float, float]]:
    """Each metric with its value and interval."""
    spread = bootstrap(lambda rows: frechet_distance(rows, reference), found.features, resamples=RESAMPLES)
    accuracy = float(found.right.mean())
    error = 1.96 * float(found.right.std()) / len(found.right) ** 0.5
    return [
        ("Frechet distance", frechet_distance(found.features, reference), spread.low, spread.high),
        ("attribute accuracy", accuracy, accuracy - error, accuracy + error),
    ]


def features(pictures: Any) -> Tensor:
    """Pooled features (images, channels) of uint8 pictures (images, height, width, 3)."""
    from pared_zoo.real import efficientnet_features

    blocks = [
        efficientnet_features(pictures[start : start + BATCH], maps=True)[STAGE].mean(dim=(2, 3))
        for start in range(0, len(pictures), BATCH)
    ]
    return torch.cat(blocks)


def _accuracies(pictures: Tensor, scenes: list[Any]) -> Tensor:
    """Share of the attributes found, picture by picture."""
    return torch.tensor(
        [
            attribute_accuracy(picture[None], [scene])["mean"]
            for picture, scene in zip(pictures, scenes, strict=True)
        ]
    )  # fmt: skip
