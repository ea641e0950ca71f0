from __future__ import annotations

import pytest
import torch
from pared_kernels import dispatch, framefusion_adjacent_cosine

BACKENDS = ("reference", "triton", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton" and not dispatch.has_triton():
        pytest.skip("triton is not installed")
    with dispatch.use(framefusion_adjacent_cosine=request.param):
        yield request.param


def test_equals_torch_on_the_gathered_predecessors(backend, generator):
    hidden = torch.randn(2, 9, 24, generator=generator)
    prev = torch.tensor([[-1, 0, 1, -1, 2, 4, 0, 6, 7], [-1, -1, 0, 1, 2, 3, -1, 5, 6]])
    gathered = hidden.gather(1, prev.clamp(min=0)[..., None].expand_as(hidden))
    expected = torch.cosine_similarity(hidden, gathered, dim=-1).masked_fill(prev < 0, -2.0)
    torch.testing.assert_close(framefusion_adjacent_cosine(hidden, prev), expected, atol=1e-6, rtol=0)


def test_a_zero_row_is_alike_to_nothing_and_a_nan_stays_one(backend):
    hidden = torch.ones(1, 4, 8)
    hidden[0, 1] = 0.0
    hidden[0, 3, 2] = torch.nan
    found = framefusion_adjacent_cosine(hidden, torch.tensor([[-1, 0, 1, 2]]))
    assert found[0, :3].tolist() == [-2.0, 0.0, 0.0]
    assert found[0, 3].isnan()


def test_channels_whose_squares_leave_the_half_range_are_summed_in_float32(backend):
    hidden = torch.full((1, 2, 16), 300.0, dtype=torch.float16)
    assert framefusion_adjacent_cosine(hidden, torch.tensor([[-1, 0]]))[0, 1].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"hidden": torch.zeros(4, 3)}, ValueError, "hidden has"),
        ({"hidden": torch.zeros(1, 4, 3, dtype=torch.int32)}, TypeError, "hidden has"),
        ({"prev": torch.zeros(1, 3, dtype=torch.long)}, ValueError, "shape of prev"),
        ({"prev": torch.zeros(1, 4, dtype=torch.int32)}, TypeError, "prev has"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    valid = {"hidden": torch.zeros(1, 4, 3), "prev": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(error, match=named):
        framefusion_adjacent_cosine(**(valid | change))
