"""Depth semantics against forwards written by hand (acceptance 3 and 4)."""

from __future__ import annotations

import pytest
import torch
from dato import FULL, DaToConfig, Policy
from dato.apply import applied

NO_PRUNING = 0.0


def forward_by_hand(unet, sample, timestep, text, added, depth, stored):
    """A call of `depth` of an unpatched UNet; `stored[k]` is read at depth k and all computed ones are refreshed."""
    emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    aug = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
    emb = emb if aug is None else emb + aug

    down = [lambda x: unet.conv_in(x)]
    up = []
    for block in unet.down_blocks:
        down += [layer(resnet, attention, emb, text) for resnet, attention in layers(block)]
        if block.downsamplers is not None:
            down.append(lambda x, sampler=block.downsamplers[0]: sampler(x))
    for block in unet.up_blocks:
        units = [layer(resnet, attention, emb, text) for resnet, attention in layers(block)]
        if block.upsamplers is not None:
            units[-1] = lambda x, before=units[-1], sampler=block.upsamplers[0]: sampler(before(x))
        up += units
    up.reverse()

    count = len(down) if depth == FULL else depth
    hidden, skips = sample, []
    for unit in down[:count]:
        hidden = unit(hidden)
        skips.append(hidden)
    if depth == FULL:
        hidden = stored[len(down)] = unet.mid_block(hidden, emb, encoder_hidden_states=text)
    else:
        hidden = stored[depth]
    for index in range(count - 1, -1, -1):
        hidden = stored[index] = up[index](torch.cat([hidden, skips[index]], dim=1))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def layers(block):
    attentions = getattr(block, "attentions", [None] * len(block.resnets))
    return zip(block.resnets, attentions, strict=True)


def layer(resnet, attention, emb, text):
    def run(x):
        x = resnet(x, emb)
        return x if attention is None else attention(x, encoder_hidden_states=text, return_dict=False)[0]

    return run


def added_conditions(unet, batch):
    if unet.config.addition_embed_type is None:
        return None
    return {"text_embeds": torch.ones(batch, 32), "time_ids": torch.arange(6.0).repeat(batch, 1)}


@pytest.mark.parametrize("model", ["sd_unet", "xl_unet"])
@torch.no_grad()
def test_every_depth_equals_a_forward_by_hand_with_the_deep_feature_frozen(model, request, calls):
    unet = request.getfixturevalue(model)
    num_units = {"sd_unet": 12, "xl_unet": 9}[model]
    inputs = calls(3)
    added = added_conditions(unet, 2)
    for depth in range(1, num_units + 1):
        stored = {}
        expected = [
            forward_by_hand(unet, *call, added, d, stored) for call, d in zip(inputs, (FULL, depth, depth), strict=True)
        ]
        policy = Policy((FULL, depth, depth), NO_PRUNING)
        with applied(unet, DaToConfig(policy=policy)):
            actual = [unet(*call, added_cond_kwargs=added).sample for call in inputs]
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_computed_units_refresh_what_later_calls_start_from(sd_unet, calls):
    depths = (FULL, 5, 2, 7, 2, 0, 1)
    inputs = calls(len(depths))
    stored = {}
    expected = [
        forward_by_hand(sd_unet, *call, None, depth, stored)
        for call, depth in zip(inputs, depths, strict=True)
        if depth != 0
    ]
    with applied(sd_unet, DaToConfig(policy=Policy(depths, NO_PRUNING))):
        actual = [sd_unet(*call).sample for call in inputs]
    assert torch.equal(actual.pop(5), actual[4])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_depth_zero_returns_the_previous_output_and_runs_no_module(sd_unet, calls):
    first, second, _ = calls(3)
    with applied(sd_unet, DaToConfig(policy=Policy((FULL, 0, 0)))):
        before = sd_unet(*first).sample
        ran = modules_that_run(sd_unet)
        assert torch.equal(sd_unet(*second).sample, before)
        assert torch.equal(sd_unet(*second, return_dict=False)[0], before)
    assert ran == ["UNet2DConditionModel"] * 2


@torch.no_grad()
def test_a_caller_that_overwrites_the_output_does_not_change_the_stored_one(sd_unet, calls):
    first, second, third = calls(3)
    with applied(sd_unet, DaToConfig(policy=Policy((FULL, 0, 0)))):
        output = sd_unet(*first).sample
        before = output.clone()
        output.zero_()
        sd_unet(*second).sample.zero_()
        assert torch.equal(sd_unet(*third).sample, before)


@torch.no_grad()
def test_depth_one_runs_the_shallowest_unit_alone(sd_unet, calls):
    first, second = calls(2)
    with applied(sd_unet, DaToConfig(policy=Policy((FULL, 1), NO_PRUNING))):
        sd_unet(*first)
        deep = [*sd_unet.down_blocks, sd_unet.mid_block, *sd_unet.up_blocks[:-1], *sd_unet.up_blocks[-1].resnets[:-1]]
        convolutions = [m for part in deep for m in part.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        for module in convolutions:
            module.register_forward_pre_hook(lambda *_: pytest.fail("a module deeper than the depth was computed"))
        sd_unet(*second)


@pytest.mark.parametrize("interval", [2, 3])
@torch.no_grad()
def test_depth_one_at_a_uniform_interval_is_deepcache_with_branch_zero(sd_unet, calls, interval):
    """DeepCache: every `interval`-th call is full and keeps the input of the last up layer; others reuse that."""
    inputs = calls(7)
    last_resnet, last_attention = sd_unet.up_blocks[-1].resnets[-1], sd_unet.up_blocks[-1].attentions[-1]
    expected, cached = [], None
    for index, (sample, timestep, text) in enumerate(inputs):
        if index % interval == 0:
            seen = []
            hook = last_resnet.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            expected.append(sd_unet(sample, timestep, text).sample)
            hook.remove()
            cached = seen[0][:, : seen[0].shape[1] - sd_unet.conv_in.out_channels]
            continue
        emb = sd_unet.time_embedding(sd_unet.get_time_embed(sample=sample, timestep=timestep))
        hidden = last_resnet(torch.cat([cached, sd_unet.conv_in(sample)], dim=1), emb)
        hidden = last_attention(hidden, encoder_hidden_states=text, return_dict=False)[0]
        expected.append(sd_unet.conv_out(sd_unet.conv_act(sd_unet.conv_norm_out(hidden))))
    with applied(sd_unet, DaToConfig(policy=Policy.uniform(7, interval, ratio=NO_PRUNING))):
        actual = [sd_unet(*call).sample for call in inputs]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(12, 20), (15, 18)])
@torch.no_grad()
def test_latents_that_are_not_square_or_not_divisible_work(sd_unet, calls, size):
    inputs = calls(3, size)
    expected = sd_unet(*inputs[0]).sample
    with applied(sd_unet, DaToConfig(policy=Policy((FULL, 5, 3), 0.4), min_tokens=1)) as handle:
        outputs = [sd_unet(*call).sample for call in inputs]
        assert handle.stats()["tokens_kept"]
    assert [tuple(output.shape[2:]) for output in outputs] == [size] * 3
    assert outputs[0].shape == expected.shape


@torch.no_grad()
def test_depth_k_of_a_dit_adds_what_the_deeper_blocks_added_at_the_last_full_call(dit):
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2)]
    labels = torch.tensor([3, 7])

    def stack(sample, timestep, depth, residual):
        time = torch.tensor([timestep] * 2)
        hidden = dit.pos_embed(sample)
        states = [hidden]
        for block in dit.transformer_blocks[: 4 if depth == FULL else depth]:
            hidden = block(hidden, timestep=time, class_labels=labels)
            states.append(hidden)
        if depth != FULL:
            hidden = hidden + residual
        return hidden, states

    for depth in (1, 2, 3, 4):
        end, states = stack(inputs[0], 900, FULL, None)
        expected, _ = stack(inputs[1], 890, depth, end - states[depth])
        seen = []
        with applied(dit, DaToConfig(policy=Policy((FULL, depth), NO_PRUNING))):
            dit(inputs[0], torch.tensor([900, 900]), labels)
            hook = dit.norm_out.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            dit(inputs[1], torch.tensor([890, 890]), labels)
            hook.remove()
        torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


def modules_that_run(model):
    """Class names of the modules of `model` called from now on."""
    ran = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: ran.append(type(module).__name__))
    return ran
