from __future__ import annotations

import pytest
import torch
from dato.adapters.known_configs import KNOWN_CONFIGS
from dato.adapters.unet_units import enumerate_units
from dato.costs import model_on_meta
from diffusers import UNet2DConditionModel, UNet2DModel
from pared_hooks import UnsupportedModelError


@pytest.fixture(scope="module", params=[("sd15", 12), ("sd21", 12), ("sdxl", 9)], ids=lambda param: param[0])
def real(request):
    """A published architecture on the meta device with its units and their expected number."""
    name, num_units = request.param
    unet = model_on_meta(UNet2DConditionModel, KNOWN_CONFIGS[name])
    return unet, enumerate_units(unet), num_units


def test_published_architectures_have_their_number_of_units(real):
    _, units, num_units = real
    assert units.num_units == num_units
    assert [unit.index for unit in units.down] == list(range(num_units))
    assert [unit.index for unit in units.up] == list(range(num_units))


def test_units_hold_every_module_between_conv_in_and_conv_out_once(real):
    unet, units, _ = real
    held = [module for module, _ in units.modules()]
    assert len(set(map(id, held))) == len(held)
    inside = {id(parameter) for module in held for parameter in module.parameters()}
    outside = {name.split(".")[0] for name, parameter in unet.named_parameters() if id(parameter) not in inside}
    assert outside <= {"time_embedding", "add_embedding", "conv_norm_out", "conv_out"}


def test_names_lead_to_the_modules(real):
    unet, units, _ = real
    for unit in (*units.down, *units.up):
        assert tuple(unet.get_submodule(name) for name in unit.names) == unit.modules
    for block in units.blocks:
        assert unet.get_submodule(block.name) is block.module


def test_both_units_of_a_skip_work_at_its_resolution(real):
    _, units, _ = real
    for down, up in zip(units.down, units.up, strict=True):
        is_downsampler = down.resnet is None and down.index > 0
        assert up.level == down.level + is_downsampler


@pytest.mark.parametrize(("name", "expected"), [("sd15", {0: 5, 1: 5, 2: 5, 3: 1}), ("sdxl", {1: 10, 2: 60})])
def test_self_attention_blocks_are_found_with_their_resolution(name, expected):
    blocks = enumerate_units(model_on_meta(UNet2DConditionModel, KNOWN_CONFIGS[name])).blocks
    assert {level: sum(block.level == level for block in blocks) for level in expected} == expected
    assert len(blocks) == sum(expected.values())


def test_units_are_visited_in_the_order_of_the_forward_pass():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    units = enumerate_units(unet)
    visited: list[int] = []
    for module, _ in units.modules():
        module.register_forward_hook(lambda module, _args, _output: visited.append(id(module)))
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 3, 8))
    assert visited == [id(module) for module, _ in units.modules()]


def test_blocks_that_only_attend_to_the_text_are_left_out():
    config = {**KNOWN_CONFIGS["sd15"], "only_cross_attention": True}
    assert {block.level for block in enumerate_units(model_on_meta(UNet2DConditionModel, config)).blocks} <= {3}


def test_another_class_is_refused_with_the_supported_one():
    with pytest.raises(UnsupportedModelError, match=r"UNet2DModel.*UNet2DConditionModel"):
        enumerate_units(UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                    up_block_types=("UpBlock2D",), norm_num_groups=8))  # fmt: skip


def test_an_unknown_block_is_refused_by_name():
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=8,
    )
    with pytest.raises(UnsupportedModelError, match="SimpleCrossAttnDownBlock2D"):
        enumerate_units(unet)
