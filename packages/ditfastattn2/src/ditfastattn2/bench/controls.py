"""The other ways to spend the same attention: whole layers, one window for all, no text stripes, reuse, chance."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pared_hooks import DenoiserView, Patch
from torch import Tensor

from ditfastattn2.apply import OWNER, DiTFastAttnV2Handle
from ditfastattn2.calibrate import Calibration
from ditfastattn2.config import DiTFastAttnV2Config
from ditfastattn2.heads import Inputs
from ditfastattn2.interception import Hook
from ditfastattn2.layout import Tokens
from ditfastattn2.plan import FULL_LETTER, Plan
from ditfastattn2.replay import Replay
from ditfastattn2.run import Call


class LayerWise(Calibration):
    """Decides once for all heads of a layer: the most saving whose errors sum up to delta at most."""

    def decide(self, rse: Tensor, saving: Tensor) -> list[int]:
        total = rse.sum(0)
        open_methods = [method for method in range(len(saving)) if float(total[method]) <= self.config.delta]
        best = max(open_methods, key=lambda method: (float(saving[method]), -float(total[method])), default=-1)
        return [best] * len(rse)


def uniform(plan: Plan, window: tuple[int, int]) -> Plan:
    """Return a plan of the same model in which every head has one window, a share a/b, from the second step on."""
    return _constant(plan, f"arrow:{window[0]}/{window[1]}", every=0)


def window_of_density(plan: Plan, kept: float) -> tuple[int, int]:
    """Return the window, in 64ths of the picture, whose uniform plan keeps nearest to `kept`."""
    candidates = [(share, 64) for share in range(1, 64) if plan.num_vision * share // 64 >= 2]
    return min(candidates, key=lambda window: abs(uniform(plan, window).kept() - kept))


def every_nth(plan: Plan, interval: int) -> Plan:
    """Return a plan that computes all attention at every `interval`-th step and reuses all of it in between (FORA)."""
    return _constant(plan, "cached", every=interval)


def interval_of_density(plan: Plan, kept: float) -> int:
    """Return the interval whose plan keeps nearest to `kept`."""
    return min(range(1, plan.num_steps + 1), key=lambda interval: abs(every_nth(plan, interval).kept() - kept))


def shuffled(plan: Plan, seed: int) -> Plan:
    """Return the plan with the methods of each step dealt out anew to its heads."""
    draw = random.Random(seed)
    choices = {}
    for branch, rows in plan.choices.items():
        dealt = []
        for row in rows:
            letters = list(row.replace(" ", ""))
            draw.shuffle(letters)
            parts = iter(letters)
            dealt.append(" ".join("".join(next(parts) for _ in range(layer.heads)) for layer in plan.layers))
        choices[branch] = tuple(dealt)
    return plan.replace(choices=choices)


def _constant(plan: Plan, method: str, *, every: int) -> Plan:
    config: DiTFastAttnV2Config = plan.config.replace(methods=(method,))
    full, row = (" ".join(letter * layer.heads for layer in plan.layers) for letter in (FULL_LETTER, "a"))
    rows = tuple(full if step == 0 or (every and step % every == 0) else row for step in range(plan.num_steps))
    return plan.replace(config=config, choices=dict.fromkeys(plan.choices, rows), density=None)


class PureWindow(Replay):
    """Runs a plan as if text were part of the picture: bands alone, no stripes."""

    def run_site(self, hook: Hook, call: Call, inputs: Inputs) -> Tensor:
        # Windows are shares of the picture, here of all tokens: a little wider than with stripes.
        band = Tokens(inputs.q.shape[1], 0, False, 1, 0, 0)
        return super().run_site(hook, call, replace(inputs, sequence=band))


@contextmanager
def pure_window(pipe: Any, plan: Plan) -> Iterator[DiTFastAttnV2Handle]:
    """Run a pipeline by a plan without text stripes."""
    replay = PureWindow(DenoiserView.of(pipe), pipe, plan)
    with Patch(OWNER) as patch:
        replay.install(patch)
        with DiTFastAttnV2Handle(patch, replay, plan) as handle:
            yield handle


@contextmanager
def broadcast(pipe: Any, interval: int) -> Iterator[None]:
    """Let diffusers' Pyramid Attention Broadcast reuse attention outputs `interval` steps long in mid-run."""
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
    from diffusers.hooks import HookRegistry

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=(100, 950),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: float(pipe.scheduler.timesteps[pipe.scheduler.step_index or 0]),
    )
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    try:
        yield
    finally:
        registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        registry.remove_hook("pyramid_attention_broadcast", recurse=True)


_ASKED = ("query", "key")


class AttentionCounter(torch.overrides.TorchFunctionMode):
    """Counts the FLOPs of torch's attention inside the block, masked pairs included."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, key = (args[place] if place < len(args) else kwargs[name] for place, name in enumerate(_ASKED))
            self.flops += 4 * query.numel() * key.shape[-2]
        return function(*args, **kwargs)
