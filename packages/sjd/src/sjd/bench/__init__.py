"""What `pared bench sjd` measures: the law of the output, passes, quality, speed, and full size by replay."""

from __future__ import annotations

import functools

from pared_bench import BenchContext, Record

from sjd.bench import assisted, counting, exact, full_size, passes, quality, speed
from sjd.bench.world import World

EXPERIMENTS = ("exactness", "count-model", "passes", "quality", "speed", "assisted", "full-size")


def run(
    context: BenchContext,
    *,
    experiments: str = ",".join(EXPERIMENTS),
    images: int = 16,
    pictures: int = 512,
) -> list[Record]:
    """Measure `experiments` (names joined by commas) on the zoo's ar-world and emu3-world, and on SmolLM2.

    `images` are drawn by every way that passes are counted for, `pictures` by every one whose quality is judged; with
    `--full`, 64 and 2000 unless given. Raises ValueError for an unknown experiment or fewer than two images.
    """
    chosen = [name.strip() for name in experiments.split(",") if name.strip()]
    if unknown := sorted(set(chosen) - set(EXPERIMENTS)):
        raise ValueError(f"experiments={unknown[0]!r} must be among {', '.join(EXPERIMENTS)}")
    for name, count in (("images", images), ("pictures", pictures)):
        if count < 2:
            raise ValueError(f"{name}={count!r} must be at least 2")
    if context.full:
        images, pictures = (64 if images == 16 else images), (2000 if pictures == 512 else pictures)
    records: list[Record] = []
    if "exactness" in chosen:
        records += exact.run(context)
    if "count-model" in chosen:
        records += counting.run(context, images)

    @functools.cache
    def world() -> World:
        return World.load(context.device, max(images, 64))

    if "passes" in chosen:
        records += passes.run(context, world(), images)
    if "quality" in chosen:
        records += quality.run(context, world(), pictures)
    if "speed" in chosen:
        records += speed.run(context, world())
    if "assisted" in chosen:
        records += assisted.run(context, 5 if context.full else 3)
    if "full-size" in chosen:
        records += full_size.run(context, world, images)
    return records
