"""Runs do not leak into each other (acceptance 8)."""

from __future__ import annotations

import threading

import pytest
import torch
from dato import FULL, DaToConfig, Policy
from dato.apply import apply

CONFIG = DaToConfig(policy=Policy((FULL, 1, 0, 2, 1, 0), 0.4), min_tokens=1)


@pytest.fixture
def two_unets(small_unet):
    """Two patched UNets with different weights."""
    unets = [small_unet(), small_unet(layers_per_block=2)]
    handles = [apply(unet, CONFIG) for unet in unets]
    yield unets
    for handle in handles:
        handle.remove()


def run(unet, inputs):
    with torch.no_grad():
        return [unet(*call).sample for call in inputs]


def test_interleaved_models_give_what_each_gives_alone(two_unets, calls):
    inputs = [calls(6), calls(6)]
    alone = [run(unet, calls_of) for unet, calls_of in zip(two_unets, inputs, strict=True)]
    for step in range(6):
        for unet, calls_of, expected in zip(two_unets, inputs, alone, strict=True):
            assert torch.equal(run(unet, [calls_of[step]])[0], expected[step])


def test_two_threads_with_two_models_do_not_disturb_each_other(two_unets, calls):
    inputs = [calls(6), calls(6)]
    alone = [run(unet, calls_of) for unet, calls_of in zip(two_unets, inputs, strict=True)]
    results = [None, None]

    def work(index):
        results[index] = [run(two_unets[index], inputs[index]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for repeats, expected in zip(results, alone, strict=True):
        for repeat in repeats:
            assert all(torch.equal(one, other) for one, other in zip(repeat, expected, strict=True))


def test_the_batch_size_may_change_between_runs(two_unets, calls):
    unet = two_unets[0]
    small, large = calls(6), calls(6, batch=4)
    first = run(unet, small)
    assert [output.shape[0] for output in run(unet, large)] == [4] * 6
    assert all(torch.equal(one, other) for one, other in zip(run(unet, small), first, strict=True))


def test_a_batch_that_changes_in_the_middle_of_a_run_computes_everything_once_and_warns(two_unets, calls):
    unet = two_unets[0]
    before, after = calls(2), calls(6, batch=1)[2:]
    outputs = run(unet, before)
    with pytest.warns(UserWarning, match="in the middle of a run"):
        outputs += run(unet, after[:1])
    outputs += run(unet, after[1:2])
    assert [output.shape[0] for output in outputs] == [2, 2, 1, 1]


def test_a_second_run_does_not_see_the_first(two_unets, calls):
    unet = two_unets[0]
    first = calls(6)
    expected = run(unet, first)
    run(unet, [(sample + 1, timestep, text) for sample, timestep, text in calls(6)])
    assert all(torch.equal(one, other) for one, other in zip(run(unet, first), expected, strict=True))


def test_a_rising_timestep_starts_a_new_run(two_unets, calls):
    unet = two_unets[0]
    inputs = calls(6)
    expected = run(unet, inputs)
    run(unet, inputs[:3])
    assert all(torch.equal(one, other) for one, other in zip(run(unet, inputs), expected, strict=True))
