"""What matching and the stores allocate (acceptance 9)."""

from __future__ import annotations

import pytest
import torch
from dato import FULL, DaToConfig, Policy
from dato.apply import applied
from dato.functional import match_tokens, select_base_tokens
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def peak_allocation(function):
    """Largest number of bytes that `function` holds at once beyond what existed before."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


@pytest.mark.parametrize(
    ("num_tokens", "channels", "limit"),
    [(4096, 64, 16 * MIB), pytest.param(16384, 320, 64 * MIB, marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_matching_holds_no_square_matrix(rng, num_tokens, channels, limit):
    side = int(num_tokens**0.5)
    metric = torch.randn(2, num_tokens, channels, generator=rng)
    score = torch.rand(2, num_tokens, generator=rng)

    def match():
        base = select_base_tokens(score, (side, side), (2, 2), cfg_aligned=True)
        return match_tokens(metric, base, int(0.4 * num_tokens))

    peak = peak_allocation(match)
    assert 0 < peak < limit
    assert peak < 2 * num_tokens**2 * 4


@torch.no_grad()
def test_the_stores_hold_one_feature_per_depth_and_are_empty_after_the_run(sd_unet, calls):
    inputs = calls(6)
    prediction = inputs[0][0].nbytes
    policy = Policy((FULL, 1, 1, 0, 1, 1), 0.0)
    with applied(sd_unet, DaToConfig(policy=policy)) as handle:
        for call in inputs[:-1]:
            sd_unet(*call)
        # Up unit 1 works at full resolution with 16 channels.
        feature = 2 * 16 * 16 * 16 * 4
        assert handle.stats()["memory_bytes"] == feature + 2 * prediction
        sd_unet(*inputs[-1])
        assert handle.stats()["memory_bytes"] == 0
        assert handle.stats()["peak_memory_bytes"] == feature + 2 * prediction
