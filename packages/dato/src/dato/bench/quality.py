"""Section 10.1: quality at equal cost, on the zoo's Stable Diffusion of the procedural world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.quality import attribute_accuracy, bootstrap, feature_distance, frechet_distance, psnr, ssim
from torch import Tensor

from dato.bench.arms import STEPS, Arm, Outcome, as_uint8, costs_of, nearest_steps, nearest_uniform, sample
from dato.config import DaToConfig
from dato.policy import PRESET_CALLS, Policy, preset_names

PRUNING = 0.4
"""Pruning ratio of the released code."""

REFERENCE_SEED = 30_000
REFERENCE_PICTURES = 500
FRECHET_STAGE = 3
"""Stage of EfficientNet-Lite0 whose pooled 112 channels the Frechet distance compares."""

PSNR_CEILING = 100.0
"""PSNR in dB of identical images."""


def run(context: BenchContext, pipe: Any, prompts: int, searched: Sequence[Policy] = ()) -> list[Record]:
    """Every arm on the same prompts and latents; `searched` policies come with arms of the same cost."""
    from pared_zoo.recipes.sd_world import GUIDANCE_SCALE, held_out_scenes
    from pared_zoo.world import caption

    scenes = held_out_scenes(prompts)
    texts = [caption(scene) for scene in scenes]
    judge = Judge(scenes)
    records = []
    base: Outcome | None = None
    for arm in arms(pipe, searched):
        outcome = sample(pipe, texts, arm, guidance_scale=GUIDANCE_SCALE, seed=context.seed, track=context.track)
        base = base or outcome
        records += judge.records(outcome, base)
    return records


def arms(pipe: Any, searched: Sequence[Policy] = ()) -> list[Arm]:
    """The unaccelerated run first, then for every policy its own arms and the baselines of its cost."""
    costs = costs_of(pipe, 1, DaToConfig())
    result = [Arm("base")]
    policies = {name: Policy.from_preset(name, PRESET_CALLS) for name in preset_names()}
    policies |= {f"searched-{i + 1}": policy for i, policy in enumerate(searched)}
    for name, policy in policies.items():
        pruned = policy if name.startswith("searched") else policy.with_ratio(PRUNING)
        target = pruned.cost(costs)
        result += [
            Arm(f"{name}: dato", DaToConfig(policy=pruned)),
            Arm(f"{name}: cache only", DaToConfig(policy=policy.with_ratio(0.0))),
            Arm(f"{name}: DeepCache uniform", DaToConfig(policy=nearest_uniform(costs, target))),
            Arm(f"{name}: fewer steps, PNDM", solver="pndm", steps=nearest_steps(costs, target, 1)),
            Arm(f"{name}: fewer steps, DPM-Solver++", solver="dpm++", steps=nearest_steps(costs, target, 0)),
        ]
        if name == "sd15-coco":
            result += [
                Arm(f"{name}: random pruned tokens", DaToConfig(policy=pruned), prunes_at_random=True),
                Arm(f"{name}: random bases", DaToConfig(policy=pruned, selection="random")),
                Arm(f"{name}: similarity bases (SiTo)", DaToConfig(policy=pruned, selection="similarity")),
                Arm(f"{name}: ToMeSD-like", DaToConfig(policy=pruned, selection="random", recover="base")),
                Arm(f"{name}: recover from bases", DaToConfig(policy=pruned, recover="base")),
            ]
    return result


class Judge:
    """Scores outcomes of one set of scenes against the unaccelerated images and against pictures of the world."""

    def __init__(self, scenes: Sequence[Any]) -> None:
        from pared_zoo.recipes.sd_world import RESOLUTION, SCENES
        from pared_zoo.world import render, sample_scenes

        self._scenes = scenes
        self._reference = _features(render(sample_scenes(REFERENCE_PICTURES, REFERENCE_SEED, SCENES), RESOLUTION))

    def scores(self, outcome: Outcome, base: Outcome) -> dict[str, Tensor | float]:
        """Per-image "psnr", "ssim", "feature_distance" to the base; "frechet", "accuracy" of the whole set."""
        images = outcome.images
        return {
            "psnr": psnr(images, base.images).clamp(max=PSNR_CEILING),
            "ssim": ssim(images, base.images),
            "feature_distance": feature_distance(images, base.images),
            "frechet": frechet_distance(_features(as_uint8(images)), self._reference),
            "accuracy": attribute_accuracy(images, self._scenes)["mean"],
        }

    def records(self, outcome: Outcome, base: Outcome) -> list[Record]:
        """The scores, FLOPs and seconds of one arm as records, with bootstrapped 95 % intervals."""
        settings = {"experiment": "quality", "model": "sd-world", "prompts": len(self._scenes), "steps": STEPS}
        units = {"psnr": "dB", "ssim": "", "feature_distance": "", "frechet": "", "accuracy": ""}
        records = []

        def add(metric: str, value: float, unit: str, spread: tuple[float, float] | None = None) -> None:
            records.append(
                Record("dato", outcome.arm.name, metric, value, unit, settings, spread, samples=len(self._scenes))
            )

        for metric, score in self.scores(outcome, base).items():
            if isinstance(score, Tensor):
                interval = bootstrap(lambda values: float(torch.as_tensor(values).mean()), score.tolist())
                add(metric, float(score.mean()), units[metric], (interval.low, interval.high))
            else:
                add(metric, float(score), units[metric])
        add("flops", outcome.flops, "FLOP")
        add("flops_ratio", base.flops / outcome.flops, "x")
        add("seconds", outcome.seconds, "s")
        add("speedup", base.seconds / outcome.seconds, "x")
        return records


def _features(pictures: Any) -> Tensor:
    from pared_zoo.real import efficientnet_features

    return efficientnet_features(pictures, maps=True)[FRECHET_STAGE].mean(dim=(2, 3))
