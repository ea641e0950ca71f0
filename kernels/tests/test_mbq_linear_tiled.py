"""`mbq_linear_tiled`: weights in the blocks that torch's product with 4-bit weights reads."""

from __future__ import annotations

import pared_kernels
import pytest
import torch
from pared_kernels import check, mbq_linear_tiled, mbq_linear_w16, mbq_tile, mbq_tiling_unsupported, mbq_untile
from pared_kernels.bitstream import pack_dense
from pared_kernels.ops.mbq_linear_tiled import cases, layout
from pared_kernels.ops.mbq_linear_tiled.reference import dequantize
from pared_kernels.ops.mbq_linear_w16 import cases as dense

needs_product = pytest.mark.skipif(not layout.known(), reason="torch has no product with 4-bit weights here")
# columns, rows, bits, group, symmetric: groups by threes and fours, whole rows, blocks that are not full
WEIGHTS = [
    (512, 80, 3, 128, False),
    (576, 48, 3, 64, True),
    (576, 16, 3, 576, False),
    (96, 128, 3, 32, False),
    (1024, 144, 4, 1024, True),
    (192, 112, 4, 64, False),
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_case_agrees_with_float64(backend):
    outcomes = check.run(["mbq_linear_tiled"], backend, device="cpu")
    assert [outcome for outcome in outcomes if outcome.status == "failed"] == []
    assert backend == "cpu" or any(outcome.status == "passed" for outcome in outcomes)


@needs_product
def test_the_processor_s_product_takes_bfloat16():
    outcomes = check.run(["mbq_linear_tiled"], "cpu", device="cpu")
    assert all(outcome.status == "passed" for outcome in outcomes if "float64" not in outcome.case)


@needs_product
@pytest.mark.parametrize(("columns", "rows", "bits", "group", "symmetric"), WEIGHTS)
def test_blocks_hold_the_weight_in_its_bytes_and_give_it_back(columns, rows, bits, group, symmetric, generator):
    _, packed, scales, zeros, *_ = dense.draw(1, columns, rows, bits, group, symmetric, False, torch.float32, generator)
    tiles, steps = mbq_tile(packed, scales, zeros, bits, group)
    assert mbq_untile(tiles, steps, bits, group, columns).equal(packed)
    parts = layout.shares(bits, group, columns)
    # Three bits pair spans by fours; a rest of up to three takes whole nibbles.
    assert tiles.nbytes <= packed.nbytes + rows * parts.span * 3 // 8
    assert bits == 3 or tiles.nbytes == packed.nbytes
    assert columns % (4 * parts.span) or tiles.nbytes == packed.nbytes
    assert steps.dtype == torch.bfloat16


@needs_product
@pytest.mark.parametrize("many", [1, 20, 100])
@pytest.mark.parametrize("bits", [3, 4])
def test_bfloat16_stays_within_two_thousandths_beside_the_rounding_of_the_result(bits, many, generator):
    x, *weight, _ = dense.draw(many, 4096, 64, bits, 128, False, False, torch.bfloat16, generator)
    with pared_kernels.use("reference"):
        expected = mbq_linear_w16(x.double(), *weight)
    tiles, steps = mbq_tile(*weight)
    found = mbq_linear_tiled(x, tiles, steps, bits, 128).double()
    rounding = (expected.bfloat16().double() - expected).norm()
    assert (found - expected).norm() <= 2e-3 * expected.norm() + rounding


@needs_product
@pytest.mark.parametrize(("bits", "inexact"), [(3, {2, 5}), (4, {1, 2, 13, 14})])
def test_weights_are_exact_where_bfloat16_holds_the_scale_but_for_a_few_zero_points(bits, inexact, generator):
    rows = 2**bits * (32 // 2**bits)
    _, packed, scales, *_ = dense.draw(1, 256, rows, bits, 64, True, False, torch.float32, generator)
    zeros = (torch.arange(rows) % 2**bits)[:, None].expand(-1, 4)
    scales, stored = scales.bfloat16(), pack_dense(zeros.contiguous(), bits, dim=0)
    with pared_kernels.use("reference"):
        expected = mbq_linear_w16(torch.eye(256), packed, scales, stored, bits, 64)
        found = mbq_linear_tiled(torch.eye(256), *mbq_tile(packed, scales, stored, bits, 64), bits, 64)
    differs = (found != expected).any(0)
    assert set(zeros[differs, 0].tolist()) <= inexact
    assert (found - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.parametrize("many", [3, 100])
def test_what_is_not_finite_in_a_row_of_x_shows_in_that_row_alone(many, generator):
    x, *rest = cases.draw(many, 256, 80, 3, 64, False, True, torch.bfloat16, generator)
    x[0, 3], x[1, 250] = torch.inf, torch.nan
    out = mbq_linear_tiled(x, *rest)
    assert not out[:2].isfinite().any()
    assert out[2:].isfinite().all()
    assert mbq_linear_tiled(x[:0], *rest).shape == (0, 80)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_gradient_goes_to_input_and_bias_through_the_dequantised_weight(bits, generator):
    x, tiles, steps, bits, group, bias = cases.draw(3, 128, 16, bits, 32, False, True, torch.float64, generator)
    weight = dequantize(tiles, steps, bits, group, 128, torch.float64).T
    x.requires_grad_()
    bias.requires_grad_()
    weights = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    (mbq_linear_tiled(x, tiles, steps, bits, group, bias) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ weight)
    torch.testing.assert_close(bias.grad, weights.sum(0))


def test_a_weight_or_processor_that_does_not_suit_is_told(monkeypatch, generator):
    assert "bits" in mbq_tiling_unsupported(64, 5, 64)
    assert "rows" in mbq_tiling_unsupported(20, 4, 64)
    assert "groups" in mbq_tiling_unsupported(64, 4, 48)
    layout.known.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    try:
        assert "processor" in mbq_tiling_unsupported(64, 4, 64)
        arguments = cases.draw(2, 128, 16, 4, 32, False, True, torch.bfloat16, generator)
        with pared_kernels.use("cpu"), pytest.raises(pared_kernels.BackendUnavailableError, match="processor"):
            mbq_linear_tiled(*arguments)
        assert mbq_linear_tiled(*arguments).shape == (2, 16)
    finally:
        layout.known.cache_clear()


@needs_product
def test_blocks_of_another_kind_are_not_taken_for_known_ones(monkeypatch):
    layout.known.cache_clear()
    monkeypatch.setattr(layout, "_halved", lambda height: height != layout.block())
    try:
        assert not layout.known()
    finally:
        layout.known.cache_clear()


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"x": torch.zeros(2, 3, 64)}, ValueError, "x"),
        ({"tiles": torch.zeros(16, 64)}, TypeError, "tiles"),
        ({"tiles": torch.zeros(16, 60, dtype=torch.uint8)}, ValueError, "tiles"),
        ({"steps": torch.zeros(4, 15, 2)}, ValueError, "steps"),
        ({"bits": 5}, ValueError, "bits"),
        ({"group_size": 48}, ValueError, "group_size"),
        ({"bias": torch.zeros(5)}, ValueError, "bias"),
    ],
)
def test_wrong_arguments_are_named(change, error, named, generator):
    names = ("x", "tiles", "steps", "bits", "group_size", "bias")
    arguments = dict(zip(names, cases.draw(2, 128, 16, 4, 32, False, True, torch.float32, generator), strict=True))
    with pytest.raises(error, match=named):
        mbq_linear_tiled(**(arguments | change))


@needs_product
def test_wrong_weights_to_put_into_blocks_are_named(generator):
    _, packed, scales, zeros, *_ = dense.draw(1, 128, 16, 4, 32, False, False, torch.float32, generator)
    with pytest.raises(ValueError, match="packed"):
        mbq_tile(packed[:, :8], scales, zeros, 4, 32)
    with pytest.raises(ValueError, match="multiples of 16 rows"):
        mbq_tile(packed[:9], scales[:9], zeros, 4, 32)
    with pytest.raises(ValueError, match="group_size"):
        mbq_untile(torch.zeros(16, 64, dtype=torch.uint8), torch.zeros(4, 16, 2), 4, 48, 128)
