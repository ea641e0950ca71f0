"""Tiny models of every family: sjd draws the tokens that plain decoding with the same noise draws."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sjd
import sjd_models
import torch
from sjd_models import BUILDERS, SIDE

FAMILIES = list(BUILDERS)
MATCH = {"verify": "match", "refresh": "gumbel", "prob_dtype": "float64"}


def drawn(family, guidance=None, rows=None, options=None, **config):
    with sjd.applied(family.model, sjd.SJDConfig(**config)) as handle:
        tokens = family.generate(guidance=guidance, rows=rows, **(options or {}))
        return tokens, handle.stats()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_matching_draws_the_tokens_of_plain_sampling_with_the_same_noise(name, tiny):
    family = tiny(name)
    plain = family.with_noise(7)
    for window in (1, 5, 20):
        tokens, stats = drawn(family, window=window, seed=7, **MATCH)
        assert tokens.equal(plain)
        assert stats["nfe"] < stats["tokens"]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "glm_image"])
@torch.no_grad()
def test_guidance_is_that_of_plain_sampling_in_one_pass_or_two(name, tiny):
    family = tiny(name)
    plain = family.with_noise(3, guidance=3.0)
    for batch in ("joint", "sequential"):
        assert drawn(family, 3.0, window=6, seed=3, guidance_batch=batch, **MATCH)[0].equal(plain)


@pytest.mark.parametrize("name", ["emu3", "janus", "llamagen_caption"])
def test_sequential_guidance_reads_half_of_the_rows_at_a_time(name, tiny):
    family, rows = tiny(name, torch.float32), {"joint": set(), "sequential": set()}
    make = sjd.engine.Side.__init__
    for batch, seen in rows.items():

        def counted(side, adapter, prompt, *arguments, seen=seen):
            seen.add(len(prompt.embeds))
            make(side, adapter, prompt, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sjd.engine.Side, "__init__", counted)
            drawn(family, 2.0, window=5, guidance_batch=batch)
    assert rows == {"joint": {4}, "sequential": {2}}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_matching_with_three_seeds_and_temperature_and_top_k_over_larger_images(name):
    if name.startswith("llamagen"):
        pytest.importorskip("pared_zoo.llamagen")
    family = sjd_models.family(name, side=8)
    assert family.grammar.length >= 64
    for seed in (1, 2, 3):
        plain = family.with_noise(seed, rows=3, temperature=0.8, top_k=7)
        options = {"temperature": 0.8, "top_k": 7}
        for init in ("random", "left", "above_sample") if family.grammar.has_grid else ("random", "left"):
            tokens, _ = drawn(family, rows=3, window=9, seed=seed, init=init, options=options, **MATCH)
            assert tokens.equal(plain)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
@pytest.mark.parametrize("name", ["chameleon", "emu3", "janus", "llamagen", "llamagen_caption"])
@torch.no_grad()
def test_joint_and_sequential_guidance_give_the_same_tokens(name, scale, tiny):
    family = tiny(name)
    found = [
        drawn(family, scale, window=5, guidance_batch=batch, prob_dtype="float64",
              options={"generator": torch.Generator().manual_seed(4)})[0]
        for batch in ("joint", "sequential")
    ]  # fmt: skip
    assert found[0].equal(found[1])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_greedy_is_greedy(name, tiny):
    family = tiny(name, torch.float32)
    plain = family.decode(lambda position, probs: probs.argmax(-1))
    tokens, stats = drawn(family, window=7, options={"do_sample": False})
    assert tokens.equal(plain)
    assert stats["mode"] == "greedy"


@pytest.mark.parametrize("refresh", ["independent", "maximal", "gumbel"])
@pytest.mark.parametrize("init", ["random", "uniform", "left", "above", "left_sample", "above_sample", "auto"])
def test_tokens_obey_the_grammar_whatever_is_guessed(refresh, init, tiny):
    family = tiny("emu3")
    tokens, _ = drawn(family, rows=3, window=11, refresh=refresh, init=init)
    grammar = family.grammar
    for position in range(grammar.length):
        forced = grammar.forced(position)
        expected = [forced] if forced >= 0 else range(grammar.allowed.start, grammar.allowed.stop)
        assert all(one in expected for one in tokens[:, position].tolist())


@pytest.mark.parametrize("window", [1, 5, 16, 64])
@pytest.mark.parametrize("name", ["chameleon", "emu3"])
def test_odd_grids_have_their_line_ends_and_end_tokens(name, window, tiny):
    family = tiny(name)
    ids, _ = family.prompt()
    if name == "emu3":
        grammar = sjd.ImageGrammar([(3, 5)], slice(10, 30), line_end=51, after=(52, 53, 2))
        options = {"image_grid": (3, 5)}
    else:
        grammar = sjd.ImageGrammar([(5, 3)], slice(4, 24), line_end=40, before=(41, 42, 43), after=(61,))
        options = {"sjd_grammar": grammar}
    config = sjd.SJDConfig(window=window)
    out = family.model.generate(ids, do_sample=True, top_k=0, max_new_tokens=grammar.length + 9,
                                custom_generate=sjd.decode, sjd_config=config, **options)  # fmt: skip
    out = out[:, ids.shape[1] :]
    assert out.shape[1] == grammar.length
    for position in range(grammar.length):
        forced = grammar.forced(position)
        column = out[:, position]
        assert (column == forced).all() if forced >= 0 else ((column >= grammar.allowed.start) & (column < 30)).all()


@pytest.mark.parametrize("name", ["chameleon", "emu3"])
def test_the_whole_head_and_a_slice_of_it_draw_the_same(name, tiny):
    family = tiny(name)
    (sliced, narrow), (whole, wide) = (
        drawn(family, window=5, seed=2, vocab_slice=which, **MATCH) for which in ("auto", "off")
    )
    assert sliced.equal(whole)
    columns = family.model.lm_head.weight.shape[0]
    assert narrow["probability_bytes"] * columns == wide["probability_bytes"] * sjd_models.CODES


def test_a_slice_of_a_head_has_its_bias_and_whoever_hooked_it_is_asked(rng):
    from sjd.adapters.base import Adapter

    head, hidden = torch.nn.Linear(6, 20), torch.randn(2, 3, 6, generator=rng)
    adapter = Adapter(SimpleNamespace(lm_head=head))
    torch.testing.assert_close(adapter.head(hidden, slice(4, 9)), head(hidden)[..., 4:9])
    hook = head.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(adapter.head(hidden, slice(4, 9)), head(hidden)[..., 4:9])
    hook.remove()
    plain = head.forward
    head.forward = lambda states: plain(states) + 1
    torch.testing.assert_close(adapter.head(hidden, slice(4, 9)), plain(hidden)[..., 4:9] + 1)


def test_image_tokens_with_gaps_are_a_mask(tiny):
    family = tiny("emu3")
    allowed = torch.zeros(60, dtype=torch.bool)
    allowed[[11, 14, 15, 29]] = True
    grammar = sjd.ImageGrammar([(3, 3)], allowed, line_end=51)
    ids, _ = family.prompt()
    for init in ("random", "uniform", "above_sample"):
        out = family.model.generate(ids, do_sample=True, top_k=0, max_new_tokens=12, custom_generate=sjd.decode,
                                    sjd_config=sjd.SJDConfig(window=4, init=init), sjd_grammar=grammar)  # fmt: skip
        rows = out[:, 5:].view(2, 3, 4)
        assert (rows[..., 3] == 51).all()
        assert torch.isin(rows[..., :3], allowed.nonzero()).all()


@pytest.mark.parametrize("refresh", ["independent", "maximal", "gumbel"])
@torch.no_grad()
def test_kernels_and_torch_take_the_same_decisions(refresh, tiny, monkeypatch):
    """The window that the kernels serve, run with their references: the same uniform numbers, the same tokens."""
    from sjd import engine

    family = tiny("emu3")
    for guidance in (None, 3.0):
        found = []
        for kernels in (False, True):
            monkeypatch.setattr(engine.Engine, "_use_kernels", lambda self, kernels=kernels: kernels)
            for init in ("auto", "uniform"):
                options = {"generator": torch.Generator().manual_seed(8), "temperature": 0.9, "top_k": 9}
                config = {"window": 6, "refresh": refresh, "init": init, "seed": 3, "prob_dtype": "float64"}
                found.append(drawn(family, guidance, rows=3, options=options, **config)[0])
        assert found[0].equal(found[2])
        assert found[1].equal(found[3])


@torch.no_grad()
def test_kernels_match_too(tiny, monkeypatch):
    from sjd import engine

    monkeypatch.setattr(engine.Engine, "_use_kernels", lambda self: True)
    family = tiny("chameleon")
    assert drawn(family, 2.0, window=6, seed=9, **MATCH)[0].equal(family.with_noise(9, guidance=2.0))


def test_a_dynamic_cache_draws_what_a_ragged_one_draws(tiny):
    family = tiny("janus")
    found = []
    for cache in ("ragged", "dynamic"):
        options = {"generator": torch.Generator().manual_seed(1)}
        found.append(drawn(family, 4.0, rows=1, options=options, window=6, cache=cache, prob_dtype="float64")[0])
    assert found[0].equal(found[1])


def test_rows_that_end_early_leave_the_batch_and_change_nothing(tiny):
    family = tiny("llama")
    plain = drawn(family, rows=7, window=4, seed=5, **MATCH)[0]
    # An end token that some rows meet much earlier than others.
    ids = plain[:, 3:8].flatten()
    end = int(ids.mode().values)
    with sjd.applied(family.model, sjd.SJDConfig(window=4, seed=5, **MATCH)) as handle:
        tokens = family.generate(rows=7, eos_token_id=end, pad_token_id=0)
        lengths = [image["tokens"] for image in handle.stats()["images"]]
    for row, length in enumerate(lengths):
        assert tokens[row, :length].equal(plain[row, :length])
        assert (tokens[row, length:] == 0).all()
        stop = (plain[row] == end).nonzero()
        assert length == (int(stop[0]) + 1 if len(stop) else plain.shape[1])
    assert min(lengths) < max(lengths)


@pytest.mark.parametrize("batch", ["joint", "sequential"])
@torch.no_grad()
def test_captions_of_different_length_stay_right_when_rows_leave_the_batch(batch, tiny, monkeypatch):
    from sjd.engine import Engine

    family, rows, shrink = tiny("llamagen_caption"), [], Engine._compact

    def seen(engine):
        shrink(engine)
        rows.append(len(engine.alive))

    monkeypatch.setattr(Engine, "_compact", seen)
    found, _ = drawn(family, 2.0, rows=7, window=4, seed=5, guidance_batch=batch, **MATCH)
    assert found.equal(family.with_noise(5, rows=7, guidance=2.0))
    assert rows
    assert rows[-1] < 4


def test_pictures_come_out_of_the_decoders(tiny):
    for name in ("emu3", "janus"):
        family = tiny(name, torch.float32)
        tokens, _ = drawn(family, window=5)
        picture = sjd.adapters.adapter_of(family.model).decode_image(tokens, family.grammar)
        assert picture.shape[:2] == (2, 3)
        assert picture.shape[2] == picture.shape[3]
        assert picture.min() >= 0
        assert picture.max() <= 1
    with pytest.raises(sjd.adapters.base.UnsupportedModelError, match="decoder"):
        sjd.adapters.adapter_of(tiny("chameleon").model).decode_image(tokens, family.grammar)


@torch.no_grad()
def test_images_in_the_prompt_take_the_place_of_their_placeholders(tiny):
    from sjd.adapters.base import Inputs

    family = tiny("chameleon", torch.float32)
    base = family.model.model
    pixels = torch.rand(1, 3, 8, 8)
    count = base.get_image_tokens(pixels).numel()
    ids = torch.cat((torch.tensor([[5]]), torch.full((1, count), 60), torch.tensor([[6]])), 1)
    adapter = sjd.adapters.adapter_of(family.model)
    mask = torch.ones_like(ids, dtype=torch.bool)
    embeds = adapter.embed_prompt(Inputs(ids, mask, {"pixel_values": pixels}))
    written = ids.masked_scatter(ids == 60, base.get_image_tokens(pixels).long())
    torch.testing.assert_close(embeds, adapter.embed(written, "prompt"))
    out = family.model.generate(ids, pixel_values=pixels, max_new_tokens=SIDE * SIDE, do_sample=True, top_k=0,
                                custom_generate=sjd.decode, sjd_config=sjd.SJDConfig(window=4))  # fmt: skip
    assert out.shape == (1, ids.shape[1] + 16)
