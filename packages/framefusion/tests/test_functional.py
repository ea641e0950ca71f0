"""The functional core against the rules written out with loops in float64 (acceptance 1)."""

from __future__ import annotations

import random

import ff_written_out
import pytest
import torch
from framefusion import BudgetError
from framefusion.functional import (
    adjacent_similarity,
    choose_kept,
    choose_merges,
    last_query_importance,
    merge,
    predecessor,
    required_sparsity,
)

NOISE = 0.15


def random_layout(seed, batch=2):
    """Frames of several videos with gaps and text between them, padding on the left; patch and stream (batch, N)."""
    choice = random.Random(seed)
    rows = []
    for _ in range(batch):
        patch, stream = [-1] * choice.randint(0, 3), []
        stream = [-1] * len(patch)
        for video in range(choice.randint(0, 3)):
            patches = choice.randint(1, 4)
            for _ in range(choice.randint(1, 4)):
                kept = [p for p in range(patches) if choice.random() < 0.85]
                patch += kept + [-1] * choice.randint(0, 2)
                stream += [video] * len(kept) + [-1] * (len(patch) - len(stream) - len(kept))
        patch += [-1] * choice.randint(1, 3)
        stream += [-1] * (len(patch) - len(stream))
        rows.append((patch, stream))
    longest = max(len(patch) for patch, _ in rows)
    padded = [([-1] * (longest - len(p)) + p, [-1] * (longest - len(s)) + s) for p, s in rows]
    return torch.tensor([p for p, _ in padded]), torch.tensor([s for _, s in padded])


def random_hidden(patch, stream, seed, channels=5):
    """Hidden states that are alike at the same (stream, patch), some of them equal or zero."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(4, 4, channels, generator=generator)
    noise = torch.randn(*patch.shape, channels, generator=generator)
    strength = NOISE * torch.randint(0, 4, patch.shape, generator=generator)[..., None]
    hidden = torch.where((patch >= 0)[..., None], base[stream, patch] + strength * noise, noise)
    hidden[:, -1] = 0.0
    return hidden


@pytest.mark.parametrize("block", range(8))
def test_the_core_equals_the_loops_on_random_layouts(block):
    for seed in range(25 * block, 25 * block + 25):
        patch, stream = random_layout(seed)
        hidden = random_hidden(patch, stream, seed)
        before = [tensor.clone() for tensor in (patch, stream, hidden)]
        prev = predecessor(patch, stream)
        sim = adjacent_similarity(hidden, prev)
        threshold, cap = random.Random(seed).uniform(-1, 1), random.Random(seed + 1).uniform(0, 1)
        masks = []
        for row in range(2):
            rows = hidden[row].double().tolist()
            expected = ff_written_out.predecessor(patch[row].tolist(), stream[row].tolist())
            assert prev[row].tolist() == expected
            similar = ff_written_out.similarity(rows, expected)
            torch.testing.assert_close(sim[row].double(), torch.tensor(similar).double(), atol=1e-5, rtol=0)
            vision = patch[row] >= 0
            choice = choose_merges(sim[row], prev[row], vision, threshold, cap)
            total = int(vision.sum())
            alike = [i for i in range(len(rows)) if expected[i] >= 0 and float(sim[row, i]) >= threshold]
            assert choice.fraction == (len(alike) / total if total else 0.0)
            assert choice.capped is not (choice.fraction < cap)
            if choice.capped:
                paired = [i for i in range(len(rows)) if expected[i] >= 0]
                alike = sorted(paired, key=lambda i: (-float(sim[row, i]), i))[: int(cap * total)]
            assert choice.mask.nonzero().flatten().tolist() == sorted(alike)
            masks.append(choice.mask)
        mask = torch.stack(masks)
        for size in (None, torch.randint(1, 9, patch.shape)):
            merged = merge(hidden, prev, mask, size)
            assert merged.keep.equal(~mask)
            for row in range(2):
                weights = None if size is None else size[row].tolist()
                rows = hidden[row].double().tolist()
                expected, anchor = ff_written_out.merge(rows, prev[row].tolist(), mask[row].tolist(), weights)
                assert merged.anchor[row].tolist() == anchor
                for place, values in enumerate(expected):
                    wanted = hidden[row, place].tolist() if values is None else values
                    torch.testing.assert_close(
                        merged.hidden[row, place].double(), torch.tensor(wanted).double(), atol=1e-5, rtol=1e-5
                    )
                    if values is not None:
                        members = [j for j, one in enumerate(anchor) if one == place]
                        counts = [1] * len(rows) if weights is None else weights
                        assert int(merged.size[row, place]) == sum(counts[j] for j in members)
        assert all(old.equal(new) for old, new in zip(before, (patch, stream, hidden), strict=True))


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_importance_is_the_mean_of_the_softmaxes(queries, masked, rng):
    query = torch.randn(2, 6, queries, 4, generator=rng)
    key = torch.randn(2, 2, 9, 4, generator=rng)
    valid = torch.rand(2, 9, generator=rng) < 0.6 if masked else None
    ours = last_query_importance(query, key, 0.5, valid)
    for row in range(2):
        seen = None if valid is None else valid[row].tolist()
        theirs = ff_written_out.importance(query[row].double().tolist(), key[row].double().tolist(), 0.5, seen)
        torch.testing.assert_close(ours[row].double(), torch.tensor(theirs).double(), atol=1e-6, rtol=0)


def test_all_that_do_not_compete_stay_and_counts_are_rounded_half_to_even(rng):
    importance = torch.rand(20, generator=rng)
    candidates = torch.arange(20) % 4 != 0
    for sparsity in (0.0, 0.3, 0.5, 0.9, 1.0):
        kept = choose_kept(importance, candidates, sparsity)
        assert kept[~candidates].all()
        best = sorted(candidates.nonzero().flatten().tolist(), key=lambda i: -importance[i])
        count = round(15 * (1 - sparsity))
        assert kept.nonzero().flatten().tolist() == sorted([*best[:count], 0, 4, 8, 12, 16])
    assert choose_kept(importance[:5], torch.ones(5, dtype=torch.bool), 0.5).sum() == 2


def test_equal_importance_and_similarity_go_to_the_lower_position():
    assert choose_kept(torch.zeros(4), torch.ones(4, dtype=torch.bool), 0.5).tolist() == [True, True, False, False]
    prev = torch.tensor([-1, 0, 1, 2])
    mask = choose_merges(torch.tensor([-2.0, 1.0, 1.0, 1.0]), prev, torch.ones(4, dtype=torch.bool), 0.5, 0.5).mask
    assert mask.tolist() == [False, True, True, False]


@pytest.mark.parametrize("layers", [4, 12, 28, 80])
@pytest.mark.parametrize("tenths", range(1, 11))
def test_required_sparsity_makes_the_average_come_out(layers, tenths):
    cost, fractions = tenths / 10, []
    for fraction in (0.0, 0.3, 0.2, 0.1):
        present, used = 1.0, 0.0
        for one in fractions:
            present *= 1 - one
            used += present
        if used > layers * cost or len(fractions) == layers:
            with pytest.raises(BudgetError, match="too small") if used > layers * cost else pytest.raises(IndexError):
                required_sparsity(fractions, cost, layers)
                raise IndexError
            return
        needed = required_sparsity(fractions, cost, layers)
        left = present * (1 - needed) * (layers - len(fractions))
        average = (used + left) / layers
        assert average == pytest.approx(cost, abs=1e-12) if needed > 0 else average <= cost + 1e-12
        fractions.append(fraction)


def test_a_nan_is_alike_to_nothing_and_important_to_nobody():
    hidden = torch.ones(1, 4, 3)
    hidden[0, 2] = torch.nan
    prev = torch.tensor([[-1, 0, 1, 1]])
    sim = adjacent_similarity(hidden, prev)
    choice = choose_merges(sim[0], prev[0], torch.ones(4, dtype=torch.bool), -1.0, 1.0)
    assert choice.mask.tolist() == [False, True, False, True]
    importance = torch.tensor([0.1, torch.nan, 0.2, 0.3])
    assert choose_kept(importance, torch.ones(4, dtype=torch.bool), 0.25).tolist() == [True, False, True, True]


def test_long_chains_of_bfloat16_do_not_lose_members():
    """Counts above 256 and sums of many members have no place in bfloat16."""
    hidden = torch.ones(1, 1000, 8, dtype=torch.bfloat16)
    hidden[0, ::2] = 3.0
    prev = torch.arange(-1, 999)[None]
    mask = prev >= 0
    merged = merge(hidden, prev, mask)
    assert merged.hidden[0, 0].tolist() == [2.0] * 8
    assert int(merged.size[0, 0]) == 1000
