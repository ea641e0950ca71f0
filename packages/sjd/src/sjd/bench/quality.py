"""Whether pictures are as good as those of plain sampling: Frechet distance and attributes, and a lossy control."""

from __future__ import annotations

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
ARMS = (
    PLAIN,
    Arm("independent, 16", 16, "independent", "random"),
    Arm("maximal, 16", 16),
    Arm("maximal, 32", 32),
    Arm("gumbel, 16", 16, "gumbel"),
    Arm("gumbel, match, 16", 16, "gumbel", verify="match"),
    Arm("relax 0.2, maximal, 16", 16, relax=0.2),
)


def run(context: BenchContext, world: World, images: int) -> list[Record]:
    """Each arm against rendered scenes and against plain sampling with another seed; differences in standard errors."""
    from pared_zoo.recipes.sd_world import RESOLUTION, SCENES
    from pared_zoo.world import render, sample_scenes

    scenes = [world.scenes[i % len(world.scenes)] for i in range(images)]
    reference = features(render(sample_scenes(images, REFERENCE_SEED, SCENES), RESOLUTION))
    settings = {"experiment": "quality", "model": "ar-world", "images": images}
    records: list[Record] = []
    plain: tuple[float, float, float, float] | None = None
    for number, arm in enumerate(context.track(ARMS, "drawing")):
        tokens = world.draw(arm, images, context.seed + 1 + number, batch=BATCH).tokens
        pictures = world.pictures(tokens)
        found = features((pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        distance = frechet_distance(found, reference)
        spread = bootstrap(lambda rows: frechet_distance(rows, reference), found, resamples=50)
        right = _accuracies(pictures, scenes)
        accuracy = float(right.mean())
        error = float(right.std() / len(right) ** 0.5)
        for metric, value, low, high in (
            ("Frechet distance", distance, spread.low, spread.high),
            ("attribute accuracy", accuracy, accuracy - 1.96 * error, accuracy + 1.96 * error),
        ):
            records.append(Record("sjd", arm.name, metric, value, "", settings, (low, high), images))
        if plain is None:
            plain = (distance, spread.standard_error, accuracy, error)
            continue
        for metric, value, base, first, second in (
            ("Frechet distance against plain", distance, plain[0], spread.standard_error, plain[1]),
            ("attribute accuracy against plain", accuracy, plain[2], error, plain[3]),
        ):
            deviation = (value - base) / max((first**2 + second**2) ** 0.5, 1e-12)
            records.append(Record("sjd", arm.name, metric, deviation, "standard errors", settings, samples=images))
    return records


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
