"""What quantising does to a model, and that it can be taken back."""

from __future__ import annotations

import copy
import pickle

import mbq
import pared_kernels
import pytest
import torch
from mbq_models import explicit_batches, language_model, llava_onevision, qwen2_vl, qwen2_vl_batches

IDS = torch.tensor([[5, 9, 33, 12, 7, 40]])
W3 = {"group_size": 32, "grid": 3}


@pytest.mark.parametrize("options", [W3, {"w_bits": 4, "a_bits": 8, "grid": 3}, {**W3, "w_bits": 4, "symmetric": True}])
@torch.no_grad()
def test_packed_and_fake_hold_the_same_weights_and_give_the_same_logits(options):
    model = qwen2_vl(num_hidden_layers=2)
    result = mbq.calibrate(model, qwen2_vl_batches(1), mbq.MBQConfig(**options))
    weights, logits = {}, {}
    for mode in ("packed", "fake"):
        with mbq.quantize(model, result, mode=mode):
            logits[mode] = model(IDS).logits
            weights[mode] = [
                module.dequantized() if mode == "packed" else module.weight
                for module in model.modules()
                if isinstance(module, mbq.QuantLinear | mbq.FakeQuantLinear)
            ]
    assert len(weights["packed"]) == len(weights["fake"]) == 14
    assert all(a.equal(b) for a, b in zip(weights["packed"], weights["fake"], strict=True))
    torch.testing.assert_close(logits["packed"], logits["fake"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["packed", "fake"])
def test_remove_restores_weights_classes_and_configuration_bit_for_bit(mode):
    model = qwen2_vl(num_hidden_layers=2).to(torch.bfloat16)
    plain = model(IDS).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds, config = [type(module) for module in model.modules()], model.config.to_dict()
    handle = mbq.apply(model, mbq.MBQConfig(**W3), explicit_batches(model, 1), mode=mode)
    assert not model(IDS).logits.equal(plain)
    handle.remove()
    handle.remove()
    assert list(model.state_dict()) == list(state)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds
    assert model.config.to_dict() == config
    assert "hf_quantizer" not in vars(model)
    assert "_pared" not in vars(model)
    assert model(IDS).logits.equal(plain)


def test_calibration_does_not_change_the_model():
    model = qwen2_vl(num_hidden_layers=2).train()
    model.model.visual.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    mbq.calibrate(model, qwen2_vl_batches(1), mbq.MBQConfig(**W3, distort=True, clip="search"))
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()] == hooks
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_an_interrupted_calibration_leaves_the_model_and_goes_on_where_it_stopped(tmp_path):
    model, batches = qwen2_vl(), qwen2_vl_batches(1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config, path = mbq.MBQConfig(**W3), tmp_path / "partial.safetensors"

    def interrupted(plans):
        for number, plan in enumerate(plans):
            if number == 2:
                raise KeyboardInterrupt
            yield plan

    with pytest.raises(KeyboardInterrupt):
        mbq.calibrate(model, batches, config, checkpoint=path, track=interrupted)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    partial = mbq.MBQResult.load(path)
    assert partial.done == 2
    with pytest.raises(mbq.ResultMismatchError, match="2 of 3"):
        mbq.quantize(model, partial)
    partial.groups[0].scale.fill_(7.0)
    partial.save(path)
    resumed = mbq.calibrate(model, batches, config, checkpoint=path)
    # The finished layers are not searched again.
    assert resumed.groups[0].scale.eq(7).all()
    whole = mbq.calibrate(model, batches, config)
    assert all(a.scale.equal(b.scale) for a, b in list(zip(resumed.groups, whole.groups, strict=True))[1:])


def test_a_result_survives_its_file(tmp_path):
    model = qwen2_vl(num_hidden_layers=2)
    for options in ({}, {"method": "gptq"}, {"clip": "search"}):
        result = mbq.calibrate(model, qwen2_vl_batches(1), mbq.MBQConfig(**W3, **options))
        result.save(tmp_path / "result.safetensors")
        again = mbq.MBQResult.load(tmp_path / "result.safetensors")
        assert (again.config, again.weights, again.sensitivity) == (result.config, result.weights, result.sensitivity)
        with mbq.quantize(model, result):
            ours = model(IDS).logits
        with mbq.quantize(model, again):
            assert model(IDS).logits.equal(ours)


def test_only_linear_layers_of_the_language_part_are_quantised():
    model = llava_onevision(num_hidden_layers=2)
    mbq.apply(model, mbq.MBQConfig(method="rtn", group_size=32, skip_modules=(r"layers\.0\.mlp",)), [])
    packed = {name for name, module in model.named_modules() if isinstance(module, mbq.QuantLinear)}
    assert len(packed) == 11
    assert all("language_model.layers" in name for name in packed)
    assert not any("layers.0.mlp" in name for name in packed)
    assert not isinstance(model.lm_head, mbq.QuantLinear)


@torch.no_grad()
def test_a_skipped_linear_layer_is_folded_but_not_rounded():
    model = language_model(num_hidden_layers=1)
    result = mbq.calibrate(
        model, explicit_batches(model, 1), mbq.MBQConfig(**W3, method="awq", skip_modules=("q_proj", "v_proj"))
    )
    query = model.model.layers[0].self_attn.q_proj
    before = query.weight.clone()
    scale = next(group.scale for group in result.groups if group.site == 0)
    assert not scale.equal(torch.ones(64))
    handle = mbq.quantize(model, result)
    torch.testing.assert_close(query.weight, before * scale)
    handle.remove()
    assert query.weight.equal(before)


def test_stats_count_bits_bytes_and_errors_by_modality():
    model = qwen2_vl(
        num_hidden_layers=2, hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=8
    )
    handle = mbq.apply(model, mbq.MBQConfig(grid=3), explicit_batches(model, 1))
    stats = handle.stats()
    assert stats["modules"] == 14
    assert stats["layers"] == 2
    assert 3.0 < stats["bits_per_weight"] <= 3.2
    assert stats["bytes"] * 8 == pytest.approx(stats["bits_per_weight"] * stats["weights"])
    assert all(error["answer"] > 0 and error["vision"] > 0 and "rtn answer" in error for error in stats["error"])


def test_originals_that_were_given_up_cannot_come_back():
    handle = mbq.apply(
        language_model(num_hidden_layers=1), mbq.MBQConfig(method="rtn", group_size=32), [], restore="none"
    )
    with pytest.raises(mbq.RestoreUnavailableError, match="restore"):
        handle.remove()


def test_a_gradient_reaches_the_input_through_packed_layers_and_the_weights_are_frozen():
    model = language_model(num_hidden_layers=1)
    embeds = torch.randn(1, 5, 64, requires_grad=True)
    with mbq.apply(model, mbq.MBQConfig(method="rtn", group_size=32), [], mode="fake"):
        model(inputs_embeds=embeds).logits.sum().backward()
        expected, embeds.grad = embeds.grad, None
    with mbq.apply(model, mbq.MBQConfig(method="rtn", group_size=32), []):
        model(inputs_embeds=embeds).logits.sum().backward()
        assert all(
            not p.requires_grad for m in model.modules() if isinstance(m, mbq.QuantLinear) for p in m.parameters()
        )
    torch.testing.assert_close(embeds.grad, expected, rtol=1e-4, atol=1e-4)


def test_casting_a_packed_model_keeps_the_dtype_of_its_scales():
    model = language_model(num_hidden_layers=1)
    mbq.apply(model, mbq.MBQConfig(method="rtn", group_size=32), [], restore="none")
    scale = model.model.layers[0].mlp.up_proj.weight_scale.clone()
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight_scale.equal(scale)
    assert model(IDS).logits.dtype == torch.bfloat16


def tiled(bits=3, **options):
    """A packed bfloat16 model, whose weights lie in blocks where the processor has a product for them."""
    model = language_model(num_hidden_layers=1).to(torch.bfloat16)
    mbq.apply(model, mbq.MBQConfig(method="rtn", w_bits=bits, group_size=32, **options), [], restore="none")
    reason = pared_kernels.mbq_tiling_unsupported(64, bits, 32)
    assert all((layer.steps is None) == (reason is not None) for layer in packed_layers(model))
    return model


def packed_layers(model):
    return [module for module in model.modules() if isinstance(module, mbq.QuantLinear)]


@pytest.mark.parametrize("bits", [3, 4])
@torch.no_grad()
def test_on_a_processor_bfloat16_layers_compute_what_their_dequantised_weights_do(bits):
    for layer in packed_layers(tiled(bits)):
        x, weight = torch.randn(5, layer.in_features).bfloat16(), layer.dequantized(torch.float64)
        expected = x.double() @ weight.T
        # Scales, what zero points add and results are rounded to bfloat16, each by 2^-9 of itself at most.
        offsets = 2 ** (bits - 1) * layer.weight_scale.double().repeat_interleave(layer.group_size, 1)
        rounded = x.double().abs() @ (weight.abs() + 2 * offsets).T + expected.abs()
        assert ((layer(x) - expected).abs() <= 2**-9 * rounded).all()
        assert (layer(x) - expected).norm() <= 5e-3 * expected.norm()
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [3, 4])
@torch.no_grad()
def test_a_layout_for_the_processor_shows_in_no_state_and_no_other_dtype(bits):
    model = tiled(bits)
    wide = language_model(num_hidden_layers=1)
    mbq.apply(wide, mbq.MBQConfig(method="rtn", w_bits=bits, group_size=32), [], restore="none")
    logits, keys = model(IDS).logits, list(wide.state_dict())
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    assert list(stored) == keys
    assert all(stored[name].dtype == value.dtype for name, value in wide.state_dict().items() if "weight_" in name)
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].shape == (128, 2 * bits)
    for layer in packed_layers(model):
        assert layer.packed.equal(layer.to(torch.float32).weight_packed)
        assert layer.steps is None
        layer.to(torch.bfloat16)
    assert all(value.equal(stored[name]) for name, value in model.state_dict().items())
    assert model(IDS).logits.equal(logits)
    other = tiled(bits)
    other.load_state_dict(stored)
    assert other(IDS).logits.equal(logits)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(IDS).logits.equal(logits)
    assert all(layer.__getstate__()["_buffers"]["weight_packed"].dtype == torch.int32 for layer in packed_layers(model))


def test_a_layout_for_the_processor_takes_hardly_more_than_the_stored_bytes():
    model = language_model(num_hidden_layers=1, hidden_size=512, intermediate_size=1024).to(torch.bfloat16)
    mbq.apply(model, mbq.MBQConfig(method="rtn"), [], restore="none")
    layers = packed_layers(model)
    resident = sum(value.nbytes for layer in layers for value in layer.buffers())
    assert resident <= 1.15 * sum(layer.stored_bytes for layer in layers)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"group_size": 32}, {"w_bits": 4, "a_bits": 8}], ids=["W3A16", "W4A8"])
@torch.no_grad()
def test_a_decode_step_of_the_whole_model_compiles_into_one_graph(options):
    from transformers import StaticCache

    model = language_model(num_hidden_layers=1)
    mbq.apply(model, mbq.MBQConfig(method="rtn", **options), [], restore="none")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = []
    for step in (model, compiled):
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(IDS, past_key_values=cache)
        logits.append(step(IDS[:, :1], past_key_values=cache, position_ids=torch.tensor([[6]])).logits)
    torch.testing.assert_close(logits[1], logits[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_compiles_into_one_graph(dtype):
    model = language_model(num_hidden_layers=1).to(dtype)
    mbq.apply(model, mbq.MBQConfig(method="rtn", group_size=32), [], restore="none")
    layer = copy.deepcopy(model.model.layers[0].mlp)
    x = torch.randn(1, 1, 64).to(dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_generation_runs_on_packed_weights():
    model = language_model(num_hidden_layers=2)
    mbq.apply(model, mbq.MBQConfig(w_bits=4, a_bits=8, method="rtn"), [], restore="none")
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert tokens.shape == (1, 10)
    step = model(tokens[:, :-1]).logits[0, -1].argmax()
    assert int(step) == int(tokens[0, -1])


def test_a_model_that_accelerate_has_placed_is_calibrated_and_quantised_the_same():
    from accelerate import dispatch_model

    model = language_model(num_hidden_layers=2)
    config, batches = mbq.MBQConfig(**W3), explicit_batches(model, 1)
    plain = mbq.calibrate(model, batches, config)
    with mbq.quantize(model, plain):
        expected = model(IDS).logits
    # As device_map="auto" does on several devices: hooks move what a module is called with.
    placed = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    result = mbq.calibrate(placed, batches, config)
    assert all(a.scale.equal(b.scale) for a, b in zip(result.groups, plain.groups, strict=True))
    with mbq.quantize(placed, result):
        assert placed(IDS).logits.equal(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_layer_at_a_time_is_searched_on_the_gpu():
    model = language_model(num_hidden_layers=2)
    config, batches = mbq.MBQConfig(**W3, method="awq"), explicit_batches(model, 1)
    here, there = (mbq.calibrate(model, batches, config, device=device) for device in (None, "cuda"))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    for one, two in zip(here.groups, there.groups, strict=True):
        torch.testing.assert_close(one.scale, two.scale, rtol=1e-4, atol=1e-4)
