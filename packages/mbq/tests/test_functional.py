"""The mathematics, against independent float64 versions written from the definitions."""

from __future__ import annotations

import math

import mbq.functional as F
import pytest
import torch

BITS = range(2, 9)


def by_hand(w, bits, group, symmetric, include_zero=True):
    """Section 3.1, value by value, in Python floats: (codes, scales, zeros)."""
    codes, scales, zeros = [], [], []
    for row in w.double().tolist():
        code_row, scale_row, zero_row = [], [], []
        for start in range(0, len(row), group):
            values = row[start : start + group]
            if symmetric:
                top = 2 ** (bits - 1) - 1
                scale, zero = max(max(abs(v) for v in values), 1e-5) / top, 2 ** (bits - 1)
                code_row += [min(max(round(v / scale), -top - 1), top) + zero for v in values]
            else:
                high, low = max(values), min(values)
                if include_zero:
                    high, low = max(high, 0.0), min(low, 0.0)
                levels = 2**bits - 1
                scale = max(high - low, 1e-5) / levels
                zero = min(max(-round(low / scale), 0), levels)
                code_row += [min(max(round(v / scale) + zero, 0), levels) for v in values]
            scale_row.append(scale)
            zero_row.append(zero)
        codes.append(code_row)
        scales.append(scale_row)
        zeros.append(zero_row)
    return torch.tensor(codes), torch.tensor(scales, dtype=torch.float64), torch.tensor(zeros)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_are_rounded_as_the_definition_says(bits, symmetric, generator):
    for _ in range(8):
        w = torch.randn(3, 16, generator=generator, dtype=torch.float64)
        found = F.quantize_weight(w, bits, 8, symmetric, scale_dtype=torch.float64)
        codes, scales, zeros = by_hand(w, bits, 8, symmetric)
        assert found.codes.long().equal(codes)
        torch.testing.assert_close(found.scales, scales)
        assert (found.zeros is None) == symmetric
        if not symmetric:
            assert found.zeros.long().equal(zeros)
        expected = (codes - zeros.repeat_interleave(8, 1)) * scales.repeat_interleave(8, 1)
        torch.testing.assert_close(F.dequantize_weight(found, torch.float64), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_zero_and_one_signed_groups_survive(symmetric):
    w = torch.stack([torch.full((8,), 0.25), torch.zeros(8), -torch.linspace(1, 2, 8), torch.linspace(3, 4, 8)])
    rounded = F.fake_quantize_weight(w, 8, 8, symmetric)
    torch.testing.assert_close(rounded, w, rtol=0.02, atol=0.02)


def test_without_zero_in_the_range_a_constant_group_is_destroyed_as_in_the_papers_code():
    w = torch.full((1, 8), 0.25)
    assert F.fake_quantize_weight(w, 3, 8, include_zero=False).abs().max() < 1e-4
    torch.testing.assert_close(F.fake_quantize_weight(w, 3, 8), w)


def test_stored_scales_are_rounded_before_codes_are_found(generator):
    w = torch.randn(4, 32, generator=generator)
    found = F.quantize_weight(w, 3, 32, scale_dtype=torch.float16)
    assert found.scales.dtype == torch.float16
    again = (w / found.scales.float()).round() + found.zeros
    assert found.codes.equal(again.clamp(0, 7).to(torch.uint8))


def test_a_tiny_scale_does_not_become_zero_in_float16():
    found = F.quantize_weight(torch.full((1, 32), 1e-9), 8, 32, scale_dtype=torch.float16)
    assert found.scales.gt(0).all()
    assert F.dequantize_weight(found).isfinite().all()


def test_rounded_weights_keep_their_dtype(generator):
    w = torch.randn(4, 32, generator=generator).bfloat16()
    assert F.fake_quantize_weight(w, 3, 32).equal(F.fake_quantize_weight(w.float(), 3, 32).bfloat16())


def test_one_scale_for_a_row_is_one_group(generator):
    w = torch.randn(4, 24, generator=generator)
    assert F.quantize_weight(w, 4, -1).codes.equal(F.quantize_weight(w, 4, 24).codes)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"bits": 9}, "bits"), ({"group_size": 7}, "group_size"), ({"group_size": 0}, "group_size")],
)
def test_wrong_options_of_the_quantiser_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        F.quantize_weight(torch.zeros(2, 16), **({"bits": 3, "group_size": 8} | options))


def test_activations_are_rounded_per_token(generator):
    x = torch.randn(2, 3, 16, generator=generator)
    x[0, 0] = 0
    codes, scale = F.quantize_activation(x)
    expected = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    torch.testing.assert_close(scale, expected)
    assert codes.dtype == torch.int8
    assert codes.equal((x / expected).round().clamp(-128, 127).to(torch.int8))
    assert (F.fake_quantize_activation(x) - x).abs().max() <= scale.max() / 2 + 1e-7


def test_channel_scales_are_balanced_around_one(generator):
    mean = torch.rand(16, generator=generator) + 0.01
    scale = F.channel_scale(mean, 0.5)
    torch.testing.assert_close(scale.max() * scale.min(), torch.tensor(1.0))
    torch.testing.assert_close(scale / scale[0], (mean / mean[0]).sqrt())
    assert F.channel_scale(mean, 0.0).equal(torch.ones(16))
    dead = F.channel_scale(torch.tensor([0.0, 1.0]), 0.95)
    assert dead.isfinite().all()
    assert dead.gt(0).all()


@pytest.mark.parametrize("mode", ["mae", "mse"])
def test_the_objective_weighs_modalities_as_the_formulas_say(mode, generator):
    ref, out = (torch.randn(2, 5, 3, generator=generator) for _ in range(2))
    answer = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    vision = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    difference = (ref - out).double()
    error = difference.abs() if mode == "mae" else difference**2
    a, v = error[answer], error[vision]
    if mode == "mae":
        expected = (a.sum() + 0.3 * v.sum()) / (a.numel() + v.numel())
    else:
        expected = a.mean() + 0.3 * v.mean()
    found = F.reconstruction_loss(ref, out, answer, vision, 0.3, mode)
    assert found.dtype == torch.float32
    assert found.shape == ()
    torch.testing.assert_close(found, expected.float())
    plain = F.reconstruction_loss(ref, out, answer, vision, None, mode)
    torch.testing.assert_close(plain, error.mean().float())


@pytest.mark.parametrize(
    ("change", "named"),
    [({"out": torch.zeros(1, 2, 4)}, "out"), ({"mode": "l2"}, "mode"), ({"vision_mask": None}, "weight")],
)
def test_wrong_arguments_of_the_objective_are_named(change, named):
    mask = torch.ones(1, 2, dtype=torch.bool)
    arguments = {"ref": torch.zeros(1, 2, 3), "out": torch.zeros(1, 2, 3), "answer_mask": mask, "vision_mask": mask}
    with pytest.raises(ValueError, match=named):
        F.reconstruction_loss(**(arguments | {"weight": 0.5} | change))


def test_smoothing_divides_the_range_of_inputs_among_them_and_the_weight(generator):
    largest, weight = torch.rand(8, generator=generator) + 0.1, torch.rand(8, generator=generator) + 0.1
    torch.testing.assert_close(F.smooth_scale(largest, weight), (largest / weight).sqrt())
    torch.testing.assert_close(F.smooth_scale(largest, weight, 0.8), largest**0.8 / weight**0.2)


def test_sensitivity_is_the_mean_gradient_over_masked_positions(generator):
    grad = torch.randn(2, 4, 3, generator=generator)
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    found = F.token_sensitivity(grad, mask)
    torch.testing.assert_close(found[0], grad[0, [0, 2]].abs().mean())
    assert found[1].isnan()


def test_layer_weights_have_the_median_as_floor():
    vision, answer = [0.1, 0.4, 0.9, 0.2], [1.0, 2.0, 1.0, 2.0]
    assert F.layer_weights(vision, answer, None) == pytest.approx([0.1, 0.2, 0.9, 0.1])
    assert F.layer_weights(vision, answer) == pytest.approx([0.15, 0.2, 0.9, 0.15])
    with pytest.raises(ValueError, match=r"answer\[1\]"):
        F.layer_weights([0.1, 0.1], [1.0, 0.0])
    with pytest.raises(ValueError, match="floor"):
        F.layer_weights(vision, answer, "mean")
    with pytest.raises(ValueError, match="vision has 4 layers"):
        F.layer_weights(vision, answer[:3])


def test_folding_divides_what_comes_before(generator):
    w, s = torch.randn(4, generator=generator), torch.rand(4, generator=generator) + 0.5
    torch.testing.assert_close(F.fold(w, s, "norm") * s, w)
    torch.testing.assert_close((1 + F.fold(w, s, "norm_plus_one")) * s, 1 + w)
    matrix = torch.randn(6, 3, generator=generator)
    rows = F.fold(matrix, s, "rows")
    assert rows[:2].equal(matrix[:2])
    torch.testing.assert_close(rows[2:] * s[:, None], matrix[2:])
    torch.testing.assert_close(F.fold(matrix[:, 0], s, "rows")[2:] * s, matrix[2:, 0])
    with pytest.raises(ValueError, match="kind"):
        F.fold(w, s, "columns")


def bit_string(codes, bits):
    """Words of a row of codes, by writing every bit into a string."""
    text = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    text += "0" * (-len(text) % 32)
    words = [int(text[i : i + 32][::-1], 2) for i in range(0, len(text), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("size", [1, 10, 11, 22, 32, 33, 96])
def test_packing_writes_a_dense_bit_stream_and_back(bits, size, generator):
    codes = torch.randint(2**bits, (3, size), generator=generator, dtype=torch.uint8)
    packed = F.pack_dense(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [bit_string(row, bits) for row in codes.tolist()]
    assert F.unpack_dense(packed, bits, size).equal(codes)
    down = F.pack_dense(codes.T.contiguous(), bits, dim=0)
    assert down.equal(packed.T)
    assert F.unpack_dense(down, bits, size, dim=0).equal(codes.T)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_that_of_compressed_tensors(bits, generator):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(2**bits, (4, 40), generator=generator, dtype=torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert F.pack_dense(codes, bits).equal(helpers.pack_to_int32(signed, bits))
    assert F.pack_dense(codes, bits, dim=0).equal(helpers.pack_to_int32(signed, bits, packed_dim=0))


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="codes"):
        F.pack_dense(torch.tensor([[8]]), 3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_packed_linear_layer_is_the_dequantised_one(bits, symmetric, generator):
    w, x = torch.randn(5, 64, generator=generator), torch.randn(2, 3, 64, generator=generator)
    qw = F.quantize_weight(w, bits, 32, symmetric)
    bias = torch.randn(5, generator=generator)
    expected = x @ F.dequantize_weight(qw).T + bias
    packed = F.pack_dense(qw.codes, bits)
    torch.testing.assert_close(F.linear_w16(x, packed, qw.scales, qw.zeros, bits, 32, bias), expected)
    if not symmetric:
        stored = F.pack_dense(qw.zeros, bits, dim=0)
        torch.testing.assert_close(F.linear_w16(x, packed, qw.scales, stored, bits, 32, bias), expected)


def test_the_integer_layer_multiplies_integers_exactly(generator):
    w, x = torch.randn(5, 64, generator=generator), torch.randn(7, 64, generator=generator)
    qw = F.quantize_weight(w, 4, -1, symmetric=True)
    codes, scale = F.quantize_activation(x)
    integers = [
        [sum(a * (b - 8) for a, b in zip(row, col, strict=True)) for col in qw.codes.tolist()] for row in codes.tolist()
    ]
    expected = torch.tensor(integers, dtype=torch.float64) * scale.double() * qw.scales.double().T
    found = F.linear_w4a8(x, F.pack_dense(qw.codes, 4), qw.scales)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_packed_three_bit_weight_takes_three_bits_and_a_little():
    rows, columns = 256, 256
    qw = F.quantize_weight(torch.randn(rows, columns), 3, 128, scale_dtype=torch.float16)
    parts = (F.pack_dense(qw.codes, 3), qw.scales, F.pack_dense(qw.zeros, 3, dim=0))
    bits = 8 * sum(part.nbytes for part in parts) / (rows * columns)
    assert math.isclose(bits, 3 + 16 / 128 + 3 / 128)
