"""The same on a GPU, where the fused kernel runs."""

from __future__ import annotations

from dataclasses import replace

import ditfastattn2
import pytest
import torch
from dfa_models import MODELS, Tiny
from dfa_spelled import Spelled
from ditfastattn2 import functional as f

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]


def on_gpu(tiny: Tiny) -> Tiny:
    original = tiny.arguments

    def arguments(x, t, text):
        return {name: one.cuda() if hasattr(one, "cuda") else one for name, one in original(x, t, text).items()}

    return replace(tiny, model=tiny.model.cuda(), sample=tiny.sample.cuda(), text=tiny.text.cuda(), arguments=arguments)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "hunyuan-video-15"])
def test_every_head_takes_its_method_at_every_step(name, plan_of):
    tiny = on_gpu(MODELS[name]())
    plan = plan_of(tiny)
    with Spelled(plan, tiny):
        expected = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan) as handle:
        result = tiny.denoise()
        assert handle.stats()["removed"] > 0
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("letters", ["a", "-ab"])
def test_caches_on_the_cpu_give_what_caches_on_the_gpu_give(letters, plan_of):
    tiny = on_gpu(MODELS["flux"]())
    plan = plan_of(tiny, letters)
    with ditfastattn2.applied(tiny.model, plan):
        expected = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan.replace(config=plan.config.replace(cache_device="cpu"))):
        assert tiny.denoise().equal(expected)


@pytest.mark.parametrize("block", [(128, 64), None])
def test_all_backends_agree(block, generator):
    q, k, v = (torch.randn(2, 1200, 3, 64, generator=generator).to("cuda", torch.bfloat16) for _ in range(3))
    valid = torch.tensor([200, 70], device="cuda")
    results = {
        backend: f.headwise_arrow_attention(q, k, v, [-1, 0, 100], 200, False, block, valid, backend=backend)
        for backend in ("triton", "flex", "sdpa")
    }
    for backend in ("flex", "sdpa"):
        torch.testing.assert_close(results[backend], results["triton"], atol=2e-2, rtol=2e-2)
