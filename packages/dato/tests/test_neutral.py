"""A policy that skips and prunes nothing changes nothing (acceptance 2)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dato import FULL, DaToConfig, Policy
from dato.apply import applied

NEUTRAL = DaToConfig(policy=Policy((FULL,) * 6, 0.0), min_tokens=1)
ACTIVE = DaToConfig(policy=Policy((FULL, 1, 0, 2, FULL, 1), 0.4), min_tokens=1)

MODELS = {
    "sd15": ("StableDiffusion", {}),
    "sd21": ("StableDiffusion", {"use_linear_projection": True, "attention_head_dim": (2, 4)}),
    "sdxl": ("StableDiffusionXL", {}),
    "dit": ("DiT", {}),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", ["hooks", "split"])
def test_images_are_bitwise_equal_to_the_plain_pipeline(pipeline, model, backend):
    if model == "dit" and backend == "split":
        pytest.skip("the split backend is for UNets")
    kind, changes = MODELS[model]
    pipe, run = pipeline(kind, steps=6, **changes)

    def sample():
        run["generator"].manual_seed(2)
        return np.asarray(pipe(**run).images)

    expected = sample()
    with applied(pipe, NEUTRAL.replace(backend=backend)):
        assert np.array_equal(sample(), expected)
    assert np.array_equal(sample(), expected)


@pytest.mark.parametrize("options", [{}, {"selection": "random"}, {"sign_flip_prob": 0.5}, {"seed": None}], ids=str)
def test_no_run_touches_the_global_random_state(pipeline, options):
    import random

    pipe, run = pipeline(steps=6)
    with applied(pipe, ACTIVE.replace(**options)):
        before = torch.get_rng_state(), random.getstate()
        pipe(**run)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]


def test_a_seed_reproduces_the_image_and_another_seed_changes_it(pipeline):
    pipe, run = pipeline(steps=6)

    def sample(seed):
        run["generator"].manual_seed(2)
        with applied(pipe, ACTIVE.replace(seed=seed)):
            return pipe(**run).images

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
