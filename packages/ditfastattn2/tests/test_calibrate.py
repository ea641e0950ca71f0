"""Making plans: what is chosen, that a plan replays its calibration, interruption, checkpoints."""

from __future__ import annotations

import json

import ditfastattn2
import pytest
import torch
from dfa_models import MODELS
from dfa_pipelines import pipeline
from ditfastattn2 import CalibrationError, Config, Plan
from ditfastattn2 import functional as f
from torch.nn.functional import scaled_dot_product_attention

SMALL = {"block": (16, 16), "methods": ("cached", "arrow:1/4", "arrow:1/8"), "min_cache_steps": 1}


def calibrated(tiny, config, steps=4, texts=None, **options):
    """The plan of a tiny model and the final sample of its calibration."""
    kept = []
    plan = ditfastattn2.calibrate(
        lambda prompts: kept.append(tiny.denoise(steps, texts=texts)),
        ["a prompt"],
        config,
        num_inference_steps=steps,
        denoiser=tiny.model,
        **options,
    )
    return plan, kept[0]


@torch.no_grad()
@pytest.mark.parametrize("methods", [SMALL["methods"], SMALL["methods"][1:]], ids=["all", "arrows"])
@pytest.mark.parametrize("name", MODELS)
def test_replaying_a_plan_gives_what_its_calibration_gave(name, methods):
    tiny = MODELS[name]()
    plain = tiny.denoise()
    plan, expected = calibrated(tiny, Config(delta=4.0, coef=None, **(SMALL | {"methods": methods})))
    assert tiny.denoise().equal(plain), "the model is not restored"
    with ditfastattn2.applied(tiny.model, plan) as handle:
        result = tiny.denoise()
        assert handle.stats()["cache_misses"] == 0
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert (result - plain).abs().max() > 1e-3, "the plan changes nothing, the test says nothing"


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_separate_guidance_gets_a_plan_for_each_branch(name):
    tiny = MODELS[name]()
    texts = (tiny.text, -tiny.text)
    plan, expected = calibrated(tiny, Config(delta=4.0, coef=None, **SMALL), texts=texts)
    assert set(plan.choices) == {"cond", "uncond"}
    assert plan.guidance == "separate"
    with ditfastattn2.applied(tiny.model, plan):
        torch.testing.assert_close(tiny.denoise(texts=texts), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_choices_are_those_of_the_errors_at_each_layer_on_the_compressed_trajectory():
    tiny = MODELS["flux"]()
    config = Config(delta=1.0, coef=1.5, **SMALL)
    plan, _ = calibrated(tiny, config, steps=3)
    chosen: list[str] = []
    before: dict[int, torch.Tensor] = {}

    class ByHand(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is not scaled_dot_product_attention:
                return function(*args, **(kwargs or {}))
            q, k, v = (kwargs[name].transpose(1, 2) for name in ("query", "key", "value"))
            full = function(**kwargs).transpose(1, 2)
            step, layer = divmod(len(chosen), 2)
            if step == 0:
                chosen.append("--")
                before[layer] = full
                return full.transpose(1, 2)
            candidates = [before[layer]] + [
                f.headwise_arrow_attention(q, k, v, [window] * 2, 6, True, (16, 16)) for window in (8, 4)
            ]
            rse = torch.stack([f.head_rse(one, full) for one in candidates], dim=1)
            saving = torch.tensor([f.method_saving(method, 64, 6) for method in config.methods])
            choice = f.solve_head_plan(rse, saving, 1.0, 1.5)
            chosen.append("".join("-abc"[int(method) + 1] for method in choice))
            before[layer] = full.clone()
            for head, method in enumerate(choice.tolist()):
                if method >= 0:
                    before[layer][:, :, head] = candidates[method][:, :, head]
            return before[layer].transpose(1, 2)

    with ByHand():
        tiny.denoise(3)
    assert plan.choices["cond"] == tuple(" ".join(chosen[2 * step : 2 * step + 2]) for step in range(3))


@torch.no_grad()
def test_a_larger_delta_removes_more_and_zero_removes_nothing():
    tiny = MODELS["sd3"]()
    kept = [calibrated(tiny, Config(delta=delta, **SMALL))[0].kept() for delta in (0.0, 0.2, 1.0, 5.0)]
    assert kept[0] == 1.0
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 0.6


@torch.no_grad()
def test_layers_that_would_save_too_little_are_full():
    tiny = MODELS["sd3"]()

    def densities(plan):
        return [plan.density_at("cond", step, layer) for step in range(4) for layer in range(len(plan.layers))]

    config = Config(delta=0.5, **SMALL)
    assert any(0.7 < density < 1 for density in densities(calibrated(tiny, config)[0]))
    found = densities(calibrated(tiny, config.replace(dense_above=0.7))[0])
    assert all(density <= 0.7 or density == 1 for density in found)
    assert min(found) <= 0.7


@torch.no_grad()
def test_first_and_last_steps_stay_full():
    tiny = MODELS["sd3"]()
    plan, _ = calibrated(tiny, Config(delta=1e6, coef=None, first_full_steps=2, last_full_steps=1, **SMALL), steps=5)
    full = ["-" in row or "a" in row for row in plan.choices["cond"]]
    assert [set(row) <= {"-", " "} for row in plan.choices["cond"]] == [True, True, False, False, True], full


@torch.no_grad()
def test_short_runs_reuse_nothing_unless_told_to():
    tiny = MODELS["sd3"]()
    options = {name: value for name, value in SMALL.items() if name != "min_cache_steps"}
    plan, _ = calibrated(tiny, Config(delta=1e6, coef=None, **options))
    assert "a" not in "".join(plan.choices["cond"])
    plan, _ = calibrated(tiny, Config(delta=1e6, coef=None, **options), steps=5)
    assert "a" in "".join(plan.choices["cond"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["cogvideox", "wan", "hunyuan-video"])
def test_video_heads_can_run_with_frames_side_by_side(name):
    tiny = MODELS[name]()
    config = Config(delta=1e6, coef=None, methods=("reorder_arrow:1/4",), block=(16, 16))
    plan, expected = calibrated(tiny, config)
    assert plan.frames == 3
    with ditfastattn2.applied(tiny.model, plan):
        torch.testing.assert_close(tiny.denoise(), expected, atol=1e-5, rtol=1e-5)
    plain, _ = calibrated(tiny, config.replace(methods=("arrow:1/4",)))
    with ditfastattn2.applied(tiny.model, plain):
        assert (tiny.denoise() - expected).abs().max() > 1e-3


@torch.no_grad()
def test_reordered_heads_attend_within_a_band_of_patches(generator):
    from ditfastattn2.heads import Inputs, Launch, compute
    from ditfastattn2.layout import Layout

    sequence = Layout(48, 6, frames=3).of_site("first")
    q, k, v = (torch.randn(1, 54, 2, 8, generator=generator) for _ in range(3))
    out = compute((Launch((4, -1), True, False),), Inputs(q, k, v, sequence), None, Config(exact_mask=True))
    patch = torch.arange(48) % 16 * 3 + torch.arange(48) // 16
    keep = torch.ones(54, 54, dtype=torch.bool)
    keep[6:, 6:] = (patch[:, None] - patch[None, :]).abs() <= 4
    parts = [one[:, :, :1].transpose(1, 2) for one in (q, k, v)]
    expected = scaled_dot_product_attention(*parts, attn_mask=keep).transpose(1, 2)
    torch.testing.assert_close(out[:, :, :1], expected)


@torch.no_grad()
def test_what_arrows_lacked_at_the_last_full_step_can_be_added():
    tiny = MODELS["sd3"]()
    times = torch.linspace(500, 499.99, 4)

    def outputs(prompts=None):
        """The outputs of calls that hardly differ, as those of a long run do."""
        calls = (tiny.arguments(tiny.sample, t.expand(2), tiny.text) for t in times)
        return torch.stack([tiny.model(**call)[0] for call in calls])

    plain, errors = outputs(), {}
    for method in ("arrow:1/8", "arrow:1/8+residual"):
        kept = []
        config = Config(delta=1e6, coef=None, block=(16, 16), methods=(method,))
        plan = ditfastattn2.calibrate(
            lambda prompts, kept=kept: kept.append(outputs()),
            ["a prompt"],
            config,
            num_inference_steps=4,
            denoiser=tiny.model,
        )
        with ditfastattn2.applied(tiny.model, plan) as handle:
            result = outputs()
            assert handle.stats()["cache_misses"] == 0
        torch.testing.assert_close(result, kept[0], atol=1e-5, rtol=1e-5)
        errors[method] = float((result - plain).norm())
    assert errors["arrow:1/8+residual"] < 0.02 * errors["arrow:1/8"]


@torch.no_grad()
def test_guidance_halves_can_be_shared_in_a_batched_pipeline():
    pipe = pipeline()
    config = Config(delta=1e6, coef=None, methods=("full+cfg",), block=(16, 16))
    plan = ditfastattn2.calibrate(
        pipe, ["a red circle"], config, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    )
    assert plan.guidance == "batched"
    assert plan.kept() == pytest.approx(0.75)
    tiny = MODELS["sd3"]()
    with pytest.raises(ValueError, match="not in one batch"):
        calibrated(tiny, config)


@torch.no_grad()
def test_shared_guidance_computes_the_conditional_half_and_copies_it(generator):
    from ditfastattn2.heads import Inputs, Launch, compute
    from ditfastattn2.layout import Layout

    sequence = Layout(48, 6, text_valid=torch.tensor([6, 2])).of_site("last")
    q, k, v = (torch.randn(2, 54, 2, 8, generator=generator) for _ in range(3))
    out = compute((Launch((-1, 4), False, True),), Inputs(q, k, v, sequence), None, Config(exact_mask=True))
    keep = torch.stack([torch.ones(54, 54, dtype=torch.bool), f.arrow_mask(48, 6, 4)])
    keep[:, :, 50:] = False
    parts = [one[1:].transpose(1, 2) for one in (q, k, v)]
    expected = scaled_dot_product_attention(*parts, attn_mask=keep).transpose(1, 2)
    torch.testing.assert_close(out, expected.expand_as(out))


@torch.no_grad()
def test_a_pipeline_is_calibrated_with_its_own_arguments():
    pipe = pipeline()
    steps = []
    plan = ditfastattn2.calibrate(
        pipe,
        ["a red circle", "a blue square"],
        Config(delta=4.0, coef=None, **SMALL),
        num_inference_steps=3,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        guidance_scale=3.0,
        progress=lambda step, total: steps.append((step, total)),
    )
    assert steps == [(0, 3), (1, 3), (2, 3)]
    assert (plan.model, plan.height, plan.scheduler) == (
        "SD3Transformer2DModel",
        64,
        "FlowMatchEulerDiscreteScheduler",
    )
    assert plan.guidance == "batched"
    with ditfastattn2.applied(pipe, plan) as handle:
        pipe("a red circle", num_inference_steps=3, height=64, width=64, output_type="latent")
        assert handle.stats()["removed"] == pytest.approx(1 - plan.kept())
        with pytest.raises(ditfastattn2.PlanMismatch, match="2 steps"):
            pipe("a red circle", num_inference_steps=2, height=64, width=64, output_type="latent")


@torch.no_grad()
def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path):
    tiny = MODELS["sd3"]()
    config = Config(delta=2.0, coef=None, **SMALL)
    path = tmp_path / "calibration.json"
    options = {"checkpoint": path, "generator": torch.Generator().manual_seed(0)}
    expected, _ = calibrated(tiny, config, steps=5)

    def stop(step, total):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(tiny, config, steps=5, progress=stop, **options)
    assert sorted(json.loads(path.read_text())["letters"]["cond"]) == ["0", "1", "2"]
    assert not hasattr(tiny.model, "_pared"), "something is left patched"
    solved = []
    original = f.solve_head_plan
    from ditfastattn2 import calibrate as module  # the function: its module is reached through it

    namespace = module.__globals__
    namespace["solve_head_plan"] = lambda *args: solved.append(1) or original(*args)
    try:
        plan, _ = calibrated(tiny, config, steps=5, **options)
    finally:
        namespace["solve_head_plan"] = original
    assert plan == expected
    assert len(solved) == 2 * 2


@torch.no_grad()
def test_a_calibration_that_is_interrupted_again_while_it_repeats_its_steps_loses_nothing(tmp_path):
    tiny = MODELS["flux"]()
    config = Config(delta=2.0, coef=None, **SMALL)
    path = tmp_path / "calibration.json"
    options = {"checkpoint": path, "generator": torch.Generator().manual_seed(0)}
    expected, _ = calibrated(tiny, config, steps=5)
    for last in (4, 2):

        def stop(step, total, last=last):
            if step == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrated(tiny, config, steps=5, progress=stop, **options)
        assert sorted(json.loads(path.read_text())["letters"]["cond"]) == ["0", "1", "2", "3"]
    assert calibrated(tiny, config, steps=5, **options)[0] == expected


@torch.no_grad()
def test_denoising_twice_is_refused():
    tiny = MODELS["flux"]()
    with pytest.raises(CalibrationError, match="one batch"):
        ditfastattn2.calibrate(
            lambda prompts: [tiny.denoise() for _ in prompts],
            ["a prompt", "another"],
            Config(**SMALL),
            num_inference_steps=4,
            denoiser=tiny.model,
        )
    assert not hasattr(tiny.model, "_pared")


@torch.no_grad()
def test_a_checkpoint_of_another_calibration_is_refused(tmp_path):
    tiny = MODELS["sd3"]()
    path = tmp_path / "calibration.json"
    options = {"checkpoint": path, "generator": torch.Generator().manual_seed(0)}
    calibrated(tiny, Config(delta=2.0, **SMALL), **options)
    with pytest.raises(ValueError, match="another model"):
        calibrated(tiny, Config(delta=3.0, **SMALL), **options)
    path.write_text("{}")
    with pytest.raises(ValueError, match="calibration file"):
        calibrated(tiny, Config(delta=2.0, **SMALL), **options)
    with pytest.raises(ValueError, match="generator"):
        calibrated(tiny, Config(delta=2.0, **SMALL), checkpoint=path)


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 2])
def test_outputs_that_are_not_finite_stop_the_calibration(step):
    tiny = MODELS["sd3"]()
    plain = tiny.denoise()
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        return output * torch.nan if len(calls) == step + 1 else output

    hook = tiny.model.transformer_blocks[1].attn.to_v.register_forward_hook(spoil)
    with pytest.raises(CalibrationError, match=rf"step {step}, layer transformer_blocks.1.attn"):
        calibrated(tiny, Config(**SMALL))
    hook.remove()
    assert tiny.denoise().equal(plain)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": "a prompt"}, "prompts"),
        ({"num_inference_steps": 1}, "num_inference_steps"),
        ({"config": {"delta": 1}}, "config"),
        ({"denoiser": None}, "pipe_or_step_fn"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    tiny = MODELS["sd3"]()
    arguments = {"prompts": ["a prompt"], "config": Config(**SMALL), "num_inference_steps": 4, "denoiser": tiny.model}
    arguments |= change
    with pytest.raises(ValueError, match=named):
        ditfastattn2.calibrate(tiny.model, **arguments)


@torch.no_grad()
def test_methods_that_do_not_fit_the_tokens_are_refused():
    tiny = MODELS["sd3"]()
    for method, message in (("arrow:1/64", "band is empty"), ("reorder_arrow:1/8", "one frame")):
        with pytest.raises(ValueError, match=message):
            calibrated(tiny, Config(methods=(method,)))
    assert not hasattr(tiny.model, "_pared")


@torch.no_grad()
@pytest.mark.parametrize("steps", [4, 30, 100])
def test_plans_of_many_steps_are_made_and_read(steps, tmp_path):
    tiny = MODELS["flux"]()
    plan, _ = calibrated(tiny, Config(delta=0.5, **SMALL), steps=steps)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with ditfastattn2.applied(tiny.model, plan):
        assert tiny.denoise(steps).isfinite().all()
