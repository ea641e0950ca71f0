"""StepClock in real diffusers pipelines and loops: run, call, step and branch of every denoiser call."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pared_hooks import ConfigError, Patch, StepClock
from pared_hooks._schedule import Schedule

_spec = importlib.util.spec_from_file_location("tiny_pipelines", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

SAMPLE = torch.zeros(1, 4, 8, 8)


def watched(pipeline, denoiser, **options):
    """A clock on the denoiser, and the list its states are appended to."""
    clock, states = StepClock(pipeline, **options), []
    patch = Patch("test")
    clock.attach(patch, denoiser)
    patch.add_hook(denoiser, "forward", lambda module, args, output: states.append(clock.state))
    return clock, states


def places(states):
    return [(state.run, state.call, state.step, state.branch) for state in states]


# name -> scheduler, timesteps entries for 4 steps, step of each entry
SCHEDULERS = {
    "ddim": (DDIMScheduler, [0, 1, 2, 3]),
    "euler": (EulerDiscreteScheduler, [0, 1, 2, 3]),
    "heun": (HeunDiscreteScheduler, [0, 0, 1, 1, 2, 2, 3]),
    "dpm++2m": (DPMSolverMultistepScheduler, [0, 1, 2, 3]),
    "pndm": (lambda: PNDMScheduler(skip_prk_steps=True), [0, 1, 1, 2, 3]),
    "pndm-prk": (lambda: PNDMScheduler(skip_prk_steps=False), None),
    "lcm": (LCMScheduler, [0, 1, 2, 3]),
}


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "pndm-prk"])
def test_batched_guidance_counts_every_scheduler_entry_once(name):
    scheduler, steps = SCHEDULERS[name]
    pipeline = tiny.stable_diffusion(scheduler())
    _, states = watched(pipeline, pipeline.unet)
    tiny.run_stable_diffusion(pipeline)
    assert places(states) == [(0, call, step, "both") for call, step in enumerate(steps)]
    assert {state.num_calls for state in states} == {len(steps)}
    assert {state.num_steps for state in states} == {4}


def test_runge_kutta_warm_up_calls_of_pndm_are_all_counted():
    pipeline = tiny.stable_diffusion(PNDMScheduler(skip_prk_steps=False))
    _, states = watched(pipeline, pipeline.unet)
    tiny.run_stable_diffusion(pipeline, steps=5)
    assert [state.call for state in states] == list(range(len(pipeline.scheduler.timesteps)))


@pytest.mark.parametrize("name", ["ddim", "heun", "pndm"])
def test_a_second_run_starts_again_with_its_own_number_of_steps(name):
    scheduler, steps = SCHEDULERS[name]
    pipeline = tiny.stable_diffusion(scheduler())
    _, states = watched(pipeline, pipeline.unet)
    tiny.run_stable_diffusion(pipeline, steps=4)
    first = len(states)
    tiny.run_stable_diffusion(pipeline, steps=6)
    second = states[first:]
    assert first == len(steps)
    assert [state.run for state in second] == [1] * len(second)
    assert [state.call for state in second] == list(range(second[0].num_calls))
    assert second[-1].num_steps == 6
    assert second[-1].step == 5


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm++2m", "pndm", "lcm"])
def test_image_to_image_starts_later_in_the_list_and_counts_from_zero(name):
    scheduler, _ = SCHEDULERS[name]
    pipeline = tiny.stable_diffusion(scheduler(), image_to_image=True)
    _, states = watched(pipeline, pipeline.unet)
    tiny.run_stable_diffusion(pipeline, steps=4, strength=0.5)
    total = len(pipeline.scheduler.timesteps)
    expected = total - 2 * pipeline.scheduler.order
    assert [state.call for state in states] == list(range(expected))
    assert {state.num_calls for state in states} == {expected}
    assert states[0].first_call == total - expected
    assert states[0].step == 0
    assert states[-1].step == states[-1].num_steps - 1


def test_guidance_off_calls_the_conditional_branch_alone():
    pipeline = tiny.stable_diffusion(DDIMScheduler())
    _, states = watched(pipeline, pipeline.unet)
    tiny.run_stable_diffusion(pipeline, guidance_scale=1.0)
    assert [state.branch for state in states] == ["cond"] * 4


def test_a_run_that_is_broken_off_does_not_spill_into_the_next():
    pipeline = tiny.stable_diffusion(EulerDiscreteScheduler())
    _, states = watched(pipeline, pipeline.unet)

    def stop(pipeline, step, timestep, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.run_stable_diffusion(pipeline, callback_on_step_end=stop)
    tiny.run_stable_diffusion(pipeline)
    assert places(states) == [(0, 0, 0, "both")] + [(1, call, call, "both") for call in range(4)]


def test_a_scheduler_changed_between_runs_is_followed():
    pipeline = tiny.stable_diffusion(DDIMScheduler())
    _, states = watched(pipeline, pipeline.unet)
    tiny.run_stable_diffusion(pipeline, steps=2)
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    tiny.run_stable_diffusion(pipeline, steps=2)
    assert places(states)[2:] == [(1, 0, 0, "both"), (1, 1, 0, "both"), (1, 2, 1, "both")]


def test_separate_guidance_calls_share_a_call_and_differ_in_branch():
    pipeline = tiny.wan(FlowMatchEulerDiscreteScheduler())
    _, states = watched(pipeline, pipeline.transformer)
    tiny.run_wan(pipeline, steps=3)
    tiny.run_wan(pipeline, steps=2)
    expected = [(0, call, call, branch) for call in range(3) for branch in ("cond", "uncond")]
    expected += [(1, call, call, branch) for call in range(2) for branch in ("cond", "uncond")]
    assert places(states) == expected


def test_separate_guidance_switched_off_leaves_the_conditional_branch():
    pipeline = tiny.wan(FlowMatchEulerDiscreteScheduler())
    _, states = watched(pipeline, pipeline.transformer)
    tiny.run_wan(pipeline, steps=2, guidance_scale=1.0)
    assert places(states) == [(0, 0, 0, "cond"), (0, 1, 1, "cond")]


@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.0])
def test_flux_which_scales_its_timesteps_is_followed(true_cfg_scale):
    pipeline = tiny.flux(FlowMatchEulerDiscreteScheduler())
    _, states = watched(pipeline, pipeline.transformer)
    tiny.run_flux(pipeline, steps=3, true_cfg_scale=true_cfg_scale)
    branches = ["cond"] if true_cfg_scale == 1.0 else ["cond", "uncond"]
    assert places(states) == [(0, call, call, branch) for call in range(3) for branch in branches]


def test_batched_guidance_with_flow_matching_counts_every_entry_once():
    pipeline = tiny.stable_diffusion_3(FlowMatchEulerDiscreteScheduler())
    _, states = watched(pipeline, pipeline.transformer)
    tiny.run_stable_diffusion_3(pipeline, steps=3)
    tiny.run_stable_diffusion_3(pipeline, steps=2, guidance_scale=1.0)
    expected = [(0, call, call, "both") for call in range(3)] + [(1, call, call, "cond") for call in range(2)]
    assert places(states) == expected


def test_the_forward_of_skip_layer_guidance_is_an_extra_of_its_call():
    pipeline = tiny.stable_diffusion_3(FlowMatchEulerDiscreteScheduler())
    _, states = watched(pipeline, pipeline.transformer)
    tiny.run_stable_diffusion_3(
        pipeline, steps=4, skip_guidance_layers=[1], skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.7
    )
    branches = {call: [state.branch for state in states if state.call == call] for call in range(4)}
    assert branches == {0: ["both"], 1: ["both", "extra"], 2: ["both", "extra"], 3: ["both"]}
    assert {state.run for state in states} == {0}


def test_a_run_that_ends_early_for_a_refiner_has_that_many_calls():
    pipeline = tiny.stable_diffusion_xl(EulerDiscreteScheduler())
    _, states = watched(pipeline, pipeline.unet)
    tiny.run_stable_diffusion_xl(pipeline, steps=5, denoising_end=0.6)
    tiny.run_stable_diffusion_xl(pipeline, steps=4)
    assert places(states[:3]) == [(0, call, call, "both") for call in range(3)]
    assert {(state.num_calls, state.num_steps) for state in states[:3]} == {(3, 3)}
    assert places(states[3:]) == [(1, call, call, "both") for call in range(4)]


def test_attaching_leaves_no_trace_after_removal():
    pipeline = tiny.wan(FlowMatchEulerDiscreteScheduler())
    before = set(pipeline.transformer.__dict__)
    patch = Patch("test")
    StepClock(pipeline).attach(patch, pipeline.transformer)
    tiny.run_wan(pipeline, steps=1)
    patch.remove()
    left = set(pipeline.transformer.__dict__) - before
    # `cache_context` of the pipeline makes an empty registry on any model.
    assert left <= {"_diffusers_hook"}
    assert not pipeline.transformer._forward_pre_hooks


def test_the_clock_does_not_keep_its_pipeline_alive():
    import gc
    import weakref

    pipeline = tiny.stable_diffusion(DDIMScheduler())
    reference, clock = weakref.ref(pipeline), StepClock(pipeline)
    del pipeline
    gc.collect()
    assert reference() is None
    assert clock.tick(SAMPLE, 5).call == 0


# Loops without a pipeline


def loop(clock, scheduler, steps, forwards=1, number=False, scale=None):
    scheduler.set_timesteps(steps)
    sample = SAMPLE
    for timestep in scheduler.timesteps:
        for _ in range(forwards):
            given = timestep.clone() if scale is None else timestep * scale
            yield clock.tick(sample, float(given) if number else given)
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(torch.zeros_like(sample), timestep, scaled)[0]


LOOPS = {name: case for name, case in SCHEDULERS.items() if name != "pndm-prk"} | {
    "unipc": (UniPCMultistepScheduler, [0, 1, 2, 3]),
    "kdpm2": (KDPM2DiscreteScheduler, [0, 0, 1, 1, 2, 2, 3]),
    "flow-euler": (FlowMatchEulerDiscreteScheduler, [0, 1, 2, 3]),
    "flow-heun": (FlowMatchHeunDiscreteScheduler, [0, 0, 1, 1, 2, 2, 3]),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("forwards", [1, 2])
def test_a_loop_with_only_a_scheduler(name, forwards):
    scheduler_class, steps = LOOPS[name]
    scheduler = scheduler_class()
    clock = StepClock(scheduler)
    branches = ["both"] if forwards == 1 else ["both", "uncond"]
    for run in range(2):
        states = list(loop(clock, scheduler, 4, forwards, number=True))
        assert [(s.call, s.step) for s in states] == [(c, s) for c, s in enumerate(steps) for _ in range(forwards)]
        assert {state.run for state in states} == {run}
        if run == 0:
            assert [state.branch for state in states][:forwards] == branches
        elif forwards == 2:
            assert [state.branch for state in states] == ["cond", "uncond"] * len(steps)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("forwards", [1, 2])
def test_a_loop_of_which_the_clock_knows_nothing_but_the_timesteps(name, forwards):
    scheduler_class, steps = LOOPS[name]
    clock = StepClock()
    for run in range(2):
        states = list(loop(clock, scheduler_class(), 4, forwards))
        assert [state.call for state in states] == [call for call in range(len(steps)) for _ in range(forwards)]
        assert {state.run for state in states} == {run}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("forwards", [1, 2])
def test_a_denoiser_that_gets_scaled_timesteps_is_followed_by_the_scheduler(name, forwards):
    scheduler_class, steps = LOOPS[name]
    scheduler = scheduler_class()
    clock = StepClock(scheduler)
    for _ in range(2):
        states = list(loop(clock, scheduler, 4, forwards, scale=1 / 7919))
        assert [(s.call, s.step) for s in states] == [(c, s) for c, s in enumerate(steps) for _ in range(forwards)]


def test_an_element_of_the_schedulers_timesteps_is_placed_without_reading_it():
    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(4)
    schedule = Schedule(scheduler, scheduler.timesteps)
    assert [schedule.position_of_view(timestep.expand(2)) for timestep in scheduler.timesteps] == [0, 1, 2, 3, 4]
    assert [schedule.position_of_view(timestep) for timestep in scheduler.timesteps[2:]] == [2, 3, 4]
    assert schedule.position_of_view(scheduler.timesteps[1].clone()) is None
    assert schedule.position_of_view(scheduler.timesteps[1:3]) is None
    assert schedule.position_of_view(17) is None


def test_calls_per_step_given_by_hand_names_the_first_branch_at_once():
    states = list(loop(StepClock(calls_per_step=2), DDIMScheduler(), 3, forwards=2))
    assert [state.branch for state in states] == ["cond", "uncond"] * 3


@settings(max_examples=50, deadline=None)
@given(
    num_calls=st.integers(1, 6),
    forwards=st.integers(1, 2),
    runs=st.integers(1, 3),
)
def test_a_run_of_announced_length_wraps_around(num_calls, forwards, runs):
    clock = StepClock(calls_per_step=forwards)
    clock.start_run(num_calls=num_calls)
    seen = [clock.tick(SAMPLE, 1000 - call) for _ in range(runs) for call in range(num_calls) for _ in range(forwards)]
    assert [(s.run, s.call) for s in seen] == [
        (run, call) for run in range(runs) for call in range(num_calls) for _ in range(forwards)
    ]
    assert clock.num_calls == num_calls


def test_reset_starts_a_new_run_in_the_middle():
    clock, runs = StepClock(), []
    clock.on_new_run(lambda: runs.append(clock.run))
    clock.tick(SAMPLE, 900)
    clock.tick(SAMPLE, 800)
    clock.reset()
    assert clock.tick(SAMPLE, 700).call == 0
    assert runs == [0, 1]


def test_a_shape_that_changes_in_a_run_is_reported_and_a_new_run_is_not():
    clock, changes = StepClock(), []
    clock.on_shape_change(lambda old, new: changes.append((old, new)))
    clock.tick(torch.zeros(1, 4, 9, 8, 8), 900)
    clock.tick(torch.zeros(1, 4, 5, 8, 8), 800)
    clock.tick(torch.zeros(1, 4, 9, 8, 8), 900)
    assert changes == [((1, 4, 9, 8, 8), (1, 4, 5, 8, 8))]


def test_an_extra_forward_with_a_smaller_batch_is_no_guidance_branch():
    clock = StepClock()
    for timestep in (900, 800, 700):
        assert clock.tick(torch.zeros(2, 4, 8, 8), timestep).branch == "both"
        assert clock.tick(torch.zeros(1, 4, 8, 8), timestep).branch == "extra"
    assert clock.call == 2


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_wrong_count_is_refused(value):
    with pytest.raises(ConfigError, match="is not valid: an integer >= 1"):
        StepClock().start_run(num_calls=value)
    with pytest.raises(ConfigError, match="calls_per_step"):
        StepClock(calls_per_step=value)


def test_asking_before_the_first_call_is_an_error():
    with pytest.raises(ConfigError, match="has not seen a denoiser call"):
        _ = StepClock().call


def test_attach_names_the_arguments_there_are():
    from torch import nn

    class Denoiser(nn.Module):
        def forward(self, sample, t):
            return sample

    with pytest.raises(ConfigError, match=r"timestep_name = 'timestep' is not valid: one of sample, t"):
        StepClock().attach(Patch("test"), Denoiser())
