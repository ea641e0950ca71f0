"""Codebooks on the sphere: where codes go, which one is nearest, and how many are used."""

from __future__ import annotations

import pytest
import torch
from pared_zoo.recipes.codebook import code_usage, nearest_code, separate_codes, spread_codes
from torch.nn.functional import normalize


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def clusters():
    """Five directions far apart, the first of them as frequent as in a picture of background."""
    centres = normalize(torch.eye(6)[:5] + 0.1, dim=1)
    counts = torch.tensor([2000, 20, 20, 20, 20])
    near = centres.repeat_interleave(counts, dim=0) + 0.01 * torch.randn(2080, 6, generator=seeded(1))
    return centres, normalize(near, dim=1)


def test_the_nearest_code_is_that_of_the_smallest_distance():
    codebook = normalize(torch.randn(40, 8, generator=seeded(2)), dim=1)
    directions = normalize(torch.randn(3, 5, 8, generator=seeded(3)), dim=-1)
    expected = torch.cdist(directions.flatten(0, 1), codebook).argmin(dim=1).view(3, 5)
    assert torch.equal(nearest_code(directions, codebook), expected)


@pytest.mark.parametrize("seed", range(5))
def test_rare_directions_get_codes_too(clusters, seed):
    centres, directions = clusters
    codebook = spread_codes(directions, 5, seeded(seed))
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(5))
    assert (centres @ codebook.T).amax(dim=1).min() > 0.99
    assert sorted((centres @ codebook.T).argmax(dim=1).tolist()) == [0, 1, 2, 3, 4]


def test_kept_codes_stay_and_new_ones_go_where_one_is_missing(clusters):
    centres, directions = clusters
    codebook = spread_codes(directions, 5, seeded(), kept=centres[[0, 2, 3]])
    assert torch.equal(codebook[:3], centres[[0, 2, 3]])
    assert sorted((codebook[3:] @ centres.T).argmax(dim=1).tolist()) == [1, 4]


def test_more_codes_than_directions_are_no_error():
    codebook = spread_codes(torch.eye(3), 7, seeded())
    assert codebook.shape == (7, 3)
    assert set(codebook.argmax(dim=1).tolist()) == {0, 1, 2}


def test_new_codes_keep_their_distance_while_they_can(clusters):
    _, directions = clusters
    codebook = spread_codes(directions, 5, seeded(), kept=directions[:1], apart=0.1)
    others = codebook @ codebook.T - 2 * torch.eye(5)
    # Five centres with five codes: without a distance, several go to the cluster of 2,000.
    assert others.max() < 0.9
    # A sixth code has no place so far away.
    assert spread_codes(directions, 6, seeded(), kept=directions[:1], apart=0.1).shape == (6, 6)


def test_of_two_near_codes_the_commoner_one_stays_and_what_does_not_occur_goes():
    angles = torch.tensor([0.0, 0.01, 1.0, 1.01, 2.0])
    codebook = torch.stack([angles.cos(), angles.sin()], dim=1)
    kept = separate_codes(codebook, torch.tensor([3, 5, 9, 2, 0]), apart=0.001)
    assert kept.tolist() == [1, 2]
    assert separate_codes(codebook, torch.tensor([3, 5, 9, 2, 0]), apart=0.0).tolist() == [0, 1, 2, 3]


def test_usage_counts_codes_and_how_even_they_are():
    assert code_usage(torch.tensor([[0, 1], [2, 3]]), 8) == (4, pytest.approx(4.0))
    used, perplexity = code_usage(torch.tensor([5] * 99 + [1]), 8)
    assert used == 2
    assert 1 < perplexity < 1.1
