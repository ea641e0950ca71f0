"""What `pared bench sjd` measures: the law of the output, passes, quality, speed, and full size by replay."""

from __future__ import annotations

from pared_bench import BenchContext, Record

EXPERIMENTS = ("exactness", "count-model", "passes", "quality", "speed", "full-size")


def run(
    context: BenchContext,
    *,
    experiments: str = ",".join(EXPERIMENTS),
    images: int = 16,
    pictures: int = 512,
) -> list[Record]:
    """Measure `experiments` (names joined by commas) on the zoo's ar-world and emu3-world.

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
        from sjd.bench import exact

        records += exact.run(context)
    if "count-model" in chosen:
        from sjd.bench import counting

        records += counting.run(context, images)
    if {"passes", "quality", "speed", "full-size"} & set(chosen):
        from sjd.bench import full_size, passes, quality, speed
        from sjd.bench.world import Arm, World

        world = World.load(context.device, max(images, 64))
        if "passes" in chosen:
            records += passes.run(context, world, images)
        if "quality" in chosen:
            records += quality.run(context, world, pictures)
        if "speed" in chosen:
            records += speed.run(context, world)
        if "full-size" in chosen:
            arms = {"independent": Arm("independent", 15, "independent", "random"), "maximal": Arm("maximal", 31)}
            traces = {
                name: [image.committed for run in world.draw(arm, images, context.seed).runs for image in run.images]
                for name, arm in arms.items()
            }
            records += full_size.run(context, traces)
    return records
