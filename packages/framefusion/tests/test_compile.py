"""torch.compile over a decoding step and over a prefill with fixed ratios (acceptance 7)."""

from __future__ import annotations

import torch
from framefusion import FrameFusionConfig, TokenLayout, VideoBlock, applied
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

LAYOUT = TokenLayout.from_blocks(78, [VideoBlock(6, 4, 16)])


def embeddings(rng):
    return torch.randn(1, 78, 64, generator=rng)


@torch.no_grad()
def test_a_decoding_step_is_compiled_once(tiny, rng):
    _, model = tiny("llava-onevision")
    text = model.model.language_model
    torch._dynamo.reset()
    counter = CompileCounter()
    with applied(text, FrameFusionConfig(cost=0.4, similarity_threshold=0.99), layout=LAYOUT):
        cache = StaticCache(text.config, max_cache_len=96)
        plain = StaticCache(text.config, max_cache_len=96)
        inputs = embeddings(rng)
        for one in (cache, plain):
            text(inputs_embeds=inputs, past_key_values=one, use_cache=True)
        step = torch.compile(text, backend=counter)
        frames = []
        for index in range(5):
            token = torch.randn(1, 1, 64, generator=rng)
            position = torch.tensor([[78 + index]])
            given = {"inputs_embeds": token, "position_ids": position, "use_cache": True}
            ours = step(**given, past_key_values=cache).last_hidden_state
            theirs = text(**given, past_key_values=plain).last_hidden_state
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            frames.append(counter.frame_count)
    assert frames[-1] == frames[1]


@torch.no_grad()
def test_a_prefill_with_fixed_ratios_is_one_graph(tiny, rng):
    _, model = tiny("llava-onevision")
    text = model.model.language_model
    torch._dynamo.reset()
    inputs = embeddings(rng)
    config = FrameFusionConfig(cost=0.4, merge_ratios=(0.3, 0.2), min_keep=0)
    with applied(text, config, layout=LAYOUT):
        expected = text(inputs_embeds=inputs, use_cache=False).last_hidden_state
        compiled = torch.compile(text, fullgraph=True, backend="eager")
        found = compiled(inputs_embeds=inputs, use_cache=False).last_hidden_state
        other = compiled(inputs_embeds=embeddings(rng), use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert other.shape == found.shape
    assert found.shape[1] < 78
