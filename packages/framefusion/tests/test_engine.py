"""Caches, contexts and refusals, on tiny models of the real classes (acceptance 6, 7, 9; section 12)."""

from __future__ import annotations

import copy
import threading

import ff_models
import pytest
import torch
from framefusion import (
    BudgetError,
    FrameFusionConfig,
    LayoutError,
    StaleCacheError,
    TokenLayout,
    UnsupportedCacheError,
    UnsupportedLayerError,
    VideoBlock,
    applied,
    apply,
    calibrate,
)
from pared_hooks import AlreadyAppliedError, UnsupportedModelError
from test_families import AT_ONCE, CONFIG, greedy, logits
from torch import nn
from transformers import DynamicCache, StaticCache

NAME = "qwen2-vl"
PARTS = (("text", 4), ("video", 5), ("text", 6))


@pytest.fixture
def case(tiny, rng):
    family, model = tiny(NAME)
    return family, model, family.batch(family.prompt(rng, *PARTS))


@torch.no_grad()
def step_by_step(model, inputs, cache, tokens=4):
    """Greedy ids by hand, so that any cache can be passed."""
    out = model(**inputs, past_key_values=cache, use_cache=True)
    length, ids = inputs["input_ids"].shape[1], []
    delta = model.model.rope_deltas.item()
    for step in range(tokens):
        ids.append(int(out.logits[0, -1].argmax()))
        position = torch.full((3, 1, 1), length + step + delta)
        token = torch.tensor([[ids[-1]]])
        out = model(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True)
    return ids


@pytest.mark.parametrize("config", [CONFIG, AT_ONCE], ids=["stage after stage", "at once"])
def test_a_static_cache_decodes_the_same_ids(config, case):
    _, model, inputs = case
    with applied(model, config):
        dynamic = step_by_step(model, inputs, DynamicCache(config=model.config))
        static = StaticCache(model.config, max_cache_len=160)
        assert step_by_step(model, inputs, static) == dynamic
        assert int(static.get_seq_length()) == inputs["input_ids"].shape[1] + 4


def test_static_generation_of_a_padded_batch_is_the_dynamic_one(tiny, rng):
    family, model = tiny(NAME)
    inputs = family.batch(*family.prompts(rng))
    with applied(model, CONFIG):
        dynamic = greedy(model, inputs)
        options = {"cache_implementation": "static", "disable_compile": True}
        assert greedy(model, inputs, **options).equal(dynamic)


def test_every_layer_holds_its_own_number_of_tokens_and_the_length_of_the_sequence(case):
    _, model, inputs = case
    with applied(model, CONFIG) as handle, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        present = [round(one) for one in handle.stats()["attention_tokens"]]
    length = inputs["input_ids"].shape[1]
    text = length - 5 * ff_models.FRAME
    assert [layer.keys.shape[2] - text for layer in cache.layers] == present
    assert present == sorted(present, reverse=True)
    assert present[-1] < present[0] <= 80
    assert {layer.get_seq_length() for layer in cache.layers} == {length}
    assert [layer.get_mask_sizes(1) for layer in cache.layers] == [(text + n + 1, 0) for n in present]


def test_a_cache_can_be_cropped_reordered_and_repeated(case):
    _, model, inputs = case
    with applied(model, AT_ONCE), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        held = cache.layers[0].keys.shape[2]
        for layer in cache.layers:
            layer.batch_repeat_interleave(3)
            layer.reorder_cache(torch.tensor([2, 0]))
            layer.crop(-2)
        first = cache.layers[0]
        assert first.keys.shape[:1] + first.keys.shape[2:3] == (2, held - 2)
        assert first.get_seq_length() == inputs["input_ids"].shape[1] - 2
        assert first.held()[0].shape == (2, held - 2)
        first.reset()
        assert type(first).__name__ == "DynamicLayer"
        assert first.get_seq_length() == 0


def test_a_video_in_a_later_turn_is_reduced_behind_a_plain_past(tiny, rng):
    """The past is text: reducing the video that follows is reducing it in one prompt."""
    family, model = tiny("llava-onevision")
    prompt = family.prompt(rng, ("text", 6), ("video", 4), ("text", 5))
    whole = family.batch(prompt)
    with applied(model, AT_ONCE) as handle, torch.no_grad():
        once = model(**whole).logits[:, -1]
        cache = model(input_ids=whole["input_ids"][:, :6], use_cache=True).past_key_values
        later = {**whole, "input_ids": whole["input_ids"][:, 6:]}
        out = model(**later, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], once, atol=1e-4, rtol=1e-4)
        assert handle.stats()["costs"][-1] == pytest.approx(0.5)
        assert cache.get_seq_length() == whole["input_ids"].shape[1]


def test_a_cache_of_a_removed_handle_is_refused(case):
    _, model, inputs = case
    with applied(model, AT_ONCE), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(StaleCacheError, match="removed"), torch.no_grad():
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_a_static_cache_of_windows_is_refused_before_anything_is_written(tiny, rng):
    family, model = tiny("gemma3")
    inputs = family.batch(family.prompt(rng, *PARTS))
    with applied(model, AT_ONCE), torch.no_grad():
        cache = StaticCache(model.config, max_cache_len=256)
        with pytest.raises(UnsupportedCacheError, match="StaticSlidingWindowLayer"):
            model(**inputs, past_key_values=cache, use_cache=True)
        assert not any(layer.is_initialized for layer in cache.layers)


def test_an_error_inside_a_layer_leaves_cache_and_context_clean(case, monkeypatch):
    _, model, inputs = case
    with applied(model, CONFIG):
        expected = logits(model, inputs)
        cache = DynamicCache(config=model.config)
        mlp = model.model.language_model.layers[2].mlp
        broken = mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"), torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
        broken.remove()
        assert cache.get_seq_length() == 0
        assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}
        with torch.no_grad():
            again = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1:]
        assert again.equal(expected)


def test_two_threads_do_not_disturb_each_other(tiny, rng):
    family, model = tiny(NAME)
    batches = [family.batch(family.prompt(rng, ("text", 3), ("video", n), ("text", 5))) for n in (2, 5)]
    with applied(model, CONFIG):
        alone = [logits(model, one) for one in batches]
        found = {}

        def work(index):
            found[index] = [logits(model, batches[index]) for _ in range(4)]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # rope_deltas lie on the model, but a prompt computes its own positions.
        assert all(one.equal(alone[index]) for index in range(2) for one in found[index])


def test_a_repeated_frame_vanishes_whole_and_leaves_its_anchor_as_it_was(tiny, rng):
    family, model = tiny("llava-onevision")
    inputs = family.batch(family.prompt(rng, ("text", 3), ("video", 4), ("text", 4)))
    pixels = torch.randn(inputs["pixel_values_videos"].shape, generator=rng)
    pixels[:, 2] = pixels[:, 1]
    inputs["pixel_values_videos"] = pixels
    seen = []
    layer = model.model.language_model.layers[0]
    plain = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        plain.remove()
        norm = layer.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with applied(model, FrameFusionConfig(cost=0.5, similarity_threshold=0.9999)) as handle:
            seen.clear()
            model(**inputs)
            stage = handle.trace[0]
        norm.remove()
    with torch.no_grad():
        dense = model.get_input_embeddings()(inputs["input_ids"])
        features = model.model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output
        dense[inputs["input_ids"] == ff_models.VIDEO] = features.flatten(0, 1)
    assert (stage.before, stage.after, stage.kind) == ((64,), (48,), ("merge",))
    start = 4
    gone = range(start + 2 * 16, start + 3 * 16)
    left = [i for i in range(dense.shape[1]) if i not in gone]
    torch.testing.assert_close(seen[-1], dense[:, left], atol=1e-6, rtol=0)


def test_an_explicit_layout_gives_what_the_resolver_gives(tiny, rng):
    family, model = tiny("llava-next-video")
    inputs = family.batch(family.prompt(rng, ("text", 3), ("video", 4), ("text", 4)))
    layout = TokenLayout.from_blocks(inputs["input_ids"].shape[1], [VideoBlock(4, 4, 16)])
    with applied(model, CONFIG):
        expected = logits(model, inputs)
    with applied(model, CONFIG, layout=layout):
        assert logits(model, inputs).equal(expected)
        with pytest.raises(LayoutError, match="layout has shape"):
            logits(model, {**inputs, "input_ids": inputs["input_ids"][:, :-1], "attention_mask": None})
    with applied(model, CONFIG, layout=lambda inputs: layout):
        assert logits(model, inputs).equal(expected)
    # The bare text model of a LLaVA-Video fork: layout and embeddings alone.
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        text = model.model.language_model
        with applied(text, CONFIG, layout=layout) as handle:
            assert text(inputs_embeds=embeds).last_hidden_state.shape[1] < embeds.shape[1]
            handle.set_layout(TokenLayout.empty(1, embeds.shape[1]))
            assert text(inputs_embeds=embeds).last_hidden_state.shape[1] == embeds.shape[1]
            with pytest.raises(LayoutError, match="TokenLayout"):
                handle.set_layout("video")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patch": torch.zeros(1, 4, dtype=torch.int32)}, "patch is torch.int32"),
        ({"frame": torch.zeros(1, 5, dtype=torch.long)}, "frame has shape"),
        ({"stream": torch.full((1, 4), -2)}, "stream has -2"),
        ({"stream": torch.full((1, 4), -1)}, "disagree"),
        ({"patch": torch.zeros(1, 4, dtype=torch.long)}, "repeats"),
    ],
)
def test_a_wrong_layout_is_refused_before_anything_runs(change, named, tiny):
    _, model = tiny(NAME)
    valid = {"patch": torch.arange(4)[None], "frame": torch.zeros(1, 4).long(), "stream": torch.zeros(1, 4).long()}
    with pytest.raises(LayoutError, match=named):
        apply(model, CONFIG, layout=TokenLayout(**(valid | change)))
    assert model.config.text_config._attn_implementation == "sdpa"
    assert "forward" not in vars(model.model.language_model)


def test_a_layout_of_another_prompt_is_refused_before_the_cache_is_touched(case):
    _, model, inputs = case
    cache = DynamicCache(config=model.config)
    with applied(model, CONFIG) as handle:
        handle.set_layout(TokenLayout.empty(1, 7))
        with pytest.raises(LayoutError, match=r"shape \(1, 7\)"), torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0
    assert not any(layer.is_initialized for layer in cache.layers)


def test_blocks_that_overlap_or_do_not_fit_are_refused():
    with pytest.raises(LayoutError, match="overlaps"):
        TokenLayout.from_blocks(40, [VideoBlock(0, 2, 8), VideoBlock(15, 2, 8)])
    with pytest.raises(LayoutError, match="inside the 40 tokens"):
        TokenLayout.from_blocks(40, [VideoBlock(30, 2, 8)])
    layout = TokenLayout.from_blocks(450, [VideoBlock.llava_video(10, 2)])
    assert int(layout.patch.max()) == 209
    assert int((layout.patch >= 0).sum()) == 420


def test_a_second_apply_and_a_model_without_resolver_are_refused(tiny):
    _, model = tiny(NAME)
    with applied(model, CONFIG), pytest.raises(AlreadyAppliedError, match="framefusion"):
        apply(model, CONFIG)
    with pytest.raises(UnsupportedModelError, match=r"LlavaOnevisionModel.*layout="):
        apply(model.model.language_model, CONFIG)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        apply(nn.Linear(2, 2), CONFIG)


def test_a_layer_that_is_more_than_its_halves_is_refused_and_taken_whole(tiny, rng):
    family, model = tiny(NAME)
    inputs = family.batch(family.prompt(rng, *PARTS))
    layer = model.model.language_model.layers[1]
    scale = layer.register_forward_hook(lambda _, args, out: out * 1.5)
    try:
        with pytest.raises(UnsupportedLayerError, match=r"layers\.1.*layer_input"):
            apply(model, CONFIG)
        assert model.config.text_config._attn_implementation == "sdpa"
        with applied(model, CONFIG.replace(placement="layer_input")) as handle:
            assert logits(model, inputs).isfinite().all()
            assert handle.stats()["cost"] == pytest.approx(0.4, abs=0.02)
    finally:
        scale.remove()


def test_flex_attention_is_refused_and_the_model_is_as_it_was(tiny, monkeypatch):
    _, model = tiny(NAME)
    text = model.model.language_model
    monkeypatch.setattr(text.config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(NotImplementedError, match=r"flex_attention.*use 'sdpa'"):
        apply(model, CONFIG)
    assert text.config._attn_implementation == "flex_attention"
    assert "forward" not in vars(text)


def test_attention_matrices_and_positions_to_keep_are_refused(case):
    _, model, inputs = case
    with applied(model, CONFIG) as handle:
        with pytest.raises(NotImplementedError, match="output_attentions"), torch.no_grad():
            model(**inputs, output_attentions=True)
        with pytest.raises(NotImplementedError, match="logits_to_keep"), torch.no_grad():
            model(**inputs, logits_to_keep=torch.tensor([3, 5]))
        with torch.no_grad():
            assert model(**inputs, logits_to_keep=3).logits.shape[1] == 3
            lengths = [one.shape[1] for one in model(**inputs, output_hidden_states=True).hidden_states]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[-1] < lengths[0]
        assert handle.applied


def test_labels_are_those_of_the_tokens_that_are_left_and_gradients_flow(tiny, rng):
    family, model = tiny("llava-onevision")
    inputs = family.batch(family.prompt(rng, ("text", 3), ("video", 4), ("text", 9)))
    labels = inputs["input_ids"].clone()
    labels[:, :-8] = -100
    with applied(model, CONFIG) as handle:
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        with torch.no_grad():
            rows = model(**inputs).logits[0]
        assert handle.kept.shape[1] == len(rows)
    expected = torch.nn.functional.cross_entropy(rows[-9:-1], inputs["input_ids"][0, -8:])
    torch.testing.assert_close(loss, expected)
    projector = model.model.multi_modal_projector.linear_1.weight.grad
    assert projector.abs().sum() > 0
    model.zero_grad()


def test_gradient_checkpointing_gives_the_same_gradients(tiny, rng):
    family, model = tiny("llava-onevision")
    inputs = family.batch(family.prompt(rng, ("text", 3), ("video", 4), ("text", 9)))
    labels = inputs["input_ids"].clone()
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    found = []
    model.train()
    try:
        with applied(model, CONFIG):
            for checkpointing in (False, True):
                if checkpointing:
                    model.gradient_checkpointing_enable()
                model.zero_grad()
                model(**inputs, labels=labels, use_cache=False).loss.backward()
                found.append(weight.grad.clone())
            with pytest.raises(NotImplementedError, match=r"past_key_values.*use_cache=False"):
                model(**inputs, past_key_values=DynamicCache(config=model.config), use_cache=True)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0])


def test_short_videos_stay_dense_and_images_are_left_alone(tiny, rng):
    family, model = tiny(NAME)
    short = family.batch(family.prompt(rng, ("text", 3), ("video", 2), ("text", 4)))
    images = family.batch(family.prompt(rng, ("text", 3), ("image", 3), ("text", 4)))
    expected = [logits(model, one) for one in (short, images)]
    with applied(model, CONFIG.replace(min_vision_tokens=33)) as handle:
        assert logits(model, short).equal(expected[0])
        assert logits(model, images).equal(expected[1])
        assert handle.stats()["requests"] == 0
    with applied(model, AT_ONCE.replace(image_streams="always")) as handle:
        logits(model, images)
        assert handle.stats()["vision_tokens"] == 48


@pytest.mark.parametrize("name", ["internvl", "smolvlm", "gemma3"])
def test_images_of_families_that_show_videos_as_images_stay_with_never(name, tiny, rng):
    family, model = tiny(name)
    inputs = family.batch(family.prompt(rng, ("text", 3), ("image", 3), ("text", 4)))
    expected, ids = logits(model, inputs), greedy(model, inputs)
    with applied(model, AT_ONCE.replace(image_streams="never")) as handle:
        assert logits(model, inputs).equal(expected)
        assert greedy(model, inputs).equal(ids)
        assert handle.stats()["requests"] == 0
    with applied(model, AT_ONCE) as handle:
        assert not logits(model, inputs).equal(expected)
        assert handle.stats()["vision_tokens"] == 48


def test_a_step_behind_a_dense_prompt_is_bitwise_the_plain_model(case):
    _, model, inputs = case
    token = {"input_ids": torch.tensor([[7]]), "position_ids": torch.full((3, 1, 1), 200)}
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        expected = model(**token, past_key_values=copy.deepcopy(cache)).logits
        with applied(model, CONFIG):
            assert model(**token, past_key_values=cache).logits.equal(expected)


def test_a_cost_that_cannot_be_met_is_met_as_far_as_possible_and_said_once(case):
    _, model, inputs = case
    twice = {name: torch.cat((value, value)) for name, value in inputs.items()}
    with applied(model, FrameFusionConfig(cost=0.04)) as handle:
        with pytest.warns(UserWarning, match=r"cost = 0\.04 cannot be met") as caught:
            logits(model, twice)
        achieved = handle.stats()["cost"]
    assert [str(one.message) for one in caught if "cost" in str(one.message)] == [
        str(caught[0].message),
    ]
    assert f"for a cost of {achieved:.3f}" in str(caught[0].message)
    assert 0.04 < achieved < 0.1


@pytest.mark.parametrize(("options", "layers"), [({"cost": 0.1}, 0), ({"cost": 0.3, "merge_floor": 0.0}, 1)])
def test_a_cost_that_cannot_be_met_is_an_error_and_the_cache_stays_empty(options, layers, case):
    _, model, inputs = case
    cache = DynamicCache(config=model.config)
    config = FrameFusionConfig(on_budget="error", similarity_threshold=1.0, **options)
    ran = []
    with applied(model, config), torch.no_grad():
        hook = model.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: ran.append(1))
        with pytest.raises(BudgetError, match=f"cost = {config.cost}"):
            model(**inputs, past_key_values=cache, use_cache=True)
        hook.remove()
    assert len(ran) == layers
    assert cache.get_seq_length() == 0
    assert not any(layer.is_initialized for layer in cache.layers)


def test_tokens_that_are_not_a_number_are_alike_to_nothing_and_nothing_breaks(tiny, rng):
    family, model = tiny("llava-onevision")
    inputs = family.batch(family.prompt(rng, ("text", 3), ("video", 4), ("text", 4)))
    inputs["pixel_values_videos"][:, 2] = torch.nan
    # A quarter of the tokens are to go at once: those of frame 1 are the only ones with a similarity.
    with applied(model, AT_ONCE.replace(cost=0.75)) as handle:
        logits(model, inputs)
        assert handle.groups[0, 4 + 16 : 4 + 32].tolist() == list(range(4, 20))
        assert handle.layout.frame[0, handle.kept[0]].unique().tolist() == [-1, 0, 2, 3]
    with applied(model, CONFIG) as handle:
        logits(model, inputs)
        assert handle.stats()["cost"] == pytest.approx(0.4, abs=0.02)


def test_several_videos_do_not_merge_into_each_other(tiny, rng):
    family, model = tiny(NAME)
    inputs = family.batch(family.prompt(rng, ("text", 3), ("video", 2), ("text", 4), ("video", 3), ("text", 2)))
    with applied(model, AT_ONCE) as handle:
        logits(model, inputs)
        assert handle.layout.stream.unique().tolist() == [-1, 0, 1]
        groups, layout = handle.groups[0], handle.layout
        for row in groups.unique().tolist():
            members = layout.stream[0][groups == row]
            assert members.unique().numel() == 1


@pytest.mark.parametrize("option", [{"importance_dtype": "model"}, {"average": "weighted"}, {"prune_scope": "span"}])
def test_options_run_and_meet_the_budget(option, case):
    _, model, inputs = case
    with applied(model, CONFIG.replace(**option)) as handle:
        assert logits(model, inputs).isfinite().all()
        assert handle.stats()["cost"] == pytest.approx(0.4, abs=0.02)


def test_statistics_are_those_of_the_prompt_and_can_be_reset(case):
    _, model, inputs = case
    with applied(model, CONFIG) as handle:
        logits(model, inputs)
        stats = handle.stats()
        assert stats["requests"] == stats["sequences"] == 1
        assert stats["vision_tokens"] == 80
        assert sum(stats["attention_tokens"]) / (4 * 80) == pytest.approx(stats["cost"])
        assert all(
            mlp <= attention for mlp, attention in zip(stats["mlp_tokens"], stats["attention_tokens"], strict=True)
        )
        assert 0 < stats["flops_ratio"] < 1
        assert stats["kv_bytes_saved"] > 0
        handle.reset()
        assert handle.stats()["requests"] == 0
        assert handle.trace == []
        assert handle.kept is None


def test_calibration_returns_the_threshold_that_changes_answers_least(case):
    _, model, inputs = case
    chosen = calibrate(model, [inputs], 0.5, grid=(0.2, 0.9, 0.99))
    dense = logits(model, inputs).log_softmax(-1)
    losses = {}
    for threshold in (0.2, 0.9, 0.99):
        with applied(model, chosen.replace(similarity_threshold=threshold)):
            losses[threshold] = float((dense.exp() * (dense - logits(model, inputs).log_softmax(-1))).sum())
    assert losses[chosen.similarity_threshold] == min(losses.values())
    with pytest.raises(ValueError, match="grid is empty"):
        calibrate(model, [inputs], grid=())


def test_a_patched_model_can_be_copied_and_the_copy_is_plain(case):
    _, model, inputs = case
    expected = logits(model, inputs)
    with applied(model, CONFIG):
        copied = copy.deepcopy(model)
        assert logits(copied, inputs).equal(expected)
