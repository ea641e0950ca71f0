"""Qwen3-VL adds features of middle layers of the tower: where they go when tokens have left (acceptance 8)."""

from __future__ import annotations

import pytest
import torch
from framefusion import FrameFusionConfig, applied
from framefusion.apply import install
from framefusion.baselines import Dropper

FAMILIES = ("qwen3-vl", "qwen3-vl-moe")
DUPLICATES = FrameFusionConfig(cost=0.75, similarity_threshold=0.9999)
"""A quarter of the tokens are repeated, and a quarter is what the budget asks for: nothing else happens."""


@torch.no_grad()
def states(model, inputs):
    return model(**inputs, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("name", FAMILIES)
def test_merging_a_repeated_frame_is_dropping_it(name, tiny, rng):
    family, model = tiny(name)
    inputs = family.batch(family.prompt(rng, ("text", 3), ("video", 4), ("text", 5)))
    pixels = torch.randn(4, 64, 96, generator=rng)
    pixels[2] = pixels[1]
    inputs["pixel_values_videos"] = pixels.reshape(256, 96)

    def strategy(layout, valid, budgets):
        def scores(dropper, hidden, importance):
            return (dropper.frame != 2).float()

        return Dropper(layout, valid, budgets, keep=0.75, stage=0, scores=scores)

    with applied(model, DUPLICATES) as handle:
        merged = states(model, inputs)
        assert handle.trace[0].after == (48,)
    with install(model, FrameFusionConfig(cost=1.0), strategy, None, "drop"):
        dropped = states(model, inputs)
    for ours, theirs in zip(merged[1:3], dropped[1:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_added_row_is_the_mean_over_the_group(tiny, rng):
    family, model = tiny("qwen3-vl")
    inputs = family.batch(family.prompt(rng, ("text", 3), ("video", 4), ("text", 5)))
    with applied(model, FrameFusionConfig(cost=0.4, similarity_threshold=0.995, merge_floor=0.05)) as handle:
        final = states(model, inputs)[-1]
        engine, groups = handle._engine, handle.groups[0]
        where = handle.layout.patch >= 0
        features = torch.randn(int(where.sum()), 64, generator=rng)
        token = engine._current.set(engine.last)
        added = model.model.language_model._deepstack_process(torch.zeros_like(final), where, features)[0]
        engine._current.reset(token)
    full = torch.zeros(where.shape[1], 64)
    full[where[0]] = features
    for row in range(len(added)):
        members = (groups == row) & where[0]
        expected = full[members].mean(0) if bool(members.any()) else torch.zeros(64)
        torch.testing.assert_close(added[row], expected, atol=1e-6, rtol=1e-5)
    assert (groups == -1).any()
