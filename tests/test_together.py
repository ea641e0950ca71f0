"""Methods of several packages on one model: those that go together do, those that do not say so."""

from __future__ import annotations

from typing import Any

import cskv
import framefusion
import mbq
import pytest
import sjd
import torch
from framefusion import FrameFusionConfig
from pared_hooks import ConflictError
from torch import Tensor
from transformers import DynamicCache, StaticCache

VIDEO, FRAME, FRAMES = 311, 16, 4
CONFIG = FrameFusionConfig(cost=0.4, similarity_threshold=0.98, merge_floor=0.05)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """A tiny LLaVA-OneVision with random weights; tests leave it as it was."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    text = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.08,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
    }
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=310,
        video_token_id=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[32, 32]],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaOnevisionForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(3, 300, (1, 12), generator=generator)
    video = torch.full((1, FRAMES * FRAME + 1), VIDEO)
    still = torch.randn(1, 1, 3, 32, 32, generator=generator)
    moving = torch.randn(1, FRAMES, 3, 32, 32, generator=generator)
    moving[..., :16, :] *= 0.1
    return {
        "input_ids": torch.cat((text[:, :4], video, text[:, 4:]), 1),
        "attention_mask": torch.ones(1, 12 + FRAMES * FRAME + 1, dtype=torch.long),
        "pixel_values_videos": still + 0.25 * moving,
    }


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits[:, -1]
    return found


def ids(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[int]:
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[310, VIDEO], **options)
    answer: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return answer


def quantised(model: Any) -> mbq.MBQHandle:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(2):
        labels = torch.randint(3, 60, (1, 14), generator=generator)
        labels[:, :-4] = -100
        where = torch.arange(14)[None] < 6
        embeds = torch.randn(1, 14, 64, generator=generator)
        batches.append({"inputs_embeds": embeds, "labels": labels, "vision_mask": where})
    return mbq.apply(model, mbq.MBQConfig(w_bits=4, group_size=32, grid=2), batches)


@pytest.mark.parametrize("first", ["cskv", "framefusion"])
def test_cskv_and_framefusion_both_decide_what_the_cache_holds_and_refuse_each_other(
    first: str, tiny: Any, inputs: dict[str, Tensor]
) -> None:
    """Layers of CSKV share rotary rows and a window of the latest tokens; with FrameFusion each has its own tokens."""
    plain = logits(tiny, inputs)
    methods: dict[str, Any] = {
        "cskv": lambda: cskv.applied(tiny, cskv.CSKVConfig(init="svd", window=8)),
        "framefusion": lambda: framefusion.applied(tiny, CONFIG),
    }
    second = "framefusion" if first == "cskv" else "cskv"
    with methods[first]() as handle:
        alone = ids(tiny, inputs)
        with pytest.raises(ConflictError, match=rf"{second} and {first} both need 'decoder.cache'.*remove one"):
            methods[second]().__enter__()
        assert handle.applied
        assert ids(tiny, inputs) == alone
    assert logits(tiny, inputs).equal(plain)
    with methods[second]():
        assert len(ids(tiny, inputs)) == 6


def test_a_cache_of_cskv_is_refused_by_name(tiny: Any, inputs: dict[str, Tensor]) -> None:
    with cskv.applied(tiny, cskv.CSKVConfig(init="svd", window=8)) as handle:
        cache = handle.new_cache()
    refused = pytest.raises(framefusion.UnsupportedCacheError, match=r"CSKVCache with layers of CSKVLayer")
    with framefusion.applied(tiny, CONFIG), torch.no_grad(), refused:
        tiny(**inputs, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("first_removed", ["mbq", "framefusion"])
def test_a_packed_model_is_reduced_and_either_can_go_first(
    first_removed: str, tiny: Any, inputs: dict[str, Tensor]
) -> None:
    plain = logits(tiny, inputs)
    with framefusion.applied(tiny, CONFIG):
        only_reduced = logits(tiny, inputs)
    packed = quantised(tiny)
    only_packed = logits(tiny, inputs)
    with framefusion.applied(tiny, FrameFusionConfig(cost=1.0)):
        assert logits(tiny, inputs).equal(only_packed)
    reduced = framefusion.apply(tiny, CONFIG)
    both = logits(tiny, inputs)
    assert not any(both.equal(one) for one in (plain, only_packed, only_reduced))
    assert reduced.stats()["cost"] == pytest.approx(0.4, abs=0.02)
    static = ids(tiny, inputs, cache_implementation="static", disable_compile=True)
    assert static == ids(tiny, inputs)
    (packed if first_removed == "mbq" else reduced).remove()
    assert logits(tiny, inputs).equal(only_reduced if first_removed == "mbq" else only_packed)
    (reduced if first_removed == "mbq" else packed).remove()
    assert logits(tiny, inputs).equal(plain)


@torch.no_grad()
def test_a_decoding_step_of_a_packed_and_reduced_model_is_compiled_once(tiny: Any) -> None:
    from torch._dynamo.testing import CompileCounter

    text = tiny.model.language_model
    generator = torch.Generator().manual_seed(7)
    layout = framefusion.TokenLayout.from_blocks(78, [framefusion.VideoBlock(6, FRAMES, FRAME)])
    prompt = torch.randn(1, 78, 64, generator=generator)
    torch._dynamo.reset()
    counter = CompileCounter()
    with quantised(tiny), framefusion.applied(text, CONFIG, layout=layout) as handle:
        caches = [StaticCache(text.config, max_cache_len=96), DynamicCache(config=text.config)]
        for one in caches:
            text(inputs_embeds=prompt, past_key_values=one, use_cache=True)
        assert handle.stats()["cost"] == pytest.approx(0.4, abs=0.02)
        step = torch.compile(text, backend=counter)
        frames = []
        for index in range(4):
            given = {
                "inputs_embeds": torch.randn(1, 1, 64, generator=generator),
                "position_ids": torch.tensor([[78 + index]]),
                "use_cache": True,
            }
            compiled = step(**given, past_key_values=caches[0]).last_hidden_state
            plain = text(**given, past_key_values=caches[1]).last_hidden_state
            torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
            frames.append(counter.frame_count)
    assert frames[-1] == frames[1]


@pytest.fixture(scope="module")
def words() -> Any:
    """A tiny language model with random weights, large enough for context to matter; tests leave it as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=60, initializer_range=0.2, pad_token_id=0)).eval()
    model.generation_config.eos_token_id = None
    return model


def continued(model: Any) -> list[int]:
    prompt = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    out: list[int] = model.generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    return out


@pytest.mark.parametrize("first", ["cskv", "sjd"])
def test_sjd_takes_drafts_out_of_the_cache_and_refuses_one_that_compresses_them(first: str, words: Any) -> None:
    plain = continued(words)
    methods: dict[str, Any] = {
        "cskv": lambda: cskv.applied(words, cskv.CSKVConfig(init="svd", window=8)),
        "sjd": lambda: sjd.applied(words, sjd.SJDConfig(window=4)),
    }
    second = "sjd" if first == "cskv" else "cskv"
    with methods[first]():
        alone = continued(words)
        with pytest.raises(ConflictError, match=rf"{second} and {first} both need 'decoder.cache'.*remove one"):
            methods[second]().__enter__()
        assert continued(words) == alone
    assert "generate" not in vars(words)
    assert continued(words) == plain
    with methods[second]():
        assert len(continued(words)) == 21


@pytest.mark.parametrize("first_removed", ["mbq", "sjd"])
def test_a_packed_model_draws_several_tokens_a_pass_and_either_can_go_first(first_removed: str, words: Any) -> None:
    plain = continued(words)
    packed = mbq.apply(words, mbq.MBQConfig(method="rtn", group_size=32), [])
    only_packed = continued(words)
    drafted = sjd.apply(words, sjd.SJDConfig(window=4))
    assert continued(words) == only_packed
    assert drafted.stats()["nfe"] < 12
    (packed if first_removed == "mbq" else drafted).remove()
    assert continued(words) == (plain if first_removed == "mbq" else only_packed)
    (drafted if first_removed == "mbq" else packed).remove()
    assert continued(words) == plain
