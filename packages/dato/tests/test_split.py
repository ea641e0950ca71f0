"""The split backend against the hooks backend, and under `torch.compile` (acceptance 6)."""

from __future__ import annotations

import pytest
import torch
from dato import DaToConfig, Policy
from dato.apply import applied
from pared_hooks import ConfigError, UnsupportedModelError

POLICY = Policy((-1, 1, 0, 4, 12, -1, 2, 1), 0.5)


def run(unet, config, inputs, **conditions):
    with applied(unet, config) as handle:
        outputs = [unet(*call, **conditions).sample for call in inputs]
        return outputs, handle.stats()


def assert_backends_agree(unet, inputs, config, **conditions):
    expected, by_hooks = run(unet, config, inputs, **conditions)
    actual, by_split = run(unet, config.replace(backend="split"), inputs, **conditions)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()
    assert by_split["calls"] == by_hooks["calls"]
    assert by_split["tokens_kept"] == by_hooks["tokens_kept"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selection": "similarity"},
        {"selection": "random", "recover": "base"},
        {"reuse_match": 3, "noise_alpha": 0.0},
        {"share_match": True, "max_downsample": 2, "min_tokens": 64},
        {"metric": "norm", "kept_multiple": 64, "sign_flip_prob": 0.5},
    ],
    ids=str,
)
@torch.no_grad()
def test_both_backends_give_equal_outputs_and_counts(sd_unet, calls, options):
    assert_backends_agree(sd_unet, calls(8), DaToConfig(policy=POLICY, **options))


@torch.no_grad()
def test_both_backends_agree_on_a_model_like_sdxl(xl_unet, calls):
    added = {"text_embeds": torch.ones(2, 32), "time_ids": torch.arange(6.0).repeat(2, 1)}
    policy = Policy((-1, 1, 0, 4, 9, -1), 0.5)
    config = DaToConfig(policy=policy, max_downsample=4, min_tokens=1)
    assert_backends_agree(xl_unet, calls(6), config, added_cond_kwargs=added)


@torch.no_grad()
def test_both_backends_agree_on_odd_sizes_with_a_mask_on_the_text(sd_unet, calls):
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    config = DaToConfig(policy=POLICY, min_tokens=1)
    assert_backends_agree(sd_unet, calls(8, (13, 18)), config, encoder_attention_mask=mask)


@torch.no_grad()
def test_both_backends_agree_on_the_residuals_of_a_controlnet(sd_unet, calls, rng):
    inputs = calls(8)
    skips = []
    for module in (sd_unet.conv_in, *(m for b in sd_unet.down_blocks for m in (*b.resnets, *(b.downsamplers or [])))):
        module.register_forward_hook(lambda _m, _a, output: skips.append(output.shape))
    sd_unet(*inputs[0])
    down = [torch.randn(shape, generator=rng) * 0.1 for shape in skips]
    assert_backends_agree(
        sd_unet,
        inputs,
        DaToConfig(policy=POLICY),
        down_block_additional_residuals=down,
        mid_block_additional_residual=torch.randn(down[-1].shape, generator=rng),
    )


@pytest.mark.parametrize("model", ["sd_unet", "xl_unet"])
@torch.no_grad()
def test_both_backends_agree_on_the_features_of_a_t2i_adapter(model, request, calls, rng):
    unet = request.getfixturevalue(model)
    inputs = calls(8 if model == "sd_unet" else 6)
    added = {"text_embeds": torch.ones(2, 32), "time_ids": torch.arange(6.0).repeat(2, 1)}
    conditions = {"added_cond_kwargs": added} if model == "xl_unet" else {}
    shapes = []
    for block in unet.down_blocks:
        block.register_forward_hook(
            lambda m, _a, out: shapes.append(out[1][-2 if m.downsamplers and hasattr(m, "attentions") else -1].shape)
        )
    unet(*inputs[0], **conditions)
    features = [torch.randn(shape, generator=rng) * 0.1 for shape in shapes]
    depths = (-1, 1, 0, 4, 12, -1, 2, 3) if model == "sd_unet" else (-1, 1, 0, 3, 9, 4)

    def outputs(backend):
        with applied(unet, DaToConfig(policy=Policy(depths, 0.5), backend=backend)):
            return [
                unet(*call, **conditions, down_intrablock_additional_residuals=[f.clone() for f in features]).sample
                for call in inputs
            ]

    for one, other in zip(outputs("split"), outputs("hooks"), strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


@torch.no_grad()
def test_compiled_functions_are_whole_graphs_and_are_made_once(sd_unet, calls):
    torch._dynamo.reset()
    graphs = []

    def count(graph_module, _example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    inputs = calls(8)
    config = DaToConfig(policy=POLICY, backend="split", kept_multiple=64)
    expected, _ = run(sd_unet, config, inputs)
    with applied(sd_unet, config) as handle:
        handle.compile(backend=count)
        actual = [sd_unet(*call).sample for call in inputs]
        made = len(graphs)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                again = [sd_unet(*call).sample for call in inputs]
    torch._dynamo.reset()
    # One graph for each of FULL, 1, 4, 12 and 2.
    assert made == len(graphs) == 5
    for one, two, other in zip(actual, again, expected, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(two, other)


@pytest.mark.slow
@torch.no_grad()
def test_compilation_by_inductor_gives_the_same_outputs(sd_unet, calls):
    torch._dynamo.reset()
    inputs = calls(8)
    config = DaToConfig(policy=Policy((-1, 1, 0, 1, 1, -1, 1, 1), 0.5), backend="split")
    expected, _ = run(sd_unet, config, inputs)
    with applied(sd_unet, config) as handle:
        handle.compile()
        actual = [sd_unet(*call).sample for call in inputs]
    torch._dynamo.reset()
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < 1e-3 * other.abs().max()


@torch.no_grad()
def test_a_transformer_is_refused_by_name(dit):
    with pytest.raises(UnsupportedModelError, match="DiTTransformer2DModel"), applied(dit, DaToConfig(backend="split")):
        pass


def test_compile_needs_the_split_backend(sd_unet):
    with applied(sd_unet) as handle, pytest.raises(ConfigError, match="split"):
        handle.compile()
