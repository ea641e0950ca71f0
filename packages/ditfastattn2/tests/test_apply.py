"""What `apply` does to the real classes, against their own attention under the masks of the plan."""

from __future__ import annotations

import copy

import ditfastattn2
import pytest
import torch
from dfa_models import MODELS, Tiny
from dfa_spelled import Spelled
from ditfastattn2 import functional as f
from torch.nn.functional import scaled_dot_product_attention

NAMES = list(MODELS)


@pytest.fixture(params=NAMES)
def tiny(request) -> Tiny:
    return MODELS[request.param]()


@torch.no_grad()
def test_every_head_takes_its_method_at_every_step(tiny, plan_of):
    plan = plan_of(tiny)
    with Spelled(plan, tiny):
        expected = tiny.denoise()
    plain = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan) as handle:
        result = tiny.denoise()
        stats = handle.stats()
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert (plain - expected).abs().max() > 1e-3, "the plan changes nothing, the test says nothing"
    assert stats["cache_misses"] == 0
    assert stats["dense"] == {}
    assert stats["removed"] > 0


@torch.no_grad()
def test_a_full_plan_is_bit_identical_to_the_plain_model(tiny, plan_of):
    plain = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan_of(tiny, "-")) as handle:
        assert tiny.denoise().equal(plain)
        assert handle.stats()["removed"] == 0


@torch.no_grad()
def test_remove_restores_outputs_processors_and_modules(tiny, plan_of):
    modules = dict(tiny.model.named_modules())
    before = {name: dict(module.__dict__) for name, module in modules.items()}
    processors = {name: module.processor for name, module in modules.items() if hasattr(module, "processor")}
    contents = {name: dict(processor.__dict__) for name, processor in processors.items()}
    keys, plain = list(tiny.model.state_dict()), tiny.denoise()
    handle = ditfastattn2.apply(tiny.model, plan_of(tiny))
    tiny.denoise()
    handle.remove()
    handle.remove()
    assert tiny.denoise().equal(plain)
    assert list(tiny.model.state_dict()) == keys
    for name, module in modules.items():
        assert set(module.__dict__) == set(before[name]), name
        if name in processors:
            assert module.processor is processors[name]
            assert dict(module.processor.__dict__) == contents[name]


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan", "qwen-image", "flux"])
def test_separate_guidance_calls_have_caches_of_their_own(name, plan_of):
    tiny = MODELS[name]()
    texts = (tiny.text, -tiny.text)
    plan = plan_of(tiny, branches=("cond", "uncond"))
    assert plan.choices["cond"] != plan.choices["uncond"]
    with Spelled(plan, tiny, ("cond", "uncond")):
        expected = tiny.denoise(texts=texts)
    with ditfastattn2.applied(tiny.model, plan):
        together = tiny.denoise(texts=texts)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan", "qwen-image"])
def test_separate_branches_equal_two_runs_of_one_branch(name, plan_of):
    tiny = MODELS[name]()
    plan = plan_of(tiny)
    recorded = []
    with ditfastattn2.applied(tiny.model, plan):
        for t in torch.linspace(900, 50, 4):
            for text in (tiny.text, -tiny.text):
                arguments = tiny.arguments(tiny.sample * t / 900, t.expand(len(tiny.sample)), text)
                recorded.append(tiny.model(**arguments)[0])
    for branch, text in enumerate((tiny.text, -tiny.text)):
        with ditfastattn2.applied(tiny.model, plan):
            for step, t in enumerate(torch.linspace(900, 50, 4)):
                arguments = tiny.arguments(tiny.sample * t / 900, t.expand(len(tiny.sample)), text)
                torch.testing.assert_close(tiny.model(**arguments)[0], recorded[2 * step + branch])


@torch.no_grad()
def test_a_layer_of_cached_heads_alone_skips_its_projections(tiny, plan_of):
    plan = plan_of(tiny, "a")
    results = {}
    for skip in (True, False):
        counted = []
        plan_now = plan.replace(config=plan.config.replace(skip_projections=skip))
        with ditfastattn2.applied(tiny.model, plan_now) as handle:
            hooks = [
                module.register_forward_hook(lambda *_, name=name, counted=counted: counted.append(name))
                for name, module in tiny.model.named_modules()
                if name.endswith(("to_q", "to_qkv_mlp_proj")) and "attn2" not in name and "refiner" not in name
            ]
            results[skip] = tiny.denoise()
            stats = handle.stats()
            for hook in hooks:
                hook.remove()
        fused = sum("to_qkv_mlp_proj" in name for name in set(counted))
        layers = len(set(counted))
        expected = layers * 4 if not skip else (layers - fused) + 4 * fused
        assert len(counted) == expected
        assert (stats["skipped_projections"] > 0) == skip
        assert stats["removed"] == pytest.approx(0.75)
    assert results[True].equal(results[False])


@torch.no_grad()
def test_caches_hold_only_heads_that_the_next_step_reuses(plan_of):
    tiny = MODELS["flux"]()
    plan = plan_of(tiny, "-", steps=3)
    plan = plan.replace(choices={"cond": ("-- --", "a- --", "-- --")})
    with ditfastattn2.applied(tiny.model, plan) as handle:
        tiny.denoise(3)
        stats = handle.stats()
    tokens = tiny.vision + tiny.text.shape[1]
    assert stats["peak_cache_bytes"] == 1 * tokens * 1 * 16 * 4
    assert stats["cache_bytes"] == 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_caches_can_be_kept_in_fewer_bits_and_on_the_cpu(dtype, plan_of):
    tiny = MODELS["sd3"]()
    plain = tiny.denoise()
    # At the third step some of the heads that the second one passed on are computed.
    exact = plan_of(tiny, "a").replace(choices={"cond": ("---- ----", "aaaa aaaa", "a-ab aa--", "aaaa aaaa")})
    with ditfastattn2.applied(tiny.model, exact) as handle:
        expected = tiny.denoise()
        size = handle.stats()["peak_cache_bytes"]
    smaller = exact.replace(config=exact.config.replace(cache_dtype=dtype, cache_device="cpu"))
    with ditfastattn2.applied(tiny.model, smaller) as handle:
        result = tiny.denoise()
        assert handle.stats()["peak_cache_bytes"] == size // (2 if dtype == "float16" else 4)
    error = (result - expected).norm() / (plain - expected).norm()
    assert 0 < error < (0.01 if dtype == "float16" else 0.3)


def test_what_is_recalled_comes_back_to_the_device_and_type_of_the_model():
    from ditfastattn2 import interception
    from ditfastattn2.adapters.base import sites_of
    from pared_hooks import DenoiserView

    class Recalling:
        def recall(self, hook):
            return torch.ones(1, 4, 2, 8)

    site = sites_of(DenoiserView.of(MODELS["flux"]().model))[0]
    hook = interception.Hook(0, site, None, Recalling())
    hidden_states = torch.empty(1, 4, 16, device="meta", dtype=torch.bfloat16)
    result = interception._run_recall(hidden_states, None, 16, hook.number)
    assert (result.device.type, result.dtype, result.shape) == ("meta", torch.bfloat16, (1, 4, 16))


@torch.no_grad()
def test_a_run_can_be_repeated_and_statistics_reset(tiny, plan_of):
    with ditfastattn2.applied(tiny.model, plan_of(tiny)) as handle:
        first = tiny.denoise()
        again = tiny.denoise()
        assert handle.stats()["calls"] == 8
        handle.reset()
        assert handle.stats()["calls"] == 0
        assert tiny.denoise().equal(first)
    assert again.equal(first)


@torch.no_grad()
def test_a_run_that_starts_late_computes_what_it_cannot_reuse(plan_of):
    tiny = MODELS["sd3"]()
    plan = plan_of(tiny, "a")
    with ditfastattn2.applied(tiny.model, plan) as handle:
        # Without a scheduler the first call is step 0, which is full; after a reset in mid-run it is so again.
        t = torch.full((2,), 500.0)
        handle._replay.clock.start_run()
        handle._replay._plan = None
        plan_step_1 = plan.replace(choices={"cond": (plan.choices["cond"][1],) * 4})
        handle._replay._given = plan_step_1
        plain = tiny.model(**tiny.arguments(tiny.sample, t, tiny.text))[0]
        assert handle.stats()["cache_misses"] == 8
    expected = tiny.model(**tiny.arguments(tiny.sample, t, tiny.text))[0]
    assert plain.equal(expected)


@torch.no_grad()
def test_an_exception_in_mid_run_leaves_no_cache_behind(plan_of):
    tiny = MODELS["sd3"]()
    plan = plan_of(tiny, "a")
    with ditfastattn2.applied(tiny.model, plan) as handle:
        expected = tiny.denoise()
        calls = 0

        def fail(module, args, output):
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyError("broken")

        hook = tiny.model.proj_out.register_forward_hook(fail)
        with pytest.raises(KeyError):
            tiny.denoise()
        hook.remove()
        assert handle.stats()["cache_bytes"] == 0
        assert tiny.denoise().equal(expected)


@torch.no_grad()
def test_more_steps_than_the_plan_run_full_with_one_warning(plan_of):
    tiny = MODELS["sd3"]()
    plan = plan_of(tiny, "a", steps=2)
    with ditfastattn2.applied(tiny.model, plan) as handle:
        with pytest.warns(UserWarning, match="longer than the plan") as caught:
            tiny.denoise(5)
        assert len(caught) == 1
        assert handle.stats()["beyond_plan"] == 3


@torch.no_grad()
def test_another_batch_size_in_the_next_run_is_fine(plan_of):
    tiny = MODELS["sd3"]()
    plan = plan_of(tiny)
    with ditfastattn2.applied(tiny.model, plan):
        both = tiny.denoise()
        tiny.sample, tiny.text = tiny.sample[:1], tiny.text[:1]
        torch.testing.assert_close(tiny.denoise(), both[:1])


@torch.no_grad()
def test_another_text_length_is_fine(plan_of):
    tiny = MODELS["flux"]()
    plan = plan_of(tiny)
    tiny.text = torch.cat([tiny.text, tiny.text], dim=1)
    with Spelled(plan, tiny):
        expected = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan):
        torch.testing.assert_close(tiny.denoise(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_another_resolution_is_refused_unless_windows_may_follow(plan_of):
    tiny = MODELS["sd3"]()
    plan = plan_of(tiny)
    tiny.sample = torch.cat([tiny.sample, tiny.sample], dim=3)
    plain = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan), pytest.raises(ditfastattn2.PlanMismatch, match="128 vision tokens"):
        tiny.denoise()
    assert tiny.denoise().equal(plain)
    wider = plan.retarget(V=128)
    with Spelled(wider, tiny):
        expected = tiny.denoise()
    for fitting, strict in ((plan, False), (wider, True)):
        with ditfastattn2.applied(tiny.model, fitting, strict=strict):
            torch.testing.assert_close(tiny.denoise(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "flux2", "qwen-image"])
def test_reference_pictures_meet_everything_as_text_does(name, plan_of):
    tiny = MODELS[name]()
    plan = plan_of(tiny, "b")
    original = tiny.arguments
    reference = torch.randn(len(tiny.sample), 16, tiny.sample.shape[2], generator=torch.Generator().manual_seed(5))

    def arguments(x, t, text):
        call = original(x, t, text)
        call["hidden_states"] = torch.cat([x, reference], dim=1)
        if name != "qwen-image":
            ids = call["img_ids"][:16].clone()
            ids[:, 0] = 1
            call["img_ids"] = torch.cat([call["img_ids"], ids])
        else:
            call["img_shapes"] = [[(1, 8, 8), (1, 4, 4)]] * 2
        return call

    tiny.arguments = arguments
    text, vision = tiny.text.shape[1], tiny.vision
    seen = []

    class Masked(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function is not scaled_dot_product_attention:
                return function(*args, **kwargs)
            # In the order reference, text, picture the mask is an arrow; back in the order of the model it is not.
            order = [*range(text + vision, text + vision + 16), *range(text + vision)]
            block = plan.config.block
            blocks = f.arrow_block_map(vision, text + 16, 8, True, block)
            place = torch.arange(text + vision + 16)
            mask = torch.empty(len(order), len(order), dtype=torch.bool)
            mask[torch.tensor(order)[:, None], torch.tensor(order)[None, :]] = blocks[
                (place // block[0])[:, None], (place // block[1])[None, :]
            ]
            if kwargs.get("attn_mask") is not None:
                mask = mask & kwargs["attn_mask"]
            seen.append(len(seen) >= len(plan.layers))
            full = kwargs.get("attn_mask")
            return function(**(kwargs | {"attn_mask": mask if seen[-1] else full}))

    with Masked():
        expected = tiny.denoise(2)
    plan = plan.replace(num_steps=2, choices={"cond": plan.choices["cond"][:2]})
    with ditfastattn2.applied(tiny.model, plan):
        torch.testing.assert_close(tiny.denoise(2), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_38_heads_and_the_second_attention_without_text_are_handled(plan_of):
    import dfa_models

    tiny = dfa_models.sd3(dual=True, heads=38)
    plan = plan_of(tiny)
    assert [layer.text for layer in plan.layers] == ["last", None, "last"]
    with Spelled(plan, tiny):
        expected = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan):
        torch.testing.assert_close(tiny.denoise(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("first_frame", [True, False])
def test_texts_and_a_first_frame_count_without_their_padding(first_frame, plan_of):
    import dfa_models

    tiny = dfa_models.hunyuan_video_15(first_frame)
    plan = plan_of(tiny)
    with Spelled(plan, tiny):
        expected = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan) as handle:
        torch.testing.assert_close(tiny.denoise(), expected, atol=1e-5, rtol=1e-5)
        valid = handle._replay._reader.read(tiny.arguments(tiny.sample, torch.ones(2), tiny.text)).text_valid
    frame = 2 if first_frame else 0
    assert valid.tolist() == [4 + 3 + frame, 6 + 1 + frame]


@torch.no_grad()
def test_a_copy_of_a_patched_model_is_the_plain_model(plan_of):
    tiny = MODELS["flux"]()
    plain = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan_of(tiny)):
        tiny.model = copy.deepcopy(tiny.model)
        assert tiny.denoise().equal(plain)
