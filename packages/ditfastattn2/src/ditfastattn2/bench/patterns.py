"""What the heads of the trained model look like: near or far, the same for all prompts or not, text dense or not."""

from __future__ import annotations

import statistics

import torch
from pared_bench import BenchContext, Record

from ditfastattn2.bench.world import MODEL, STEPS, World
from ditfastattn2.patterns import HeadPattern, head_patterns, local_share

PROMPTS = 4


def observe(world: World, prompts: int = PROMPTS) -> list[HeadPattern]:
    """Look at the heads of the trained model over a run of a few prompts."""

    def run() -> None:
        generator = torch.Generator().manual_seed(world.seed)
        world.pipe(
            world.texts(prompts),
            num_inference_steps=STEPS,
            generator=generator,
            output_type="latent",
            **world.options(),
        )

    return head_patterns(world.pipe, run)


def run(context: BenchContext, world: World) -> list[Record]:
    """Numbers of every head, and of all together."""
    patterns = observe(world)
    settings = {"experiment": "patterns", "model": MODEL, "prompts": PROMPTS, "steps": STEPS, "window": "1/8"}
    records = []

    def add(name: str, metric: str, value: float) -> None:
        records.append(Record("ditfastattn2", name, metric, value, "", settings, samples=PROMPTS))

    for one in patterns:
        name = f"{one.layer} head {one.head}"
        add(name, "band_mass", statistics.mean(one.band))
        add(name, "band_mass_deviation", statistics.pstdev(one.band))
        add(name, "attention_to_text", one.to_text)
        add(name, "text_entropy", one.text_spread)
        add(name, "step_similarity", one.similarity)
    add("all heads", "local_share", local_share(patterns))
    spread = statistics.mean(statistics.pstdev(one.band) for one in patterns)
    add("all heads", "band_mass_deviation", spread)
    add("all heads", "band_mass_deviation_of_heads", statistics.pstdev([statistics.mean(one.band) for one in patterns]))
    return records
