"""The tensor functions: each against what it says, on numbers that can be checked by hand or in another way."""

from __future__ import annotations

import math
import time
import warnings

import pytest
import torch
from pared_kernels import philox
from sjd.errors import GrammarError
from sjd.functional import (
    accept_lengths,
    expected_ratio,
    gumbel,
    initial_drafts,
    inverse_cdf,
    process_rows,
    residual_probs,
    window_step,
)
from sjd.grammar import ImageGrammar

F64 = torch.float64


def normal(rng, *shape, dtype=F64):
    weights = torch.rand(shape, generator=rng, dtype=dtype) ** 3 + 1e-3
    return weights / weights.sum(-1, keepdim=True)


def step_arguments(rng, rows=64, window=5, vocab=7, dtype=F64):
    q, p = normal(rng, rows, window, vocab, dtype=dtype), normal(rng, rows, window + 1, vocab, dtype=dtype)
    drafts = inverse_cdf(q, torch.rand(rows, window, generator=rng, dtype=F64))
    u, v = (torch.rand(rows, n, generator=rng, dtype=F64) for n in (window, window + 1))
    return drafts, q, p, u, v


def test_accepted_lengths_are_those_of_a_loop_over_positions(rng):
    drafts, q, p, u, _ = step_arguments(rng)
    valid = torch.rand(64, 5, generator=rng) < 0.9
    found = accept_lengths(drafts, q, p, u, valid=valid)
    for row in range(64):
        count = 0
        while count < 5 and valid[row, count]:
            token = drafts[row, count]
            if not u[row, count] * q[row, count, token] < p[row, count, token]:
                break
            count += 1
        assert found[row] == count


def test_tests_and_residuals_are_those_of_transformers(rng, monkeypatch):
    """64 rows of its speculative sampling with our uniform numbers: how many match, and the law it then draws from."""
    from transformers.generation.utils import _speculative_sampling

    drafts, q, p, u, _ = step_arguments(rng)
    found, laws, uniforms = accept_lengths(drafts, q, p, u), [], iter(u)

    def multinomial(law, num_samples):
        laws.append(law[0])
        return law.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "rand_like", lambda like: next(uniforms))
    monkeypatch.setattr(torch, "multinomial", multinomial)
    for row in range(64):
        _, count = _speculative_sampling(drafts[row, None], q[row, None].log(), 5, p[row, None].log())
        assert found[row] == count
        expected = p[row, 5] if count == 5 else residual_probs(p[row, count], q[row, count])
        torch.testing.assert_close(expected, laws[row], atol=1e-6, rtol=0)
    assert set(range(4)) < set(found.tolist())


def test_a_draft_that_q_excludes_passes_where_p_does_not_exclude_it():
    q = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])
    p = torch.tensor([[[0.5, 0.5]], [[0.0, 1.0]]])
    drafts = torch.zeros(2, 1, dtype=torch.int64)
    u = torch.full((2, 1), 0.999)
    with pytest.warns(RuntimeWarning, match="draft 0 of row 0"):
        assert accept_lengths(drafts, q, p, u).tolist() == [1, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What is not tested need not have been drawn from anything.
        assert accept_lengths(drafts, q, p, u, valid=torch.zeros(2, 1, dtype=torch.bool)).tolist() == [0, 0]


def test_the_test_is_strict():
    p = q = torch.tensor([[[0.25, 0.75]]])
    drafts = torch.tensor([[1]])
    assert accept_lengths(drafts, q, p, torch.tensor([[1.0 - 2**-24]])).item() == 1
    assert accept_lengths(drafts, q, 0 * p, torch.zeros(1, 1)).item() == 0


def test_the_residual_is_the_normalised_positive_part(rng):
    p, q = normal(rng, 64, 11), normal(rng, 64, 11)
    expected = (p - q).clamp(min=0)
    torch.testing.assert_close(residual_probs(p, q), expected / expected.sum(-1, keepdim=True))


def test_a_residual_that_vanished_or_is_not_finite_becomes_p():
    p = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.3, 0.7]])
    q = torch.tensor([[0.2, 0.8], [float("nan"), 0.1], [0.4, 0.9]])
    torch.testing.assert_close(residual_probs(p, q), p)


def test_accepting_or_drawing_from_the_residual_gives_p(rng):
    """sum_x q(x) min(1, p / q) [x = y] + P(reject) residual(y) = p(y), the identity everything rests on."""
    p, q = normal(rng, 32, 9), normal(rng, 32, 9)
    accepted = torch.minimum(p, q)
    rejected = 1 - accepted.sum(-1, keepdim=True)
    torch.testing.assert_close(accepted + rejected * residual_probs(p, q), p)
    torch.testing.assert_close(expected_ratio(p, q), 1 - (p - q).abs().sum(-1) / 2)


def test_inversion_selects_every_token_for_its_share_of_the_unit_interval():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, 1 - 2**-24])
    assert inverse_cdf(probs.expand(6, -1), u).tolist() == [1, 1, 3, 3, 4, 4]
    # What is selected does not change with the scale, and zero is never selected.
    assert inverse_cdf(7 * probs.expand(6, -1), u).tolist() == [1, 1, 3, 3, 4, 4]
    assert inverse_cdf(probs[None], torch.tensor([1 - 2**-53], dtype=F64)).item() == 4


def test_inversion_has_the_law_of_its_probabilities(rng):
    probs = normal(rng, 13)
    tokens = inverse_cdf(probs.expand(40_000, -1), torch.rand(40_000, generator=rng, dtype=F64))
    share = torch.bincount(tokens, minlength=13) / 40_000
    assert (share - probs).abs().max() < 5 * (0.25 / 40_000) ** 0.5


def test_noise_comes_from_the_published_vectors_of_philox():
    def noise_of(words):
        return [-math.log(-math.log((word + 0.5) * 2.0**-32)) for word in words]

    zero = gumbel(0, torch.zeros(1).long(), torch.zeros(1, 1).long(), 4, dtype=F64)
    assert zero.flatten().tolist() == pytest.approx(noise_of((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)))
    # The other vectors have counters of tokens far behind any vocabulary; `philox.gumbel` begins where it is told.
    far = (
        (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x299F31D0A4093822, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344,
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    )  # fmt: skip
    for seed, block, position, row, stream, words in far:
        place = torch.tensor([row]), torch.tensor([[position]])
        noise = philox.gumbel(seed, *place, 4, stream, F64, first=block << 2)
        assert noise.flatten().tolist() == pytest.approx(noise_of(words))


def test_noise_depends_on_seed_row_position_token_and_stream_alone():
    rows, positions = torch.tensor([3, 5]), torch.tensor([[0, 1, 2], [7, 8, 9]])
    noise = gumbel(11, rows, positions, 10)
    assert gumbel(11, rows.flip(0), positions.flip(0), 10).flip(0).equal(noise)
    assert gumbel(11, rows[:1], positions[:1, 2:], 7).equal(noise[:1, 2:, :7])
    for other in (
        gumbel(12, rows, positions, 10),
        gumbel(11, rows + 1, positions, 10),
        gumbel(11, rows, positions + 3, 10),
        gumbel(11, rows, positions, 10, stream=1),
    ):
        assert (other - noise).abs().min() > 1e-6


def test_noise_is_gumbel_and_its_argmax_has_the_law_of_the_probabilities():
    positions = torch.arange(40_000)[None]
    noise = gumbel(1, torch.zeros(1).long(), positions, 5)[0]
    ordered = noise.flatten().double().sort().values
    below = torch.exp(-torch.exp(-ordered))
    assert (below - torch.linspace(0, 1, len(ordered), dtype=F64)).abs().max() < 1.95 / len(ordered) ** 0.5
    assert noise.isfinite().all()
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    share = torch.bincount((probs.log() + noise).argmax(-1), minlength=5) / 40_000
    assert (share - probs).abs().max() < 5 * (0.25 / 40_000) ** 0.5


@pytest.mark.gpu
def test_noise_is_the_same_on_a_gpu():
    place = torch.arange(3), torch.arange(12).view(3, 4)
    here, there = (gumbel(2**40 + 3, *place, 1000, stream=2, device=device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there.cpu(), here, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["seed", "stream"])
def test_wrong_words_of_noise_are_named(name):
    zero, words = torch.zeros(1).long(), {"seed": 0, "stream": 0} | {name: -1}
    with pytest.raises(ValueError, match=name):
        gumbel(words["seed"], zero, zero[None], 4, stream=words["stream"])


@pytest.mark.parametrize("refresh", ["independent", "maximal"])
def test_a_step_is_the_loop_of_the_paper(refresh, rng):
    drafts, q, p, u, v = step_arguments(rng)
    found = window_step(drafts, q, p, u, v, refresh=refresh)
    leading = accept_lengths(drafts, q, p, u)
    assert found.committed.equal(leading + 1)
    for row in range(64):
        for k in range(6):
            first = int(leading[row])
            passes = k < 5 and u[row, k] * q[row, k, drafts[row, k]] < p[row, k, drafts[row, k]]
            tested = k < 5 and (k <= first or refresh == "maximal")
            if tested and passes:
                expected = drafts[row, k]
            else:
                law = residual_probs(p[row, k], q[row, k]) if tested else p[row, k]
                expected = inverse_cdf(law, v[row, k])
            assert found.tokens[row, k] == expected


def test_the_gumbel_refresh_draws_behind_the_first_rejection_from_the_noise(rng):
    drafts, q, p, u, v = step_arguments(rng)
    noise = gumbel(5, torch.arange(64), torch.arange(6).repeat(64, 1), 7, dtype=F64)
    found = window_step(drafts, q, p, u, v, refresh="gumbel", gumbel=noise)
    other = window_step(drafts, q, p, u, v, refresh="independent")
    place = torch.arange(6)
    behind = place >= found.committed[:, None]
    assert found.committed.equal(other.committed)
    assert found.tokens[behind].equal((p.log() + noise).argmax(-1)[behind])
    rejected = (place == found.committed[:, None] - 1) & (place < 5)
    accepted = place < found.committed[:, None] - 1
    assert found.tokens[accepted | rejected].equal(other.tokens[accepted | rejected])


def test_matching_accepts_what_the_noise_would_draw(rng):
    drafts, _, p, u, v = step_arguments(rng)
    noise = gumbel(5, torch.arange(64), torch.arange(6).repeat(64, 1), 7, dtype=F64)
    for given in (noise, None):
        drawn = (p.log() + given).argmax(-1) if given is not None else p.argmax(-1)
        close = torch.where(torch.rand(64, 5, generator=rng) < 0.7, drawn[:, :5], drafts)
        found = window_step(close, None, p, u, v, refresh="maximal", verify="match", gumbel=given)
        assert found.tokens.equal(drawn)
        assert found.committed.equal((close == drawn[:, :5]).long().cumprod(1).sum(1) + 1)


@pytest.mark.parametrize("refresh", ["independent", "maximal", "gumbel"])
def test_invalid_drafts_are_drawn_from_p_and_end_the_window(refresh, rng):
    drafts, q, p, u, v = step_arguments(rng)
    valid = torch.ones(64, 5, dtype=torch.bool)
    valid[:, 2:] = False
    noise = gumbel(5, torch.arange(64), torch.arange(6).repeat(64, 1), 7, dtype=F64)
    # Everything that may be tested is accepted.
    found = window_step(drafts, q, p, 0 * u, v, refresh=refresh, gumbel=noise, valid=valid)
    assert (found.committed == 3).all()
    drawn = (p.log() + noise).argmax(-1) if refresh == "gumbel" else inverse_cdf(p, v)
    assert found.tokens[:, 2].equal(drawn[:, 2])


def test_a_limit_lowers_what_is_committed_and_changes_no_token(rng):
    drafts, q, p, u, v = step_arguments(rng)
    limit = torch.randint(0, 4, (64,), generator=rng)
    free, held = (window_step(drafts, q, p, u, v, refresh="maximal", limit=one) for one in (None, limit))
    assert held.tokens.equal(free.tokens)
    assert held.committed.equal(torch.minimum(free.committed, limit))


def test_a_window_without_drafts_draws_one_token(rng):
    p = normal(rng, 9, 1, 7)
    nothing, v = torch.empty(9, 0), torch.rand(9, 1, generator=rng, dtype=F64)
    found = window_step(nothing.long(), p[:, :0], p, nothing, v, refresh="independent")
    assert found.committed.tolist() == [1] * 9
    assert found.tokens.equal(inverse_cdf(p, v))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"refresh": "never"}, "refresh"),
        ({"refresh": "maximal", "verify": "guess"}, "verify"),
        ({"refresh": "gumbel"}, "gumbel"),
        ({"refresh": "maximal", "draft_probs": None}, "draft_probs"),
    ],
)
def test_wrong_arguments_of_a_step_are_named(options, named, rng):
    drafts, q, p, u, v = step_arguments(rng)
    q = options.pop("draft_probs", q)
    with pytest.raises(ValueError, match=named):
        window_step(drafts, q, p, u, v, **options)


def test_processing_keeps_its_order(rng):
    logits = 2 * torch.randn(20, 30, generator=rng, dtype=F64)
    other = torch.randn(20, 30, generator=rng, dtype=F64)
    allowed = torch.rand(30, generator=rng) < 0.7
    options = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "allowed": allowed}
    found = process_rows(logits, guidance=(3.0, other), **options)
    for row in range(20):
        scores = (other[row] + 3 * (logits[row] - other[row])).masked_fill(~allowed, -torch.inf) / 0.7
        kept = scores >= scores.sort(descending=True).values[8]
        probs = scores.masked_fill(~kept, -torch.inf).softmax(-1)
        ordered, order = probs.sort(descending=True)
        count = int((ordered.cumsum(0) < 0.8).sum()) + 1
        expected = torch.zeros(30, dtype=F64)
        expected[order[:count]] = ordered[:count] / ordered[:count].sum()
        torch.testing.assert_close(found[row], expected)
    assert process_rows(logits, guidance=(other, 3.0), temperature=0.7, top_k=9, top_p=0.8, allowed=allowed).equal(
        found
    )


def test_top_k_keeps_ties_and_top_p_keeps_at_least_one():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert (process_rows(logits, top_k=1) > 0).tolist() == [[False, True, True, False]]
    assert (process_rows(logits, top_p=1e-6) > 0).sum() == 1
    assert process_rows(logits, top_k=0, top_p=1.0).equal(logits.softmax(-1))


def test_forced_rows_are_certain_and_a_slice_is_a_mask(rng):
    logits = torch.randn(3, 8, generator=rng)
    found = process_rows(logits, allowed=slice(2, 5), forced=torch.tensor([-1, 7, -1]))
    assert found[1].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    torch.testing.assert_close(found[0, 2:5], logits[0, 2:5].softmax(-1))
    assert found[0, :2].sum() + found[0, 5:].sum() == 0
    assert process_rows(logits.half()).dtype == torch.float32


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_wrong_processing_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        process_rows(torch.zeros(1, 4), **options)


GRID = ImageGrammar([(3, 4)], slice(10, 20), line_end=99, after=(98,))


def known(first, length=40):
    """Tokens that tell their position, as image tokens where they are known."""
    tokens = torch.full((len(first), length), -1)
    for row, count in enumerate(first):
        tokens[row, :count] = 10 + torch.arange(count) % 10
    return tokens, torch.tensor(first)


def test_copies_come_from_the_left_or_above_and_forced_places_are_forced(rng):
    # Rows of four cells and a line end: positions 0-3, 5-8, 10-13 are cells, 4, 9, 14 line ends, 15 the end.
    tokens, first = known([7])
    left, law = initial_drafts(tokens, first, 9, GRID, scheme="left", generator=rng)
    assert law == "onehot"
    assert left[0, [0, 1]].tolist() == [16, 16]  # what stands at 6
    assert left[0, 2] == 99
    assert left[0, 3] == left[0, 4] == left[0, 5] == left[0, 6]  # a new row: one random token, copied on
    assert 10 <= left[0, 3] < 20
    assert left[0, [7, 8]].tolist() == [99, 98]
    above, _ = initial_drafts(tokens, first, 9, GRID, scheme="above", generator=rng)
    assert above[0].tolist() == [12, 13, 99, 15, 16, 12, 13, 99, 98]  # 10 copies 5, known; 12 copies 7, and that 2


def test_auto_is_above_and_in_the_first_row_left(rng):
    tokens, first = known([2, 7])
    auto, _ = initial_drafts(tokens, first, 5, GRID, scheme="auto", generator=rng)
    assert auto[0].tolist() == [11, 11, 99, 10, 11]
    assert auto[1].tolist() == [12, 13, 99, 15, 16]


def test_above_in_the_first_row_is_random_and_the_rows_below_copy_it(rng):
    tokens, first = known([0])
    above, _ = initial_drafts(tokens, first, 14, GRID, scheme="above", generator=rng)
    assert above[0, :4].equal(above[0, 5:9])
    assert above[0, :4].equal(above[0, 10:14])
    assert len(set(above[0, :4].tolist())) > 1


def test_random_drafts_are_uniform_over_the_allowed_tokens(rng):
    allowed = torch.zeros(12, dtype=torch.bool)
    allowed[[2, 5, 11]] = True
    for grammar, ids in ((GRID, range(10, 20)), (ImageGrammar([(3, 4)], allowed), [2, 5, 11])):
        drafts, law = initial_drafts(
            torch.zeros(4000, 40).long(), torch.zeros(4000).long(), 3, grammar, scheme="uniform", generator=rng
        )
        assert law == "uniform"
        share = torch.tensor([(drafts == one).double().mean() for one in ids])
        assert share.sum() == pytest.approx(1)
        assert (share - 1 / len(ids)).abs().max() < 5 * (0.25 / 12_000) ** 0.5


def test_sampled_schemes_draw_from_the_neighbours_law_and_say_so(rng):
    tokens, first = known([7] * 4000)
    law = normal(rng, 10)
    asked = []

    def stored(source):
        asked.append(source[0].tolist())
        return law.expand(*source.shape, -1)

    drafts, laws = initial_drafts(
        tokens, first, 4, GRID, scheme="left_sample", generator=rng, neighbour_probs=stored, offset=10
    )
    assert asked == [[6, 6, -1, -1]]
    torch.testing.assert_close(laws[0, 0], law)
    assert laws[0, 2].tolist() == [0] * 9 + [1]  # forced, in the column that is nearest
    torch.testing.assert_close(laws[0, 3], torch.full((10,), 0.1, dtype=F64))
    share = torch.bincount(drafts[:, 1] - 10, minlength=10) / 4000
    assert (share - law).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_a_draw_from_above_takes_the_law_of_the_cell_above(rng):
    tokens, first = known([7] * 2000)
    places = normal(rng, 40, 10)

    def stored(source):
        return places[source.clamp(min=0)]

    drafts, laws = initial_drafts(
        tokens, first, 4, GRID, scheme="above_sample", generator=rng, neighbour_probs=stored, offset=10
    )
    # 7 and 8 stand under 2 and 3, 9 is a line end, 10 stands under 5.
    for place, above in ((0, 2), (1, 3), (3, 5)):
        torch.testing.assert_close(laws[0, place], places[above])
        share = torch.bincount(drafts[:, place] - 10, minlength=10) / 2000
        assert (share - places[above]).abs().max() < 5 * (0.25 / 2000) ** 0.5


def test_a_uniform_guess_passes_as_often_as_p_overlaps_with_it_and_a_random_one_once_in_all_tokens(rng):
    p = normal(rng, 10)
    rows = 40_000
    drafts, _ = initial_drafts(
        torch.zeros(rows, 40).long(), torch.zeros(rows).long(), 1, GRID, scheme="uniform", generator=rng
    )
    drafts, u = drafts - 10, torch.rand(rows, 1, generator=rng, dtype=F64)
    flat = torch.full((10,), 0.1, dtype=F64)
    certain = torch.zeros(rows, 1, 10, dtype=F64).scatter_(-1, drafts[..., None], 1.0)
    for law, expected in ((flat.expand(rows, 1, -1), float(expected_ratio(p, flat))), (certain, 0.1)):
        share = float(accept_lengths(drafts, law, p.expand(rows, 1, -1), u).double().mean())
        assert abs(share - expected) < 5 * (0.25 / rows) ** 0.5


def test_text_takes_random_uniform_and_the_last_token(rng):
    tokens, first = known([5])
    assert initial_drafts(tokens, first, 3, None, scheme="left")[0].tolist() == [[14, 14, 14]]
    with pytest.raises(GrammarError, match="vocab"):
        initial_drafts(tokens, first, 3, None, scheme="random")
    drafts, _ = initial_drafts(tokens, first, 50, None, scheme="random", generator=rng, vocab=6)
    assert set(drafts[0].tolist()) == set(range(6))
    for scheme in ("above", "above_sample", "left_sample"):
        with pytest.raises(GrammarError, match=scheme):
            initial_drafts(tokens, first, 3, None, scheme=scheme)
    with pytest.raises(ValueError, match="below"):
        initial_drafts(tokens, first, 3, None, scheme="below")


@pytest.mark.slow
def test_a_step_over_four_rows_of_a_window_of_thirty_two_takes_less_than_thirty_milliseconds(rng):
    drafts, q, p, u, v = step_arguments(rng, 4, 32, 8192, torch.float32)
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        window_step(drafts, q, p, u, v, refresh="maximal")
        best = min(best, time.process_time() - start)
    assert best < 0.030


@pytest.mark.parametrize("scheme", ["random", "left", "above", "auto"])
def test_guesses_behind_the_end_are_still_image_tokens(scheme, rng):
    tokens, first = known([14, 15, 16])
    drafts, _ = initial_drafts(tokens, first, 12, GRID, scheme=scheme, generator=rng)
    position = first[:, None] + torch.arange(12)
    inside = (drafts >= 10) & (drafts < 20)
    assert (inside | (GRID.forced(position) >= 0)).all()
