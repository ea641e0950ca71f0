"""The LlamaGen transformer computes what its equations say, whole, in pieces and behind a guided sampler."""

from __future__ import annotations

import pytest
import torch
from pared_zoo.llamagen import GrowingCache, LlamaGenTransformer, draw_tokens, from_original, guided, to_original
from pared_zoo.recipes.attention import plain_attention
from torch.nn.functional import silu, softmax
from transformers.cache_utils import DynamicCache

TINY = {
    "vocab_size": 24,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "grid_size": 4,
    "multiple_of": 16,
}
CAPTION = {"condition": "caption", "caption_channels": 12, "caption_length": 6}


def build(**options) -> LlamaGenTransformer:
    torch.manual_seed(11)
    model = LlamaGenTransformer(**TINY, num_classes=5, initializer_range=0.2, **options).eval()
    torch.nn.init.normal_(model.output.weight, std=0.2)
    return model


@pytest.fixture(params=["class", "padded caption", "caption", "padded caption with keys"])
def case(request):
    """(model, condition, condition_mask, tokens of three whole pictures)."""
    tokens = torch.randint(0, 24, (3, 16), generator=torch.Generator().manual_seed(5))
    if request.param == "class":
        return build(), torch.tensor([0, 4, 5]), None, tokens
    features = torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(6))
    mask = torch.arange(6) >= torch.tensor([[3], [0], [5]]) if "padded" in request.param else None
    return build(**CAPTION, prefix_keys="keys" in request.param), features, mask, tokens


def by_hand(model, condition, condition_mask, tokens):
    """Logits of one row in float64, token by token, straight from the equations."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    if model.prefix_length == 1:
        prefix = state["cls_embedding.embedding_table.weight"][condition][None]
    else:
        prefix = torch.nn.functional.gelu(
            condition.double() @ state["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh"
        )
        prefix = prefix @ state["cls_embedding.cap_proj.fc2.weight"].T
    x, t = torch.cat([prefix, state["tok_embeddings.weight"][tokens]]), model.prefix_length
    frequencies = torch.tensor([10000.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    turns = torch.full((len(x), 8), float(model.config["prefix_keys"]), dtype=torch.complex128)
    for slot in range(t, len(x)):
        row, column = divmod(slot - t, 4)
        angles = torch.cat([row * frequencies, column * frequencies])
        turns[slot] = torch.polar(torch.ones_like(angles), angles)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turned(y, slot):
        return torch.view_as_real(torch.view_as_complex(y.reshape(8, 2).contiguous()) * turns[slot]).flatten()

    for layer in range(2):
        w = {k.removeprefix(f"layers.{layer}."): v for k, v in state.items() if k.startswith(f"layers.{layer}.")}
        q, k, v = (norm(x, w["attention_norm.weight"]) @ w["attention.wqkv.weight"].T).split(32, dim=-1)
        out = torch.zeros_like(x)
        for head in range(2):
            part = slice(16 * head, 16 * head + 16)
            for slot in range(len(x)):
                seen = [
                    s for s in range(slot + 1) if s >= t or s == slot or condition_mask is None or condition_mask[s]
                ]
                scores = torch.stack([turned(q[slot, part], slot) @ turned(k[s, part], s) for s in seen]) / 4
                out[slot, part] = softmax(scores, 0) @ v[seen, part]
        x = x + out @ w["attention.wo.weight"].T
        n = norm(x, w["ffn_norm.weight"])
        gate = silu(n @ w["feed_forward.w1.weight"].T) * (n @ w["feed_forward.w3.weight"].T)
        x = x + gate @ w["feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"])[t - 1 :] @ state["output.weight"].T


def test_logits_are_those_of_the_equations(case):
    model, condition, mask, tokens = case
    logits = model(tokens[:, :9], condition, mask)
    assert logits.shape == (3, 10, 24)
    assert logits.dtype == torch.float32
    for row in range(3):
        expected = by_hand(model, condition[row], None if mask is None else mask[row], tokens[row, :9])
        torch.testing.assert_close(logits[row].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new_cache", [DynamicCache, lambda: GrowingCache(2, 40)])
def test_pieces_give_the_logits_of_the_whole(case, new_cache):
    model, condition, mask, tokens = case
    cache, whole = new_cache(), model(tokens, condition, mask)
    pieces = [model.prefill(condition, cache, mask)[:, None]]
    done = 0
    for size in (1, 1, 5, 2, 7):
        first = model.prefix_length + done
        seen = None if mask is None else model.attention_mask(mask, size, first)
        positions = torch.arange(first, first + size)
        pieces.append(model.step(tokens[:, done : done + size], cache, positions, seen))
        done += size
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_positions_may_differ_between_rows():
    model, tokens = build(), torch.tensor([[3, 4], [5, 6]])
    inputs = torch.cat([model.embed_condition(torch.tensor([1, 2])), model.embed_tokens(tokens)], dim=1)
    positions = torch.tensor([[0, 3, 9], [0, 1, 2]])
    both = model.trunk(inputs, positions)
    alone = [model.trunk(inputs[i : i + 1], positions[i]) for i in (0, 1)]
    torch.testing.assert_close(both, torch.cat(alone))
    assert not torch.allclose(both[0], model.trunk(inputs[:1], positions[1])[0])


def test_what_stands_at_padding_changes_nothing():
    model, features = build(**CAPTION), torch.randn(2, 6, 12)
    mask = torch.arange(6) >= torch.tensor([[2], [4]])
    tokens = torch.zeros(2, 5, dtype=torch.long)
    logits = model(tokens, features, mask)
    other = torch.where(mask[..., None], features, torch.randn(2, 6, 12))
    assert torch.equal(model(tokens, other, mask), logits)
    assert not torch.allclose(model(tokens, other), logits)


def test_queries_and_keys_of_the_prefix_vanish():
    model = build(**CAPTION)
    cosine, sine = model.rotation(torch.arange(22))
    assert not cosine[:, :6].any()
    assert not sine[:, :6].any()
    torch.testing.assert_close(
        cosine.square() + sine.square(), (torch.arange(22) >= 6).float()[None, :, None].expand(1, 22, 8)
    )


def test_a_plain_attention_may_take_the_place_of_the_fused_one(case):
    model, condition, mask, tokens = case
    fused = model(tokens, condition, mask)
    for layer in model.layers:
        layer.attention.attend = plain_attention
    torch.testing.assert_close(model(tokens, condition, mask), fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_generate_draws_from_guided_logits_of_the_drawn_prefix(case, scale):
    model, condition, mask, _ = case
    drawn = model.generate(
        condition,
        mask,
        guidance_scale=scale,
        temperature=0.7,
        top_k=9,
        top_p=0.9,
        generator=torch.Generator().manual_seed(2),
    )
    generator, tokens = torch.Generator().manual_seed(2), torch.zeros(3, 0, dtype=torch.long)
    with torch.no_grad():
        for _ in range(16):
            conditional = model(tokens, condition, mask)[:, -1]
            null = model(tokens, model.null_condition(condition), mask)[:, -1]
            logits = guided(torch.cat([conditional, null]), scale)
            new = draw_tokens(logits, temperature=0.7, top_k=9, top_p=0.9, generator=generator)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
    assert torch.equal(drawn, tokens)


def test_nulls_are_the_label_after_the_last_and_the_learnt_caption():
    assert build().null_condition(torch.tensor([0, 3])).tolist() == [5, 5]
    model = build(**CAPTION)
    null = model.null_condition(torch.randn(3, 6, 12))
    assert torch.equal(null[1], model.cls_embedding.uncond_embedding)
    null.sum().backward()
    assert model.cls_embedding.uncond_embedding.grad.eq(3).all()


def test_draws_follow_temperature_top_k_and_top_p():
    probabilities = torch.tensor([0.4, 0.2, 0.2, 0.15, 0.05])
    logits = probabilities.log().expand(20_000, -1)

    def shares(**settings):
        drawn = draw_tokens(logits, generator=torch.Generator().manual_seed(7), **settings)
        return torch.bincount(drawn, minlength=5) / len(drawn)

    def close(found, expected):
        expected = torch.tensor(expected) / sum(expected)
        # Four standard deviations of a share of 20,000 draws.
        assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 20_000).sqrt()).all()

    close(shares(), [0.4, 0.2, 0.2, 0.15, 0.05])
    close(shares(temperature=0.5), [0.16, 0.04, 0.04, 0.0225, 0.0025])
    # The second largest is there twice: a tie with the k-th is kept.
    close(shares(top_k=2), [0.4, 0.2, 0.2, 0.0, 0.0])
    close(shares(top_p=0.7), [0.4, 0.2, 0.2, 0.0, 0.0])
    close(shares(top_p=0.01), [1.0, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
    ],
)
def test_settings_without_a_distribution_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build().generate(torch.tensor([0]), **settings)


def test_wrong_models_and_conditions_are_refused():
    with pytest.raises(ValueError, match="condition='text' must be one of"):
        build(condition="text")
    with pytest.raises(ValueError, match="hidden_size=36 must be a multiple of 4"):
        LlamaGenTransformer(hidden_size=36, num_attention_heads=2)
    with pytest.raises(ValueError, match="holds labels 0 to 6; valid are 0 to 5"):
        build()(torch.zeros(2, 1, dtype=torch.long), torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"must be labels of shape \(rows,\)"):
        build()(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must be text features of shape \(rows, 6, 12\)"):
        build(**CAPTION)(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 5, 12))


def test_a_full_cache_is_refused():
    model, cache = build(), GrowingCache(2, 2)
    model.prefill(torch.tensor([1]), cache)
    with pytest.raises(ValueError, match="key_states has 2 tokens; 1 of 2 are free"):
        model.step(torch.tensor([[1, 2]]), cache, torch.tensor([1, 2]))


#: Parameters of the published models of classes, in millions, and of the one of captions.
SIZES = {"B": (12, 12, 768, 111), "L": (24, 16, 1024, 343), "XL": (36, 20, 1280, 775), "3B": (24, 32, 3200, 3096)}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_the_published_numbers_of_parameters(size):
    layers, heads, width, millions = SIZES[size]
    with torch.device("meta"):
        model = LlamaGenTransformer(num_layers=layers, num_attention_heads=heads, hidden_size=width)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(millions, rel=5e-3)


OFFICIAL = {
    "tok_embeddings.weight", "norm.weight", "output.weight",
    *(f"layers.{i}.{name}.weight" for i in (0, 1) for name in (
        "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
        "attention_norm", "ffn_norm",
    )),
}  # fmt: skip


def test_weights_have_the_official_names():
    assert set(build().state_dict()) == OFFICIAL | {"cls_embedding.embedding_table.weight"}
    caption = {"cap_proj.fc1.weight", "cap_proj.fc2.weight", "uncond_embedding"}
    assert set(build(**CAPTION).state_dict()) == OFFICIAL | {f"cls_embedding.{name}" for name in caption}


@pytest.mark.parametrize("case", ["class", "padded caption"], indirect=True)
@pytest.mark.parametrize("shell", ["model", "module", "state_dict", None])
def test_official_checkpoints_are_read(case, shell, tmp_path):
    model, condition, mask, tokens = case
    state = to_original(model)["model"] | {"freqs_cis": torch.zeros(3)}
    torch.save(state if shell is None else {shell: state, "steps": 4}, tmp_path / "model.pt")
    read = from_original(tmp_path / "model.pt", num_attention_heads=2, grid_size=4)
    assert torch.equal(read(tokens, condition, mask), model(tokens, condition, mask))


def test_other_checkpoints_are_refused():
    with pytest.raises(ValueError, match="prefix_keys=True"):
        to_original(build(**CAPTION, prefix_keys=True))
    state = to_original(build())["model"]
    with pytest.raises(ValueError, match="num_attention_heads must be given for 2 layers of width 32"):
        from_original({"model": state})
    changed = {k: v for k, v in state.items() if k != "norm.weight"} | {"extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"lacks \['norm.weight'\] and has \['extra'\]"):
        from_original(changed, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"no 'tok_embeddings\.weight'"):
        from_original({"weight": torch.zeros(1)})
