"""Ways in which models are run beside a plain forward: prefill in chunks, offloaded and quantised weights."""

from __future__ import annotations

import copy

import ff_models
import pytest
import torch
from framefusion import FrameFusionConfig, LayoutError, TokenLayout, VideoBlock, applied
from test_families import AT_ONCE, CONFIG, greedy, logits

CHUNK = 24


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl", "internvl", "llava-onevision"])
def test_a_prompt_prefilled_in_chunks_is_its_chunks_one_after_the_other(name, tiny, rng):
    """Each chunk is a prompt of its own, which has its columns of the whole prompt's layout."""
    family, model = tiny(name)
    inputs = family.batch(family.prompt(rng, ("text", 4), ("video", 4), ("text", 14), ("video", 4), ("text", 6)))
    plain = greedy(model, inputs, 6, prefill_chunk_size=CHUNK)
    with applied(model, FrameFusionConfig(cost=1.0)) as handle:
        assert greedy(model, inputs, 6, prefill_chunk_size=CHUNK).equal(plain)
        logits(model, inputs)
        layout = handle.layout
    with applied(model, CONFIG) as handle:
        found = greedy(model, inputs, 6, prefill_chunk_size=CHUNK, return_dict_in_generate=True, output_logits=True)
        costs = handle.stats()["costs"]
    length = inputs["input_ids"].shape[1]
    chunks = [layout.patch[:, start : start + CHUNK] for start in range(0, length, CHUNK)]
    with_video = [int((one >= 0).sum()) for one in chunks if bool((one >= 0).any())]
    assert len(costs) == len(with_video)
    # The rounding of a chunk of a few tokens is one of them.
    for cost, tokens in zip(costs, with_video, strict=True):
        assert cost == pytest.approx(0.4, abs=1 / tokens)
    cache = found.past_key_values
    assert cache.get_seq_length() == length + 5
    assert cache.layers[-1].keys.shape[2] < length
    expected = by_hand(model, inputs, layout)
    torch.testing.assert_close(found.logits[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def by_hand(model, inputs, layout):
    """Next-token logits of a prompt whose chunks go through the text model with the embeddings and layout of each."""
    seen = {}
    text = model.model.language_model

    def note(module, args, kwargs):
        seen.update(kwargs)

    hook = text.register_forward_pre_hook(note, with_kwargs=True)
    model(**inputs)
    hook.remove()
    cache = None
    with applied(text, CONFIG, layout=TokenLayout.empty(1, 1)) as handle:
        for start in range(0, seen["inputs_embeds"].shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            handle.set_layout(TokenLayout(layout.patch[:, part], layout.frame[:, part], layout.stream[:, part]))
            given = {"inputs_embeds": seen["inputs_embeds"][:, part], "past_key_values": cache, "use_cache": True}
            if isinstance(positions := seen.get("position_ids"), torch.Tensor):
                given["position_ids"] = positions[..., part]
            if isinstance(where := seen.get("visual_pos_masks"), torch.Tensor):
                begin, count = int(where[:, :start].sum()), int(where[:, part].sum())
                given["visual_pos_masks"] = where[:, part]
                deep = seen["deepstack_visual_embeds"]
                given["deepstack_visual_embeds"] = [one[begin : begin + count] for one in deep]
            out = text(**given)
            cache = out.past_key_values
    return model.lm_head(out.last_hidden_state[:, -1])


def test_chunks_of_a_padded_batch_and_of_beams(tiny, rng):
    family, model = tiny("qwen2-vl")
    inputs = family.batch(*family.prompts(rng))
    with applied(model, AT_ONCE) as handle:
        batch = greedy(model, inputs, 4, prefill_chunk_size=CHUNK)
        rows, length = inputs["input_ids"].shape
        assert batch.shape == (rows, length + 4)
        assert handle.stats()["cost"] == pytest.approx(0.5, abs=0.05)
        # A chunk as long as the prompt is the prompt.
        assert greedy(model, inputs, 4, prefill_chunk_size=500).equal(greedy(model, inputs, 4))
        beams = greedy(model, inputs, 4, num_beams=3, prefill_chunk_size=500)
        assert beams.equal(greedy(model, inputs, 4, num_beams=3))
        assert greedy(model, inputs, 4, num_beams=2, prefill_chunk_size=CHUNK).shape == batch.shape


def test_a_chunk_by_hand_needs_a_layout(tiny, rng):
    family, model = tiny("qwen2-vl")
    inputs = family.batch(family.prompt(rng, ("text", 4), ("video", 4), ("text", 4)))
    with torch.no_grad():
        features = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    chunk = {"input_ids": inputs["input_ids"][:, :37], "mm_token_type_ids": inputs["mm_token_type_ids"][:, :37]}
    encoded = type(features)(pooler_output=[torch.cat(list(features.pooler_output))[:32]])
    with applied(model, CONFIG) as handle, torch.no_grad():
        with pytest.raises(LayoutError, match="video_grid_thw is missing"):
            model(**chunk, mm_encoder_outputs={"video": encoded})
        handle.set_layout(TokenLayout.from_blocks(37, [VideoBlock(5, 2, ff_models.FRAME)]))
        model(**chunk, mm_encoder_outputs={"video": encoded}, use_cache=True)
        assert handle.stats()["costs"] == pytest.approx([0.4], abs=1 / 32)
        # An announced layout is for the next prompt alone.
        with pytest.raises(LayoutError, match="video_grid_thw is missing"):
            model(**chunk, mm_encoder_outputs={"video": encoded})


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_an_offloaded_model_answers_as_the_one_in_memory(offload, tiny, rng, tmp_path):
    """accelerate puts hooks around the forward of every module whose weights are elsewhere."""
    accelerate = pytest.importorskip("accelerate")
    family, model = tiny("qwen2-vl")
    inputs = family.batch(*family.prompts(rng))
    with applied(model, CONFIG):
        expected, ids = logits(model, inputs), greedy(model, inputs, 4)
    dense = logits(model, inputs)
    copied = copy.deepcopy(model)
    if offload == "cpu":
        away = accelerate.cpu_offload(copied, execution_device="cpu")
    else:
        away = accelerate.disk_offload(copied, str(tmp_path), execution_device="cpu")
    assert next(away.model.language_model.layers[0].parameters()).device.type == "meta"
    with applied(away, CONFIG) as handle:
        assert logits(away, inputs).equal(expected)
        assert greedy(away, inputs, 4).equal(ids)
        assert handle.stats()["cost"] == pytest.approx(0.4, abs=0.02)
    assert logits(away, inputs).equal(dense)


def test_a_model_dispatched_over_a_device_map_answers_the_same(tiny, rng, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    family, model = tiny("qwen2-vl")
    inputs = family.batch(*family.prompts(rng))
    with applied(model, CONFIG):
        expected, ids = logits(model, inputs), greedy(model, inputs, 4)
    dense = logits(model, inputs)
    text = "model.language_model"
    places = {
        "model.visual": "cpu",
        f"{text}.embed_tokens": "cpu",
        f"{text}.layers.0": "cpu",
        **{f"{text}.layers.{index}": "disk" for index in (1, 2, 3)},
        f"{text}.norm": "cpu",
        f"{text}.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    copied = copy.deepcopy(model)
    with applied(copied, CONFIG) as handle:
        # Put on first, dispatched after: accelerate's hooks then go around ours.
        spread = accelerate.dispatch_model(copied, places, main_device="cpu", offload_dir=str(tmp_path))
        assert logits(spread, inputs).equal(expected)
        assert greedy(spread, inputs, 4).equal(ids)
        assert handle.stats()["requests"] == 2
    assert logits(spread, inputs).equal(dense)


def test_a_quantised_model_is_reduced_like_its_dequantised_twin(tiny, rng):
    quanto = pytest.importorskip("optimum.quanto")
    family, model = tiny("qwen2-vl")
    inputs = family.batch(*family.prompts(rng))
    quantised = copy.deepcopy(model)
    quanto.quantize(quantised.model.language_model, weights=quanto.qint8)
    quanto.freeze(quantised)
    layer = quantised.model.language_model.layers[1]
    assert type(layer.mlp.up_proj).__name__ == "QLinear"
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if type(module).__name__ == "QLinear":
                twin.get_submodule(name).weight.copy_(module.weight.dequantize())
    plain = logits(quantised, inputs)
    with applied(quantised, FrameFusionConfig(cost=1.0)):
        assert logits(quantised, inputs).equal(plain)
    found = []
    for one in (quantised, twin):
        with applied(one, CONFIG) as handle:
            found.append((logits(one, inputs), greedy(one, inputs, 6), handle.trace))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    assert found[0][1].equal(found[1][1])
    assert found[0][2] == found[1][2]
    assert logits(quantised, inputs).equal(plain)
