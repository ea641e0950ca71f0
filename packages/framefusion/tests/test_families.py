"""What holds for every family, on tiny models of the real classes (acceptance 3, 5, 6)."""

from __future__ import annotations

import copy

import ff_models
import pytest
import torch
from ff_replay import replayed
from framefusion import FrameFusionConfig, applied, apply

FAMILIES = list(ff_models.FAMILIES)
CONFIG = FrameFusionConfig(cost=0.4, similarity_threshold=0.995, merge_floor=0.05)
"""Merges some and prunes the rest on these models."""
AT_ONCE = FrameFusionConfig(cost=0.5, similarity_threshold=-1.0)
"""All is done before the first layer, where nothing depends on what follows the video."""

pytestmark = pytest.mark.parametrize("name", FAMILIES)


THRESHOLDS = {"gemma4": 0.99999}
PLACEHOLDERS = [ff_models.IMAGE, ff_models.VIDEO]


def config_of(name):
    return CONFIG.replace(similarity_threshold=THRESHOLDS.get(name, CONFIG.similarity_threshold))


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits[:, -1:]


def one_token(handle):
    """The budget's tolerance, or one of the 16 tokens a short video has."""
    return max(0.02, 1 / 16) if handle.stats()["vision_tokens"] < 50 else 0.02


def greedy(model, inputs, tokens=5, **options):
    # An answer with placeholders in it could not be given to the model again.
    options |= {"suppress_tokens": PLACEHOLDERS, "max_new_tokens": tokens, "do_sample": False}
    return model.generate(**copy.deepcopy(inputs), **options)


def test_a_cost_of_one_is_the_plain_model_and_removal_brings_it_back(name, tiny, rng):
    family, model = tiny(name)
    inputs = family.batch(*family.prompts(rng))
    keys, names = list(model.state_dict()), dict(vars(model))
    attention = model.config.get_text_config()._attn_implementation
    with torch.no_grad():
        expected = model(**inputs).logits
    ids = greedy(model, inputs)
    torch.manual_seed(5)
    sampled = model.generate(**copy.deepcopy(inputs), max_new_tokens=5, do_sample=True)
    handle = apply(model, FrameFusionConfig(cost=1.0))
    with torch.no_grad():
        assert model(**inputs).logits.equal(expected)
    assert greedy(model, inputs).equal(ids)
    torch.manual_seed(5)
    assert model.generate(**copy.deepcopy(inputs), max_new_tokens=5, do_sample=True).equal(sampled)
    assert handle.stats()["cost"] == 1.0
    with handle.disabled():
        assert greedy(model, inputs).equal(ids)
    handle.remove()
    handle.remove()
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    assert out.logits.equal(expected)
    assert not any(type(layer).__name__.startswith("Reduced") for layer in out.past_key_values.layers)
    assert list(model.state_dict()) == keys
    assert dict(vars(model)).keys() == names.keys()
    assert model.config.get_text_config()._attn_implementation == attention


def test_a_text_prompt_is_bitwise_the_plain_model(name, tiny, rng):
    family, model = tiny(name)
    inputs = family.batch(family.prompt(rng, ("text", 9)), family.prompt(rng, ("text", 5)))
    expected = logits(model, inputs)
    with applied(model, config_of(name)) as handle:
        assert logits(model, inputs).equal(expected)
        assert handle.stats()["requests"] == 0


def test_decoding_from_the_reduced_cache_is_recomputing_the_reduced_prompt(name, tiny, rng):
    family, model = tiny(name)
    prompt = family.prompts(rng)[1]
    inputs = family.batch(prompt)
    with applied(model, config_of(name)) as handle:
        found = greedy(model, inputs, 16, return_dict_in_generate=True, output_logits=True)
        request = handle._engine.last
        assert handle.stats()["cost"] == pytest.approx(0.4, abs=one_token(handle))
        kinds = {kind for stage in handle.trace for kind in stage.kind}
        assert "prune" in kinds
    selections = request._selections
    length = len(prompt.ids)
    answer = found.sequences[0, length:].tolist()
    longer = family.batch(ff_models.Prompt(prompt.ids + answer, prompt.inputs, prompt.types + [0] * len(answer)))
    with replayed(model, selections, length), torch.no_grad():
        rows = model(**longer, use_cache=False).logits[0, -17:]
    torch.testing.assert_close(torch.stack(found.logits, 1)[0], rows[:16], atol=2e-4, rtol=1e-4)
    rows[:, PLACEHOLDERS] = -torch.inf
    assert rows[:16].argmax(-1).tolist() == answer


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_is_its_prompts_one_by_one(name, attention, tiny, rng):
    family, model = tiny(name)
    prompts = family.prompts(rng)
    model.set_attn_implementation(attention)
    try:
        with applied(model, config_of(name)) as handle:
            singles = [greedy(model, family.batch(one))[0, -5:] for one in prompts]
            alone = [logits(model, family.batch(one)) for one in prompts]
            handle.reset()
            together = family.batch(*prompts)
            torch.testing.assert_close(logits(model, together), torch.cat(alone), atol=1e-4, rtol=1e-4)
            costs, tolerance = handle.stats()["costs"], one_token(handle)
            assert greedy(model, together)[:, -5:].equal(torch.stack(singles))
            draws = []
            for _ in range(2):
                torch.manual_seed(3)
                draws.append(model.generate(**copy.deepcopy(together), max_new_tokens=5, do_sample=True))
            assert draws[0].equal(draws[1])
        assert costs == pytest.approx([0.4] * 4, abs=tolerance)
    finally:
        model.set_attn_implementation("sdpa")


def test_beams_are_scored_as_recomputing_the_reduced_prompt_scores_them(name, tiny, rng, monkeypatch):
    family, model = tiny(name)
    if name == "video-llama3":
        # transformers' own expansion for beams fails where a compression mask leaves fewer tokens than features.
        monkeypatch.setattr(family, "kept", 2.0)
    prompt = family.prompts(rng)[0]
    inputs = family.batch(prompt)
    options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    with applied(model, config_of(name)) as handle:
        found = greedy(model, inputs, 6, **options)
        logits(model, inputs)
        selections = handle._engine.last._selections
    assert any(selections)
    length = len(prompt.ids)
    answers = [row[length:].tolist() for row in found.sequences]
    assert len({tuple(one) for one in answers}) == 3
    assert found.sequences_scores.tolist() == sorted(found.sequences_scores.tolist(), reverse=True)
    for answer, score in zip(answers, found.sequences_scores, strict=True):
        longer = family.batch(ff_models.Prompt(prompt.ids + answer, prompt.inputs, prompt.types + [0] * 6))
        with replayed(model, selections, length), torch.no_grad():
            rows = model(**longer, use_cache=False).logits[0, -7:-1].log_softmax(-1)
        expected = rows.gather(1, torch.tensor(answer)[:, None]).mean()
        torch.testing.assert_close(score, expected, atol=2e-4, rtol=1e-4)


def test_a_second_turn_on_the_reduced_cache_is_the_whole_chat_at_once(name, tiny, rng):
    family, model = tiny(name)
    prompt = family.prompts(rng)[0]
    inputs = family.batch(prompt)
    more = torch.randint(3, 300, (6,), generator=rng).tolist()
    with applied(model, AT_ONCE):
        first = greedy(model, inputs, 4, return_dict_in_generate=True)
        cache, answer = first.past_key_values, first.sequences[0, len(prompt.ids) :].tolist()
        assert cache.get_seq_length() == len(prompt.ids) + 3
        ids = prompt.ids + answer + more
        second = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        }
        if family.types is not None:
            second[family.types] = torch.tensor([prompt.types + [0] * (len(answer) + len(more))])
        continued = greedy(model, second, 4, past_key_values=cache)
        whole = family.batch(ff_models.Prompt(ids, prompt.inputs, prompt.types + [0] * (len(answer) + len(more))))
        once = greedy(model, whole, 4)
        assert continued.equal(once)
        held = [layer.keys.shape[2] for layer in cache.layers if getattr(layer, "keys", None) is not None]
        assert max(held) < cache.get_seq_length()
