"""The law of the output is that of plain sampling: enumerated, and tested on samples of every mode."""

from __future__ import annotations

import pytest
import torch
from sjd.config import SJDConfig
from sjd.exactness import KeepsOldLaws, Table, binary_noises, deviations, enumerated_law, sample
from sjd.functional import process_rows
from sjd.grammar import ImageGrammar

SEQUENCES = 200_000
MODES = [
    ("independent", "speculative"),
    ("maximal", "speculative"),
    ("gumbel", "speculative"),
    ("gumbel", "match"),
]
INITS = ("random", "uniform", "left", "above", "left_sample", "above_sample", "auto")


def chi_square(counts: torch.Tensor, law: torch.Tensor) -> float:
    """p value of these counts under a law; cells expected less than five times are taken together."""
    expected = law * counts.sum()
    rare = expected < 5
    observed = torch.cat((counts[~rare].double(), counts[rare].sum()[None].double()))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    if expected[-1] < 1e-9:
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    half = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def counts_of(table, config, rng, **options):
    # Small batches and large ones are the same rows: each has a length of its own from the first pass on.
    tokens = sample(table, SEQUENCES, config, rng, **options)
    return torch.bincount(table.code(tokens), minlength=table.vocab**table.length)


def config_of(window, refresh, verify="speculative", init="auto", **options):
    return SJDConfig(window=window, refresh=refresh, verify=verify, init=init, **options)


@pytest.mark.parametrize("init", ["left", "uniform"])
@pytest.mark.parametrize("refresh", ["independent", "maximal"])
def test_every_random_choice_followed_gives_the_law_of_plain_sampling(refresh, init, rng):
    table = Table(2, 4, rng)
    law = enumerated_law(table, config_of(2, refresh, init=init, prob_dtype="float64"))
    assert float((law - table.law()).abs().sum() / 2) < 1e-9


@pytest.mark.parametrize("verify", ["speculative", "match"])
def test_so_it_does_with_noise_that_is_fixed_for_a_position(verify, rng):
    table = Table(2, 3, rng)
    config = config_of(2, "gumbel", verify, "left", prob_dtype="float64")
    law = enumerated_law(table, config, binary_noises(table))
    assert float((law - table.law()).abs().sum() / 2) < 1e-9


def test_the_published_bookkeeping_is_found_out_by_the_enumeration(rng):
    table = Table(2, 4, rng)
    config = config_of(2, "maximal", init="left", prob_dtype="float64")
    law = enumerated_law(table, config, kind=KeepsOldLaws)
    assert float((law - table.law()).abs().sum() / 2) > 1e-3


@pytest.mark.slow
def test_all_modes_on_all_toys():
    found = list(deviations())
    assert max(one.total_variation for one in found if one.exact) < 1e-9
    assert min(one.total_variation for one in found if not one.exact) > 1e-3


@pytest.mark.parametrize(("refresh", "verify"), MODES)
def test_samples_of_every_mode_pass_a_chi_square_test(refresh, verify, rng):
    table = Table(3, 5, rng)
    counts = counts_of(table, config_of(3, refresh, verify, "left", seed=7), rng)
    assert chi_square(counts, table.law()) > 1e-3


@pytest.mark.parametrize("init", INITS)
def test_samples_of_every_first_guess_pass_a_chi_square_test(init, rng):
    table = Table(2, 6, rng)
    grammar = ImageGrammar([(2, 3)], slice(0, 2))
    counts = counts_of(table, config_of(3, "maximal", init=init), rng, grammar=grammar)
    assert chi_square(counts, table.law()) > 1e-3


def test_the_published_bookkeeping_fails_the_chi_square_test(rng):
    table = Table(3, 5, rng)
    counts = counts_of(table, config_of(3, "maximal", init="left"), rng, kind=KeepsOldLaws)
    assert chi_square(counts, table.law()) < 1e-6


def test_relaxing_changes_the_law(rng):
    table = Table(3, 4, rng, zeros=False)
    config = SJDConfig(window=3, relax=0.3, init="uniform")
    neighbours = torch.tensor([[1, 2], [0, 2], [1, 0]])

    def kind(*arguments, **options):
        from sjd.window import Window

        return Window(*arguments, neighbours=neighbours, **options)

    counts = counts_of(table, config, rng, kind=kind)
    assert chi_square(counts, table.law()) < 1e-6


def test_a_margin_at_the_end_is_decoded_one_by_one_and_keeps_the_law(rng):
    table = Table(3, 5, rng)
    counts = counts_of(table, config_of(3, "independent", init="left", stop_margin=3), rng)
    assert chi_square(counts, table.law()) > 1e-3


def law_of_model(family, length, guidance_scale=1.0, **processing):
    """The law of a tiny real model's sequences, by its plain forward on each of them."""
    import itertools

    vocab = 3
    family.rows = vocab**length
    sequences = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
    law = torch.ones(len(sequences), dtype=torch.float64)
    with torch.no_grad():
        ids = torch.full((len(sequences), 4), 5)
        for position in range(length):
            # The unconditional prompt is the last token of the prompt.
            both = [
                family.model(torch.cat((prompt, sequences[:, :position]), 1)).logits[:, -1, :vocab]
                for prompt in (ids, ids[:, -1:])
            ]
            probs = process_rows(both[0], guidance=(guidance_scale, both[1]), **processing)
            law *= probs.gather(1, sequences[:, position, None]).squeeze(1)
    return sequences, law


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (4096, {}),
        (4096, {"temperature": 0.6, "top_p": 0.8, "guidance_scale": 2.0}),
        pytest.param(7, {}, marks=pytest.mark.slow),
        pytest.param(1, {}, marks=pytest.mark.slow),
    ],
    ids=["4096", "4096 processed", "7", "1"],
)
@pytest.mark.parametrize("refresh", ["independent", "maximal"])
def test_a_real_model_keeps_its_law_in_batches_of_any_size(rows, options, refresh, rng):
    import sjd
    from sjd_models import family

    model = family("llama").model
    sequences, law = law_of_model(family("llama"), 4, **options)
    code = {tuple(one): number for number, one in enumerate(sequences.tolist())}
    grammar = ImageGrammar.free(4, slice(0, 3))
    counts = torch.zeros(len(law))
    total = 4096 if rows > 4 else 6000
    config = SJDConfig(window=3, refresh=refresh, prob_dtype="float64")
    ids = torch.full((rows, 4), 5)
    for _ in range(total // rows):
        out = model.generate(ids, max_new_tokens=4, do_sample=True, top_k=0, custom_generate=sjd.decode,
                             sjd_config=config, sjd_grammar=grammar, generator=rng, **options)  # fmt: skip
        for one in out[:, 4:].tolist():
            counts[code[tuple(one)]] += 1
    assert chi_square(counts, law) > 1e-3
