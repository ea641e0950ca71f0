"""Wrong input fails early, with the argument, its value and what is valid; an error leaves nothing behind."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import sjd
import torch
from pared_hooks import ConfigError, UnsupportedModelError
from sjd.engine import Engine


def generate(model, ids, config=None, tokens=16, **options):
    options.setdefault("do_sample", True)
    options.setdefault("top_k", 0)
    return model.generate(ids, max_new_tokens=tokens, custom_generate=sjd.decode,
                          sjd_config=config or sjd.SJDConfig(window=5), **options)  # fmt: skip


@pytest.fixture
def llama(tiny):
    return tiny("llama", torch.float32)


@pytest.mark.parametrize(
    ("field", "value", "valid"),
    [
        ("window", 0, "window must be 1..256"),
        ("window", 257, "window must be 1..256"),
        ("window", "many", "window must be 1..256"),
        ("window", True, "window must be 1..256"),
        ("window", 3.5, "window must be 1..256"),
        ("verify", "ratio", "'speculative', 'match'"),
        ("refresh", "coupled", "'independent', 'maximal', 'gumbel'"),
        ("init", "below", "'above'"),
        ("seed", -1, "0 <= seed"),
        ("seed", 2**64, "seed < 2**64"),
        ("seed", 1.5, "int"),
        ("guidance_batch", "both", "'joint', 'sequential'"),
        ("vocab_slice", "on", "'auto', 'off'"),
        ("prob_dtype", "bfloat16", "'float32', 'float64'"),
        ("cache", "static", "'ragged', 'dynamic'"),
        ("relax", 1.0, "0 <= relax < 1"),
        ("relax", -0.1, "0 <= relax < 1"),
        ("relax", float("nan"), "0 <= relax < 1"),
        ("relax", "0.1", "float"),
        ("compile", "default", "'reduce-overhead'"),
        ("backend", "cuda", "'triton'"),
        ("stop_margin", -1, "at least 0"),
        ("stop_margin", 1.5, "int"),
    ],
)
def test_every_field_refuses_what_is_not_valid(field, value, valid):
    with pytest.raises(ConfigError, match=field) as caught:
        sjd.SJDConfig(**{field: value})
    assert valid in str(caught.value)
    assert caught.value.field == field


def test_a_configuration_survives_json_and_the_preset_is_the_papers():
    config = sjd.SJDConfig(window="auto", refresh="gumbel", verify="match", seed=2**40)
    assert sjd.SJDConfig.from_json(config.to_json()) == config
    paper = sjd.preset("paper")
    assert (paper.window, paper.refresh, paper.init, paper.cache) == (15, "independent", "random", "dynamic")
    with pytest.raises(ConfigError, match="'paper'"):
        sjd.preset("best")
    with pytest.raises(ConfigError, match="relax"):
        sjd.SJDConfig(verify="match", relax=0.1)


def test_matching_samples_only_with_noise_of_the_position(llama):
    ids, _ = llama.prompt()
    with pytest.raises(ConfigError, match="gumbel"):
        generate(llama.model, ids, sjd.SJDConfig(verify="match"))
    # Greedy decoding matches in any case.
    generate(llama.model, ids, sjd.SJDConfig(verify="match"), do_sample=False, top_k=None)


def test_guesses_from_the_row_above_need_rows(llama):
    ids, _ = llama.prompt()
    for init in ("above", "left_sample", "above_sample"):
        with pytest.raises(sjd.GrammarError, match=init):
            generate(llama.model, ids, sjd.SJDConfig(init=init))


def test_a_dynamic_cache_is_for_one_row(llama):
    ids, _ = llama.prompt(2)
    with pytest.raises(ConfigError, match="2 rows"):
        generate(llama.model, ids, sjd.SJDConfig(cache="dynamic"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_need_a_gpu(llama):
    ids, _ = llama.prompt()
    with pytest.raises(RuntimeError, match="GPU"):
        generate(llama.model, ids, sjd.SJDConfig(backend="triton"))


@pytest.mark.parametrize(
    ("config", "options", "why"),
    [({"init": "above_sample"}, {}, "above_sample"), ({"relax": 0.1}, {}, "relax"), ({}, {"top_p": 0.9}, "top-p")],
    ids=["init", "relax", "top_p"],
)
@pytest.mark.filterwarnings("ignore:relax")
def test_kernels_that_were_asked_for_and_cannot_run_are_an_error(config, options, why, tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    family = tiny("emu3", torch.float32)
    applied = sjd.applied(family.model, sjd.SJDConfig(backend="triton", **config))
    with applied, pytest.raises(ConfigError, match=f"SJDConfig.backend = 'triton' .*{why}"):
        family.generate(**options)


GREEDY = {"do_sample": False, "top_k": None}


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 3, **GREEDY},
        {"prompt_lookup_num_tokens": 3, **GREEDY},
        {"penalty_alpha": 0.5, "do_sample": False, "top_k": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_beams_and_other_ways_to_search_are_refused_before_the_first_pass(options, llama, monkeypatch):
    ids, _ = llama.prompt(1)
    monkeypatch.setattr(llama.model, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=r"num_beams|penalty_alpha"):
        generate(llama.model, ids, **options)


def test_an_assistant_is_refused(llama):
    ids, _ = llama.prompt(1)
    with sjd.applied(llama.model), pytest.raises(ConfigError, match="assistant_model"):
        llama.model.generate(ids, assistant_model=llama.model)


def test_padding_on_the_right_is_refused(llama):
    ids, mask = llama.prompt()
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="left"):
        generate(llama.model, ids, attention_mask=mask)


def test_padding_of_a_negative_prompt_is_named(llama):
    ids, _ = llama.prompt()
    name, options = "negative_prompt_attention_mask", {"guidance_scale": 2.0, "negative_prompt_ids": ids}
    for mask, named in ((torch.tensor([[1, 1, 1, 1, 0]]).expand(2, -1), "left"), (torch.ones(2, 4), r"\(2, 5\)")):
        with pytest.raises(ConfigError, match=f"{name} .*{named}"):
            generate(llama.model, ids, **options, **{name: mask})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]]).expand(2, -1)}, "attention_mask .*left"),
        ({"num_beams": 2}, "num_beams"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"streamer": object()}, "token_streamer"),
        ({"token_streamer": object()}, "token_streamer"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_a_loop_of_its_own_refuses_what_the_others_refuse(options, named, tiny):
    family = tiny("janus", torch.float32)
    ids, mask = family.prompt()
    asked = {"attention_mask": mask, "generation_mode": "image", "do_sample": True, "guidance_scale": 1.0} | options
    with sjd.applied(family.model), pytest.raises(ConfigError, match=named):
        family.model.generate(ids, **asked)


def test_both_numbers_are_named_when_an_answer_does_not_fit(llama, tiny):
    ids, _ = llama.prompt()
    with pytest.raises(ConfigError, match=r"205 .* 128"):
        generate(llama.model, ids, tokens=200)
    ids, _ = tiny("emu3", torch.float32).prompt()
    with pytest.raises(ConfigError, match=r"= 10 .* 23 "):
        generate(tiny("emu3", torch.float32).model, ids, tokens=10, image_grid=(4, 4))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("cache", ["ragged", "dynamic"])
@pytest.mark.parametrize("way", ["sampled", "greedy", "kernels"])
def test_logits_that_are_not_finite_are_an_error_with_row_and_position(value, cache, way, llama, monkeypatch):
    """From position 4 of the answer on, the head gives nothing."""
    ids, _ = llama.prompt(1)
    monkeypatch.setattr(Engine, "_use_kernels", lambda self: way == "kernels")
    options = {"greedy": GREEDY, "sampled": {}, "kernels": {"top_k": 7}}[way]
    reached = []

    def broken(module, args, kwargs, output):
        positions = kwargs["position_ids"][0]
        spoiled = positions[-output.logits.shape[1] :] >= 8
        reached.append(int(positions.max()))
        output.logits = output.logits.masked_fill(spoiled[None, :, None], value)
        return output

    hook = llama.model.register_forward_hook(broken, with_kwargs=True)
    engines = []
    make = Engine.__init__

    def watched(self, *args, **kwargs):
        engines.append(self)
        make(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "__init__", watched)
    try:
        with pytest.raises(RuntimeError, match="row 0 at position 4"):
            generate(llama.model, ids, sjd.SJDConfig(window=3, cache=cache), **options)
    finally:
        hook.remove()
    # The pass that failed committed nothing, and the last final token was not read yet.
    (side,), final = engines[0].sides, int(engines[0].window.committed)
    assert 1 <= final <= 4
    assert side.rows.lengths.tolist() == [5 + final - 1]
    assert side.cache.get_seq_length() == 5 + final - 1
    assert generate(llama.model, ids).shape == (1, 21)


def test_an_error_inside_a_pass_leaves_model_and_handle_usable(llama):
    buffers = []

    def fails(module, args, kwargs):
        buffers.append(weakref.ref(kwargs["past_key_values"]))
        if len(buffers) == 3:
            raise KeyboardInterrupt

    with sjd.applied(llama.model, sjd.SJDConfig(window=3)) as handle:
        hook = llama.model.register_forward_pre_hook(fails, with_kwargs=True)
        interrupted = False
        try:
            llama.generate()
        except KeyboardInterrupt:
            interrupted = True
        hook.remove()
        assert interrupted
        gc.collect()
        assert [one() for one in buffers] == [None] * 3
        assert llama.generate().shape == (2, 24)
        assert handle.stats()["requests"] == 1
    assert "generate" not in vars(llama.model)


def test_unknown_models_and_attention_that_cannot_roll_back_are_refused():
    from transformers import (
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 20}  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="register_adapter"):
        sjd.apply(torch.nn.Linear(2, 2))
    sliding = MistralForCausalLM(MistralConfig(**small, sliding_window=4))
    with pytest.raises(UnsupportedModelError, match="sliding"):
        sjd.apply(sliding)
    with pytest.raises(UnsupportedModelError, match="sliding"):
        generate(sliding, torch.ones(1, 3, dtype=torch.int64))
    encoder = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match="T5"):
        sjd.apply(encoder)
    model = Qwen2ForCausalLM(Qwen2Config(**small))
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        sjd.apply(model)
    model.config.layer_types = ["full_attention"] * 2
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        sjd.apply(model)
    assert not any("generate" in vars(one) for one in (sliding, encoder, model))


def test_caches_that_hold_tokens_or_are_quantised_are_refused(llama):
    from transformers import DynamicCache

    ids, _ = llama.prompt(1)
    held = DynamicCache()
    llama.model(ids[:, :2], past_key_values=held)
    with pytest.raises(ConfigError, match="past_key_values"):
        generate(llama.model, ids, past_key_values=held)
    # Making a true one needs a library of quantised numbers.
    quantised = type("QuantizedCache", (DynamicCache,), {})()
    with pytest.raises(ConfigError, match="QuantizedCache cannot take rejected drafts back"):
        generate(llama.model, ids, past_key_values=quantised)
    assert generate(llama.model, ids, past_key_values=DynamicCache()).shape == (1, 21)
    assert generate(llama.model, ids, cache_implementation="static").shape == (1, 21)


def test_scores_embeddings_and_streamers_of_batches_are_refused(llama):
    ids, _ = llama.prompt(2)
    with pytest.raises(ConfigError, match="output_scores"):
        generate(llama.model, ids, return_dict_in_generate=True, output_scores=True)
    with pytest.raises(ConfigError, match="token_streamer"):
        generate(llama.model, ids, token_streamer=object())
    with pytest.raises(ConfigError, match="negative_prompt_ids"):
        generate(llama.model, ids, guidance_scale=2.0, negative_prompt_ids=torch.ones(3, 2).long())


def test_processors_that_a_window_would_confuse_are_refused(llama):
    from transformers import LogitsProcessorList
    from transformers.generation import ClassifierFreeGuidanceLogitsProcessor

    ids, _ = llama.prompt(2)
    with pytest.raises(ConfigError, match="ClassifierFreeGuidanceLogitsProcessor"):
        generate(llama.model, ids, logits_processor=LogitsProcessorList([ClassifierFreeGuidanceLogitsProcessor(2.0)]))


@pytest.mark.parametrize(
    ("name", "options"),
    [("chameleon", {"max_new_tokens": 16}), ("janus", {"generation_mode": "image", "guidance_scale": 1.0})],
)
def test_the_default_top_k_of_transformers_is_pointed_out_for_images(name, options, tiny):
    family = tiny(name, torch.float32)
    ids, mask = family.prompt()
    with sjd.applied(family.model):
        with pytest.warns(UserWarning, match="generation_config.top_k"):
            family.model.generate(ids, attention_mask=mask, do_sample=True, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            family.generate(top_k=0)


def test_glm_image_needs_its_grids_and_takes_no_guidance(tiny):
    family = tiny("glm_image", torch.float32)
    ids, _ = family.prompt()
    with pytest.raises(ConfigError, match="image_grid_thw"):
        generate(family.model, ids, tokens=30)
    with sjd.applied(family.model), pytest.raises(ConfigError, match="guidance_scale"):
        family.generate(guidance=2.0)


def test_rows_that_ask_for_different_sizes_are_refused(tiny):
    family = tiny("emu3", torch.float32)
    ids, _ = family.prompt()
    with sjd.applied(family.model), pytest.raises(ConfigError, match="image_sizes"):
        family.model.generate(ids, image_sizes=torch.tensor([[2, 2], [3, 3]]), max_new_tokens=30, do_sample=True)


def test_a_window_that_takes_much_memory_is_named_with_one_that_fits(llama, monkeypatch):
    from sjd import memory

    monkeypatch.setattr(memory, "free_memory", lambda device: 100 * 2**20)
    with pytest.warns(UserWarning, match="window=100 fits"):
        memory.warn_if_large(1, 400, 2**16, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 20 * 4 * 8)
    ids, _ = llama.prompt()
    with pytest.warns(UserWarning, match="distributions of a window of 5 .* window=2 fits"):
        generate(llama.model, ids)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"condition_mask": torch.ones(2, 5, dtype=torch.bool)}, r"condition_mask .*\(2, 6\)"),
        ({"condition_mask": torch.arange(6).expand(2, -1) < 4}, "condition_mask pads on the right"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_conditions_and_sampling_of_a_transformer_that_is_no_model_of_transformers_are_checked(options, named, tiny):
    family = tiny("llamagen_caption", torch.float32)
    condition, mask = family.condition(2)
    with sjd.applied(family.model), pytest.raises(ValueError, match=named):
        family.model.generate(condition, **{"condition_mask": mask, **options})


def test_a_config_or_grammar_that_is_none_is_refused(llama):
    ids, _ = llama.prompt()
    with pytest.raises(ConfigError, match="SJDConfig"):
        sjd.apply(llama.model, {"window": 3})
    with pytest.raises(sjd.GrammarError, match="sjd_grammar"):
        generate(llama.model, ids, sjd_grammar="on")
    with pytest.raises(ConfigError, match="prompts"):
        sjd.generate_images(llama.model, None, [])
