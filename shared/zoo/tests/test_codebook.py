"""Codebooks on the sphere: where codes go, which one is nearest, and how many are used."""

from __future__ import annotations

import pytest
import torch
from pared_zoo.recipes.codebook import code_usage, nearest_code, spread_codes
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


def test_usage_counts_codes_and_how_even_they_are():
    assert code_usage(torch.tensor([[0, 1], [2, 3]]), 8) == (4, pytest.approx(4.0))
    used, perplexity = code_usage(torch.tensor([5] * 99 + [1]), 8)
    assert used == 2
    assert 1 < perplexity < 1.1
