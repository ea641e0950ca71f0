from __future__ import annotations

import pytest
import torch
from dato import FULL, DaToConfig, Policy, unit_costs
from dato.adapters.known_configs import KNOWN_CONFIGS
from dato.adapters.unet_units import enumerate_units
from dato.costs import AttentionCost, UnitCosts, model_on_meta
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

TINY = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def attention_cost(**changes) -> AttentionCost:
    """Attention over 16 x 16 tokens of 8 channels in unit 0."""
    fields = {"name": "a", "unit": 0, "batch": 2, "grid": (16, 16), "channels": 8, "text_tokens": 0}
    return AttentionCost(**{**fields, "linear": 1000.0, "quadratic": 4000.0, **changes})


def costs_with(*attention: AttentionCost, **options) -> UnitCosts:
    return UnitCosts(1e6, (0.0, 1e5, 5e5), attention, DaToConfig(**options))


@pytest.fixture(scope="module")
def sd15() -> UnitCosts:
    return unit_costs(model_on_meta(UNet2DConditionModel, KNOWN_CONFIGS["sd15"]), (2, 4, 64, 64))


def test_the_cost_table_of_sd15_is_that_of_the_documentation(sd15):
    assert sd15.full == pytest.approx(1.607e12, rel=1e-3)
    assert sd15.depth[1] == pytest.approx(126.5e9, rel=1e-3)
    assert sum(cost.total for cost in sd15.attention if cost.unit < 1) == pytest.approx(49.7e9, rel=1e-3)
    assert sum(cost.total for cost in sd15.attention) / sd15.full == pytest.approx(0.216, abs=5e-4)


@pytest.mark.parametrize(("preset", "speedup"), [("sd15-coco", 7.7), ("sd15-alt", 7.6), ("sd15-mild", 5.7)])
def test_the_presets_without_pruning_have_their_speedups_on_sd15(sd15, preset, speedup):
    assert round(Policy.from_preset(preset).with_ratio(0).speedup(sd15), 1) == speedup


def test_pruning_forty_percent_saves_thirty_gigaflops_a_block_on_sd15(sd15):
    assert sd15.call(1, 0.4).saved == pytest.approx(30.2e9, rel=5e-3)
    assert sd15.call(FULL, 0.4).saved == pytest.approx(5 * 30.2e9, rel=5e-3)
    assert sd15.call(1, 0.4).matching == pytest.approx(4.0e9 + 5.2e9, rel=1e-2)


def test_sdxl_has_nothing_to_prune_at_full_resolution():
    costs = unit_costs(model_on_meta(UNet2DConditionModel, KNOWN_CONFIGS["sdxl"]), (2, 4, 128, 128))
    assert costs.full == pytest.approx(13.52e12, rel=1e-3)
    assert costs.depth[1] / costs.full == pytest.approx(0.0145, abs=5e-5)
    assert costs.call(FULL, 0.4).saved == 0


def test_every_depth_equals_the_flops_of_the_modules_it_runs():
    unet = model_on_meta(UNet2DConditionModel, TINY)
    costs = unit_costs(unet, (2, 4, 16, 16))
    inputs = {"encoder_hidden_states": torch.empty(2, 77, 8, device="meta")}

    def flops_without(modules) -> float:
        """FLOPs of a forward in which `modules` cost nothing: a hook takes their own count out again."""
        skipped = 0.0
        counter = FlopCounterMode(display=False)
        marks = []

        def before(*_):
            marks.append(counter.get_total_flops())

        def after(*_):
            nonlocal skipped
            skipped += counter.get_total_flops() - marks.pop()

        hooks = [h for m in modules for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
        with torch.no_grad(), counter:
            unet(torch.empty(2, 4, 16, 16, device="meta"), torch.empty(2, device="meta"), **inputs)
        for hook in hooks:
            hook.remove()
        return counter.get_total_flops() - skipped

    assert costs.full == flops_without([])
    units = enumerate_units(unet)
    for depth in range(1, units.num_units + 1):
        deeper = [module for module, unit in units.modules() if unit >= depth]
        assert costs.depth[depth] == pytest.approx(flops_without(deeper))


def test_the_model_is_not_touched():
    unet = UNet2DConditionModel(**TINY)
    before = {name: set(vars(module)) for name, module in unet.named_modules()}
    unit_costs(unet, (1, 4, 16, 16))
    assert {name: set(vars(module)) for name, module in unet.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_projections_shrink_with_the_tokens_and_products_with_their_square():
    assert attention_cost().kept(64) == 1000 / 4 + 4000 / 16


def test_text_tokens_of_joint_attention_are_never_pruned():
    cost = attention_cost(text_tokens=64)
    assert cost.kept(96) == 1000 * (160 / 320) + 4000 * (160 / 320) ** 2


def test_a_shallow_call_prunes_only_the_attention_it_runs():
    costs = costs_with(attention_cost(), attention_cost(unit=1))
    assert costs.call(FULL, 0.5).saved == 2 * costs.call(1, 0.5).saved > 0


def test_a_skipped_call_costs_nothing():
    assert costs_with(attention_cost()).call(0, 0.5).total == 0


def test_small_grids_and_low_resolutions_are_left_unpruned():
    assert costs_with(attention_cost(), min_tokens=257).call(1, 0.5).saved == 0
    assert costs_with(attention_cost(downsample=2)).call(1, 0.5).saved == 0
    assert costs_with(attention_cost(downsample=2), max_downsample=2).call(1, 0.5).saved > 0


def test_matching_compares_candidates_with_bases_and_pruned_with_kept():
    cost = costs_with(attention_cost()).call(1, 0.5)
    assert cost.matching == 2 * 2 * 8 * (192 * 64 + 128 * 128)
    assert costs_with(attention_cost(), recover="base").call(1, 0.5).matching == 2 * 2 * 8 * 192 * 64


def test_matching_is_spread_over_the_calls_that_reuse_it():
    once = costs_with(attention_cost()).call(1, 0.5).matching
    assert costs_with(attention_cost(), reuse_match=4).call(1, 0.5).matching == once / 4
    assert costs_with(attention_cost(), attention_cost(), share_match=True).call(1, 0.5).matching == once
    assert costs_with(attention_cost(), attention_cost(plans=False)).call(1, 0.5).matching == once


@pytest.mark.parametrize("depth", [-2, 3])
def test_an_unknown_depth_names_the_valid_ones(depth):
    with pytest.raises(ValueError, match=r"outside -1\.\.2"):
        costs_with().call(depth)


def test_units_of_a_dit_are_its_blocks():
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=4, sample_size=16, in_channels=4,
        out_channels=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    costs = unit_costs(model, (2, 4, 16, 16))
    assert costs.num_units == 4
    assert costs.depth[4] == costs.full
    assert [cost.grid for cost in costs.attention] == [(8, 8)] * 4
    assert costs.attention[0].linear == 4 * 2 * 2 * 64 * 64 * 64


def test_joint_attention_counts_its_text_tokens():
    model = SD3Transformer2DModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        dual_attention_layers=(0,),
    )  # fmt: skip
    costs = unit_costs(model, (1, 4, 16, 16), text_tokens=13)
    assert [(cost.name, cost.text_tokens, cost.plans) for cost in costs.attention] == [
        ("transformer_blocks.0.attn", 13, True),
        ("transformer_blocks.0.attn2", 0, False),
        ("transformer_blocks.1.attn", 13, True),
    ]
    assert costs.attention[0].linear == 8 * (64 + 13) * 16 * 16


def test_a_sample_shape_needs_four_numbers():
    with pytest.raises(ValueError, match="four numbers"):
        unit_costs(UNet2DConditionModel(**TINY), (4, 16, 16))
