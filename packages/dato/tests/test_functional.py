from __future__ import annotations

import pytest
import torch
from dato import functional as F


def unit(row: torch.Tensor) -> torch.Tensor:
    norm = row.double().norm()
    return row.double() / norm if norm > 0 else row.double()


def reference_base(score, grid, patch, groups):
    """Section 3.3 token by token; `groups` is None when samples are not aligned."""
    (h, w), (sy, sx) = grid, patch
    chosen = []
    for b in range(len(score)):
        row = score[b if groups is None else b % (len(score) // groups)].tolist()
        bases = []
        for py in range(h // sy):
            for px in range(w // sx):
                tokens = [(py * sy + dy) * w + px * sx + dx for dy in range(sy) for dx in range(sx)]
                bases.append(max(tokens, key=lambda token: (row[token], -token)))
        chosen.append(bases)
    return chosen


def reference_plan(metric, base_idx, num_prune, recover):
    """Sections 3.4 and 3.5 token by token in float64: kept, pruned and source tokens of each sample."""
    plans = []
    for sample, base in zip(metric, base_idx.tolist(), strict=True):
        tokens = [unit(row) for row in sample]
        base = sorted(base)
        rest = [token for token in range(len(tokens)) if token not in base]
        closest = {token: max(float(tokens[token] @ tokens[other]) for other in base) for token in rest}
        pruned = sorted(sorted(rest, key=lambda token: (-closest[token], token))[:num_prune])
        kept = [token for token in range(len(tokens)) if token not in pruned]
        pool = kept if recover == "kept" else base
        sources = [max(pool, key=lambda other: (float(tokens[token] @ tokens[other]), -other)) for token in pruned]
        plans.append((kept, pruned, sources))
    return plans


@pytest.mark.parametrize("seed", range(50))
def test_selection_and_matching_equal_a_float64_reference_index_for_index(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    batch, grid, patch = draw(1, 4), (draw(3, 11), draw(3, 11)), ((2, 2), (1, 2), (2, 1), (3, 2))[seed % 4]
    groups = 2 if seed % 3 == 0 else None
    if groups and batch % 2:
        batch += 1
    recover = ("kept", "base")[seed % 2]
    dtype = (torch.float64, torch.float32)[(seed // 2) % 2]
    tokens, channels = grid[0] * grid[1], draw(2, 40)
    score = torch.randn(batch, tokens, generator=generator, dtype=dtype)
    metric = torch.randn(batch, tokens, channels, generator=generator, dtype=dtype)
    metric[:, draw(0, tokens - 1)] = 0

    base_idx = F.select_base_tokens(score, grid, patch, cfg_aligned=groups is not None)
    assert base_idx.tolist() == reference_base(score, grid, patch, groups)

    num_prune = draw(0, tokens - base_idx.shape[1])
    plan = F.match_tokens(metric, base_idx, num_prune, recover=recover)
    for b, (kept, pruned, sources) in enumerate(reference_plan(metric, base_idx, num_prune, recover)):
        assert plan.keep_idx[b].tolist() == kept
        assert plan.prune_idx[b].tolist() == pruned
        assert plan.keep_idx[b][plan.source_pos[b]].tolist() == sources
        received = dict(zip(kept, kept, strict=True)) | dict(zip(pruned, sources, strict=True))
        assert plan.keep_idx[b][plan.gather_map[b]].tolist() == [received[token] for token in range(tokens)]


def test_noise_difference_is_the_channel_mean_in_row_major_order():
    current = torch.tensor([[[[1.0, 2.0]], [[5.0, 0.0]]]])
    assert F.noise_difference(current, torch.zeros_like(current)).tolist() == [[3.0, 1.0]]


def test_noise_difference_of_half_precision_is_computed_in_fp32(rng):
    current, previous = (torch.randn(2, 4, 3, 5, generator=rng).half() for _ in range(2))
    expected = (current.float() - previous.float()).abs().mean(1).flatten(1)
    difference = F.noise_difference(current, previous)
    assert difference.dtype == torch.float32
    torch.testing.assert_close(difference, expected, rtol=0, atol=0)


def test_noise_difference_refuses_two_shapes(rng):
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\) and \(1, 4, 2, 3\)"):
        F.noise_difference(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 3))


def test_pool_score_averages_patches_and_keeps_an_equal_grid(rng):
    score = torch.randn(2, 24, generator=rng)
    assert F.pool_score(score, (4, 6), (4, 6)) is score
    pooled = F.pool_score(score, (4, 6), (2, 3)).view(2, 2, 3)
    torch.testing.assert_close(pooled[1, 1, 2], score.view(2, 4, 6)[1, 2:, 4:].mean())


def test_pool_score_names_the_size_that_does_not_fit():
    with pytest.raises(ValueError, match=r"size=\(4, 4\)"):
        F.pool_score(torch.zeros(1, 24), (4, 4), (2, 2))


def test_base_score_normalises_dynamics_per_sample():
    difference = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    score = F.base_score(difference, None, gamma=2.0)
    torch.testing.assert_close(score, torch.tensor([[1.0, 3.0], [1.0, 3.0]]))


def test_base_score_counts_nan_dynamics_as_zero():
    score = F.base_score(torch.tensor([[float("nan"), 2.0]]), torch.tensor([[10.0, 10.0]]), normalize=False)
    torch.testing.assert_close(score, torch.tensor([[1.0, 3.0]]))


def test_base_score_without_dynamics_is_the_noise():
    noise = torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(F.base_score(None, noise, alpha=0.5), noise / 2)


def test_similarity_score_sums_the_cosines_to_every_token(rng):
    metric = torch.randn(2, 9, 5, generator=rng, dtype=torch.float64)
    direction = metric / metric.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(F.similarity_score(metric), (direction @ direction.mT).sum(-1))


def test_equal_scores_choose_the_first_token_of_the_patch():
    assert F.select_base_tokens(torch.zeros(1, 16), (4, 4), (2, 2)).tolist() == [[0, 2, 8, 10]]


def test_rows_and_columns_beyond_the_last_whole_patch_hold_no_base_token():
    score = torch.arange(15.0).view(1, 15)
    assert F.select_base_tokens(score, (3, 5), (2, 2)).tolist() == [[6, 8]]


def test_alignment_copies_the_base_tokens_of_the_first_half():
    score = torch.stack([torch.arange(4.0), torch.arange(4.0).flip(0)])
    assert F.select_base_tokens(score, (2, 2), (2, 2), cfg_aligned=True).tolist() == [[3], [3]]
    assert F.select_base_tokens(score, (2, 2), (2, 2)).tolist() == [[3], [0]]


def test_alignment_of_an_odd_batch_is_off():
    score = torch.eye(3, 4)
    assert F.select_base_tokens(score, (2, 2), (2, 2), cfg_aligned=True).tolist() == [[0], [1], [2]]


def test_nan_scores_select_tokens_within_range():
    assert F.select_base_tokens(torch.full((1, 4), float("nan")), (2, 2), (2, 2)).tolist() == [[0]]


def test_a_patch_larger_than_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"patch=\(4, 4\)"):
        F.select_base_tokens(torch.zeros(1, 9), (3, 3), (4, 4))


def test_ties_in_similarity_prune_the_lower_tokens_first():
    plan = F.match_tokens(torch.ones(1, 6, 4), torch.tensor([[3]]), 2)
    assert plan.prune_idx.tolist() == [[0, 1]]


def test_ties_in_similarity_copy_the_lower_token():
    metric = torch.ones(1, 6, 4)
    base = torch.tensor([[4, 2]])
    assert F.match_tokens(metric, base, 1, recover="base").keep_idx[0, 1] == 2
    plan = F.match_tokens(metric, base, 1, recover="base")
    assert plan.keep_idx.gather(1, plan.source_pos).tolist() == [[2]]
    plan = F.match_tokens(metric, base, 1, recover="kept")
    assert plan.keep_idx.gather(1, plan.source_pos).tolist() == [[1]]


def test_zero_tokens_are_less_similar_than_any_with_a_positive_cosine():
    metric = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.1, 1.0], [-1.0, 0.0]]])
    assert F.match_tokens(metric, torch.tensor([[0]]), 2).prune_idx.tolist() == [[1, 2]]


def test_pruning_nothing_is_the_identity(rng):
    x = torch.randn(2, 9, 5, generator=rng)
    plan = F.match_tokens(x, torch.tensor([[0, 4], [1, 3]]), 0)
    assert torch.equal(F.recover_tokens(F.prune_tokens(x, plan), plan), x)


@pytest.mark.parametrize("num_prune", [-1, 8])
def test_pruning_more_than_the_tokens_that_are_not_base_is_refused(num_prune):
    with pytest.raises(ValueError, match=rf"num_prune={num_prune} is outside 0\.\.7"):
        F.match_tokens(torch.ones(1, 9, 4), torch.tensor([[0, 1]]), num_prune)


def test_an_unknown_recovery_is_refused():
    with pytest.raises(ValueError, match="recover='nearest'"):
        F.match_tokens(torch.ones(1, 9, 4), torch.tensor([[0]]), 1, recover="nearest")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kept_tokens_come_back_bit_for_bit(rng, dtype):
    metric, x = torch.randn(2, 16, 8, generator=rng).to(dtype), torch.randn(2, 16, 3, generator=rng).to(dtype)
    plan = F.match_tokens(metric, torch.tensor([[0, 5], [2, 9]]), 6)
    kept = F.prune_tokens(x, plan)
    recovered = F.recover_tokens(kept, plan)
    assert torch.equal(F.prune_tokens(recovered, plan), kept)
    assert torch.equal(recovered.gather(1, plan.prune_idx[..., None].expand(-1, -1, 3)),
                       kept.gather(1, plan.source_pos[..., None].expand(-1, -1, 3)))  # fmt: skip


def test_prune_count_is_the_integer_part_bounded_by_the_base_tokens():
    assert F.prune_count(4096, 0.4) == 1638
    assert F.prune_count(10, 0.9, num_base=4) == 6


def test_prune_count_rounds_the_kept_tokens_up_to_the_multiple():
    assert F.prune_count(4096, 0.4, kept_multiple=64) == 4096 - 2496
    assert F.prune_count(48, 0.4, kept_multiple=64) == 0


def test_resampling_takes_the_nearest_entry_halves_away_from_zero():
    depth, ratio = F.resample_policy([0, 1, 2], [0.0, 0.1, 0.2], 5)
    assert depth == [F.FULL, 1, 1, 2, 2]
    assert ratio == [0.0, 0.1, 0.1, 0.2, 0.2]


def test_resampling_to_the_same_length_only_forces_the_first_call():
    assert F.resample_policy([1, 0, 1], [0.1, 0.2, 0.3], 3) == ([F.FULL, 0, 1], [0.1, 0.2, 0.3])


def test_resampling_to_one_call_computes_everything():
    assert F.resample_policy([1, 0], [0.1, 0.2], 1) == ([F.FULL], [0.1])


@pytest.mark.parametrize(("depth", "ratio", "m"), [([1], [0.1, 0.2], 2), ([], [], 2), ([1], [0.1], 0)])
def test_resampling_refuses_unequal_empty_and_zero_lengths(depth, ratio, m):
    with pytest.raises(ValueError, match="at least 1"):
        F.resample_policy(depth, ratio, m)


def test_nondominated_sort_ranks_fronts_and_keeps_equal_rows_together():
    assert F.nondominated_sort([(0, 2), (2, 0), (1, 1), (2, 2), (1, 1), (3, 3)]) == [0, 0, 0, 1, 0, 2]


def test_crowding_distance_is_infinite_at_the_ends_and_relative_between():
    assert F.crowding_distance([(0, 4), (1, 2), (4, 0)]) == [float("inf"), 2.0, float("inf")]


def test_a_constant_objective_adds_nothing_to_inner_rows():
    inf = float("inf")
    assert F.crowding_distance([(0, 7), (1, 7), (3, 7), (4, 7)]) == [inf, 0.75, 0.75, inf]


def test_crowding_distance_of_no_rows_is_empty():
    assert F.crowding_distance([]) == []
