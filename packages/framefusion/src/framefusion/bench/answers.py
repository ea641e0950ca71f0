"""Accuracy and tokens at 30, 50, 70 and 85 % fewer vision tokens, by method, and what that says about the claim."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pared_bench import BenchContext, Record
from torch import Tensor

from framefusion.bench.arms import FASTV, OURS, WINDOW, Arm, arms
from framefusion.bench.claims import claim
from framefusion.bench.world import BLOCK, CALIBRATION_SEED, FRAMES, World
from framefusion.calibrate import calibrate
from framefusion.config import FrameFusionConfig

REDUCTIONS = (0.3, 0.5, 0.7, 0.85)
CLAIM, CLAIMED_LOSS = 0.7, 0.03
DENSE = "dense"
NEEDLE = "needle"


@dataclass
class Outcome:
    """Right answers by task for each stream of clips, and the costs of all prompts."""

    right: list[dict[str, list[float]]] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    pruned: list[bool] = field(default_factory=list)
    """For each prompt, whether anything was left for pruning to drop."""

    def means(self, task: str | None = None) -> list[float]:
        """Accuracy of each stream: of a task, or averaged over tasks."""
        if task is not None:
            return [sum(one[task]) / len(one[task]) for one in self.right]
        return [sum(sum(v) / len(v) for v in one.values()) / len(one) for one in self.right]


@dataclass(frozen=True)
class Block:
    """Prompts that are asked at once: their texts, the encoded clip of each, and what is asked."""

    inputs: dict[str, Any]
    features: Tensor
    asked: list[tuple[str, str]]
    """(task, right answer) of each."""


def calibrated(context: BenchContext, world: World, costs: Sequence[float]) -> list[FrameFusionConfig]:
    """FrameFusion at each cost with the threshold that changes the model's answers least, on clips of their own."""
    from pared_zoo.recipes.exam import exam, exam_pixels

    sheets = exam(1, CALIBRATION_SEED, FRAMES)
    features = world.encode(exam_pixels(sheets, CALIBRATION_SEED))
    texts = world.texts([next(iter(asked.values())).text for _, _, asked in sheets], FRAMES)
    batches = [{**texts, **world.encoded(features)}]
    return [calibrate(world.model, batches, cost, layout=world.layout) for cost in context.track(costs, "calibrate")]


def run(context: BenchContext, world: World, questions: int, seeds: int) -> list[Record]:
    """Ask every method the same questions about the same clips."""
    found = calibrated(context, world, [1 - reduction for reduction in REDUCTIONS])
    configs = dict(zip(REDUCTIONS, found, strict=True))
    outcomes: dict[tuple[str, float], Outcome] = {}
    for seed in range(seeds):
        blocks = list(exam_blocks(world, questions, seed))
        methods: dict[tuple[str, float], Arm | None] = {(DENSE, 0.0): None}
        for reduction, config in configs.items():
            for name, arm in arms(config, world.depth, world.layout, seed).items():
                methods[name, reduction] = arm
        for key, method in context.track(methods.items(), f"stream {seed + 1} of {seeds}", len(methods)):
            ask(world, blocks, method, outcomes.setdefault(key, Outcome()))
    return list(_records(world, outcomes, configs, questions, seeds))


def exam_blocks(world: World, questions: int, seed: int) -> Iterator[Block]:
    """So many questions of each task about one stream of clips; each clip is encoded once for all that is asked."""
    from pared_zoo.recipes.exam import EXAM_SEED, exam, exam_pixels

    first = EXAM_SEED + 1000 * seed
    sheets = exam(questions, first, FRAMES)
    features = world.encode(exam_pixels(sheets, first))
    asked = [(clip, task, one) for clip, (_, _, found) in enumerate(sheets) for task, one in found.items()]
    for start in range(0, len(asked), BLOCK):
        block = asked[start : start + BLOCK]
        inputs = world.texts([one.text for _, _, one in block], FRAMES)
        clips = torch.tensor([clip for clip, _, _ in block], device=features.device)
        yield Block(inputs, features[clips], [(task, one.answer) for _, task, one in block])


def ask(world: World, blocks: Iterable[Block], arm: Arm | None, outcome: Outcome) -> None:
    """Add the answers of one method, or of the dense model, about one stream of clips."""
    right: dict[str, list[float]] = {}
    handle = None if arm is None else arm(world.model)
    try:
        for block in blocks:
            for (task, answer), found in zip(block.asked, world.answer(block.inputs, block.features), strict=True):
                right.setdefault(task, []).append(float(found == answer))
            if handle is not None:
                kinds = zip(*(stage.kind for stage in handle.trace), strict=True)
                outcome.pruned += ["prune" in of_row for of_row in kinds]
        outcome.right.append(right)
        if handle is not None:
            stats = handle.stats()
            outcome.costs += stats["costs"]
            outcome.flops.append(stats["flops_ratio"])
    finally:
        if handle is not None:
            handle.remove()


def _records(
    world: World,
    outcomes: dict[tuple[str, float], Outcome],
    configs: dict[float, FrameFusionConfig],
    questions: int,
    seeds: int,
) -> Iterator[Record]:
    dense = outcomes[DENSE, 0.0]
    base = {
        "experiment": "answers",
        "model": world.name,
        "dtype": str(world.model.dtype).removeprefix("torch."),
        "questions_per_task": questions,
        "streams": seeds,
    }
    for (name, reduction), outcome in outcomes.items():
        settings = {**base, "reduction": reduction}
        samples = seeds * questions * len(outcome.right[0])
        means, needles = outcome.means(), outcome.means(NEEDLE)
        yield _spread(name, "accuracy", means, settings, samples)
        yield _spread(name, "accuracy on needles", needles, settings, seeds * questions)
        loss = [1 - mine / theirs for mine, theirs in zip(means, dense.means(), strict=True) if theirs > 0]
        if name != DENSE:
            if loss:
                yield _spread(name, "relative loss", loss, settings, samples)
            average = sum(outcome.costs) / len(outcome.costs)
            spread = (min(outcome.costs), max(outcome.costs))
            yield Record("framefusion", name, "cost", average, "", settings, spread, len(outcome.costs))
            flops = sum(outcome.flops) / len(outcome.flops)
            yield Record("framefusion", name, "FLOPs of the prefill", flops, "", settings)
    for reduction, config in configs.items():
        settings = {**base, "reduction": reduction}
        yield Record("framefusion", OURS, "threshold", config.similarity_threshold, "", settings)
        # Where nothing is left to prune, FrameFusion and merging alone are one and the same.
        pruned = outcomes[OURS, reduction].pruned
        share = sum(pruned) / len(pruned)
        yield Record("framefusion", OURS, "prompts that are pruned", share, "", settings, samples=len(pruned))
    yield from _claims(outcomes, base)


def _spread(name: str, metric: str, values: list[float], settings: dict[str, Any], samples: int) -> Record:
    return Record(
        "framefusion", name, metric, sum(values) / len(values), "", settings, (min(values), max(values)), samples
    )


def _claims(outcomes: dict[tuple[str, float], Outcome], base: dict[str, Any]) -> Iterator[Record]:
    dense = outcomes[DENSE, 0.0]
    # A model that has learnt nothing has nothing to lose.
    if min(dense.means()) > 0:
        loss = [1 - mine / theirs for mine, theirs in zip(outcomes[OURS, CLAIM].means(), dense.means(), strict=True)]
        settings = {**base, "experiment": "claims", "reduction": CLAIM}
        yield claim(f"relative loss below {CLAIMED_LOSS:.0%}", [CLAIMED_LOSS - one for one in loss], settings)
    for reduction in REDUCTIONS:
        settings = {**base, "experiment": "claims", "reduction": reduction}
        arms_here = {name: outcome for (name, at), outcome in outcomes.items() if at == reduction}
        ours = arms_here.pop(OURS)
        for name, other in arms_here.items():
            yield claim(f"above {name}", _differences(ours, other), settings)
        if reduction != CLAIM:
            continue
        yield claim("within 3 points of dense", [0.03 + one for one in _differences(ours, dense)], settings)
        if FASTV in arms_here:
            needles = _differences(ours, arms_here[FASTV], NEEDLE)
            yield claim("5 points above fastv on needles", [one - 0.05 for one in needles], settings)
        window = arms_here.pop(WINDOW)
        others = [one.means(NEEDLE) for one in (ours, *arms_here.values())]
        margins = [min(found) - last for *found, last in zip(*others, window.means(NEEDLE), strict=True)]
        yield claim("window worst on needles", margins, settings)


def _differences(first: Outcome, second: Outcome, task: str | None = None) -> list[float]:
    return [a - b for a, b in zip(first.means(task), second.means(task), strict=True)]
