from __future__ import annotations

import pytest
import torch
from pared_kernels import dispatch, framefusion_segment_mean_compact

BACKENDS = ("reference", "triton")
ORDER = torch.tensor([[3, 0, 2, 1, 4, 5]])
STARTS = torch.tensor([[1, 2, 2, 5]])
PLACES = torch.tensor([[2, 0, 1]])


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton" and not dispatch.has_triton():
        pytest.skip("triton is not installed")
    with dispatch.use(framefusion_segment_mean_compact=request.param):
        yield request.param


def test_segments_are_averaged_in_order_and_written_to_their_places(backend):
    hidden = torch.arange(6.0)[None, :, None].repeat(1, 1, 4)
    out = framefusion_segment_mean_compact(hidden, ORDER, STARTS, PLACES)
    # Token 3 is before the first segment, 5 behind the last; the second segment is empty.
    assert out[0, :, 0].tolist() == pytest.approx([0.0, (2 + 1 + 4) / 3, 0.0])


def test_weights_count_a_token_as_many(backend):
    hidden = torch.arange(6.0)[None, :, None].repeat(1, 1, 4)
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    out = framefusion_segment_mean_compact(hidden, ORDER, STARTS, PLACES, weight)
    assert out[0, 1, 0].item() == pytest.approx((2 * 3 + 1 * 2 + 4 * 5) / 10)


def test_many_members_in_bfloat16_are_summed_in_float32(backend):
    hidden = torch.ones(1, 600, 8, dtype=torch.bfloat16)
    hidden[:, ::2] = 2.0
    order, places = torch.arange(600)[None], torch.zeros(1, 1, dtype=torch.long)
    out = framefusion_segment_mean_compact(hidden, order, torch.tensor([[0, 600]]), places)
    assert out[0, 0].tolist() == [1.5] * 8


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_finite_differences(weighted, generator):
    hidden = torch.randn(1, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(1, 6, generator=generator, dtype=torch.float64) + 0.5 if weighted else None
    assert torch.autograd.gradcheck(
        lambda x: framefusion_segment_mean_compact(x, ORDER, STARTS, PLACES, weight), (hidden,)
    )


def test_the_result_is_the_same_bits_in_every_run(backend, generator):
    hidden = torch.randn(1, 40, 16, generator=generator)
    order = torch.randperm(40, generator=generator)[None]
    starts, places = torch.tensor([[0, 17, 40]]), torch.tensor([[1, 0]])
    first = framefusion_segment_mean_compact(hidden, order, starts, places)
    assert all(framefusion_segment_mean_compact(hidden, order, starts, places).equal(first) for _ in range(3))


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"order": torch.zeros(1, 5, dtype=torch.long)}, ValueError, "length of order"),
        ({"seg_start": torch.zeros(1, 3, dtype=torch.long)}, ValueError, "length of seg_start"),
        ({"out_index": torch.zeros(1, 3, dtype=torch.int32)}, TypeError, "out_index has"),
        ({"weight": torch.ones(1, 6, dtype=torch.float16)}, TypeError, "weight has"),
        ({"weight": torch.ones(1, 5)}, ValueError, "shape of weight"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    valid = {"hidden": torch.zeros(1, 6, 4), "order": ORDER, "seg_start": STARTS, "out_index": PLACES}
    with pytest.raises(error, match=named):
        framefusion_segment_mean_compact(**(valid | change))
