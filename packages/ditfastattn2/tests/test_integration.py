"""Beside what else people do to their models: compilation, offloading, LoRA, other caches, other backends."""

from __future__ import annotations

import ditfastattn2
import pytest
import torch
from dfa_models import MODELS
from dfa_pipelines import flux_pipeline, pipeline, wan_pipeline
from dfa_spelled import Spelled
from ditfastattn2 import Config
from pared_hooks import UnsupportedModelError
from torch._dynamo.utils import counters


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_compiled_blocks_are_whole_graphs_and_do_not_compile_anew_for_each_step(name, plan_of):
    tiny = MODELS[name]()
    plan = plan_of(tiny, steps=20)
    rows = list(plan.choices["cond"])
    # A layer whose heads are all reused takes the other path.
    rows[5] = rows[6] = rows[12] = " ".join("a" * layer.heads for layer in plan.layers)
    rows[4] = rows[11] = " ".join("-" * layer.heads for layer in plan.layers)
    plan = plan.replace(choices={"cond": tuple(rows)})
    with ditfastattn2.applied(tiny.model, plan):
        expected = tiny.denoise(20)
    torch._dynamo.reset()
    counters.clear()
    blocks = [*tiny.model.transformer_blocks, *getattr(tiny.model, "single_transformer_blocks", [])]
    with ditfastattn2.applied(tiny.model, plan):
        for block in blocks:
            block.compile(backend="eager", fullgraph=True)
        result = tiny.denoise(20)
        kinds = len({(type(block), getattr(block, "context_pre_only", None)) for block in blocks})
        assert counters["stats"]["unique_graphs"] <= 2 * kinds
        assert not counters["graph_break"]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_another_block_cache_may_skip_blocks(plan_of):
    from diffusers import FirstBlockCacheConfig

    tiny = MODELS["flux"]()
    plan = plan_of(tiny, "a", steps=4)
    with ditfastattn2.applied(tiny.model, plan) as handle:
        tiny.model.enable_cache(FirstBlockCacheConfig(threshold=1e6))
        with tiny.model.cache_context("cond"):
            result = tiny.denoise()
        assert result.isfinite().all()
        # The second block ran at the first step alone.
        assert handle.stats()["skipped_projections"] == 3
        tiny.model.disable_cache()
    tiny.denoise()


@torch.no_grad()
def test_blocks_can_be_offloaded_in_groups(plan_of):
    tiny = MODELS["flux"]()
    plan = plan_of(tiny)
    with ditfastattn2.applied(tiny.model, plan):
        expected = tiny.denoise()
    tiny.model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with ditfastattn2.applied(tiny.model, plan):
        assert tiny.denoise().equal(expected)


@torch.no_grad()
def test_lora_layers_are_part_of_the_model(plan_of):
    from peft import LoraConfig

    tiny = MODELS["flux"]()
    plan = plan_of(tiny, "b")
    with ditfastattn2.applied(tiny.model, plan):
        before = tiny.denoise()
    tiny.model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    plain = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan) as handle:
        compressed = tiny.denoise()
        assert handle.stats()["dense"] == {}
    assert (compressed - before).abs().max() > 1e-3
    assert (compressed - plain).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "cogvideox", "wan"])
def test_fused_projections_are_the_model_s_own(name, plan_of):
    tiny = MODELS[name]()
    plan = plan_of(tiny)
    with ditfastattn2.applied(tiny.model, plan):
        expected = tiny.denoise()
    tiny.model.fuse_qkv_projections()
    with ditfastattn2.applied(tiny.model, plan):
        torch.testing.assert_close(tiny.denoise(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_full_heads_go_to_the_backend_that_the_user_chose(plan_of):
    from diffusers.models import attention_dispatch as dispatch

    tiny = MODELS["flux"]()
    plan = plan_of(tiny, "-b")
    rows = ("-- --", "-b b-", "-- b-", "bb -b")
    plan = plan.replace(choices={"cond": rows})
    with ditfastattn2.applied(tiny.model, plan):
        expected = tiny.denoise()
    seen = []
    original = dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName._NATIVE_MATH]

    def counting(query, key, value, **options):
        seen.append(query.shape[2])
        return original(query, key, value, **options)

    registry = dispatch._AttentionBackendRegistry
    active = registry.get_active_backend()[0]
    registry._backends[dispatch.AttentionBackendName._NATIVE_MATH] = counting
    try:
        with ditfastattn2.applied(tiny.model, plan):
            tiny.model.set_attention_backend("_native_math")
            result = tiny.denoise()
        assert seen == [2, 2, 1, 1, 2, 1, 1], "two layers a step, their full heads"
        # What was chosen while the plan was applied stays.
        assert tiny.model.transformer_blocks[0].attn.processor._attention_backend == "_native_math"
    finally:
        registry._backends[dispatch.AttentionBackendName._NATIVE_MATH] = original
        registry.set_active_backend(active)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_pipeline_with_offloading_runs_by_its_plan():
    pipe = pipeline()
    config = Config(delta=4.0, coef=None, block=(16, 16), methods=("cached", "arrow:1/4"), min_cache_steps=1)
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "latent"}

    def sample():
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **options).images

    plan = ditfastattn2.calibrate(
        pipe,
        ["a blue square"],
        config,
        num_inference_steps=3,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
    )
    plain = sample()
    with ditfastattn2.applied(pipe, plan) as handle:
        expected = sample()
        assert handle.stats()["removed"] > 0
    assert sample().equal(plain)
    assert not expected.equal(plain)
    # What `enable_model_cpu_offload` puts on the models, without the GPU it asks for.
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module

    for early in (True, False):
        if early:
            add_hook_to_module(pipe.transformer, CpuOffload(execution_device="cpu"), append=True)
        with ditfastattn2.applied(pipe, plan) as handle:
            if not early:
                add_hook_to_module(pipe.transformer, CpuOffload(execution_device="cpu"), append=True)
            assert sample().equal(expected)
            assert handle.stats()["cache_misses"] == 0
            if not early:
                remove_hook_from_module(pipe.transformer)
        if early:
            remove_hook_from_module(pipe.transformer)
        assert sample().equal(plain)


@torch.no_grad()
@pytest.mark.parametrize(("name", "build"), [("wan", wan_pipeline), ("flux", flux_pipeline)])
def test_a_pipeline_that_calls_its_guidance_branches_apart_keeps_them_apart(name, build, plan_of):
    pipe, run = build()
    tiny = MODELS[name]()
    plan = plan_of(tiny, branches=("cond", "uncond"))
    with Spelled(plan, tiny, ("cond", "uncond")):
        expected = run(4)
    plain = run(4)
    with ditfastattn2.applied(pipe, plan) as handle:
        result = run(4)
        again = run(4)
        stats = handle.stats()
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert (result - plain).abs().max() > 1e-3
    assert again.equal(result)
    assert (stats["calls"], stats["cache_misses"], stats["dense"]) == (16, 0, {})
    assert stats["removed"] == pytest.approx(1 - plan.kept())


@torch.no_grad()
def test_a_pipeline_of_two_denoisers_is_refused_and_each_of_them_can_have_a_plan():
    pipe, run = wan_pipeline(two=True)
    plain = run(6)
    config = Config(delta=4.0, coef=None, block=(16, 16), methods=("cached", "arrow:1/4"), min_cache_steps=1)
    with pytest.raises(UnsupportedModelError, match="transformer_2"):
        ditfastattn2.calibrate(pipe, ["a fox"], config, num_inference_steps=6)
    plans = [
        ditfastattn2.calibrate(lambda prompts: run(6), ["a fox"], config, num_inference_steps=3, denoiser=model)
        for model in (pipe.transformer, pipe.transformer_2)
    ]
    assert plans[0].choices != plans[1].choices
    with pytest.raises(UnsupportedModelError, match="transformer_2"):
        ditfastattn2.apply(pipe, plans[0])
    first = ditfastattn2.apply(pipe.transformer, plans[0])
    second = ditfastattn2.apply(pipe.transformer_2, plans[1])
    for _ in range(2):
        assert run(6).isfinite().all()
    for handle, plan in ((first, plans[0]), (second, plans[1])):
        stats = handle.stats()
        assert (stats["calls"], stats["cache_misses"], stats["beyond_plan"]) == (12, 0, 0)
        assert stats["removed"] == pytest.approx(1 - plan.kept())
        assert stats["removed"] > 0.1
        handle.remove()
    assert run(6).equal(plain)


@torch.no_grad()
def test_a_run_from_a_picture_takes_the_steps_of_its_noise(plan_of):
    from diffusers import StableDiffusion3Img2ImgPipeline

    pipe = pipeline()
    config = Config(delta=1e6, coef=None, block=(16, 16), methods=("cached",), min_cache_steps=1)
    plan = ditfastattn2.calibrate(
        pipe,
        ["a circle"],
        config,
        num_inference_steps=4,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
    )
    rows = plan.choices["cond"]
    plan = plan.replace(choices={"cond": (rows[0], rows[0], rows[1], rows[0])})
    other = StableDiffusion3Img2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with ditfastattn2.applied(other, plan) as handle:
        options = {"image": image, "num_inference_steps": 4, "height": 64, "width": 64, "output_type": "latent"}
        # The last two of four steps: the first of them, number 2 of the plan, has nothing to reuse.
        other("a circle", strength=0.5, **options)
        stats = handle.stats()
        assert stats["calls"] == 2
        assert stats["cache_misses"] == sum(layer.heads for layer in plan.layers)
        handle.reset()
        # The last three: step 2 reuses step 1.
        other("a circle", strength=0.75, **options)
        stats = handle.stats()
        assert (stats["calls"], stats["cache_misses"]) == (3, 0)
        assert stats["removed"] == pytest.approx(1 / 3)


@torch.no_grad()
def test_half_precision_stays_half_precision(plan_of):
    tiny = MODELS["sd3"]()
    plan = plan_of(tiny)
    with ditfastattn2.applied(tiny.model, plan):
        expected = tiny.denoise()
        tiny.model.to(torch.bfloat16)
        tiny.sample, tiny.text = tiny.sample.bfloat16(), tiny.text.bfloat16()
        result = tiny.denoise()
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).norm() < 0.1 * expected.norm()
