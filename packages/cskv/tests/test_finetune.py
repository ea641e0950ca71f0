"""Layer-wise regression: its loss, what it can improve, and that it can be interrupted."""

from __future__ import annotations

import pytest
import torch
from cskv import CSKVConfig, calibrate, finetune, fit
from cskv import functional as F
from cskv.adapters import adapters_of
from cskv.capture import reading, run_batch
from cskv.finetune import LayerRegression
from cskv.plan import plan_layers
from pared_hooks import ConfigError

QUANTISED = CSKVConfig(k_rank=8, v_rank=12, k_bits=2, v_bits=2, quant_group=8, zero_point="clamped")


def losses(model, config, factors, batch):
    """Loss of keys and values of every layer."""
    view, plans = plan_layers(model, config)
    layers = {plan.index: LayerRegression(plan, factors[plan.index], 1e-3, None) for plan in plans}
    found = {}

    def read(adapter, x, cos, sin):
        found[adapter.index] = {side: float(loss) for side, loss in layers[adapter.index].losses(x, cos, sin).items()}

    with reading([plan.adapter for plan in plans], read), torch.no_grad():
        run_batch(view, batch)
    return found


@pytest.mark.parametrize("config", [CSKVConfig(k_rank=8, v_rank=12, init="svd"), QUANTISED.replace(init="svd")])
def test_the_loss_is_that_of_function_nine(language_model, tokens, config):
    model, ids = language_model(), tokens(2, 32)
    factors = fit(model, config)
    expected = {}

    def read(adapter, x, cos, sin):
        layer, ((w_k, _), (w_v, _)) = factors[adapter.index], adapter.maps()
        pair = F.reconstruction_loss(
            x, w_k, w_v, layer.a_k, layer.b_k, layer.a_v, layer.b_v,
            cos=cos, sin=sin, num_kv_heads=2, k_bits=config.k_bits, v_bits=config.v_bits,
            group_size=config.quant_group, zero_point=config.zero_point,
        )  # fmt: skip
        expected[adapter.index] = {"k": float(pair[0]), "v": float(pair[1])}

    view, adapters = adapters_of(model)
    with reading(adapters, read), torch.no_grad():
        run_batch(view, ids)
    for index, pair in losses(model, config, factors, ids).items():
        assert pair == pytest.approx(expected[index], rel=1e-4)


@pytest.mark.parametrize(("family", "cached"), [("llama", False), ("qwen2", True), ("qwen3", True)])
def test_training_with_the_quantiser_in_the_loop_lowers_the_loss(language_model, tokens, family, cached):
    model, ids = language_model(family), tokens(2, 32)
    width = 2 * model.model.layers[0].self_attn.head_dim
    # Little is lost by the rank, so that what the quantiser loses is what can be won back.
    config = QUANTISED.replace(k_rank=width - 8, v_rank=width - 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factors = fit(model, config, calibrate(model, [ids]))
    start = losses(model, config, factors, ids)
    trained = finetune(model, config, factors, [ids], steps=60, learning_rate=2e-2, cache_inputs=cached)
    end = losses(model, config, trained, ids)
    for index, pair in start.items():
        assert sum(end[index].values()) < 0.9 * sum(pair.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert trained.fingerprints == factors.fingerprints
    assert trained[0].a_k.dtype == factors[0].a_k.dtype


def test_without_a_quantiser_whitened_factors_are_at_their_minimum_already(language_model, tokens):
    model, ids = language_model(), tokens(4, 60)
    config = CSKVConfig(k_rank=8, v_rank=12)
    factors = fit(model, config, calibrate(model, [ids]))
    start = losses(model, config, factors, ids)
    end = losses(model, config, finetune(model, config, factors, [ids], steps=40, learning_rate=1e-3), ids)
    for index, pair in start.items():
        assert sum(end[index].values()) > 0.999 * sum(pair.values())


def test_an_interrupted_training_continues_to_the_same_factors(language_model, tokens, tmp_path):
    model, batches = language_model(), [tokens(1, 16) for _ in range(3)]
    factors = fit(model, QUANTISED.replace(init="svd"))
    options = {"steps": 9, "learning_rate": 1e-3}
    whole = finetune(model, QUANTISED, factors, batches, **options)

    def stop(steps):
        for step in steps:
            if step == 7:
                raise KeyboardInterrupt
            yield step

    path = tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(model, QUANTISED, factors, batches, checkpoint=path, checkpoint_every=3, track=stop, **options)
    done = []
    again = finetune(
        model, QUANTISED, factors, batches, checkpoint=path, track=lambda steps: (done.append(s) or s for s in steps),
        **options,
    )  # fmt: skip
    assert done == [6, 7, 8]
    for index in whole:
        assert torch.allclose(again[index].a_k, whole[index].a_k, atol=1e-6)
        assert torch.allclose(again[index].b_v, whole[index].b_v, atol=1e-6)


def test_the_length_is_cut_to_whole_groups(language_model, tokens):
    model, ids = language_model(), tokens(1, 21)
    factors = fit(model, QUANTISED.replace(init="svd"))
    cut = finetune(model, QUANTISED, factors, [ids[:, :16]], steps=3, learning_rate=1e-3)
    whole = finetune(model, QUANTISED, factors, [ids], steps=3, learning_rate=1e-3)
    assert torch.allclose(cut[0].a_k, whole[0].a_k, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batches": []}, "batches"),
        ({"batches": [torch.ones(1, 5, dtype=torch.int64)]}, "quant_group"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": 1e30}, "learning_rate"),
        (
            {"batches": [{"input_ids": torch.ones(1, 16, dtype=torch.int64), "attention_mask": torch.zeros(1, 16)}]},
            "padding",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(language_model, tokens, change, match):
    model = language_model()
    arguments = {"batches": [tokens(1, 16)], "steps": 4} | change
    factors = fit(model, QUANTISED.replace(init="svd"))
    with pytest.raises(ConfigError, match=match):
        finetune(model, QUANTISED, factors, **arguments)


def test_a_checkpoint_of_something_else_is_refused(language_model, tokens, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    model = language_model()
    factors = fit(model, QUANTISED.replace(init="svd"))
    with pytest.raises(ConfigError, match="checkpoint"):
        finetune(model, QUANTISED, factors, [tokens(1, 16)], checkpoint=tmp_path / "x.safetensors")
