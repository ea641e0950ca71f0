from __future__ import annotations

import itertools
import math

import pytest
import torch
from ditfastattn2 import functional as f


@pytest.fixture
def draw(seed):
    """Random tensors that differ from test to test."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def dense(q, k, v, keep, scale=None):
    """Attention in float64 under a mask (..., S, S) written out."""
    q, k, v = (one.double().transpose(1, 2) for one in (q, k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def expanded(blocks, block, tokens):
    rows, columns = torch.arange(tokens) // block[0], torch.arange(tokens) // block[1]
    return blocks[rows[:, None], columns[None, :]]


# Error of a head (section 3.2)


def test_error_is_the_squared_difference_over_the_variance_per_head(draw):
    reference, candidate = draw(2, 5, 3, 4), draw(2, 5, 3, 4)
    expected = []
    for head in range(3):
        y, full = candidate[:, :, head].double(), reference[:, :, head].double()
        expected.append((y - full).pow(2).mean() / (full - full.mean()).pow(2).mean())
    torch.testing.assert_close(f.head_rse(candidate, reference), torch.stack(expected).float())


def test_error_of_half_precision_outputs_is_computed_in_float32(draw):
    reference = (100 * draw(1, 7, 2, 8)).half()
    rse = f.head_rse((reference.float() * 1.01).half(), reference)
    assert rse.dtype == torch.float32
    assert rse.isfinite().all()


def test_error_of_a_constant_reference_is_infinite_unless_it_is_met():
    reference = torch.full((3, 7, 2, 5), 0.1)
    candidate = reference.clone()
    candidate[0, 0, 1, 0] += 1
    assert f.head_rse(candidate, reference).tolist() == [0.0, math.inf]


def test_error_refuses_outputs_of_different_shapes(draw):
    with pytest.raises(ValueError, match="one shape"):
        f.head_rse(draw(1, 5, 2, 4), draw(1, 5, 3, 4))


# Savings (section 3.1)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("full", 0.0),
        ("cached", 1.0),
        ("arrow:1/8", (4096 - 256) ** 2 / 4429**2),
        ("arrow:1/32", (4096 - 64) ** 2 / 4429**2),
        ("reorder_arrow:1/8", (4096 - 256) ** 2 / 4429**2),
        ("arrow:1/8+residual", (4096 - 256) ** 2 / 4429**2),
        ("arrow:1/8+cfg", 1 - (1 - (4096 - 256) ** 2 / 4429**2) / 2),
        ("cached_cfg", 0.5),
        ("full+cfg", 0.5),
    ],
)
def test_saving_of_a_method_is_that_of_the_method_section(method, expected):
    assert f.method_saving(method, 4096, 333) == pytest.approx(expected, abs=1e-15)


def test_window_is_rounded_down_twice():
    # floor(floor(1001 / 8) / 2) = floor(125 / 2) = 62
    assert f.method_saving("arrow:1/8", 1001, 0) == pytest.approx((1001 - 62) ** 2 / 1001**2, abs=1e-15)


@pytest.mark.parametrize("method", ["arrow", "arrow:8/1", "arrow:0/8", "cached+cfg", "full+residual", "window:1/8", ""])
def test_unknown_methods_are_refused(method):
    with pytest.raises(ValueError, match="not valid"):
        f.method_saving(method, 4096, 333)


def test_arrow_without_a_band_is_refused():
    with pytest.raises(ValueError, match="band is empty"):
        f.method_saving("arrow:1/32", 40, 0)


# The plan of one step and layer (section 3.3)


def brute_force(rse, saving, delta, coef):
    """Best (saving, -error) over all choices, in float64."""
    heads, methods = rse.shape
    limit = math.inf if coef is None else coef * delta / heads
    best = (0.0, 0.0)
    for choice in itertools.product(range(-1, methods), repeat=heads):
        picked = [(float(rse[h, m]), float(saving[m])) for h, m in enumerate(choice) if m >= 0]
        if all(error < limit for error, _ in picked) and math.fsum(e for e, _ in picked) <= delta:
            best = max(best, (math.fsum(s for _, s in picked), -math.fsum(e for e, _ in picked)))
    return best


def value(rse, saving, plan):
    chosen = [(h, m) for h, m in enumerate(plan.tolist()) if m >= 0]
    error = math.fsum(float(rse[h, m]) for h, m in chosen)
    return math.fsum(float(saving[m]) for _, m in chosen), -error


@pytest.mark.parametrize("part", range(4))
def test_plan_equals_brute_force(part, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        heads, methods = (int(torch.randint(1, high, (), generator=generator)) for high in (7, 5))
        rse = torch.rand(heads, methods, generator=generator) ** 2
        saving = torch.rand(methods, generator=generator)
        delta = float(torch.rand((), generator=generator)) * heads / 2
        coef = (None, 0.7, 1.5, 2.0)[part]
        plan = f.solve_head_plan(rse, saving, delta, coef)
        assert value(rse, saving, plan) == pytest.approx(brute_force(rse, saving, delta, coef), abs=1e-12)
        limit = math.inf if coef is None else coef * delta / heads
        assert all(rse[h, m] < limit for h, m in enumerate(plan.tolist()) if m >= 0)
        assert -value(rse, saving, plan)[1] <= delta


@pytest.mark.parametrize("heads", [24, 38])
def test_plan_equals_an_independent_integer_programme(heads, seed):
    scipy = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        saving = torch.tensor([1.0, *(torch.rand(3, generator=generator) * 0.3 + 0.6).tolist()]).double()
        rse = torch.rand(heads, 4, generator=generator).double() * torch.tensor([2.0, 1.0, 1.4, 2.0])
        delta, coef = float(torch.rand((), generator=generator)) * 4, 1.5 if heads == 24 else None
        plan = f.solve_head_plan(rse, saving, delta, coef)
        limit = math.inf if coef is None else coef * delta / heads
        open_ = (rse < limit).numpy().ravel()
        one_a_head = torch.block_diag(*torch.ones(heads, 1, 4)).numpy()
        found = scipy.milp(
            -saving.repeat(heads).numpy(),
            constraints=[
                scipy.LinearConstraint(rse.reshape(1, -1).numpy(), ub=delta),
                scipy.LinearConstraint(one_a_head, ub=1),
            ],
            bounds=scipy.Bounds(0, open_.astype(float)),
            integrality=[1] * 4 * heads,
            options={"mip_rel_gap": 0.0},
        )
        assert value(rse, saving, plan)[0] == pytest.approx(-found.fun, abs=1e-6)


def test_of_equal_savings_the_smaller_error_wins_then_the_lower_method():
    saving = torch.tensor([0.5, 0.5, 0.5])
    rse = torch.tensor([[0.2, 0.1, 0.1], [0.3, 0.3, 0.2]])
    assert f.solve_head_plan(rse, saving, 1.0, None).tolist() == [1, 2]
    # Only one of two equal heads fits: the first stays full, the choice that is lower head by head.
    assert f.solve_head_plan(torch.full((2, 1), 0.6), torch.ones(1), 1.0, None).tolist() == [-1, 0]


def test_methods_that_save_nothing_are_not_taken():
    assert f.solve_head_plan(torch.zeros(2, 2), torch.tensor([0.0, 0.5]), 1.0).tolist() == [1, 1]
    assert f.solve_head_plan(torch.zeros(2, 1), torch.zeros(1), 1.0).tolist() == [-1, -1]


def test_the_limit_of_a_head_is_exclusive_and_the_sum_inclusive():
    rse = torch.full((2, 1), 0.5, dtype=torch.float64)
    assert f.solve_head_plan(rse, torch.ones(1), 1.0, 1.0).tolist() == [-1, -1]
    assert f.solve_head_plan(rse, torch.ones(1), 1.0, 1.5).tolist() == [0, 0]


def test_delta_of_zero_leaves_all_heads_full():
    assert f.solve_head_plan(torch.zeros(3, 2), torch.ones(2), 0.0, None).tolist() == [-1] * 3


def test_infinite_errors_are_never_chosen():
    rse = torch.tensor([[math.inf, 0.1]])
    assert f.solve_head_plan(rse, torch.tensor([1.0, 0.5]), 1e300, None).tolist() == [1]


@pytest.mark.parametrize("wrong", [math.nan, -1e-9])
def test_errors_that_are_nan_or_negative_are_refused(wrong):
    with pytest.raises(ValueError, match="NaN or negative"):
        f.solve_head_plan(torch.tensor([[0.1, wrong]]), torch.ones(2), 1.0)


@pytest.mark.parametrize(("delta", "coef"), [(-1.0, 1.5), (math.nan, 1.5), (math.inf, 1.5), (1.0, 0.0), (1.0, -1.0)])
def test_wrong_bounds_are_refused(delta, coef):
    with pytest.raises(ValueError, match="must be"):
        f.solve_head_plan(torch.zeros(1, 1), torch.ones(1), delta, coef)


# Arrows (sections 3.1 and 3.7)


@pytest.mark.parametrize("text_first", [False, True])
def test_arrow_keeps_the_band_of_the_picture_and_everything_with_text(text_first):
    mask = f.arrow_mask(5, 2, 1, text_first)
    text = range(2) if text_first else range(5, 7)
    for i, j in itertools.product(range(7), repeat=2):
        assert bool(mask[i, j]) == (i in text or j in text or abs(i - j) <= 1)


def test_window_of_minus_one_keeps_everything_and_zero_has_no_mask():
    assert f.arrow_mask(5, 2, -1).all()
    for window in (0, -2):
        with pytest.raises(ValueError, match="window"):
            f.arrow_mask(5, 2, window)


def test_block_maps_are_the_smallest_cover_of_the_mask(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    partial = 0
    for _ in range(200):
        vision, text = pick(1, 150), pick(0, 60)
        window = pick(1, 60) if pick(0, 8) else -1
        block = (2 ** pick(2, 6), 2 ** pick(2, 6))
        text_first = bool(pick(0, 2))
        mask = f.arrow_mask(vision, text, window, text_first)
        tokens = vision + text
        rows, columns = -(-tokens // block[0]), -(-tokens // block[1])
        padded = torch.zeros(rows * block[0], columns * block[1], dtype=torch.bool)
        padded[:tokens, :tokens] = mask
        cover = padded.view(rows, block[0], columns, block[1]).any(3).any(1)
        assert f.arrow_block_map(vision, text, window, text_first, block).equal(cover)
        partial += tokens % block[0] != 0
    assert partial > 100


def test_density_counts_visited_pairs_and_skipped_heads_as_nothing(seed):
    windows = torch.tensor([-1, 0, 3, 20], dtype=torch.int32)
    for text_first in (False, True):
        for block in (None, (16, 8)):
            visited = 0
            for window in (-1, 3, 20):
                mask = f.arrow_mask(45, 9, window, text_first)
                if block:
                    mask = expanded(f.arrow_block_map(45, 9, window, text_first, block), block, 54)
                visited += int(mask.sum())
            assert f.plan_density(windows, 45, 9, text_first, block) == pytest.approx(visited / (4 * 54**2))


@pytest.mark.parametrize(
    ("vision", "text", "text_first", "share", "exact", "blocks"),
    [
        (4096, 333, False, 8, 0.249, 0.290),
        (4096, 333, False, 16, 0.198, 0.241),
        (4096, 333, False, 32, 0.171, 0.216),
        (4096, 512, True, 8, 0.306, 0.329),
        (4096, 512, True, 16, 0.259, 0.282),
        (4096, 512, True, 32, 0.235, 0.259),
        (16384, 512, True, 8, 0.174, 0.180),
        (16384, 512, True, 16, 0.118, 0.125),
        (16384, 512, True, 32, 0.089, 0.096),
        (13 * 30 * 45, 226, True, 8, 0.143, 0.159),
        (21 * 30 * 52, 0, False, 8, 0.121, 0.125),
        (21 * 30 * 52, 0, False, 16, 0.062, 0.065),
        (21 * 30 * 52, 0, False, 32, 0.031, 0.035),
    ],
)
def test_densities_of_real_models_are_those_of_the_method(vision, text, text_first, share, exact, blocks):
    window = vision // share // 2
    assert f.plan_density([window], vision, text, text_first, None) == pytest.approx(exact, abs=6e-4)
    # The method counts blocks at the edge as whole ones.
    visited = f.arrow_block_map(vision, text, window, text_first).float().mean()
    assert float(visited) == pytest.approx(blocks, abs=6e-4)


# Attention


@pytest.mark.parametrize(
    ("backend", "block", "text_first"),
    [
        *(("auto", block, text_first) for block in ((16, 32), None) for text_first in (False, True)),
        ("sdpa", (16, 32), True),
        ("flex", (16, 32), False),
        ("flex", None, True),
    ],
)
def test_attention_is_that_of_the_mask(backend, block, text_first, draw):
    vision, text, windows = 45, 9, [-1, 0, 3, 20]
    q, k, v = (draw(2, 54, 4, 16) for _ in range(3))
    valid = torch.tensor([9, 4])
    place = torch.arange(54) - (0 if text_first else vision)
    padding = (place >= valid[:, None]) & (place < text) & (place >= 0)
    out = f.headwise_arrow_attention(
        q, k, v, torch.tensor(windows, dtype=torch.int32), text, text_first, block, valid, backend=backend
    )
    for head, window in enumerate(windows):
        if window == 0:
            assert out[:, :, head].eq(0).all()
            continue
        mask = f.arrow_mask(vision, text, window, text_first)
        if block:
            mask = expanded(f.arrow_block_map(vision, text, window, text_first, block), block, 54)
        keep = mask & ~padding[:, None, None, :]
        expected = dense(*(one[:, :, head : head + 1] for one in (q, k, v)), keep)
        torch.testing.assert_close(out[:, :, head : head + 1].double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", ["auto", "flex"])
def test_skipped_heads_keep_what_out_holds(backend, draw):
    q = draw(1, 20, 3, 16)
    out = torch.full_like(q, 7.0)
    result = f.headwise_arrow_attention(q, q, q, [0, 2, 0], 4, False, (16, 16), out=out, backend=backend)
    assert result is out
    assert out[:, :, [0, 2]].eq(7.0).all()
    assert not out[:, :, 1].eq(7.0).any()


def test_scale_multiplies_the_scores(draw):
    q, k, v = (draw(1, 20, 1, 16) for _ in range(3))
    out = f.headwise_arrow_attention(q, k, v, [-1], 4, False, scale=0.5)
    torch.testing.assert_close(
        out.double(), dense(q, k, v, torch.ones(20, 20, dtype=torch.bool), 0.5), atol=2e-6, rtol=0
    )


def test_unknown_backend_is_refused_and_one_that_cannot_run_says_what_is_missing(draw, monkeypatch):
    from pared_kernels import dispatch

    monkeypatch.setattr(dispatch, "interprets", lambda: False)
    q = draw(1, 20, 1, 16)
    with pytest.raises(ValueError, match="backend"):
        f.headwise_arrow_attention(q, q, q, [-1], 4, False, backend="flash")
    with pytest.raises(RuntimeError, match="GPU"):
        f.headwise_arrow_attention(q, q, q, [-1], 4, False, backend="triton")


# Reordering of frames (section 3.6)


@pytest.mark.parametrize("text_first", [False, True])
def test_reordering_puts_the_frames_of_a_patch_side_by_side(text_first):
    text, frames, patches = 2, 3, 4
    x = torch.arange(14.0).view(1, 14, 1, 1)
    start = text if text_first else 0
    moved = f.reorder_tokens(x, text, frames, text_first)
    for patch, frame in itertools.product(range(patches), range(frames)):
        assert moved[0, start + patch * frames + frame] == x[0, start + frame * patches + patch]
    kept = slice(0, text) if text_first else slice(12, 14)
    assert moved[:, kept].equal(x[:, kept])
    assert f.reorder_tokens(moved, text, frames, text_first, inverse=True).equal(x)


def test_frames_must_divide_the_vision_tokens():
    with pytest.raises(ValueError, match="frames"):
        f.reorder_tokens(torch.zeros(1, 14, 1, 1), 2, 5, False)
