"""Rows of different length in one cache, with rejected tokens behind them, against a forward over everything."""

from __future__ import annotations

import pytest
import torch
from sjd.adapters import adapter_of
from sjd.adapters.base import Inputs
from sjd.cache import RaggedCache

ROWS, PATTERNS, WIDTH = 5, 50, 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "glm_image"])
@torch.no_grad()
def test_logits_are_those_of_a_full_forward_after_any_pattern_of_acceptance(name, attention, tiny, rng):
    family = tiny(name, torch.float32)
    family.model.set_attn_implementation(attention)
    adapter = adapter_of(family.model)
    ids, mask = family.prompt(ROWS)
    extras = {}
    if name == "glm_image":
        extras = {"image_grid_thw": torch.tensor([[1, 3, 4], [1, 2, 2]] * ROWS),
                  "images_per_sample": torch.tensor([2] * ROWS)}  # fmt: skip
    prompt = adapter.prompt(Inputs(ids, mask.bool(), extras))
    tokens = torch.zeros(ROWS, 17, dtype=torch.int64)
    committed = torch.zeros(ROWS, dtype=torch.int64)
    cache = RaggedCache(adapter.layers(), ROWS, ids.shape[1] + 17 + WIDTH, "cpu")
    adapter.logits(prompt.embeds, cache.mask(5, prompt.padding, torch.float32),
                   adapter.positions(cache.next_slots(5), prompt), cache, None)  # fmt: skip
    tokens[:, 0] = torch.randint(0, 20, (ROWS,), generator=rng)
    committed += 1
    for _ in range(PATTERNS):
        fresh = torch.randint(0, 20, (ROWS, WIDTH - 1), generator=rng)
        place = committed[:, None] + torch.arange(WIDTH - 1)
        tokens.scatter_(1, place.clamp(max=16), fresh)
        window = tokens.gather(1, (committed[:, None] - 1 + torch.arange(WIDTH)).clamp(max=16))
        cache.lengths = ids.shape[1] - 1 + committed
        cache.show(int(cache.lengths.max()) + WIDTH)
        slots = cache.next_slots(WIDTH)
        logits = adapter.logits(adapter.embed(window, "image"), cache.mask(WIDTH, prompt.padding, torch.float32),
                                adapter.positions(slots, prompt), cache, None)  # fmt: skip
        expected = family.every_logits(tokens[:, :16])
        for row, count in enumerate(committed.tolist()):
            seen = min(WIDTH, 17 - count)
            torch.testing.assert_close(logits[row, :seen], expected[row, count : count + seen], atol=2e-5, rtol=1e-5)
        committed = committed + torch.randint(1, WIDTH + 1, (ROWS,), generator=rng)
        committed = torch.where(committed > 12, 1, committed)
    family.model.set_attn_implementation("sdpa")


def test_rolling_back_copies_nothing(rng):
    cache = RaggedCache(1, 2, 9, "cpu")
    keys = torch.randn(2, 1, 4, 2, generator=rng)
    cache.update(keys, keys, 0)
    where = cache.layers[0].keys.data_ptr()
    cache.lengths = torch.tensor([1, 3])
    new = torch.randn(2, 1, 2, 2, generator=rng)
    found, _ = cache.update(new, new, 0)
    assert cache.layers[0].keys.data_ptr() == where
    assert found[0, :, 1:3].equal(new[0])
    assert found[1, :, 3:5].equal(new[1])
    assert found[0, :, 0].equal(keys[0, :, 0])


def test_the_mask_hides_padding_and_what_comes_later():
    cache = RaggedCache(1, 2, 6, "cpu")
    cache.lengths = torch.tensor([1, 3])
    mask = cache.mask(2, torch.tensor([0, 2]), torch.float32)
    assert (mask == 0)[:, 0].tolist() == [
        [[True, True, False, False, False, False], [True, True, True, False, False, False]],
        [[False, False, True, True, False, False], [False, False, True, True, True, False]],
    ]
    cache.lengths = torch.tensor([0, 0])
    mask = cache.mask(2, torch.tensor([0, 2]), torch.float32)
    # What stands on padding sees itself alone, and not the mean of all that is there.
    assert (mask == 0)[1, 0].tolist() == [[True] + [False] * 5, [False, True] + [False] * 4]


def test_rows_can_be_dropped(rng):
    cache = RaggedCache(2, 3, 5, "cpu")
    keys = torch.randn(3, 1, 2, 4, generator=rng)
    for layer in range(2):
        cache.update(keys, keys, layer)
    cache.lengths = torch.tensor([2, 1, 2])
    cache.select(torch.tensor([2, 0]))
    assert cache.lengths.tolist() == [2, 2]
    assert cache.layers[1].keys[:, :, :2].equal(keys[[2, 0]])
