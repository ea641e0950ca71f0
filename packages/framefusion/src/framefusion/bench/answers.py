"""Accuracy and tokens at 30, 50, 70 and 85 % fewer vision tokens, by method, and what that says about the claim."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from pared_bench import BenchContext, Record
from torch import Tensor

from framefusion.apply import FrameFusionHandle
from framefusion.bench.arms import OURS, arms
from framefusion.bench.world import CALIBRATION_SEED, FRAMES, World
from framefusion.calibrate import calibrate
from framefusion.config import FrameFusionConfig

REDUCTIONS = (0.3, 0.5, 0.7, 0.85)
CLAIM, CLAIMED_LOSS = 0.7, 0.03
BLOCK = 16
DENSE = "dense"
NEEDLE = "needle"


@dataclass
class Outcome:
    """Right answers by task for each stream of clips, and the costs of all prompts."""

    right: list[dict[str, list[float]]] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)

    def means(self, task: str | None = None) -> list[float]:
        """Accuracy of each stream: of a task, or averaged over tasks."""
        if task is not None:
            return [sum(one[task]) / len(one[task]) for one in self.right]
        return [sum(sum(v) / len(v) for v in one.values()) / len(one) for one in self.right]


def calibrated(context: BenchContext, world: World, cost: float, clips: int = 24) -> FrameFusionConfig:
    """FrameFusion at this cost with the threshold that changes the model's answers least, on clips of their own."""
    from pared_zoo.recipes.exam import exam, exam_pixels

    sheets = exam(max(1, clips // 16), CALIBRATION_SEED, FRAMES)[:clips]
    pixels = exam_pixels(sheets, CALIBRATION_SEED)
    questions = [next(iter(asked.values())).text for _, _, asked in sheets]
    batches = [
        world.prompts(pixels[start : start + BLOCK], questions[start : start + BLOCK])
        for start in range(0, len(sheets), BLOCK)
    ]
    return calibrate(world.model, context.track(batches, "calibrate", len(batches)), cost)


def run(context: BenchContext, world: World, questions: int, seeds: int) -> list[Record]:
    """Ask every method the same questions about the same clips."""
    configs = {reduction: calibrated(context, world, 1 - reduction) for reduction in REDUCTIONS}
    outcomes: dict[tuple[str, float], Outcome] = {}
    for seed in range(seeds):
        blocks = list(_blocks(world, questions, seed))
        _ask(context, world, blocks, None, outcomes.setdefault((DENSE, 0.0), Outcome()))
        for reduction, config in configs.items():
            for name, arm in arms(config, world.depth, world.layout, seed).items():
                handle = arm(world.model)
                try:
                    _ask(context, world, blocks, handle, outcomes.setdefault((name, reduction), Outcome()))
                finally:
                    handle.remove()
    return list(_records(world, outcomes, configs, questions, seeds))


def _blocks(world: World, questions: int, seed: int) -> Iterator[tuple[dict[str, Any], Tensor, list[tuple[str, str]]]]:
    """Arguments of the model, encoded clips, and (task, answer) of each prompt."""
    from pared_zoo.recipes.exam import EXAM_SEED, exam, exam_pixels

    first = EXAM_SEED + 1000 * seed
    sheets = exam(questions, first, FRAMES)
    pixels = exam_pixels(sheets, first)
    asked = [(clip, task, one) for clip, (_, _, found) in enumerate(sheets) for task, one in found.items()]
    for start in range(0, len(asked), BLOCK):
        block = asked[start : start + BLOCK]
        frames = pixels[torch.tensor([clip for clip, _, _ in block])]
        inputs = world.prompts(frames, [one.text for _, _, one in block])
        yield inputs, world.encode(inputs), [(task, one.answer) for _, task, one in block]


def _ask(
    context: BenchContext, world: World, blocks: list[Any], handle: FrameFusionHandle | None, outcome: Outcome
) -> None:
    right: dict[str, list[float]] = {}
    for inputs, features, wanted in context.track(blocks, "ask", len(blocks)):
        for (task, answer), found in zip(wanted, world.answer(inputs, features), strict=True):
            right.setdefault(task, []).append(float(found == answer))
    outcome.right.append(right)
    if handle is not None:
        stats = handle.stats()
        outcome.costs += stats["costs"]
        outcome.flops.append(stats["flops_ratio"])


def _records(
    world: World,
    outcomes: dict[tuple[str, float], Outcome],
    configs: dict[float, FrameFusionConfig],
    questions: int,
    seeds: int,
) -> Iterator[Record]:
    dense = outcomes[DENSE, 0.0]
    base = {"experiment": "answers", "model": world.name, "questions_per_task": questions, "streams": seeds}
    for (name, reduction), outcome in outcomes.items():
        settings = {**base, "reduction": reduction}
        samples = seeds * questions * len(outcome.right[0])
        means, needles = outcome.means(), outcome.means(NEEDLE)
        yield _spread(name, "accuracy", means, settings, samples)
        yield _spread(name, "accuracy on needles", needles, settings, seeds * questions)
        loss = [1 - mine / theirs for mine, theirs in zip(means, dense.means(), strict=True) if theirs > 0]
        if name != DENSE and loss:
            yield _spread(name, "relative loss", loss, settings, samples)
            average = sum(outcome.costs) / len(outcome.costs)
            spread = (min(outcome.costs), max(outcome.costs))
            yield Record("framefusion", name, "cost", average, "", settings, spread, len(outcome.costs))
            flops = sum(outcome.flops) / len(outcome.flops)
            yield Record("framefusion", name, "FLOPs of the prefill", flops, "", settings)
    for reduction, config in configs.items():
        value = config.similarity_threshold
        yield Record("framefusion", OURS, "threshold", value, "", {**base, "reduction": reduction})
    yield from _claims(outcomes, base)


def _spread(name: str, metric: str, values: list[float], settings: dict[str, Any], samples: int) -> Record:
    return Record(
        "framefusion", name, metric, sum(values) / len(values), "", settings, (min(values), max(values)), samples
    )


def _claims(outcomes: dict[tuple[str, float], Outcome], base: dict[str, Any]) -> Iterator[Record]:
    """Each claim as a margin: positive where it holds here."""

    def accuracy(name: str, task: str | None = None) -> float:
        means = outcomes[name, CLAIM if name != DENSE else 0.0].means(task)
        return sum(means) / len(means)

    settings = {**base, "experiment": "claims", "reduction": CLAIM}
    margins = {}
    if accuracy(DENSE) > 0:
        loss = 1 - accuracy(OURS) / accuracy(DENSE)
        verdict = "reproduced" if loss < CLAIMED_LOSS else "not reproduced"
        margins[f"relative loss below {CLAIMED_LOSS:.0%}: {verdict}"] = CLAIMED_LOSS - loss
    margins["within 3 points of dense"] = 0.03 - (accuracy(DENSE) - accuracy(OURS))
    if ("fastv", CLAIM) in outcomes:
        margins["5 points above fastv on needles"] = accuracy(OURS, NEEDLE) - accuracy("fastv", NEEDLE) - 0.05
    for half in ("similarity alone", "importance alone", "evs", "random", "uniform frames"):
        margins[f"above {half}"] = accuracy(OURS) - accuracy(half)
    others = [name for name, reduction in outcomes if reduction == CLAIM and name != "window"]
    margins["window worst on needles"] = min(accuracy(one, NEEDLE) for one in others) - accuracy("window", NEEDLE)
    for claim, margin in margins.items():
        # The name of a record must not depend on its outcome: a later run replaces it.
        name, _, verdict = claim.partition(": ")
        yield Record("framefusion", name, "margin", margin, "", settings, note=verdict)
