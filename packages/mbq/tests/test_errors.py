"""Wrong input, and models that cannot be quantised: the error says what and why, and the model is as it was."""

from __future__ import annotations

import mbq
import pytest
import torch
from mbq_models import TEXT, explicit_batches, language_model, qwen2_vl, qwen2_vl_batches, text_batches
from torch import nn

W3 = {"group_size": 32, "grid": 2}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"w_bits": 1}, "w_bits"),
        ({"w_bits": 9}, "w_bits"),
        ({"a_bits": 4}, "a_bits"),
        ({"group_size": 0}, "group_size"),
        ({"a_bits": 8, "group_size": 64}, "group_size"),
        ({"a_bits": 8, "symmetric": False}, "symmetric"),
        ({"method": "best"}, "method"),
        ({"loss": "l1"}, "loss"),
        ({"ratio_floor": "mean"}, "ratio_floor"),
        ({"vision_weight": -1.0}, "vision_weight"),
        ({"vision_weight": 0.5, "method": "awq"}, "vision_weight"),
        ({"grid": 0}, "grid"),
        ({"gqa": "yes"}, "gqa"),
        ({"method": "rtn", "distort": True}, "distort"),
        ({"method": "gptq", "clip": "search"}, "clip"),
        ({"scale_dtype": "float64"}, "scale_dtype"),
        ({"skip_modules": ("(",)}, "skip_modules"),
        ({"include_zero": "yes"}, "include_zero"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_a_wrong_option_is_named(options, field):
    with pytest.raises(ValueError, match=field):
        mbq.MBQConfig(**options)


def test_a_configuration_survives_json_and_resolves_its_defaults():
    config = mbq.MBQConfig(a_bits=8, w_bits=4, skip_modules=("lm_head", "q_proj"))
    assert mbq.MBQConfig.from_json(config.to_json()) == config
    assert (config.group_size, config.is_symmetric) == (-1, True)
    assert (mbq.MBQConfig().group_size, mbq.MBQConfig().is_symmetric) == (128, False)


def test_the_defaults_are_what_the_paper_publishes_for_three_bits():
    config = mbq.MBQConfig()
    assert (config.w_bits, config.a_bits, config.group_size, config.is_symmetric) == (3, 16, 128, False)
    assert (config.method, config.loss, config.ratio_floor, config.grid) == ("mbq", "mae", "median", 20)
    assert (config.distort, config.gqa, config.clip, config.skip_modules) == (False, "skip", "none", ("lm_head",))
    # Unlike theirs: groups of one sign survive, and scales can be stored.
    assert (config.include_zero, config.scale_dtype) == (True, "float16")


def test_missing_answers_are_found_before_any_layer_runs():
    model = qwen2_vl(num_hidden_layers=1)
    model.model.language_model.layers[0].forward = None
    batch = {key: value for key, value in qwen2_vl_batches(1)[0].items() if key != "labels"}
    with pytest.raises(mbq.CalibrationError, match="answer"):
        mbq.calibrate(model, [batch], mbq.MBQConfig(**W3))


def test_no_data_at_all_is_an_error():
    with pytest.raises(mbq.CalibrationError, match="no token"):
        mbq.calibrate(language_model(num_hidden_layers=1), [], mbq.MBQConfig(**W3))


def test_masks_of_another_shape_are_named():
    model = language_model(num_hidden_layers=1)
    batch = explicit_batches(model, 1)[0] | {"vision_mask": torch.ones(1, 3)}
    with pytest.raises(mbq.CalibrationError, match="vision_mask"):
        mbq.calibrate(model, [batch], mbq.MBQConfig(**W3))


def test_an_activation_that_is_not_finite_names_layer_and_sample():
    model = language_model(num_hidden_layers=2)
    batches = explicit_batches(model, 3)
    batches[1]["inputs_embeds"][0, 2] = float("nan")
    with pytest.raises(mbq.CalibrationError, match=r"layers\.0 .*sample 1"):
        mbq.calibrate(model, batches, mbq.MBQConfig(**W3, method="awq"))


def test_a_gradient_that_is_not_finite_names_layer_and_sample_and_suggests_bfloat16():
    model = language_model(num_hidden_layers=2)
    batches = explicit_batches(model, 2)
    batches[1]["inputs_embeds"][0, 0] = float("inf")
    with pytest.raises(mbq.CalibrationError, match=r"layers.*sample 1.*bfloat16"):
        mbq.calibrate(model, batches, mbq.MBQConfig(**W3))


def test_a_width_that_does_not_suit_the_group_names_the_module_and_a_way_out():
    model = language_model(num_hidden_layers=1, intermediate_size=96)
    with pytest.raises(ValueError, match=r"down_proj.*96.*skip_modules"):
        mbq.calibrate(model, text_batches(1), mbq.MBQConfig(group_size=64))
    odd = language_model(num_hidden_layers=1, intermediate_size=72)
    with pytest.raises(ValueError, match=r"down_proj.*72.*32"):
        mbq.calibrate(odd, text_batches(1), mbq.MBQConfig(group_size=8))


def test_a_group_that_cannot_be_packed_is_refused_before_calibration():
    model = language_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="group_size"):
        mbq.apply(model, mbq.MBQConfig(group_size=16), [])
    with pytest.raises(ValueError, match="scale_dtype"):
        mbq.apply(model, mbq.MBQConfig(group_size=32, scale_dtype="float32"), [])
    with pytest.raises(ValueError, match="w_bits"):
        mbq.apply(model, mbq.MBQConfig(w_bits=3, a_bits=8), [])
    mbq.apply(model, mbq.MBQConfig(group_size=16, method="rtn", scale_dtype="float32"), [], mode="fake")


def test_a_pattern_that_finds_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing_here"):
        mbq.calibrate(language_model(), text_batches(1), mbq.MBQConfig(**W3, skip_modules=("nothing_here",)))


def test_unknown_decoders_and_mixtures_of_experts_are_refused():
    with pytest.raises(mbq.UnsupportedLayerError, match="Sequential"):
        mbq.calibrate(nn.Sequential(nn.Linear(32, 32)), [], mbq.MBQConfig(**W3))
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "head_dim": 16}
    with pytest.raises(mbq.UnsupportedLayerError, match="mixture of experts"):
        mbq.calibrate(language_model("Qwen3Moe", **experts), text_batches(1), mbq.MBQConfig(**W3))


def test_layers_without_values_of_their_own_are_refused():
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    heads = {"head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 32}
    shared = {"num_kv_shared_layers": 1, "vocab_size_per_layer_input": 64, "num_hidden_layers": 2}
    layers = {"layer_types": ["full_attention", "full_attention"]}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**{**TEXT, **heads, **shared, **layers}))
    with pytest.raises(mbq.UnsupportedLayerError, match=r"layers\.1.*another layer"):
        mbq.calibrate(model, text_batches(1), mbq.MBQConfig(**W3))


def test_parameters_without_data_are_refused():
    model = language_model(num_hidden_layers=1)
    model.model.layers[0].to("meta")
    with pytest.raises(mbq.UnsupportedLayerError, match="meta"):
        mbq.calibrate(model, text_batches(1), mbq.MBQConfig(**W3))


def test_an_offloaded_model_is_refused():
    from accelerate import cpu_offload

    model = cpu_offload(language_model(num_hidden_layers=1), torch.device("cpu"))
    with pytest.raises(mbq.UnsupportedLayerError, match="offloaded"):
        mbq.calibrate(model, text_batches(1), mbq.MBQConfig(**W3))


def test_a_quantised_model_is_not_quantised_again():
    model = language_model(num_hidden_layers=1)
    config = mbq.MBQConfig(method="rtn", group_size=32)
    with mbq.apply(model, config, []), pytest.raises(mbq.AlreadyQuantizedError, match="already"):
        mbq.apply(model, config, [])
    with mbq.apply(model, config, [], mode="fake"), pytest.raises(mbq.AlreadyQuantizedError):
        mbq.calibrate(model, [], config)


def test_a_result_of_another_model_or_configuration_is_refused(tmp_path):
    model, other = language_model(num_hidden_layers=2), language_model(num_hidden_layers=1)
    batches = explicit_batches(model, 1)
    result = mbq.calibrate(model, batches, mbq.MBQConfig(**W3))
    with pytest.raises(mbq.ResultMismatchError, match="other layers"):
        mbq.quantize(other, result)
    with pytest.raises(mbq.ResultMismatchError, match="w_bits = 3"):
        mbq.quantize(model, result, mbq.MBQConfig(**W3, w_bits=4))
    result.save(tmp_path / "result.safetensors")
    again = explicit_batches(model, 1, seed=5)
    with pytest.raises(mbq.ResultMismatchError, match="data"):
        mbq.calibrate(model, again, mbq.MBQConfig(**W3), checkpoint=tmp_path / "result.safetensors")
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(mbq.ResultMismatchError, match="broken"):
        mbq.MBQResult.load(tmp_path / "broken")


def test_a_fold_that_changes_the_layer_is_rolled_back_and_names_both_ends():
    model = language_model(num_hidden_layers=2)
    result = mbq.calibrate(model, explicit_batches(model, 1), mbq.MBQConfig(**W3, method="awq"))
    next(group for group in result.groups if (group.layer, group.site) == (1, 0)).scale.copy_(
        torch.linspace(0.5, 2, 64)
    )
    # A reader of the norm that no scale reaches: the residual of the second layer.
    layer = model.model.layers[1]
    forward = layer.self_attn.forward
    layer.self_attn.forward = lambda hidden_states, **kw: (forward(hidden_states, **kw)[0] + hidden_states, None)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(mbq.FoldError, match=r"layers\.1.*input_layernorm -> self_attn\.q_proj"):
        mbq.quantize(model, result)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, mbq.QuantLinear) for module in model.modules())


def test_a_norm_that_scales_otherwise_is_refused():
    model = language_model(num_hidden_layers=1)
    model.model.layers[0].input_layernorm.forward = lambda x: x * 3
    with pytest.raises(mbq.UnsupportedLayerError, match="norm before attention"):
        mbq.calibrate(model, text_batches(1), mbq.MBQConfig(**W3))


def test_wrong_modes_are_named():
    model = language_model(num_hidden_layers=1)
    for options, named in (({"mode": "int"}, "mode"), ({"restore": "disk"}, "restore")):
        with pytest.raises(ValueError, match=named):
            mbq.apply(model, mbq.MBQConfig(method="rtn", group_size=32), [], **options)
