"""What applying cskv changes, that it can be taken back, and what is refused."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
from cskv import (
    AppliedTwiceError,
    CSKVCache,
    CSKVConfig,
    UnsupportedAttentionError,
    applied,
    apply,
    calibrate,
    fit,
)
from pared_hooks import AlreadyAppliedError, ConfigError, ConflictError, Patch, UnsupportedModelError
from transformers import DynamicCache, StaticCache

CONFIG = CSKVConfig(k_rank=8, v_rank=12, window=4, init="svd")


def snapshot(model):
    """Everything that removal has to bring back."""
    return {
        "keys": list(model.state_dict()),
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "config": model.config.to_json_string(),
        "attention": model.config._attn_implementation,
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "dicts": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            (len(module._forward_pre_hooks), len(module._forward_hooks), len(module._forward_pre_hooks_with_kwargs))
            for module in model.modules()
        ],
    }


def equal(one, other):
    same = all(torch.equal(one["tensors"][name], other["tensors"][name]) for name in one["keys"])
    return same and all(one[key] == other[key] for key in one if key != "tensors")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_removal_leaves_the_model_bit_identical(language_model, tokens, family):
    model, ids = language_model(family), tokens(2, 20)
    before, logits = snapshot(model), model(ids).logits
    handle = apply(model, CONFIG)
    assert list(model.state_dict()) == before["keys"]
    model.generate(ids, max_new_tokens=5, do_sample=False)
    handle.remove()
    handle.remove()
    assert equal(snapshot(model), before)
    assert torch.equal(model(ids).logits, logits)


def test_the_prompt_is_bit_identical_while_applied(language_model, tokens):
    model, ids = language_model(), tokens(2, 20)
    logits = model(ids).logits
    with applied(model, CONFIG):
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model(ids, use_cache=False).logits, logits)


def test_two_patches_come_off_in_any_order(language_model, tokens):
    model, ids = language_model(), tokens(1, 12)
    before, logits = snapshot(model), model(ids).logits
    other = Patch("other")
    handle = apply(model, CONFIG)
    with other:
        other.wrap_forward(model.model.layers[0].self_attn, lambda original, *args, **kwargs: original(*args, **kwargs))
    model.generate(ids, max_new_tokens=4, do_sample=False)
    handle.remove()
    other.remove()
    assert equal(snapshot(model), before)
    assert torch.equal(model(ids).logits, logits)


def test_an_error_while_applying_leaves_nothing_behind(language_model, monkeypatch):
    model = language_model()
    before = snapshot(model)
    # `cskv.apply` is the function; the module of that name is found among the loaded ones.
    monkeypatch.setattr(
        sys.modules["cskv.apply"], "_decoder_hook", lambda *_: (_ for _ in ()).throw(MemoryError("full"))
    )
    with pytest.raises(MemoryError):
        apply(model, CONFIG)
    assert equal(snapshot(model), before)


def test_factors_follow_the_model_to_another_dtype_and_are_not_saved(language_model, tokens, tmp_path):
    model, ids = language_model(), tokens(1, 12)
    with applied(model, CONFIG):
        model.to(torch.bfloat16)
        assert model.generate(ids, max_new_tokens=8, do_sample=False).shape == (1, 20)
        model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert set(saved.state_dict()) == set(model.state_dict())


def test_a_copy_of_a_patched_model_is_the_plain_one(language_model, tokens):
    model, ids = language_model(), tokens(1, 20)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    with applied(model, CONFIG):
        assert torch.equal(copy.deepcopy(model).generate(ids, max_new_tokens=12, do_sample=False), plain)


def test_a_second_apply_is_refused_and_leaves_the_first(language_model, tokens):
    model, ids = language_model(), tokens(1, 20)
    with applied(model, CONFIG):
        tokens_before = model.generate(ids, max_new_tokens=12, do_sample=False)
        for kind in (RuntimeError, AlreadyAppliedError, AppliedTwiceError):
            with pytest.raises(kind, match="cskv"):
                apply(model, CONFIG)
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), tokens_before)
    apply(model, CONFIG).remove()


def test_another_method_that_needs_the_cache_is_a_conflict(language_model):
    model = language_model()
    with Patch("other") as patch:
        patch.claim(model.model, "decoder.cache")
    with pytest.raises(ConflictError, match="cskv and other"):
        apply(model, CONFIG)


# Caches


def test_an_empty_dynamic_cache_becomes_ours_and_its_holder_sees_the_tokens(language_model, tokens):
    model, cache = language_model(), DynamicCache()
    with applied(model, CONFIG):
        model.generate(tokens(1, 9), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert isinstance(cache, CSKVCache)
    assert cache.get_seq_length() == 13


def test_a_cache_that_is_not_empty_is_left_alone_with_one_warning(language_model, tokens):
    model, ids = language_model(), tokens(1, 20)
    with torch.no_grad():
        expected = model(ids).logits[:, 10:]
        cache = model(ids[:, :10], use_cache=True).past_key_values
        with applied(model, CONFIG):
            with pytest.warns(UserWarning, match="DynamicCache"):
                first = model(ids[:, 10:11], past_key_values=cache).logits
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                rest = model(ids[:, 11:], past_key_values=cache).logits
    assert type(cache) is DynamicCache
    assert torch.allclose(torch.cat((first, rest), 1), expected, atol=1e-4)


def test_static_caches_are_refused_with_the_remedy(language_model, tokens):
    model, ids = language_model(), tokens(1, 9)
    with applied(model, CONFIG):
        with pytest.raises(ConfigError, match=r"StaticCache.*cache_implementation"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
        with pytest.raises(ValueError, match="StaticCache"):
            model.generate(ids, cache_implementation="static", max_new_tokens=3)


def test_a_cache_whose_handle_was_removed_raises(language_model, tokens):
    model, ids = language_model(), tokens(1, 9)
    handle = apply(model, CONFIG)
    cache = handle.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        handle.remove()
        with pytest.raises(RuntimeError, match="removed"):
            model(ids[:, :1], past_key_values=cache)
    with pytest.raises(RuntimeError, match="removed"):
        handle.new_cache()


def test_a_cache_of_another_model_is_refused(language_model, tokens):
    one, other, ids = language_model(), language_model(), tokens(1, 9)
    with applied(one, CONFIG) as handle, applied(other, CONFIG), pytest.raises(ConfigError, match="another model"):
        other(ids, past_key_values=handle.new_cache())


def test_a_cache_in_a_model_without_hooks_raises(language_model, tokens):
    one, other, ids = language_model(), language_model(), tokens(1, 9)
    with applied(one, CONFIG) as handle, pytest.raises(RuntimeError, match="without the inputs"):
        other(ids, past_key_values=handle.new_cache())


def test_a_prompt_padded_on_the_right_is_refused_when_decoding_begins(language_model, tokens):
    model, ids = language_model(), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 7:] = 0
    with applied(model, CONFIG), torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True)
        longer = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), 1)
        with pytest.raises(ConfigError, match=r"rows \[1\].*left"):
            model(ids[:, :1], attention_mask=longer, past_key_values=out.past_key_values)


def test_attention_that_takes_no_such_mask_is_refused_when_it_would_matter(language_model):
    model = language_model(attn_implementation="flex_attention")
    with applied(model, CONFIG) as handle:
        layer = handle.new_cache().layers[0]
        layer._key_branches.store.length = 20
        x = torch.zeros(1, 5, 64)
        with pytest.raises(UnsupportedAttentionError, match="flex_attention"):
            layer.stage(x, x, x, None, "flex_attention")


# Statistics of a handle


def test_stats_tell_what_the_latest_cache_holds_until_reset(language_model, tokens):
    model = language_model()
    with applied(model, CONFIG) as handle:
        assert handle.stats()["ratio"] is None
        model.generate(tokens(2, 100), max_new_tokens=5, do_sample=False)
        stats = handle.stats()
        assert stats["tokens"] == 104
        assert stats["batch"] == 2
        assert stats["layers"] == {0: {"k": 8, "v": 12}, 1: {"k": 8, "v": 12}}
        assert stats["backend"] == "cpu"
        # 20 of 64 channels, a short tail, half of cos and sin.
        assert 20 / 64 < stats["ratio"] < 0.6
        handle.reset()
        assert handle.stats()["tokens"] == 0


def test_a_rank_of_full_width_is_stored_exactly_and_said_to_be(language_model):
    with applied(language_model(), CSKVConfig(k_rank=32, v_rank=8, init="svd")) as handle:
        assert handle.stats()["layers"][0] == {"k": "exact", "v": 8}


# Refusals


@pytest.mark.parametrize("name", ["T5", "GPT2"])
def test_an_unknown_model_is_refused_by_name(name):
    import transformers

    options = {
        "T5": {"d_model": 16, "num_layers": 1, "d_ff": 16, "num_heads": 2, "vocab_size": 32},
        "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32},
    }[name]
    kind = "T5ForConditionalGeneration" if name == "T5" else "GPT2LMHeadModel"
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**options))
    for error in (NotImplementedError, UnsupportedModelError):
        with pytest.raises(error, match=name):
            apply(model, CONFIG)


def test_a_model_of_sliding_windows_alone_has_nothing_to_compress(language_model):
    with pytest.raises(ConfigError, match=r"no layer of full attention.*sliding_attention"):
        apply(language_model("mistral", sliding_window=8), CONFIG)


def test_layers_are_checked_by_number_and_type(language_model):
    with pytest.raises(ConfigError, match=r"2 layers"):
        apply(language_model(), CONFIG.replace(layers=(0, 7)))
    with pytest.raises(ConfigError, match=r"layer 0 is of type 'sliding_attention'"):
        apply(language_model("gemma3"), CONFIG.replace(layers=(0,)))


def test_a_value_group_must_divide_the_rank(language_model):
    with pytest.raises(ConfigError, match="v_group = 5"):
        apply(language_model(), CONFIG.replace(v_bits=4, v_group=5))
    with pytest.raises(ConfigError, match="v_group = None"):
        apply(language_model(), CONFIG.replace(v_bits=4, v_rank=7))


def test_factors_are_checked_before_any_hook_is_set(language_model, tokens):
    model = language_model()
    before = snapshot(model)
    factors = fit(model, CONFIG)
    with pytest.raises(ConfigError, match=r"A_K of layer 0 is \(8, 64\); \(6, 64\)"):
        apply(model, CONFIG.replace(k_rank=6), factors)
    with pytest.raises(ConfigError, match="calibrate"):
        apply(model, CSKVConfig(k_rank=8, v_rank=8))
    with pytest.raises(ConfigError, match="CSKVConfig"):
        apply(model, {"k_rank": 8})
    assert equal(snapshot(model), before)


def test_the_triton_backend_says_what_it_needs(language_model):
    with pytest.raises(RuntimeError, match="CUDA"):
        apply(language_model(), CONFIG.replace(backend="triton"))


def test_factors_may_come_as_a_list_of_four_matrices_a_layer(language_model, tokens):
    model, ids = language_model(), tokens(1, 20)
    factors = fit(model, CONFIG.replace(init="whiten"), calibrate(model, [tokens(2, 40)]))
    rows = [(layer.a_k, layer.b_k, layer.a_v, layer.b_v) for layer in factors.layers.values()]
    outputs = []
    for given in (factors, rows):
        with applied(model, CONFIG, given):
            outputs.append(model.generate(ids, max_new_tokens=12, do_sample=False))
    assert torch.equal(*outputs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_compiled_model_gives_the_same(language_model, tokens, backend):
    model, ids = language_model(), tokens(1, 12)
    with applied(model, CONFIG.replace(backend=backend)), torch.no_grad():
        expected = model(ids[:, :1], past_key_values=model(ids, use_cache=True).past_key_values).logits
        compiled = torch.compile(lambda x, cache: model(x, past_key_values=cache).logits, backend="eager")
        cache = model(ids, use_cache=True).past_key_values
        assert torch.allclose(compiled(ids[:, :1], cache), expected, atol=1e-5)


@pytest.mark.slow
def test_the_torch_backend_breaks_a_compiled_graph_only_where_the_cache_is_read(language_model, tokens):
    model, ids = language_model(), tokens(1, 12)
    with applied(model, CONFIG.replace(backend="torch")), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        explained = torch._dynamo.explain(lambda x: model(x, past_key_values=cache).logits)(ids[:, :1])
    assert all("CSKVLayer.update" in one.reason or "hook" in one.reason for one in explained.break_reasons)
