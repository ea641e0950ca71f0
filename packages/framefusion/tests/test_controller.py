"""Stage after stage against the rule of section 3.2 written out with loops (acceptance 2)."""

from __future__ import annotations

import random

import ff_written_out
import pytest
import torch
from framefusion import BudgetError, FrameFusionConfig
from framefusion.functional import Controller, required_sparsity
from framefusion.functional.reducer import Reducer
from test_functional import random_hidden, random_layout


def run(controller, steps, seed, channels=5):
    """Kept places after each stage; a toy stack that adds seeded noise between stages."""
    generator = torch.Generator().manual_seed(seed)
    patch, stream = controller._reducer.patch, controller._reducer.stream
    hidden = random_hidden(patch, stream, seed, channels)
    trace = []
    for _ in range(steps):
        importance = torch.rand(1, hidden.shape[1], generator=generator)
        importance = importance if controller.wants_importance else None
        hidden, kept = controller.step(hidden, importance)
        trace.append((kept.tolist(), list(controller.fractions), controller.merging_done, controller.pruning_done))
        hidden = hidden + 0.05 * torch.randn(hidden.shape, generator=generator)
    return hidden, trace


def run_written_out(controller, steps, seed, wants, channels=5):
    generator = torch.Generator().manual_seed(seed)
    patch, stream = torch.tensor([controller.patch]), torch.tensor([controller.stream])
    rows = random_hidden(patch, stream, seed, channels)[0].double().tolist()
    trace = []
    for step in range(steps):
        importance = torch.rand(1, len(rows), generator=generator)[0].tolist()
        rows, kept = controller.step(rows, importance if wants[step] else None)
        trace.append((list(kept), list(controller.fractions), controller.merging_done, controller.pruning_done))
        rows = (torch.tensor(rows).double() + 0.05 * torch.randn(len(rows), channels, generator=generator)).tolist()
    return rows, trace


@pytest.mark.parametrize("seed", range(40))
def test_the_trace_is_that_of_the_rule(seed):
    choice = random.Random(1000 + seed)
    patch, stream = random_layout(500 + seed, batch=1)
    if not bool((patch >= 0).any()):
        patch[0, -1], stream[0, -1] = 0, 0
    layers = choice.choice([4, 8, 12, 28])
    options = {
        "cost": choice.choice([0.3, 0.5, 0.7, 1.0]),
        "similarity_threshold": choice.choice([0.5, 0.9, 0.99]),
        "merge_floor": choice.choice([0.0, 0.1, 0.4]),
        "prune_scope": choice.choice(["vision", "span"]),
        "average": choice.choice(["plain", "weighted"]),
    }
    ours = Controller(FrameFusionConfig(**options, min_keep=0), patch, stream, layers)
    wants = []
    original = ours.step

    def step(hidden, importance=None):
        wants.append(importance is not None)
        return original(hidden, importance)

    ours.step = step
    hidden, trace = run(ours, layers, seed)
    theirs = ff_written_out.Controller(
        options["cost"],
        options["similarity_threshold"],
        options["merge_floor"],
        patch[0].tolist(),
        stream[0].tolist(),
        layers,
        options["prune_scope"],
        options["average"] == "weighted",
    )
    rows, expected = run_written_out(theirs, layers, seed, wants)
    for (kept, fractions, *flags), (kept_too, fractions_too, *flags_too) in zip(trace, expected, strict=True):
        assert kept == kept_too
        assert fractions == pytest.approx(fractions_too)
        assert flags == flags_too
    torch.testing.assert_close(hidden[0].double(), torch.tensor(rows).double(), atol=1e-5, rtol=1e-5)


def block(frames, patches):
    patch = torch.arange(patches).repeat(frames)[None]
    return patch, torch.zeros_like(patch)


def test_a_cost_of_one_removes_nothing_and_ends_at_once():
    controller = Controller(FrameFusionConfig(cost=1.0), *block(4, 3), 8)
    hidden = torch.ones(1, 12, 4)
    after, kept = controller.step(hidden)
    assert after is hidden
    assert kept.tolist() == list(range(12))
    assert controller.merging_done
    assert controller.pruning_done
    assert controller.fractions == []


def test_the_cap_merges_exactly_what_the_budget_asks_whatever_the_threshold(rng):
    controller = Controller(FrameFusionConfig(cost=0.5, similarity_threshold=-1.0), *block(10, 4), 8)
    after, kept = controller.step(torch.randn(1, 40, 6, generator=rng))
    assert after.shape[1] == len(kept) == 20
    assert controller.fractions == []
    assert controller.pruning_done


def test_where_too_few_have_a_predecessor_the_next_stage_prunes_the_rest(rng):
    # Stage 0 alone would spend 1 of the 0.9 that are allowed, and no attention has been computed yet.
    controller = Controller(FrameFusionConfig(cost=0.09, similarity_threshold=1.0), *block(2, 10), 10)
    _, kept = controller.step(torch.randn(1, 20, 6, generator=rng))
    assert kept.tolist() == list(range(10))
    assert controller.fractions == [0.5]
    assert controller.wants_importance
    assert not controller.pruning_done
    with pytest.raises(ValueError, match="importance"):
        controller.step(torch.zeros(1, 10, 6))
    importance = torch.arange(10.0)[None]
    _, kept = controller.step(torch.zeros(1, 10, 6), importance)
    assert len(kept) == round(10 * (1 - required_sparsity([0.5], 0.09, 10)))
    assert kept.tolist() == list(range(10 - len(kept), 10))


def test_pruning_at_once_meets_a_budget_that_another_stage_would_overdraw(rng):
    # Nothing is alike: after stage 0 each slot costs 1 of the 4 * 0.3 = 1.2 that are allowed.
    config = FrameFusionConfig(cost=0.3, similarity_threshold=1.0, merge_floor=0.0)
    controller = Controller(config, *block(10, 10), 4)
    controller.step(torch.randn(1, 100, 6, generator=rng))
    assert controller.wants_importance
    _, kept = controller.step(torch.randn(1, 100, 6, generator=rng), torch.rand(1, 100, generator=rng))
    assert len(kept) == round(100 * 0.2 / 3)
    strict = Controller(config.replace(on_budget="error"), *block(10, 10), 4)
    strict.step(torch.randn(1, 100, 6, generator=rng))
    with pytest.raises(BudgetError, match=r"cost = 0\.3"):
        strict.step(torch.randn(1, 100, 6, generator=rng))


def test_an_impossible_cost_keeps_the_least_of_every_video_and_says_so(rng):
    patch = torch.arange(10)[None].repeat(1, 2)
    stream = (torch.arange(20)[None] >= 10).long()
    config = FrameFusionConfig(cost=0.1, min_keep=2)
    controller = Controller(config, patch, stream, 4)
    controller.step(torch.randn(1, 20, 6, generator=rng))
    with pytest.warns(UserWarning, match="cost = 0.1 cannot be met"):
        _, kept = controller.step(torch.randn(1, 20, 6, generator=rng), torch.rand(1, 20, generator=rng))
    assert [sum(place < 10 for place in kept.tolist()), len(kept)] == [2, 4]
    with pytest.raises(BudgetError, match="too small"):
        Controller(config.replace(on_budget="error"), patch, stream, 4).step(torch.randn(1, 20, 6, generator=rng))


def test_fixed_ratios_give_counts_that_depend_on_the_length_alone(rng):
    config = FrameFusionConfig(cost=0.3, merge_ratios=(0.35, 0.35, 0.35))
    lengths = []
    for _ in range(2):
        controller = Controller(config, *block(16, 10), 12)
        hidden, seen = torch.randn(1, 160, 6, generator=rng), []
        for _ in range(5):
            importance = torch.rand(1, hidden.shape[1], generator=rng) if controller.wants_importance else None
            hidden, kept = controller.step(hidden, importance)
            seen.append(len(kept))
        lengths.append(seen)
    assert lengths[0] == lengths[1]
    assert lengths[0][:2] == [104, 104 - int(0.35 * 104)]


@pytest.mark.parametrize("depth", [4, 8, 28])
@pytest.mark.parametrize("cost", [0.2, 0.3, 0.5, 0.7])
def test_the_average_cost_is_the_asked_one(depth, cost, rng):
    patch, stream = block(16, 16)
    for threshold in (0.3, 0.9):
        controller = Controller(FrameFusionConfig(cost=cost, similarity_threshold=threshold), patch, stream, depth)
        base = torch.randn(1, 16, 32, generator=rng).repeat(1, 16, 1)
        hidden = base + torch.rand(1, 256, 1, generator=rng) * torch.randn(1, 256, 32, generator=rng)
        present = []
        for _ in range(depth):
            importance = torch.rand(1, hidden.shape[1], generator=rng) if controller.wants_importance else None
            hidden, kept = controller.step(hidden, importance)
            present.append(len(kept) / 256)
        assert sum(present) / depth == pytest.approx(cost, abs=0.02)


def test_a_batch_is_its_rows_one_by_one(rng):
    """Rows of different videos, padded on the left, each with a budget of its own."""
    rows = [random_layout(seed, batch=1) for seed in (901, 902, 903)]
    longest = max(patch.shape[1] for patch, _ in rows)
    pads = [longest - patch.shape[1] for patch, _ in rows]
    padded = [
        tuple(torch.nn.functional.pad(one, (pad, 0), value=-1) for one in row)
        for pad, row in zip(pads, rows, strict=False)
    ]
    patch, stream = (torch.cat([row[i] for row in padded]) for i in range(2))
    valid = torch.arange(longest) >= torch.tensor(pads)[:, None]
    config = FrameFusionConfig(cost=0.5, similarity_threshold=0.9, min_keep=0)
    together = Reducer(config, patch, stream, 6, valid)
    hidden = random_hidden(patch, stream, 5) * valid[..., None]
    alone = [Reducer(config, *row, 6) for row in rows]
    singles = [hidden[i : i + 1, pad:] for i, pad in enumerate(pads)]
    for _ in range(4):
        importance = torch.rand(hidden.shape[:2], generator=rng)
        tail = [importance[i : i + 1, importance.shape[1] - one.shape[1] :] for i, one in enumerate(singles)]
        hidden, _ = together.step(hidden, importance)
        singles = [reducer.step(one, imp)[0] for reducer, one, imp in zip(alone, singles, tail, strict=True)]
        for row, (one, reducer) in enumerate(zip(singles, alone, strict=True)):
            assert together.budgets[row].fractions == reducer.budgets[0].fractions
            torch.testing.assert_close(hidden[row : row + 1, hidden.shape[1] - one.shape[1] :], one)
