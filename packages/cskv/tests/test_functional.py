"""The ten functions of the method against float64 references and their defining properties."""

from __future__ import annotations

import math

import pytest
import torch
from cskv import functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def weighted_loss(weight, factors, moment):
    residual = weight.double() - (factors[1].double() @ factors[0].double())
    return float(torch.trace(residual @ moment.double() @ residual.T))


def correlated_inputs(rng, tokens, channels):
    """Inputs whose channels differ in scale and are mixed, as those of a language model are."""
    scales = torch.logspace(-1.5, 1, channels, dtype=torch.float64)
    mixing = torch.randn(channels, channels, generator=rng, dtype=torch.float64) / channels**0.5
    return torch.randn(tokens, channels, generator=rng, dtype=torch.float64) * scales @ mixing


# Ranks and factors


@pytest.mark.parametrize(
    ("density", "heads", "head_dim", "rank"),
    [(0.5, 8, 128, 512), (0.2, 32, 128, 800), (0.25, 3, 64, 48), (1.0, 2, 16, 32), (0.001, 3, 64, 3)],
)
def test_rank_keeps_whole_channels_of_every_head(density, heads, head_dim, rank):
    assert F.rank_from_density(density, heads, head_dim) == rank


@pytest.mark.parametrize("arguments", [(0.0, 2, 16), (1.1, 2, 16), (0.5, 0, 16), (0.5, 2, 0)])
def test_rank_refuses_what_is_no_share_or_size(arguments):
    with pytest.raises(ValueError, match=r"density|num_kv_heads|head_dim"):
        F.rank_from_density(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_factors_are_the_best_of_their_rank_and_balanced(randn, dtype):
    weight = randn(12, 20, dtype=torch.float64).to(dtype)
    a, b = F.svd_factors(weight, 5)
    assert a.dtype == b.dtype == dtype
    assert a.shape == (5, 20)
    assert b.shape == (12, 5)
    values = torch.linalg.svdvals(weight.double())
    error = (weight.double() - b.double() @ a.double()).square().sum()
    assert float(error) == pytest.approx(float(values[5:].square().sum()), rel=max(10 * DTYPES[dtype], 1e-9))
    norms = a.double().norm(dim=1)
    assert torch.allclose(norms, b.double().norm(dim=0), rtol=max(DTYPES[dtype], 1e-6))


def test_full_rank_factors_give_the_weight_back(randn):
    weight = randn(8, 12, dtype=torch.float64)
    moment = torch.eye(12, dtype=torch.float64) + 0.1
    for a, b in (
        F.svd_factors(weight, 8),
        F.asvd_factors(weight, 8, torch.rand(12) + 0.1),
        F.whitened_factors(weight, 8, moment),
    ):
        assert torch.allclose(b @ a, weight, atol=1e-8)


def test_asvd_is_the_svd_of_the_scaled_weight_whatever_the_scale_of_the_means(randn, rng):
    weight = randn(10, 16, dtype=torch.float64)
    means = torch.rand(16, generator=rng, dtype=torch.float64) + 0.05
    a, b = F.asvd_factors(weight, 4, means, alpha=0.5)
    scale = (means + 1e-6).sqrt()
    u, s, vh = torch.linalg.svd(weight * scale)
    assert torch.allclose(b @ a, (u[:, :4] * s[:4]) @ vh[:4] / scale, atol=1e-9)
    a2, b2 = F.asvd_factors(weight, 4, 1000 * means, alpha=0.5)
    assert torch.allclose(b2 @ a2, b @ a, atol=1e-5)


def test_whitened_factors_have_the_loss_that_singular_values_predict(randn, rng):
    weight = randn(10, 16, dtype=torch.float64)
    inputs = correlated_inputs(rng, 200, 16)
    moment = inputs.T @ inputs / 200
    ridged = moment + 1e-6 * moment.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    for rank in (1, 4, 9):
        values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(ridged))
        loss = weighted_loss(weight, F.whitened_factors(weight, rank, moment), ridged)
        assert loss == pytest.approx(float(values[rank:].square().sum()), rel=1e-8)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 8))
def test_whitened_factors_beat_svd_and_asvd_on_any_second_moment(seed, rank):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 12, generator=rng, dtype=torch.float64)
    inputs = correlated_inputs(rng, 12 + seed % 40, 12)
    moment = inputs.T @ inputs / len(inputs)
    ridged = moment + 1e-6 * moment.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    whitened = weighted_loss(weight, F.whitened_factors(weight, rank, moment), ridged)
    for other in (F.svd_factors(weight, rank), F.asvd_factors(weight, rank, inputs.abs().mean(0))):
        assert whitened <= weighted_loss(weight, other, ridged) * (1 + 1e-9) + 1e-12


def test_no_gradient_step_improves_whitened_factors(randn, rng):
    weight = randn(6, 10, dtype=torch.float64)
    inputs = correlated_inputs(rng, 80, 10)
    moment = inputs.T @ inputs / 80
    ridged = moment + 1e-6 * moment.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    a, b = (factor.clone().requires_grad_() for factor in F.whitened_factors(weight, 3, moment))
    before = weighted_loss(weight, (a.detach(), b.detach()), ridged)
    optimizer = torch.optim.Adam([a, b], lr=1e-3)
    for _ in range(2000):
        optimizer.zero_grad()
        residual = weight - b @ a
        torch.trace(residual @ ridged @ residual.T).backward()
        optimizer.step()
    assert before <= 1.001 * weighted_loss(weight, (a.detach(), b.detach()), ridged)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda w: F.svd_factors(w, 0), "rank"),
        (lambda w: F.svd_factors(w, 7), "rank"),
        (lambda w: F.svd_factors(w[0], 1), "weight"),
        (lambda w: F.svd_factors(w * math.inf, 1), "weight"),
        (lambda w: F.asvd_factors(w, 1, torch.ones(3)), "input_abs_mean"),
        (lambda w: F.asvd_factors(w, 1, -torch.ones(8)), "input_abs_mean"),
        (lambda w: F.whitened_factors(w, 1, torch.eye(3)), "second_moment"),
        (lambda w: F.whitened_factors(w, 1, torch.full((8, 8), math.nan)), "second_moment"),
        (lambda w: F.whitened_factors(w, 1, torch.zeros(8, 8)), "second_moment"),
    ],
)
def test_factors_of_wrong_input_are_refused_by_name(randn, call, match):
    with pytest.raises(ValueError, match=match):
        call(randn(6, 8))


# Quantisation


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("zero_point", ["affine", "clamped"])
def test_packing_gives_the_fake_quantised_values_up_to_float16_metadata(randn, bits, axis, zero_point):
    x = randn(2, 32, 12)
    group = 6 if axis == "token" else 16
    packed = F.quantize(x, bits=bits, axis=axis, group_size=group, zero_point=zero_point)
    fake = F.fake_quantize(x, bits=bits, axis=axis, group_size=group, zero_point=zero_point)
    # Half an ulp of float16 on offset and, times the largest code, on the scale.
    bound = 2.0**-11 * float(x.abs().max()) * 4
    assert float((F.dequantize(packed) - fake).abs().max()) <= bound


@pytest.mark.parametrize(("bits", "per_token"), [(2, 4), (4, 7), (8, 13)])
def test_codes_take_the_bits_they_should_and_bytes_are_counted(randn, bits, per_token):
    packed = F.quantize(randn(3, 16, 13), bits=bits, axis="channel", group_size=8)
    assert packed.codes.shape == (3, 16, per_token)
    assert packed.codes.dtype == torch.uint8
    assert packed.scale.shape == packed.offset.shape == (3, 2, 13)
    assert packed.nbytes == 3 * 16 * per_token + 2 * 2 * 3 * 2 * 13


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 4, 8]),
    axis=st.sampled_from(["token", "channel"]),
    shift=st.floats(-50, 50),
)
def test_affine_error_is_at_most_half_a_step_also_for_groups_of_one_sign(seed, bits, axis, shift):
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    y = F.fake_quantize(x, bits=bits, axis=axis, group_size=8)
    groups = x.view(2, 16, 1, 8) if axis == "token" else x.view(2, 2, 8, 8)
    dim = -1 if axis == "token" else -2
    step = (groups.amax(dim, keepdim=True) - groups.amin(dim, keepdim=True)) / (2**bits - 1)
    assert bool(((x - y).view_as(groups).abs() <= step / 2 * (1 + 1e-9)).all())


def test_the_clamped_zero_point_destroys_groups_of_one_sign_at_any_width(rng):
    x = torch.randn(1, 32, 16, generator=rng) * 0.3 + 3.5
    for bits in (4, 8):
        clamped = F.fake_quantize(x, bits=bits, axis="channel", group_size=32, zero_point="clamped")
        affine = F.fake_quantize(x, bits=bits, axis="channel", group_size=32)
        assert float((clamped - x).norm() / x.norm()) > 0.3
        assert float((affine - x).norm() / x.norm()) < 0.02


def test_clamped_arithmetic_is_that_of_the_published_code(rng):
    x = torch.randn(2, 8, 4, generator=rng, dtype=torch.float64)
    n = 15
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / n
    zero = (-(low / scale).round()).clamp(0, n)
    expected = (((x / scale).round() + zero).clamp(0, n) - zero) * scale
    assert torch.equal(F.fake_quantize(x, bits=4, axis="channel", group_size=8, zero_point="clamped"), expected)


def test_the_gradient_passes_straight_through_an_affine_quantiser(randn):
    x = randn(1, 8, 8).requires_grad_()
    upstream = randn(1, 8, 8)
    F.fake_quantize(x, bits=2, axis="channel", group_size=8).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_the_gradient_stops_where_the_clamped_quantiser_saturates(rng):
    x = (torch.randn(1, 8, 2, generator=rng) * 0.1 + torch.tensor([0.0, 5.0])).requires_grad_()
    F.fake_quantize(x, bits=4, axis="channel", group_size=8, zero_point="clamped").sum().backward()
    # Channel 1 is of one sign and far from zero: all of it lies beyond what its zero point can represent.
    assert bool((x.grad[..., 1] == 0).all())
    assert bool((x.grad[..., 0] == 1).any())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": 0}, "bits"),
        ({"axis": "row"}, "axis"),
        ({"group_size": 5}, "group_size"),
        ({"zero_point": "symmetric"}, "zero_point"),
    ],
)
def test_quantisers_refuse_wrong_arguments_by_name(randn, change, match):
    arguments = {"bits": 4, "axis": "channel", "group_size": 8, "zero_point": "affine"} | change
    for function in (F.fake_quantize, F.quantize):
        with pytest.raises(ValueError, match=match):
            function(randn(1, 16, 4), **arguments)


def test_values_beyond_float16_cannot_be_packed():
    with pytest.raises(ValueError, match="float16"):
        F.quantize(torch.full((1, 8, 4), 1e6), bits=4, axis="channel", group_size=8)


# The two branches


@pytest.mark.parametrize("window", [0, 1, 3, 8])
def test_a_sliding_tail_is_the_window_and_the_current_token(window):
    assert [F.full_precision_tail(t, window, "sliding") for t in range(1, 12)] == [
        min(t, window + 1) for t in range(1, 12)
    ]


def test_a_block_tail_breathes_between_one_and_the_window():
    assert [F.full_precision_tail(t, 4, "block") for t in range(1, 10)] == [1, 2, 3, 4, 1, 2, 3, 4, 1]


@pytest.mark.parametrize("arguments", [(0, 4, "sliding"), (3, -1, "sliding"), (3, 0, "block"), (3, 4, "other")])
def test_a_tail_of_wrong_arguments_is_refused(arguments):
    with pytest.raises(ValueError, match=r"num_tokens|window|policy"):
        F.full_precision_tail(*arguments)


@pytest.mark.parametrize(("window", "policy"), [(0, "sliding"), (3, "sliding"), (1, "block"), (4, "block")])
def test_first_exact_columns_follow_the_tail(window, policy):
    expected = [t + 1 - F.full_precision_tail(t + 1, window, policy) for t in range(5, 17)]
    assert F.first_exact_columns(12, window, policy, begin=5).tolist() == expected


def angles(rng, tokens, channels, batch=1, dtype=torch.float64):
    theta = torch.rand(batch, tokens, channels // 2, generator=rng, dtype=torch.float64) * 6
    theta = torch.cat((theta, theta), -1)
    return theta.cos().to(dtype), theta.sin().to(dtype)


def rotated_by_hand(x, cos, sin):
    """Rotate the pair (i, i + D/2) of every head by its own angle, one by one."""
    out = x.clone()
    half = cos.shape[-1] // 2
    for i in range(half):
        c, s = cos[..., i].unsqueeze(1), sin[..., i].unsqueeze(1)
        out[..., i] = x[..., i] * c - x[..., i + half] * s
        out[..., i + half] = x[..., i + half] * c + x[..., i] * s
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("partial", [8, 4])
def test_keys_are_rebuilt_normalised_and_rotated_per_head(randn, rng, dtype, partial):
    c, b, bias = randn(2, 5, 6, dtype=torch.float64), randn(24, 6, dtype=torch.float64), randn(24, dtype=torch.float64)
    cos, sin = angles(rng, 5, partial)
    c, b, bias, cos, sin = (tensor.to(dtype) for tensor in (c, b, bias, cos, sin))

    def norm(x):
        return x / x.double().norm(dim=-1, keepdim=True).to(x.dtype)

    keys = F.reconstruct_keys(c, b, bias, cos, sin, num_kv_heads=3, norm=norm)
    flat = c.double() @ b.double().T + bias.double()
    heads = flat.view(2, 5, 3, 8)
    heads = heads / heads.norm(dim=-1, keepdim=True)
    expected = rotated_by_hand(heads.transpose(1, 2), cos.double(), sin.double())
    assert keys.shape == (2, 3, 5, 8)
    assert keys.dtype == dtype
    assert float((keys.double() - expected).abs().max()) < DTYPES[dtype]


def test_rebuilding_with_factors_that_do_not_fit_is_refused(randn, rng):
    cos, sin = angles(rng, 4, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="b has shape"):
        F.reconstruct_keys(randn(1, 4, 6), randn(24, 5), None, cos, sin, num_kv_heads=3)


def decode_case(randn, rng, old, recent, groups, dtype, biased):
    batch, heads, dim, r_k, r_v = 2, 3, 8, 5, 7
    case = {
        "q": randn(batch, heads * groups, 1, dim, dtype=torch.float64),
        "c_k": randn(batch, old, r_k, dtype=torch.float64),
        "c_v": randn(batch, old, r_v, dtype=torch.float64),
        "b_k": randn(heads * dim, r_k, dtype=torch.float64),
        "b_v": randn(heads * dim, r_v, dtype=torch.float64),
        "k_tail": randn(batch, heads, recent, dim, dtype=torch.float64),
        "v_tail": randn(batch, heads, recent, dim, dtype=torch.float64),
    }
    case["cos"], case["sin"] = angles(rng, old, dim)
    if biased:
        case["bias_k"], case["bias_v"] = (randn(heads * dim, dtype=torch.float64) for _ in "kv")
    return {name: tensor.to(dtype) for name, tensor in case.items()}


def decode_by_hand(case, scale, start=None):
    case = {name: tensor.double() for name, tensor in case.items()}
    heads, dim = case["k_tail"].shape[1], case["q"].shape[-1]

    def rebuilt(c, b, bias):
        flat = c @ b.T + (0 if bias is None else bias)
        return flat.view(*flat.shape[:2], heads, dim).transpose(1, 2)

    k = rotated_by_hand(rebuilt(case["c_k"], case["b_k"], case.get("bias_k")), case["cos"], case["sin"])
    k = torch.cat((k, case["k_tail"]), 2)
    v = torch.cat((rebuilt(case["c_v"], case["b_v"], case.get("bias_v")), case["v_tail"]), 2)
    outputs = torch.zeros_like(case["q"])
    for row in range(len(k)):
        for head in range(case["q"].shape[1]):
            group = head // (case["q"].shape[1] // heads)
            scores = k[row, group] @ case["q"][row, head, 0] * scale
            if start is not None:
                scores[: int(start[row])] = -math.inf
            outputs[row, head, 0] = scores.softmax(0) @ v[row, group]
    return outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("old", "recent", "groups"), [(6, 3, 2), (0, 4, 1), (5, 0, 4), (1, 1, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_decoding_from_latents_equals_attention_over_rebuilt_keys_and_values(
    randn, rng, dtype, old, recent, groups, biased
):
    case = decode_case(randn, rng, old, recent, groups, dtype, biased)
    output = F.decode_attention(**case, scale=0.3)
    expected = decode_by_hand(case, 0.3)
    assert output.dtype == dtype
    assert float((output.double() - expected).abs().max()) <= DTYPES[dtype] * (1 + float(expected.abs().max()))


def test_decoding_leaves_out_padding_row_by_row(randn, rng):
    case = decode_case(randn, rng, 6, 3, 2, torch.float64, True)
    start = torch.tensor([2, 7])
    output = F.decode_attention(**case, scale=0.3, start=start)
    assert torch.allclose(output, decode_by_hand(case, 0.3, start), atol=1e-10)


def test_decoding_refuses_empty_caches_and_several_queries(randn, rng):
    case = decode_case(randn, rng, 0, 0, 1, torch.float32, False)
    with pytest.raises(ValueError, match="no token"):
        F.decode_attention(**case, scale=1.0)
    case = decode_case(randn, rng, 2, 2, 1, torch.float32, False)
    with pytest.raises(ValueError, match="q has 3 tokens"):
        F.decode_attention(**{**case, "q": randn(2, 3, 3, 8)}, scale=1.0)


def test_the_loss_of_exact_factors_is_zero_and_rotation_does_not_change_it(randn, rng):
    hidden, w_k, w_v = (
        randn(2, 32, 12, dtype=torch.float64),
        randn(8, 12, dtype=torch.float64),
        randn(8, 12, dtype=torch.float64),
    )
    cos, sin = angles(rng, 32, 4)
    exact = [factor for weight in (w_k, w_v) for factor in F.svd_factors(weight, 8)]
    losses = F.reconstruction_loss(hidden, w_k, w_v, *exact, cos=cos, sin=sin, num_kv_heads=2)
    assert max(float(loss) for loss in losses) < 1e-20
    a_k, b_k = F.svd_factors(w_k, 4)
    a_v, b_v = F.svd_factors(w_v, 4)
    loss_k, loss_v = F.reconstruction_loss(hidden, w_k, w_v, a_k, b_k, a_v, b_v, cos=cos, sin=sin, num_kv_heads=2)
    assert float(loss_k) == pytest.approx(float((hidden @ (w_k - b_k @ a_k).T).square().mean()), rel=1e-9)
    assert float(loss_v) == pytest.approx(float((hidden @ (w_v - b_v @ a_v).T).square().mean()), rel=1e-9)


def test_the_quantised_loss_groups_keys_over_tokens_and_values_over_channels(randn, rng):
    hidden, w_k, w_v = randn(1, 32, 12), randn(8, 12), randn(8, 12)
    cos, sin = angles(rng, 32, 4, dtype=torch.float32)
    (a_k, b_k), (a_v, b_v) = F.svd_factors(w_k, 4), F.svd_factors(w_v, 4)
    losses = F.reconstruction_loss(
        hidden, w_k, w_v, a_k, b_k, a_v, b_v, cos=cos, sin=sin, num_kv_heads=2, k_bits=2, v_bits=4, group_size=16
    )
    k = F.fake_quantize(hidden @ a_k.T, bits=2, axis="channel", group_size=16) @ b_k.T
    v = F.fake_quantize(hidden @ a_v.T, bits=4, axis="token", group_size=2) @ b_v.T
    assert float(losses[0]) == pytest.approx(float((k - hidden @ w_k.T).square().mean()), rel=1e-4)
    assert float(losses[1]) == pytest.approx(float((v - hidden @ w_v.T).square().mean()), rel=1e-4)


@pytest.mark.parametrize(("window", "policy"), [(0, "sliding"), (3, "sliding"), (50, "sliding"), (4, "block")])
@pytest.mark.parametrize("prefix", [0, 5, 40])
def test_bibranch_attention_equals_a_loop_over_rows(randn, window, policy, prefix):
    q = randn(2, 4, 17, 6, dtype=torch.float64)
    k, v, k_hat, v_hat = (randn(2, 2, 17, 6, dtype=torch.float64) for _ in range(4))
    output = F.bibranch_attention(q, k, v, k_hat, v_hat, window=window, policy=policy, prefix=prefix, scale=0.4)
    expected = torch.zeros_like(q)
    for t in range(17):
        exact = t + 1 if t < prefix else F.full_precision_tail(t + 1, window, policy)
        old = t + 1 - exact
        for head in range(4):
            keys = torch.cat((k_hat[:, head // 2, :old], k[:, head // 2, old : t + 1]), 1)
            values = torch.cat((v_hat[:, head // 2, :old], v[:, head // 2, old : t + 1]), 1)
            weights = (torch.einsum("bd,btd->bt", q[:, head, t], keys) * 0.4).softmax(-1)
            expected[:, head, t] = torch.einsum("bt,btd->bd", weights, values)
    assert torch.allclose(output, expected, atol=1e-12)


def test_bibranch_attention_scores_long_sequences_in_blocks_without_a_seam(randn):
    tokens = F.QUERY_BLOCK + 40
    q, k, v, k_hat, v_hat = (randn(1, 1, tokens, 4, dtype=torch.float64) for _ in range(5))
    arguments = {"window": 200, "policy": "sliding", "prefix": 0, "scale": 0.5}
    whole = F.bibranch_attention(q, k, v, k_hat, v_hat, **arguments)
    part = F.bibranch_attention(*(x[:, :, :270] for x in (q, k, v, k_hat, v_hat)), **arguments)
    assert torch.allclose(whole[:, :, :270], part, atol=1e-12)
    assert not torch.allclose(whole[:, :, 210:], F.bibranch_attention(q, k, v, k, v, **arguments)[:, :, 210:])


def test_bibranch_attention_refuses_a_negative_prefix(randn):
    tensors = [randn(1, 1, 4, 4) for _ in range(5)]
    with pytest.raises(ValueError, match="prefix"):
        F.bibranch_attention(*tensors, window=1, policy="sliding", prefix=-1, scale=1.0)
