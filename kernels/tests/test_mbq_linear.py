"""`mbq_linear_w16` and `mbq_linear_w4a8`: packed linear layers."""

from __future__ import annotations

import pared_kernels
import pytest
import torch
from pared_kernels import bitstream, check, dispatch, mbq_linear_w4a8, mbq_linear_w16
from pared_kernels.ops.mbq_linear_w4a8 import cases as w4a8_cases
from pared_kernels.ops.mbq_linear_w4a8.reference import quantize_tokens
from pared_kernels.ops.mbq_linear_w16 import cases as w16_cases
from pared_kernels.ops.mbq_linear_w16.reference import dequantize

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not dispatch.has_triton(), reason="no triton"))
BACKENDS = ["reference", "cpu", TRITON]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", ["mbq_linear_w16", "mbq_linear_w4a8"])
def test_every_case_agrees_with_float64(operator, backend):
    outcomes = check.run([operator], backend, device="cpu")
    assert [outcome for outcome in outcomes if outcome.status == "failed"] == []
    assert any(outcome.status == "passed" for outcome in outcomes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_bit_stream_is_dense_and_comes_back(bits, generator):
    codes = torch.randint(2**bits, (3, 70), generator=generator)
    packed = bitstream.pack_dense(codes, bits)
    assert packed.shape == (3, -(-70 * bits // 32))
    whole = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(packed[0]))
    assert [(whole >> (bits * place)) & (2**bits - 1) for place in range(70)] == codes[0].tolist()
    assert bitstream.unpack_dense(packed, bits, 70).equal(codes.to(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_sums_are_exact(backend, generator):
    x, packed, _, _ = w4a8_cases.draw(5, 128, 40, False, torch.float32, generator)
    # With scales of one and tokens whose largest entry is 127 the outputs are the integer sums themselves.
    x = torch.randint(-127, 128, x.shape, generator=generator).float()
    x[:, 0] = 127
    with pared_kernels.use(backend):
        found = mbq_linear_w4a8(x, packed, torch.ones(40, 1))
    weight = bitstream.unpack_dense(packed, 4, 128).long() - 8
    assert found.equal((x.long() @ weight.T).float())


@pytest.mark.skipif(not dispatch.has_triton(), reason="no triton")
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("many", [1, 20])
def test_repeated_runs_give_the_same_bits(backend, many, generator):
    # 32 rows of the weight leave most of a GPU idle, so that K is split and the parts are summed.
    arguments = w16_cases.draw(many, 2048, 32, 3, 128, False, True, torch.float16, generator)
    with pared_kernels.use(backend):
        first = mbq_linear_w16(*arguments)
        assert all(mbq_linear_w16(*arguments).equal(first) for _ in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("many", [1, 20, 40])
def test_rows_of_18944_bfloat16_columns_stay_within_two_thousandths(many, generator):
    arguments = w16_cases.draw(many, 18944, 8, 3, 128, False, False, torch.bfloat16, generator)
    doubled = tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)
    with pared_kernels.use("reference"):
        expected = mbq_linear_w16(*doubled)
    for backend in ("cpu", "triton") if dispatch.has_triton() else ("cpu",):
        with pared_kernels.use(backend):
            found = mbq_linear_w16(arguments[0].float(), *arguments[1:])
        assert (found.double() - expected).abs().max() <= 2e-3 * expected.abs().max()


@pytest.mark.parametrize("eight", [False, True])
def test_the_gradient_goes_to_input_and_bias_through_the_dequantised_weight(eight, generator):
    if eight:
        x, packed, scales, bias = w4a8_cases.draw(3, 64, 6, True, torch.float64, generator)
        weight = dequantize(packed, scales, None, 4, 64, 64, torch.float64)
        arguments = (packed, scales)
        operator = mbq_linear_w4a8
    else:
        x, packed, scales, zeros, bits, group, bias = w16_cases.draw(
            3, 64, 6, 3, 32, False, True, torch.float64, generator
        )
        weight = dequantize(packed, scales, zeros, bits, group, 64, torch.float64)
        arguments = (packed, scales, zeros, bits, group)
        operator = mbq_linear_w16
    x.requires_grad_()
    bias.requires_grad_()
    weights = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    (operator(x, *arguments, bias) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ weight)
    torch.testing.assert_close(bias.grad, weights.sum(0))


def test_tokens_are_rounded_half_to_even_with_a_floor_under_the_scale():
    codes, scale = quantize_tokens(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]]), 8)
    assert codes.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    torch.testing.assert_close(scale[:, 0], torch.tensor([1.0, 1e-5 / 127]))


@pytest.mark.parametrize("many", [3, 40])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_not_finite_in_a_row_of_x_shows_in_that_row_alone(backend, many, generator):
    x, *rest = w16_cases.draw(many, 64, 6, 3, 32, False, True, torch.bfloat16, generator)
    x[0, 3], x[1, 40] = torch.inf, torch.nan
    _, packed, scales, bias = w4a8_cases.draw(many, 64, 6, True, torch.bfloat16, generator)
    with pared_kernels.use(backend):
        outputs = mbq_linear_w16(x, *rest), mbq_linear_w4a8(x, packed, scales, bias)
    for out in outputs:
        assert not out[:2].isfinite().any()
        assert out[2:].isfinite().all()


@pytest.mark.parametrize("many", [1, 31, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_integer_parts_of_x_keep_float32(bits, many, generator):
    x, *rest = w16_cases.draw(many, 256, 12, bits, 64, bits % 2 == 0, True, torch.float32, generator)
    # Entries of very different size in one group, as in models with outlier channels.
    x[:, ::7] *= 1000
    with pared_kernels.use("reference"):
        expected = mbq_linear_w16(x.double(), *rest)
    with pared_kernels.use("cpu"):
        found = mbq_linear_w16(x, *rest)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_of_x_give_no_output(backend, generator):
    arguments = w16_cases.draw(2, 64, 6, 3, 32, False, True, torch.float32, generator)
    with pared_kernels.use(backend):
        assert mbq_linear_w16(arguments[0][:0], *arguments[1:]).shape == (0, 6)
        x, *rest = w4a8_cases.draw(2, 64, 6, True, torch.float32, generator)
        assert mbq_linear_w4a8(x[:0], *rest).shape == (0, 6)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"x": torch.zeros(2, 3, 64)}, ValueError, "x"),
        ({"packed": torch.zeros(6, 6)}, TypeError, "packed"),
        ({"packed": torch.zeros(6, 5, dtype=torch.int32)}, ValueError, "packed"),
        ({"scales": torch.zeros(6, 3)}, ValueError, "scales"),
        ({"zeros": torch.zeros(6, 2, dtype=torch.int32)}, ValueError, "zeros"),
        ({"bits": 9}, ValueError, "bits"),
        ({"group_size": 16}, ValueError, "group_size"),
        ({"bias": torch.zeros(5)}, ValueError, "bias"),
    ],
)
def test_wrong_arguments_are_named(change, error, named, generator):
    names = ("x", "packed", "scales", "zeros", "bits", "group_size", "bias")
    arguments = dict(zip(names, w16_cases.draw(2, 64, 6, 3, 32, False, True, torch.float32, generator), strict=True))
    with pytest.raises(error, match=named):
        mbq_linear_w16(**(arguments | change))


def test_integer_layer_names_wrong_arguments(generator):
    x, packed, scales, _ = w4a8_cases.draw(2, 64, 6, True, torch.float32, generator)
    with pytest.raises(ValueError, match="words of packed"):
        mbq_linear_w4a8(x, packed[:, :4], scales)
    with pytest.raises(ValueError, match="scales"):
        mbq_linear_w4a8(x, packed, scales.repeat(1, 2))
    with pytest.raises(ValueError, match="columns"):
        mbq_linear_w4a8(x[:, :40], packed, scales)
