"""Section 10.2: does caching flatten the dynamics of features, and does pruning bring them back?"""

from __future__ import annotations

from typing import Any

from pared_bench import BenchContext, Record

from dato.bench.arms import STEPS, initial_latents
from dato.bench.quality import PRUNING
from dato.config import DaToConfig
from dato.policy import Policy, preset_names
from dato.profile import dynamics_profile


def run(context: BenchContext, pipe: Any, prompts: int = 16) -> list[Record]:
    """Mean change of the last up unit's features over the calls of a run: unaccelerated, dato, cache only."""
    from pared_zoo.recipes.sd_world import GUIDANCE_SCALE, held_out_scenes
    from pared_zoo.world import caption

    texts = [caption(scene) for scene in held_out_scenes(prompts)]
    arguments = {
        "latents": initial_latents(pipe, prompts, context.seed).to(pipe.device, pipe.unet.dtype),
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
    }
    configs: dict[str, DaToConfig | None] = {"base": None}
    for name in preset_names():
        policy = Policy.from_preset(name)
        configs[f"{name}: dato"] = DaToConfig(policy=policy.with_ratio(PRUNING))
        configs[f"{name}: cache only"] = DaToConfig(policy=policy.with_ratio(0.0))
    settings = {"experiment": "mechanism", "model": "sd-world", "prompts": prompts, "steps": STEPS}
    records = []
    for name, config in context.track(configs.items(), "dynamics of features"):
        profile = dynamics_profile(pipe, texts, config, **arguments)
        records.append(Record("dato", name, "dynamics", float(profile[1:].mean()), "", settings, samples=prompts))
    return records
