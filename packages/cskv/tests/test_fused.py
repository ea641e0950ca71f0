"""Fused decoding gives what decoding through torch gives; on the CPU its operators run as plain references."""

from __future__ import annotations

import copy

import pared_kernels
import pytest
import torch
from cskv import CSKVConfig, applied, apply, fused
from cskv.backend import resolve_backend
from cskv.functional import decode_attention
from cskv.plan import plan_layers
from pared_hooks import Patch
from pared_kernels import cskv_decode

LOSSY = CSKVConfig(k_rank=8, v_rank=12, window=4, init="svd", backend="triton")
INT4 = LOSSY.replace(k_bits=4, v_bits=4, quant_group=8, window=8)
FAMILIES = {
    "llama": {"head_dim": 64},
    "qwen2": {"head_dim": 64},
    "mistral": {"head_dim": 64},
    "smollm3": {"head_dim": 64},
    "granite": {"head_dim": 64},
    "phi3": {"hidden_size": 256, "partial_rotary_factor": 0.5},
}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The path of a GPU, on the CPU: `apply` chooses it, and the operators run without their kernels."""
    monkeypatch.setattr("cskv.backend.missing_device", lambda model: None)


@pytest.fixture
def calls(monkeypatch):
    """How often the fused attention ran."""
    seen = []
    original = fused.attend
    monkeypatch.setattr(fused, "attend", lambda *given: seen.append(1) or original(*given))
    return seen


@pytest.fixture
def model_of(language_model):
    return lambda family="llama", **options: language_model(family, **{**FAMILIES.get(family, {}), **options})


def left_padded(tokens, *lengths):
    width = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(tokens(1, one), (width - one, 0)) for one in lengths])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def generate(model, config, inputs, steps=20):
    with applied(model, config) as handle, torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=steps, do_sample=False)
        return found, handle.stats()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [LOSSY, INT4], ids=["16 bits", "4 bits"])
def test_left_padded_batches_get_the_tokens_of_the_torch_backend(model_of, tokens, calls, family, config):
    model, inputs = model_of(family), left_padded(tokens, 9, 21, 30)
    expected, _ = generate(model, config.replace(backend="torch"), inputs)
    assert not calls
    found, stats = generate(model, config, inputs)
    assert torch.equal(found, expected)
    assert stats["backend"] == "triton"
    assert len(calls) == 2 * 19


@pytest.mark.parametrize("config", [LOSSY, INT4], ids=["16 bits", "4 bits"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_block_windows_get_the_tokens_of_the_torch_backend(model_of, tokens, calls, config, implementation):
    model, inputs = model_of(attn_implementation=implementation), left_padded(tokens, 24, 13)
    block = config.replace(window=8, window_policy="block", zero_point="clamped")
    expected, _ = generate(model, block.replace(backend="torch"), inputs)
    assert torch.equal(generate(model, block, inputs)[0], expected)
    assert calls


def decode(model, ids, prompt, chunks=()):
    """Logits of a prompt, of chunks that end at these places, and of single tokens behind them."""
    ends = [prompt, *chunks]
    ends += range(ends[-1] + 1, ids.shape[1] + 1)
    cache, begin, logits = None, 0, []
    with torch.no_grad():
        for end in ends:
            out = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache, begin = out.past_key_values, end
            logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("config", [LOSSY, INT4, LOSSY.replace(window=0), LOSSY.replace(window=100)])
def test_logits_equal_those_of_the_torch_backend(model_of, tokens, calls, config):
    model, ids = model_of(), tokens(2, 60)
    with applied(model, config.replace(backend="torch")):
        expected, _ = decode(model, ids, 17)
    with applied(model, config):
        logits, _ = decode(model, ids, 17)
    assert len(calls) == 2 * 43
    assert float((logits - expected).abs().max()) < (1e-4 if config.k_bits is None else 1e-2)


@pytest.mark.parametrize("config", [LOSSY, INT4], ids=["16 bits", "4 bits"])
def test_turns_and_chunks_mix_with_single_tokens(model_of, tokens, config):
    model, ids = model_of(), tokens(2, 60)
    for chunks in ((19,), (18, 30, 31, 45)):
        with applied(model, config.replace(backend="torch")):
            expected, _ = decode(model, ids, 17, chunks)
        with applied(model, config):
            logits, _ = decode(model, ids, 17, chunks)
        assert float((logits - expected).abs().max()) < (1e-4 if config.k_bits is None else 1e-2)


@pytest.mark.parametrize("config", [LOSSY, INT4], ids=["16 bits", "4 bits"])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_cropped_tokens_can_be_decoded_again(model_of, tokens, config, count):
    model, ids = model_of(), tokens(1, 70)
    logits = {}
    for backend in ("torch", "triton"):
        with applied(model, config.replace(backend=backend)), torch.no_grad():
            _, cache = decode(model, ids[:, :60], 17)
            cache.crop(-count)
            steps = range(60 - count, 66 - count)
            logits[backend] = torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in steps], 1)
    assert float((logits["torch"] - logits["triton"]).abs().max()) < (1e-4 if config.k_bits is None else 1e-2)


def test_assisted_decoding_and_beams_get_the_tokens_of_the_torch_backend(model_of, tokens, calls):
    model, assistant, ids = model_of(), model_of(num_hidden_layers=1), tokens(1, 30)
    for options in ({"assistant_model": assistant}, {"num_beams": 3}):
        found = []
        for backend in ("torch", "triton"):
            with applied(model, LOSSY.replace(backend=backend)):
                found.append(model.generate(ids, max_new_tokens=16, do_sample=False, **options))
        assert torch.equal(*found)
    assert calls


def test_a_layer_without_a_factor_goes_on_through_torch(model_of, tokens, calls):
    model, ids = model_of(), tokens(1, 40)
    config = LOSSY.replace(k_rank=(8, 1000))
    with applied(model, config.replace(backend="torch")):
        expected, _ = decode(model, ids, 13)
    with applied(model, config):
        logits, _ = decode(model, ids, 13)
    assert len(calls) == 27
    assert float((logits - expected).abs().max()) < 1e-4


def test_a_mask_with_holes_is_attended_as_it_says(model_of, tokens, calls):
    model, ids = model_of(), tokens(1, 30)
    mask = torch.ones(1, 31, dtype=torch.int64)
    mask[:, 7:11] = 0
    logits = []
    for backend in ("torch", "triton"):
        with applied(model, LOSSY.replace(backend=backend)), torch.no_grad():
            cache = model(ids, attention_mask=mask[:, :30], use_cache=True).past_key_values
            logits.append(model(ids[:, :1], attention_mask=mask, past_key_values=cache).logits)
    assert not calls
    assert torch.allclose(*logits, atol=1e-5)


def test_another_attention_set_meanwhile_reads_all_columns(model_of, tokens, calls):
    model, ids = model_of(), tokens(1, 30)
    with applied(model, LOSSY.replace(backend="torch")):
        expected, _ = decode(model, ids, 13)
    with applied(model, LOSSY):
        model.set_attn_implementation("eager")
        logits, _ = decode(model, ids, 13)
    assert not calls
    assert float((logits - expected).abs().max()) < 1e-4
    model.set_attn_implementation("sdpa")


def test_a_query_that_needs_a_gradient_gets_one(model_of, tokens, calls):
    model, ids = model_of(), tokens(1, 30)
    with applied(model, LOSSY):
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache).logits.sum().backward()
    assert not calls
    assert float(model.model.layers[0].self_attn.q_proj.weight.grad.abs().max()) > 0


def test_batch_rows_and_copies_of_a_cache_stay_right(model_of, tokens):
    model, ids = model_of(), tokens(3, 30)
    with applied(model, INT4), torch.no_grad():
        expected, _ = decode(model, ids, 13)
        _, cache = decode(model, ids[:, :25], 13)
        twin = copy.deepcopy(cache)
        model(tokens(3, 1), past_key_values=twin)
        cache.batch_select_indices(torch.tensor([2, 0]))
        logits = model(ids[[2, 0], 25:26], past_key_values=cache).logits
    assert float((logits - expected[[2, 0], 25:26]).abs().max()) < 1e-4


def test_removal_brings_the_attention_implementation_back(model_of, tokens):
    model, ids = model_of(), tokens(1, 12)
    before = model(ids).logits
    handle = apply(model, LOSSY)
    assert model.config._attn_implementation != "sdpa"
    assert torch.equal(model(ids).logits, before)
    assert copy.deepcopy(model).config._attn_implementation == "sdpa"
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)


def test_a_step_copies_no_old_token_unless_room_is_used_up(model_of, tokens):
    model, ids = model_of(), tokens(1, 200)
    with applied(model, LOSSY), torch.no_grad():
        _, cache = decode(model, ids[:, :100], 99)
        keys = cache.layers[0].sides[0]
        stores, copies = (keys.store.raw, keys.tail), [0, 0]
        for place in range(100, 200):
            before = [store.data.data_ptr() for store in stores]
            model(ids[:, place : place + 1], past_key_values=cache)
            copies = [n + (store.data.data_ptr() != old) for n, store, old in zip(copies, stores, before, strict=True)]
    # A sixteenth of 100 rows or more at a time; eight rows of the window.
    assert copies[0] <= 14
    assert copies[1] <= 13


@pytest.mark.parametrize("config", [LOSSY, INT4], ids=["16 bits", "4 bits"])
def test_the_kernels_themselves_give_the_tokens_in_the_interpreter(model_of, tokens, calls, config):
    pytest.importorskip("triton")
    model, inputs = model_of("qwen2", num_hidden_layers=1), left_padded(tokens, 13, 20)
    expected, _ = generate(model, config.replace(backend="torch"), inputs, 6)
    with pared_kernels.use("triton"):
        found, _ = generate(model, config, inputs, 6)
    assert torch.equal(found, expected)
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("qwen3", {"head_dim": 64}, "norm"),
        ("gpt-oss", {"head_dim": 64}, "sinks"),
        ("gemma2", {"head_dim": 64}, "cap"),
    ],
)
def test_what_the_kernels_cannot_do_is_said_and_auto_takes_torch(language_model, family, options, reason):
    model = language_model(family, **options)
    with pytest.raises(RuntimeError, match=reason):
        apply(model, LOSSY)
    with applied(model, LOSSY.replace(backend="auto")) as handle:
        assert handle.backend == "torch"


def test_another_pairing_of_channels_is_found_by_asking_the_model_file(model_of):
    model = model_of()
    view, plans = plan_layers(model, LOSSY)
    assert resolve_backend(LOSSY, view, plans) == "triton"

    def interleaved(q, k, cos, sin):
        pairs = torch.stack((-k[..., 1::2], k[..., ::2]), -1).flatten(-2)
        return q, k * cos[:, None] + pairs * sin[:, None]

    object.__setattr__(plans[0].adapter, "rope", interleaved)
    with pytest.raises(RuntimeError, match="halves"):
        resolve_backend(LOSSY, view, plans)


def test_auto_takes_the_kernels_where_they_run_and_their_operators_on_a_cpu(model_of, tokens, calls, monkeypatch):
    with applied(model_of(), LOSSY.replace(backend="auto")) as handle:
        assert handle.backend == "triton"
    monkeypatch.undo()
    model = model_of()
    with applied(model, LOSSY.replace(backend="auto")) as handle:
        assert handle.backend == "cpu"
        found = fused.attend
        monkeypatch.setattr(fused, "attend", lambda *given: calls.append(1) or found(*given))
        model.generate(tokens(1, 12), max_new_tokens=3, do_sample=False)
    assert len(calls) == 2 * len(model.model.layers)


def test_kernels_take_heads_of_some_sizes_and_the_operators_of_a_cpu_all(language_model):
    model = language_model("llama", head_dim=32)
    with pytest.raises(RuntimeError, match="64, 128 or 256"):
        apply(model, LOSSY)
    with applied(model, LOSSY.replace(backend="auto")) as handle:
        assert handle.backend == "cpu"


def test_two_patches_of_attention_come_off_in_any_order(model_of, tokens):
    model, ids = model_of(), tokens(1, 12)
    before = model(ids).logits
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    other = Patch("other")
    handle = apply(model, LOSSY)
    with other:
        other.set_attention(model, "other", sdpa_attention_forward, sdpa_mask)
    handle.remove()
    assert torch.equal(model(ids).logits, before)
    other.remove()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("start", [False, True])
def test_the_operator_means_what_the_functional_core_says(randn, start):
    batch, heads, group, dim, old, recent = 2, 2, 3, 64, 37, 5
    angles = randn(batch, old, dim // 2)
    q, c_k, c_v = randn(batch, heads * group, 1, dim), randn(batch, old, 20), randn(batch, old, 24)
    given = (q, c_k, c_v, randn(heads * dim, 20), randn(heads * dim, 24))
    tails = randn(batch, heads, recent, dim), randn(batch, heads, recent, dim)
    options = {"scale": 0.125, "bias_k": randn(heads * dim), "bias_v": randn(heads * dim)}
    if start:
        options["start"] = torch.tensor([3, 40])
    found = cskv_decode(*given, *tails, angles.cos(), angles.sin(), **options)
    whole = torch.cat((angles, angles), -1)
    expected = decode_attention(*given, *tails, whole.cos(), whole.sin(), **options)
    assert torch.allclose(found, expected, atol=1e-4)
