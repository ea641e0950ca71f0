"""SmolLM2-135M: the text of greedy decoding, and matching by noise, through windows of guesses."""

from __future__ import annotations

import pytest
import sjd
import torch

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is", "Once upon a time", "Water boils at", "def add(a, b):", "The three primary colours are",
    "In the year 1969,", "My favourite book is", "To make bread you need", "The opposite of hot is", "She opened it,",
    "The sun rises in the", "A triangle has", "Dear Sir or Madam,", "The best way to learn", "Roses are red,",
    "The largest planet is", "He looked at the map and", "Photosynthesis is", "Once the rain stopped,", "1, 2, 3, 4,",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm():
    real = pytest.importorskip("pared_zoo.real")
    try:
        return real.smollm2()
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))


def test_greedy_text_is_that_of_generate_for_twenty_prompts(smollm):
    model, tokenizer = smollm
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        with sjd.applied(model, sjd.SJDConfig(window=7)) as handle:
            assert model.generate(**inputs, max_new_tokens=24, do_sample=False).equal(plain), prompt
            assert handle.stats()["nfe"] <= handle.stats()["tokens"]


def test_two_hundred_greedy_tokens_of_a_padded_batch(smollm):
    model, tokenizer = smollm
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(PROMPTS[:2], return_tensors="pt", padding=True)
    plain = model.generate(**inputs, max_new_tokens=200, do_sample=False)
    with sjd.applied(model, sjd.SJDConfig(window=9)):
        assert model.generate(**inputs, max_new_tokens=200, do_sample=False).equal(plain)


@torch.no_grad()
def test_matching_draws_what_plain_sampling_draws_from_the_same_noise(smollm):
    from sjd.functional import gumbel

    model, tokenizer = smollm
    model = model.double()
    try:
        ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
        tokens, cache = ids, None
        for position in range(64):
            out = model(tokens[:, -1:] if cache is not None else tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = out.logits[:, -1]
            noise = gumbel(5, torch.zeros(1).long(), torch.tensor([[position]]), logits.shape[1], dtype=torch.float64)
            tokens = torch.cat((tokens, (logits.log_softmax(-1) + noise[:, 0]).argmax(-1, keepdim=True)), 1)
        config = sjd.SJDConfig(window=5, verify="match", refresh="gumbel", seed=5, prob_dtype="float64")
        with sjd.applied(model, config):
            ours = model.generate(ids, max_new_tokens=64, do_sample=True, top_k=0, eos_token_id=None)
        assert ours.equal(tokens)
    finally:
        model.float()
