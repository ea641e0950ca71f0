"""FlashAttention: transformers' code around the flash functions on the CPU, and the real ones where they are."""

from __future__ import annotations

import ff_flash
import pytest
import torch
from framefusion import FrameFusionConfig, UnsupportedCacheError, applied, apply
from pared_hooks import UnsupportedModelError
from test_families import CONFIG, greedy, logits
from transformers import StaticCache, modeling_flash_attention_utils
from transformers.utils import is_flash_attn_2_available

FLASH = "flash_attention_2"


@pytest.fixture
def flash(monkeypatch):
    """Lets a model use FLASH with the functions of `ff_flash`."""
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", ff_flash.lazy_imports)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)

    def use(model):
        monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", FLASH)

    return use


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl", "llava-onevision", "internvl"])
def test_flash_attention_gives_what_sdpa_gives(name, tiny, rng, flash):
    """Single prompts, a padded batch, and generation behind them."""
    family, model = tiny(name)
    prompts = family.prompts(rng)
    single, batch = family.batch(prompts[1]), family.batch(*prompts)
    with applied(model, CONFIG) as handle:
        expected = [logits(model, single), logits(model, batch)]
        ids = [greedy(model, single), greedy(model, batch)]
        trace = handle.trace
    flash(model)
    with applied(model, CONFIG) as handle:
        for inputs, wanted, answer in zip((single, batch), expected, ids, strict=True):
            torch.testing.assert_close(logits(model, inputs), wanted, atol=1e-4, rtol=1e-4)
            assert greedy(model, inputs).equal(answer)
        assert handle.trace == trace
    assert model.model.language_model.config._attn_implementation == FLASH


def test_a_second_turn_and_a_second_video_go_on_from_the_reduced_cache(tiny, rng, flash):
    family, model = tiny("llava-onevision")
    first = family.batch(family.prompt(rng, ("text", 6), ("video", 4), ("text", 5)))
    second = family.batch(family.prompt(rng, ("text", 3), ("video", 4), ("text", 5)))
    found = []
    for use in (lambda model: None, flash):
        use(model)
        with applied(model, CONFIG), torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
            text = model(input_ids=second["input_ids"][:, :4], past_key_values=cache, use_cache=True).logits
            later = {**second, "input_ids": second["input_ids"][:, 4:], "attention_mask": None}
            found.append((text, model(**later, past_key_values=cache, use_cache=True).logits[:, -1]))
    for flashed, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(flashed, plain, atol=1e-4, rtol=1e-4)


def test_static_caches_and_windows_are_refused_with_flash_attention(tiny, rng, flash):
    family, model = tiny("qwen2-vl")
    inputs = family.batch(family.prompt(rng, ("text", 3), ("video", 4), ("text", 5)))
    flash(model)
    with applied(model, CONFIG), torch.no_grad(), pytest.raises(UnsupportedCacheError, match="free slots"):
        model(**inputs, past_key_values=StaticCache(model.config, max_cache_len=96), use_cache=True)
    _, windows = tiny("gemma3")
    flash(windows)
    with pytest.raises(UnsupportedModelError, match="window of layer 0"):
        apply(windows, CONFIG)


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs the package flash-attn and a GPU it runs on")
def test_the_real_flash_attention_gives_what_sdpa_gives(rng):
    import ff_models

    family = ff_models.FAMILIES["qwen2-vl"]
    model = family.model().to("cuda", torch.bfloat16)
    inputs = {name: value.to("cuda") for name, value in family.batch(*family.prompts(rng)).items()}
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    config = FrameFusionConfig(cost=0.4, similarity_threshold=-1.0)
    found = []
    for implementation in ("sdpa", FLASH):
        model.set_attn_implementation(implementation)
        with applied(model, config):
            found.append(logits(model, inputs).float())
    torch.testing.assert_close(found[1], found[0], atol=5e-2, rtol=5e-2)
