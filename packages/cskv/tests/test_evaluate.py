"""Evaluation at once, and the bytes that the bench counts."""

from __future__ import annotations

import math

import pytest
import torch
from cskv import CSKVConfig, UnsupportedAttentionError, applied, fit
from cskv.bench import peers
from cskv.bench.arms import dropped_tokens, passkey_accuracy, plainly, relative_errors
from cskv.bench.memory import cache_of, fill, tensor_bytes
from cskv.bench.prompts import continued, read
from cskv.bench.quality import between
from cskv.evaluate import cskv_cache, decoding_at_once, full_cache, perplexity, sequences

CONFIG = CSKVConfig(k_rank=8, v_rank=12, window=4, init="svd")


def test_evaluation_leaves_the_model_as_it_was(language_model, tokens):
    model, ids = language_model(), tokens(1, 20)
    before = model(ids).logits
    with decoding_at_once(model, CONFIG, fit(model, CONFIG), 5):
        assert not torch.equal(model(ids, use_cache=False).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert all("_pared" not in vars(module) for module in model.modules())


def test_perplexity_scores_the_tokens_behind_the_prompt(language_model, tokens):
    model, ids = language_model(), tokens(1, 20)
    losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert perplexity(full_cache(model), [ids], 8) == pytest.approx(
        math.exp(float(losses[7:].mean().detach())), rel=1e-4
    )
    assert perplexity(cskv_cache(model, CONFIG, fit(model, CONFIG)), [ids], 8) > 1


def test_a_passkey_counts_when_every_token_of_it_is_the_likeliest(language_model, tokens):
    model, prompt = language_model(), tokens(1, 12)
    answer = model.generate(prompt, max_new_tokens=4, do_sample=False)[:, 12:]
    wrong = answer.clone()
    wrong[0, -1] = (wrong[0, -1] + 1) % 97
    prompts = [(read(model, prompt), one) for one in (answer, wrong)]
    method = plainly(lambda model, prompt: prompt.fill(peers.full(model)))
    assert passkey_accuracy(model, method, prompts) == (0.5, 7 / 8)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_prompt_that_was_read_once_fills_a_cache_as_the_model_would(language_model, tokens, family):
    model, ids = language_model(family), tokens(1, 30)
    with applied(model, CONFIG, fit(model, CONFIG)) as handle:
        expected = model(ids[:, 20:], past_key_values=model(ids[:, :20], use_cache=True).past_key_values).logits[0]
    prompt = read(model, ids[:, :20])
    with applied(model, CONFIG, fit(model, CONFIG)) as handle:
        logits = continued(model, prompt.fill(handle.new_cache()), prompt, ids[:, 20:])
    assert torch.allclose(logits[1:], expected[:-1], atol=1e-5)
    assert torch.allclose(logits[0], model(ids[:, :20]).logits[0, -1], atol=1e-5)


def test_first_and_latest_tokens_keep_their_positions(language_model, tokens):
    model, ids = language_model(), tokens(1, 30)
    prompt = read(model, ids[:, :20])
    whole = continued(model, peers.first_and_latest(model, prompt, 1.0), prompt, ids[:, 20:])
    assert torch.allclose(whole[1:], model(ids).logits[0, 20:-1], atol=1e-4)
    half = peers.first_and_latest(model, prompt, 0.5)
    assert half.get_seq_length() == 10
    kept = torch.tensor([0, 1, 2, 3, 14, 15, 16, 17, 18, 19])
    assert torch.equal(half.layers[1].values, prompt.values[1][:, :, kept])


def test_dropping_no_token_is_the_full_cache_and_dropping_some_is_not(language_model, tokens):
    model, ids = language_model(), tokens(1, 40)
    plain = model(ids).logits
    assert torch.allclose(dropped_tokens(model, 1.0)(ids, 10), plain, atol=1e-4)
    dropped = dropped_tokens(model, 0.2)(ids, 10)
    assert torch.allclose(dropped[:, :10], plain[:, :10], atol=1e-4)
    assert not torch.allclose(dropped[:, 30:], plain[:, 30:], atol=1e-2)


def test_relative_errors_fall_with_the_rank_and_end_at_zero(language_model, tokens):
    model, ids = language_model(), tokens(1, 40)
    errors = []
    for rank in (4, 16, 32):
        config = CONFIG.replace(k_rank=rank, v_rank=rank)
        errors.append(sum(relative_errors(model, config, fit(model, config), [read(model, ids)])))
    assert errors[0] > errors[1] > errors[2] == 0


def test_attention_with_sinks_cannot_be_evaluated_at_once(language_model, tokens):
    model = language_model("gpt-oss")
    with (
        decoding_at_once(model, CONFIG, fit(model, CONFIG), 5),
        pytest.raises(UnsupportedAttentionError, match="s_aux"),
    ):
        model(tokens(1, 9), use_cache=False)


def test_sequences_are_spread_over_the_text():
    found = sequences(torch.arange(100), 3, 20)
    assert [int(one[0, 0]) for one in found] == [0, 40, 80]
    with pytest.raises(ValueError, match="100 tokens"):
        sequences(torch.arange(100), 6, 20)


def test_gaps_between_sequences_share_no_token_with_them():
    ids = torch.arange(1000)
    taken = {int(token) for one in sequences(ids, 4, 100) for token in one[0]}
    gaps = between(ids, 4, 100, 150)
    assert len(gaps) == 3
    assert all(one.shape == (1, 150) and not taken & {int(token) for token in one[0]} for one in gaps)
    with pytest.raises(ValueError, match="no gaps of 300"):
        between(ids, 4, 100, 300)


@pytest.mark.parametrize("config", [None, CONFIG, CONFIG.replace(k_bits=4, v_bits=2, v_group=6)])
def test_caches_can_be_filled_without_running_the_model(language_model, config):
    model = language_model()
    cache, handle = cache_of(model, config)
    fill(model, cache, 700, torch.float32)
    assert cache.get_seq_length() == 700
    size = tensor_bytes(cache)
    full = 2 * 2 * 700 * 32 * 4
    if config is None:
        # The library keeps a little beside keys and values.
        assert full <= size <= full + 64
    else:
        assert size == cache.nbytes < 0.55 * full
        assert handle.stats()["bytes"]["total"] == size
        handle.remove()
