"""The doors: custom_generate, apply, pipelines, processors, stopping, streaming, statistics."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import sjd
import torch
from pared_hooks import AlreadyAppliedError
from sjd.processing import Processing
from torch import nn
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processors

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*called once for each position:UserWarning", "ignore:generation_config.top_k:UserWarning"
)


def generate(model, ids, config=None, tokens=16, **options):
    options.setdefault("do_sample", True)
    options.setdefault("top_k", 0)
    return model.generate(ids, max_new_tokens=tokens, custom_generate=sjd.decode,
                          sjd_config=config or sjd.SJDConfig(window=5), **options)  # fmt: skip


@pytest.fixture
def llama(tiny):
    return tiny("llama", torch.float32)


def test_custom_generate_and_apply_draw_the_same_from_the_same_generator(tiny):
    family = tiny("chameleon")
    ids, mask = family.prompt()
    config = sjd.SJDConfig(window=5)
    direct = generate(family.model, ids, config, attention_mask=mask, generator=torch.Generator().manual_seed(3))
    with sjd.applied(family.model, config):
        applied = family.generate(generator=torch.Generator().manual_seed(3))
    assert direct[:, 5:].equal(applied)


def test_a_generator_reproduces_and_another_seed_differs(llama):
    ids, _ = llama.prompt()
    first, again, other = (generate(llama.model, ids, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    torch.manual_seed(5)
    ours = generate(llama.model, ids)
    torch.manual_seed(5)
    assert generate(llama.model, ids).equal(ours)


@pytest.mark.parametrize("name", ["chameleon", "janus", "llamagen"])
def test_removing_restores_generate_and_every_bit(name, tiny):
    family = tiny(name, torch.float32)
    model = family.model
    keys = list(model.state_dict())

    # Without guidance transformers' own Janus fails: it doubles the rows all the same.
    guidance = 2.0 if name == "janus" else None

    def plain():
        torch.manual_seed(2)
        return family.generate(guidance=guidance)

    def logits():
        return family.logits(torch.zeros(2, 3, dtype=torch.int64))

    with torch.no_grad():
        tokens, values = (plain() if name != "chameleon" else None), logits()
        # transformers' own Janus notes something on itself.
        before = dict(vars(model))
        handle = sjd.apply(model, sjd.SJDConfig(window=5))
        assert "generate" in vars(model)
        family.generate(guidance=guidance)
        handle.remove()
        handle.remove()
        assert "generate" not in vars(model)
        assert set(vars(model)) == set(before)
        assert list(model.state_dict()) == keys
        assert logits().equal(values)
        assert tokens is None or plain().equal(tokens)


def test_applying_twice_is_refused_and_changes_nothing(llama):
    with sjd.applied(llama.model):
        with pytest.raises(AlreadyAppliedError, match="sjd"):
            sjd.apply(llama.model)
        assert llama.generate().shape == (2, 24)
    assert "generate" not in vars(llama.model)


def test_janus_keeps_its_text_generation(tiny):
    family = tiny("janus", torch.float32)
    ids, mask = family.prompt()
    options = {"inputs": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    plain = family.model.generate(**options)
    with sjd.applied(family.model):
        assert family.model.generate(**options).equal(plain)


class GlmProcessor:
    """What the pipeline asks its processor for, without a tokenizer."""

    def __init__(self, family):
        self.family = family

    def apply_chat_template(self, messages, **options):
        from transformers import BatchFeature

        rows = len(messages)
        ids, mask = self.family.prompt(rows)
        grids = torch.tensor([[1, 3, 4], [1, 2, 2]] * rows)
        return BatchFeature({"input_ids": ids, "attention_mask": mask, "image_grid_thw": grids,
                             "images_per_sample": torch.tensor([2] * rows)})  # fmt: skip


def test_glm_image_pipelines_draw_their_prior_tokens_with_it(tiny):
    diffusers = pytest.importorskip("diffusers")
    family = tiny("glm_image", torch.float32)
    pipe = diffusers.GlmImagePipeline(None, GlmProcessor(family), None, family.model, None, None, None)
    with sjd.applied(pipe, sjd.SJDConfig(window=6)) as handle:
        tokens, *_ = pipe.generate_prior_tokens(["a", "b"], 96, 128, device=torch.device("cpu"))
        stats = handle.stats()
    assert tokens.shape == (2, 4 * 12)
    assert tokens.max() < 20
    assert stats["tokens"] == 2 * (4 + 12 + 1)
    assert "generate" not in vars(family.model)


def test_emu3_reads_the_size_from_the_header_of_the_prompt(tiny):
    family = tiny("emu3", torch.float32)
    mapping = family.model.vocabulary_mapping.vocab_map
    names = ["<|image start|>", "3", "*", "2", "<|image token|>"]
    added = {name: 54 + number for number, name in enumerate(names)}
    mapping.update(added)
    try:
        ids = torch.tensor([[5, *added.values()]])
        out = generate(family.model, ids, tokens=50)
        assert out.shape[1] == 6 + 3 * 3 + 3
        with pytest.raises(ValueError, match="image_grid"):
            generate(family.model, torch.tensor([[5, 7, added["<|image token|>"]]]), tokens=50)
    finally:
        for name in names:
            del mapping[name]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3, 4], [7]]},
        {"suppress_tokens": [1, 2, 3]},
        {"begin_suppress_tokens": [4, 5, 6]},
        {"forced_eos_token_id": 3},
        {"sequence_bias": [[[5], 2.0], [[6, 7], -9.0]]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [row + 1, (int(ids[-1]) * 7 + len(ids)) % 20, 9]},
        {"eos_token_id": 11, "min_new_tokens": 9},
        {"eos_token_id": 11, "exponential_decay_length_penalty": (4, 1.3)},
        {"guidance_scale": 2.5},
        {"guidance_scale": 2.5, "repetition_penalty": 1.3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_see_the_tokens_in_front_of_each_place(options, llama):
    """Greedy, so that plain generation with the same processors is the answer."""
    ids, mask = llama.prompt(3)
    options = {"attention_mask": mask, "do_sample": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = llama.model.generate(ids, max_new_tokens=16, **options)
        ours = generate(llama.model, ids, top_k=None, **options)
    assert ours.equal(plain)


def test_a_negative_prompt_guides(llama):
    ids, mask = llama.prompt(2)
    negative = torch.tensor([[4, 5, 6], [0, 7, 8]])
    options = {
        "attention_mask": mask,
        "do_sample": False,
        "guidance_scale": 3.0,
        "negative_prompt_ids": negative,
        "negative_prompt_attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
    }
    ours = generate(llama.model, ids, top_k=None, **options)
    adapter_rows = []
    # transformers passes no positions for the negative prompt, so a padded one is decoded here on its own.
    for row in range(2):
        own = negative[row : row + 1, 1:] if row else negative[:1]
        words = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        out = llama.model.generate(words, max_new_tokens=16, do_sample=False, guidance_scale=3.0,
                                   negative_prompt_ids=own)  # fmt: skip
        adapter_rows.append(out[0, words.shape[1] :])
    assert ours[:, 5:].equal(torch.stack(adapter_rows))


@pytest.mark.parametrize(
    "chain",
    [
        [processors.TemperatureLogitsWarper(0.7), processors.TopKLogitsWarper(5), processors.TopPLogitsWarper(0.8)],
        [processors.TopKLogitsWarper(5), processors.TemperatureLogitsWarper(0.7)],
        [processors.MinPLogitsWarper(0.1)],
        [processors.TypicalLogitsWarper(0.8)],
        [processors.EpsilonLogitsWarper(0.02), processors.EtaLogitsWarper(0.02)],
        [processors.TemperatureLogitsWarper(1.2), processors.TopHLogitsWarper(0.4)],
        [processors.SuppressTokensLogitsProcessor([2, 3]), processors.TopPLogitsWarper(0.5, min_tokens_to_keep=3)],
    ],
    ids=lambda chain: "-".join(type(one).__name__ for one in chain),
)
def test_row_wise_processors_give_the_distribution_of_transformers(chain, rng):
    logits = 2 * torch.randn(3, 4, 20, generator=rng)
    processing = Processing.of(LogitsProcessorList(chain))
    found = processing.target(logits, None, None, torch.full((3, 4), -1))
    expected = LogitsProcessorList(chain)(torch.zeros(12, 1).long(), logits.view(12, 20)).softmax(-1).view(3, 4, 20)
    torch.testing.assert_close(found, expected)
    assert not processing.by_prefix


def test_plain_chains_run_fused_and_others_as_they_are():
    plain = Processing.of([processors.TemperatureLogitsWarper(0.5), processors.TopKLogitsWarper(3)])
    assert (plain.plain, plain.temperature, plain.top_k) == (True, 0.5, 3)
    assert not Processing.of([processors.TopKLogitsWarper(3), processors.TemperatureLogitsWarper(0.5)]).plain


class Stateful(processors.LogitsProcessor):
    """A processor of the user's, which counts its calls."""

    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


@pytest.mark.filterwarnings("default")
def test_a_processor_of_ones_own_works_and_is_named_once(llama):
    ids, _ = llama.prompt()
    own = Stateful()
    with pytest.warns(UserWarning, match="Stateful") as caught:
        generate(llama.model, ids, logits_processor=LogitsProcessorList([own]))
    assert sum("Stateful" in str(one.message) for one in caught) == 1
    assert own.calls > 0


@pytest.mark.parametrize("end", range(3))
def test_an_end_token_inside_the_window_ends_the_row_there(end, llama):
    ids, mask = llama.prompt(3)
    plain = llama.model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    token = int(plain[end, 5 + 6 + end])
    options = {"attention_mask": mask, "do_sample": False, "eos_token_id": [token], "pad_token_id": 0}
    expected = llama.model.generate(ids, max_new_tokens=20, **options)
    assert generate(llama.model, ids, sjd.SJDConfig(window=9), 20, top_k=None, **options).equal(expected)


def test_stopping_criteria_are_asked_for_every_token(llama):
    def stops(input_ids, scores, **options):
        return torch.full((len(input_ids),), int(input_ids[0, -1]) % 5 == 2)

    ids, _ = llama.prompt(1)
    options = {"do_sample": False, "stopping_criteria": [stops]}
    expected = llama.model.generate(ids, max_new_tokens=20, **options)
    assert generate(llama.model, ids, sjd.SJDConfig(window=9), 20, top_k=None, **options).equal(expected)


class Collects:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_a_streamer_gets_the_final_tokens_in_order(tiny):
    family = tiny("emu3", torch.float32)
    ids, _ = family.prompt(1)
    streamer = Collects()
    out = generate(family.model, ids, tokens=23, image_grid=(4, 4), token_streamer=streamer)
    assert streamer.tokens == out[0, 5:].tolist()
    assert streamer.ended == 1
    with sjd.applied(family.model, sjd.SJDConfig(window=5)):
        streamer = Collects()
        out = family.model.generate(ids, max_new_tokens=23, image_grid=(4, 4), do_sample=True, top_k=0,
                                    streamer=streamer)  # fmt: skip
    assert streamer.tokens == out[0].tolist()  # transformers itself puts the prompt
    assert streamer.ended == 1


def test_janus_streams_though_its_own_loop_does_not(tiny):
    family = tiny("janus", torch.float32)
    for name in ("streamer", "token_streamer"):
        streamer = Collects()
        with sjd.applied(family.model, sjd.SJDConfig(window=5)):
            assert family.generate(rows=1, **{name: streamer})[0].tolist() == streamer.tokens
        assert streamer.ended == 1


def test_nothing_behind_an_end_token_is_streamed(llama):
    ids, _ = llama.prompt(1)
    plain = llama.model.generate(ids, max_new_tokens=20, do_sample=False)[0, 5:].tolist()
    for end in plain[2:12]:
        streamer = Collects()
        out = generate(llama.model, ids, sjd.SJDConfig(window=9), 20, do_sample=False, top_k=None, eos_token_id=[end],
                       pad_token_id=0, token_streamer=streamer)  # fmt: skip
        assert streamer.tokens == out[0, 5:].tolist() == plain[: plain.index(end) + 1]
        assert streamer.ended == 1


def test_a_callback_sees_the_picture_fill_in(tiny):
    family = tiny("emu3", torch.float32)
    seen = []

    def look(progress):
        seen.append((progress.passes, progress.committed, progress.tokens, progress.images(), progress.done))

    with sjd.applied(family.model, sjd.SJDConfig(window=5)) as handle:
        tokens = family.generate(progress_callback=look)
        assert [passes for passes, *_ in seen] == list(range(1, len(seen) + 1))
        assert len(seen) == max(image["nfe"] for image in handle.stats()["images"])
    for _, committed, standing, pictures, _ in seen:
        assert pictures.shape[:2] == (2, 3)
        for row, count in enumerate(committed):
            assert standing[row, :count].equal(tokens[row, :count])
    assert [done for *_, done in seen] == [False] * (len(seen) - 1) + [True]


def test_statistics_count_passes_and_what_they_committed(tiny):
    family = tiny("chameleon", torch.float32)
    with sjd.applied(family.model, sjd.SJDConfig(window=5)) as handle:
        family.generate()
        stats = handle.stats()
        assert stats["requests"] == 1
        assert stats["tokens"] == 32
        for image in stats["images"]:
            assert image["tokens"] == 16
            assert image["nfe"] == 1 + sum(image["committed"].values())
            assert 1 + sum(length * count for length, count in image["committed"].items()) == 16
            assert image["ratio"] == pytest.approx(16 / image["nfe"])
        assert len(stats["acceptance"]) == 5
        assert all(one is None or 0 <= one <= 1 for one in stats["acceptance"])
        assert 0 <= stats["survival"] <= 1
        assert stats["ms_per_pass"] > 0
        assert stats["probability_bytes"] == 2 * (2 * 5 + 1) * 20 * 4
        assert stats["relax_tv_bound"] is None
        handle.reset()
        assert handle.stats()["requests"] == 0


def test_every_token_is_a_pass_at_most(llama):
    with sjd.applied(llama.model, sjd.SJDConfig(window=3, init="random", refresh="independent")) as handle:
        llama.generate(rows=5)
        assert all(image["nfe"] <= image["tokens"] for image in handle.stats()["images"])


def test_a_margin_at_the_end_takes_a_pass_for_each_token(tiny):
    family = tiny("llamagen", torch.float32)
    with sjd.applied(family.model, sjd.SJDConfig(window=5, stop_margin=6)) as handle:
        family.generate(rows=5)
        for image in handle.session.runs[0].images:
            starts = [sum(image.committed[:number]) for number in range(image.passes)]
            assert {count for start, count in zip(starts, image.committed, strict=True) if start >= 10} == {1}
            assert max(starts) == 15


def test_greedy_guesses_that_draw_from_a_neighbour_copy_it(tiny):
    family = tiny("emu3", torch.float32)
    found = {}
    for init in ("left", "left_sample", "above", "above_sample"):
        with sjd.applied(family.model, sjd.SJDConfig(window=9, init=init)) as handle:
            family.generate(rows=3, do_sample=False, top_k=None, generator=torch.Generator().manual_seed(4))
            found[init] = [image["committed"] for image in handle.stats()["images"]]
    assert found["left_sample"] == found["left"] != found["above_sample"]
    assert found["above_sample"] == found["above"]


@pytest.mark.parametrize("name", ["emu3", "llamagen"])
@torch.no_grad()
def test_the_window_may_reach_far_behind_the_end(name, tiny):
    family = tiny(name)
    config = sjd.SJDConfig(window=256, verify="match", refresh="gumbel", seed=7, prob_dtype="float64")
    with sjd.applied(family.model, config):
        assert family.generate().equal(family.with_noise(7))


def test_auto_tries_windows_between_images_and_keeps_the_fastest(tiny, monkeypatch):
    family = tiny("llamagen", torch.float32)
    with sjd.applied(family.model, sjd.SJDConfig(window="auto")) as handle:
        for _ in range(4):
            family.generate()
        assert handle.stats()["windows"] == [7, 15, 31, 63]
        handle.session.rates = {7: [1.0], 15: [9.0], 31: [2.0], 63: [3.0]}
        assert handle.session.window() == 15


def test_outputs_come_as_a_dictionary_where_asked(llama):
    ids, _ = llama.prompt()
    out = generate(llama.model, ids, return_dict_in_generate=True)
    assert out.sequences.shape == (2, 21)
    assert generate(llama.model, ids, num_return_sequences=3).shape == (6, 21)


def test_relax_is_lossy_and_says_so(tiny):
    family = tiny("janus", torch.float32)
    with sjd.applied(family.model, sjd.SJDConfig(window=5, relax=0.3)) as handle:
        with pytest.warns(UserWarning, match="output distribution changes"):
            family.generate()
        assert 0 < handle.stats()["relax_tv_bound"] <= 1


def test_an_adapter_of_ones_own_is_asked_first(llama, monkeypatch):
    from sjd.adapters import base, causal_lm

    class Own(causal_lm.CausalLM):
        name = "own"

    monkeypatch.setattr(base, "_registered", {})
    sjd.register_adapter("own", lambda model: model is llama.model, Own)
    assert sjd.adapters.adapter_of(llama.model).name == "own"
    with pytest.raises(ValueError, match="'own'"):
        sjd.register_adapter("own", bool, Own)


def test_prompts_to_pictures_in_one_call(tiny):
    family = tiny("emu3", torch.float32)

    def processor(text, **options):
        ids, mask = family.prompt(len(text))
        return {"input_ids": ids, "attention_mask": mask, "image_sizes": [[4, 4]] * len(text)}

    images = sjd.generate_images(family.model, processor, ["a", "b"], sjd.SJDConfig(window=5), guidance_scale=2.0)
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    again = sjd.generate_images(family.model, processor, ["a", "b"], sjd.SJDConfig(window=5), guidance_scale=2.0)
    assert [one.tobytes() for one in images] == [one.tobytes() for one in again]


def test_prompts_to_pictures_with_a_door_of_its_own(tiny):
    family = tiny("janus", torch.float32)

    def processor(text, generation_mode, **options):
        assert generation_mode == "image"
        ids, mask = family.prompt(len(text))
        return {"input_ids": ids, "attention_mask": mask}

    images = sjd.generate_images(family.model, processor, ["a", "b"], sjd.SJDConfig(window=5), guidance_scale=2.0)
    assert len(images) == 2
    assert images[0].size == images[1].size


def test_captions_keep_their_padding_on_every_way_to_a_picture():
    llamagen = pytest.importorskip("pared_zoo.llamagen")
    from pared_zoo.recipes.reading import caption_encoder
    from pared_zoo.recipes.tokenizer import world_tokenizer
    from sjd.bench.world import Arm, Sampling, World
    from sjd.images import pictures
    from sjd_models import CODES, lively, llamagen_caption, wrapped
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    tokenizer = world_tokenizer(32)
    vq = Emu3VQVAEConfig(codebook_size=CODES, embed_dim=4, latent_channels=4, temporal_downsample_factor=1,
                         base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, attn_resolutions=[],
                         hidden_size=32)  # fmt: skip
    pipe = llamagen.LlamaGenPipeline(
        transformer=lively(wrapped(llamagen_caption), 3, torch.float32),
        vqmodel=Emu3VQVAE(vq).eval(),
        text_encoder=lively(caption_encoder(tokenizer, 12, 1), 4, torch.float32),
        tokenizer=tokenizer,
    )
    prompts = ["red", "", "a red circle", "two"]
    condition, mask = pipe.encode_prompt(prompts)
    assert len(set(mask.sum(1).tolist())) > 1
    # One token to choose from: every way must draw the same.
    options = {"guidance_scale": 2.0, "top_k": 1}
    plain, tokens = pipe(prompts, output_type="pt", return_tokens=True, **options)
    assert not pipe.transformer.generate(condition, **options).equal(tokens)
    drawn = World(pipe, prompts).draw(Arm("maximal", 5), 4, 0, Sampling(greedy=True, guidance=2.0))
    assert drawn.tokens.equal(tokens)
    with sjd.applied(pipe, sjd.SJDConfig(window=5)) as handle:
        assert pipe(prompts, output_type="pt", return_tokens=True, **options)[1].equal(tokens)
        assert handle.stats()["tokens"] == tokens.numel()
    images = sjd.generate_images(pipe, None, prompts, sjd.SJDConfig(window=5), **options)
    assert [one.tobytes() for one in images] == [one.tobytes() for one in pictures(plain)]


@pytest.mark.parametrize("name", ["emu3", "llama"])
def test_models_whose_weights_lie_elsewhere_draw_the_same(name, tmp_path, tiny):
    accelerate = pytest.importorskip("accelerate")
    from sjd_models import family as build

    family = tiny(name, torch.float32)
    with sjd.applied(family.model, sjd.SJDConfig(window=5)):
        plain = family.generate(generator=torch.Generator().manual_seed(1))
    moved = build(name, torch.float32)
    decoder = {"emu3": "model.text_model", "llama": "model"}[name]
    places = {decoder: "disk", "lm_head": "disk"} | ({"model.vqmodel": "cpu"} if name == "emu3" else {})
    accelerate.dispatch_model(moved.model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert moved.model.device.type == "meta"
    with sjd.applied(moved.model, sjd.SJDConfig(window=5)):
        assert moved.generate(generator=torch.Generator().manual_seed(1)).equal(plain)


def test_llamagen_pipelines_are_found_through_their_transformer(tiny):
    family = tiny("llamagen", torch.float32)
    pipe = SimpleNamespace(
        transformer=family.model,
        decode_tokens=lambda tokens: torch.zeros(len(tokens), 3, 8, 8),
        vqmodel=SimpleNamespace(quantize=SimpleNamespace(embedding=nn.Embedding(20, 3))),
        encode_prompt=lambda prompts: (torch.arange(len(prompts)), None),
    )
    images = sjd.generate_images(pipe, None, ["a", "b"], sjd.SJDConfig(window=5), guidance_scale=2.0)
    assert len(images) == 2
    with sjd.applied(pipe, sjd.SJDConfig(window=5, relax=0.2)), pytest.warns(UserWarning, match="changes"):
        family.generate()


def test_memory_does_not_grow_over_a_thousand_passes(rng):
    from sjd import exactness

    # Distributions that have nothing to do with the guesses, so that few of them pass.
    table, config = SimpleNamespace(vocab=4, length=1800), sjd.SJDConfig(window=3, init="above_sample")
    window = exactness.make_window(
        table, 2, config, lambda shape: torch.rand(shape, generator=rng, dtype=torch.float64),
        grammar=sjd.ImageGrammar([(18, 100)], slice(0, 4)),
    )  # fmt: skip
    sizes = []
    while int(window.committed.min()) < table.length:
        window.advance((3 * torch.randn(2, window.width, table.vocab, generator=rng)).softmax(-1))
        sizes.append(sum(one.nbytes for one in vars(window).values() if isinstance(one, torch.Tensor)))
    assert len(sizes) > 1000
    assert set(sizes[1:]) == {sizes[1]}
    # What is held: p of a pass, and q of the drafts.
    assert window.laws.nbytes == 2 * 3 * 4 * 4
    assert window.peak_bytes == 2 * (2 * 3 + 1) * 4 * 4
