from __future__ import annotations

import math

import pytest
import torch
from pared_kernels import dispatch, philox, sjd_gumbel_argmax


@pytest.fixture(params=("reference", "triton"))
def backend(request):
    if request.param == "triton" and not dispatch.has_triton():
        pytest.skip("triton is not installed")
    with dispatch.use(sjd_gumbel_argmax=request.param):
        yield request.param


def test_the_noise_of_a_published_vector_decides():
    lanes = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    expected = [-math.log(-math.log((lane + 0.5) * 2.0**-32)) for lane in lanes]
    zero = torch.zeros(1, dtype=torch.int64)
    found = philox.gumbel(0, zero, zero[None], 4, 0, torch.float64)
    assert found.flatten().tolist() == pytest.approx(expected)


def test_noise_of_later_tokens_is_a_part_of_the_noise_of_all():
    rows, positions = torch.tensor([2, 5]), torch.tensor([[1, 2], [3, 4]])
    whole = philox.gumbel(9, rows, positions, 40, 1, torch.float32)
    for first in (0, 3, 4, 9):
        assert philox.gumbel(9, rows, positions, 11, 1, torch.float32, first).equal(whole[..., first : first + 11])


def test_a_draw_depends_on_its_place_alone(backend, generator):
    probs = torch.rand(2, 3, 50, generator=generator)
    rows, positions = torch.tensor([4, 9]), torch.tensor([[0, 1, 2], [5, 6, 7]])
    whole = sjd_gumbel_argmax(probs, rows, positions, seed=2**40 + 3)
    parts = [
        sjd_gumbel_argmax(probs[1:, k : k + 1], rows[1:], positions[1:, k : k + 1], seed=2**40 + 3) for k in range(3)
    ]
    assert torch.cat(parts, 1).equal(whole[1:])


def test_impossible_tokens_are_never_drawn(backend, generator):
    probs = torch.zeros(1, 40, 30)
    probs[..., 17], probs[..., 3] = 1e-30, 1e-38
    positions = torch.arange(40)[None]
    drawn = sjd_gumbel_argmax(probs, torch.zeros(1, dtype=torch.int64), positions, seed=1)
    assert set(drawn.flatten().tolist()) <= {3, 17}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": -1}, "seed"),
        ({"stream": 2**32}, "stream"),
        ({"first": -1}, "first"),
        ({"rows": torch.zeros(2).long()}, "rows"),
        ({"positions": torch.zeros(1, 2).long()}, "positions"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    valid = {
        "probs": torch.ones(1, 3, 4),
        "rows": torch.zeros(1).long(),
        "positions": torch.zeros(1, 3).long(),
        "seed": 0,
    }
    with pytest.raises(ValueError, match=named):
        sjd_gumbel_argmax(**(valid | change))
