"""Methods of different packages on one model: they meet through the model alone."""

from __future__ import annotations

import cskv
import mbq
import pytest
import torch

IDS = torch.tensor([[5, 9, 33, 12, 7, 40, 21, 8]])
WIDTH = 32


@pytest.fixture
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def answered(model):
    return model.generate(IDS, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)


@pytest.mark.parametrize("options", [{"group_size": 32}, {"w_bits": 4, "a_bits": 8}], ids=["W3A16", "W4A8"])
def test_a_quantised_model_compresses_its_cache(model, options):
    plain, state = model(IDS).logits, {name: value.clone() for name, value in model.state_dict().items()}
    quantised = mbq.apply(model, mbq.MBQConfig(method="rtn", **options), [])
    alone = answered(model)
    packed = {name: value.clone() for name, value in model.state_dict().items()}
    # Of full rank the factors of the packed projections are exact, so that the answer is that of the quantised model.
    with cskv.applied(model, cskv.CSKVConfig(k_rank=WIDTH, v_rank=WIDTH, window=2, init="svd")):
        both = answered(model)
    assert both.sequences.equal(alone.sequences)
    torch.testing.assert_close(torch.stack(both.logits), torch.stack(alone.logits), rtol=2e-2, atol=2e-2)
    with cskv.applied(model, cskv.CSKVConfig(k_rank=8, v_rank=8, window=2, init="svd")):
        assert not torch.stack(answered(model).logits).equal(torch.stack(alone.logits))
    assert all(value.equal(packed[name]) for name, value in model.state_dict().items())
    quantised.remove()
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert model(IDS).logits.equal(plain)


def test_factors_of_the_plain_model_do_not_fit_the_quantised_one(model):
    config = cskv.CSKVConfig(k_rank=8, v_rank=8, window=2, init="svd")
    factors = cskv.fit(model, config)
    mbq.apply(model, mbq.MBQConfig(method="rtn", group_size=32), [])
    with pytest.raises(ValueError, match="fingerprint"):
        cskv.apply(model, config, factors)
