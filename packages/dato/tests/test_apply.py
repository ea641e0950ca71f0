"""What `apply` does to real architectures built tiny: pruning, statistics, the clock."""

from __future__ import annotations

import pytest
import torch
from dato import FULL, DaToConfig, Policy
from dato.apply import applied, guidance_groups
from dato.functional import TokenPlan, match_tokens
from dato.pruning import gather_mask

POLICY = Policy((FULL, 1, 0, 2, 1, 0), 0.5)
CONFIG = DaToConfig(policy=POLICY, min_tokens=1)


def attended_tokens(module):
    """Numbers of tokens that reach an attention module's query projection from now on."""
    seen = []
    module.to_q.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


def run(unet, inputs, **conditions):
    with torch.no_grad():
        return [unet(*call, **conditions).sample for call in inputs]


def test_self_attention_runs_on_the_kept_tokens_alone(small_unet, calls):
    unet = small_unet()
    block = unet.up_blocks[-1].attentions[-1].transformer_blocks[0]
    self_attention, cross_attention = attended_tokens(block.attn1), attended_tokens(block.attn2)
    with applied(unet, CONFIG) as handle:
        run(unet, calls(6))
        kept = handle.stats()["tokens_kept"]["up_blocks.1.attentions.1.transformer_blocks.0"]
    assert self_attention == [128] * 4
    assert cross_attention == [256] * 4
    assert kept == {"tokens": 256, "kept": 128, "calls": 4, "plans": 4}


def test_pruned_tokens_take_the_output_of_their_source(small_unet, calls):
    """The block's output against sections 3.4 and 3.5 written out, with the plan that alpha = 0 makes predictable."""
    unet = small_unet()
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    given, after = [], []
    block.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    block.norm2.register_forward_pre_hook(lambda _, args: after.append(args[0].clone()))
    with applied(unet, DaToConfig(policy=POLICY, noise_alpha=0.0)):
        run(unet, calls(1))
    hidden = given[0]
    # No dynamics and no noise: the first token of each 2 x 2 patch of the 16 x 16 grid.
    base = torch.tensor([y * 16 + x for y in range(0, 16, 2) for x in range(0, 16, 2)]).repeat(2, 1)
    plan = match_tokens(hidden, base, 128)
    samples = torch.arange(2)[:, None]
    with torch.no_grad():
        attended = block.attn1(block.norm1(hidden)[samples, plan.keep_idx])
    torch.testing.assert_close(after[0], hidden + attended[samples, plan.gather_map], rtol=1e-5, atol=1e-5)


def test_blocks_below_full_resolution_are_pruned_only_on_request(sd_unet, calls):
    for max_downsample, tokens in ((1, {256}), (2, {256, 64}), (4, {256, 64, 16})):
        with applied(sd_unet, CONFIG.replace(max_downsample=max_downsample)) as handle:
            run(sd_unet, calls(1))
            kept = handle.stats()["tokens_kept"]
        assert {block["tokens"] for block in kept.values()} == tokens
        assert len(kept) == {1: 5, 2: 10, 4: 15}[max_downsample]


def test_small_token_grids_stay_unpruned(small_unet, calls):
    unet = small_unet()
    with applied(unet, CONFIG.replace(min_tokens=257)) as handle:
        run(unet, calls(6))
        assert handle.stats()["tokens_kept"] == {}


def test_kept_counts_are_rounded_up_to_a_multiple(small_unet, calls):
    unet = small_unet()
    with applied(unet, CONFIG.replace(kept_multiple=96)) as handle:
        run(unet, calls(6))
        assert {block["kept"] for block in handle.stats()["tokens_kept"].values()} == {192}


@pytest.mark.parametrize(
    ("options", "first", "others"),
    [({}, 4, 4), ({"reuse_match": 2}, 2, 2), ({"share_match": True}, 4, 0)],
    ids=["own", "reused", "shared"],
)
def test_plans_are_reused_over_calls_and_shared_between_blocks(small_unet, calls, options, first, others):
    unet = small_unet()
    with applied(unet, CONFIG.replace(policy=Policy((FULL, FULL, FULL, FULL), 0.5), **options)) as handle:
        run(unet, calls(4))
        made = [block["plans"] for block in handle.stats()["tokens_kept"].values()]
    assert made == [first, others, others]


def selected(unet, inputs, config, **attributes):
    """Base tokens of every plan of a run, by call of the matching."""
    import dato.pruning

    seen = []
    original = dato.pruning.match_tokens

    def spy(metric, base_idx, *args, **kwargs):
        seen.append(base_idx.clone())
        return original(metric, base_idx, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dato.pruning, "match_tokens", spy)
        with applied(unet, config):
            run(unet, inputs)
    return seen


@pytest.mark.parametrize("selection", ["dynamics", "similarity"])
def test_guidance_halves_share_base_tokens_when_aligned(small_unet, calls, selection):
    unet = small_unet()
    config = CONFIG.replace(selection=selection)
    assert all(torch.equal(*base) for base in selected(unet, calls(6), config))
    assert not all(torch.equal(*base) for base in selected(unet, calls(6), config.replace(cfg_aligned=False)))
    odd = selected(unet, calls(6, batch=3), config)
    assert not all(torch.equal(base[0], base[1]) for base in odd)


def test_random_selection_is_the_same_for_all_samples_and_changes_with_the_call(small_unet, calls):
    bases = selected(small_unet(), calls(6), CONFIG.replace(selection="random"))
    assert all(torch.equal(*base) for base in bases)
    assert not torch.equal(bases[0], bases[1])


def test_base_tokens_are_where_the_prediction_changed_most(small_unet, calls):
    unet = small_unet()
    config = CONFIG.replace(policy=Policy((FULL, FULL, FULL), 0.5), noise_alpha=0.0, cfg_aligned=False)
    inputs = calls(3)
    with applied(unet, config):
        first, second, _ = run(unet, inputs)
    change = (second - first).abs().mean(dim=1).unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    offset = change.argmax(dim=-1)
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    expected = ((2 * row + offset // 2) * 16 + 2 * column + offset % 2).flatten(1)
    assert torch.equal(selected(unet, inputs, config)[-1], expected)


def test_skipped_calls_enter_the_dynamics_only_on_request(small_unet, calls):
    unet = small_unet()
    config = CONFIG.replace(policy=Policy((FULL, FULL, 0, FULL), 0.5), noise_alpha=0.0)
    inputs = calls(4)
    first_of_each_patch = torch.tensor([y * 16 + x for y in range(0, 16, 2) for x in range(0, 16, 2)]).repeat(2, 1)
    assert torch.equal(selected(unet, inputs, config.replace(diff_update="every"))[-1], first_of_each_patch)
    assert not torch.equal(selected(unet, inputs, config)[-1], first_of_each_patch)


def test_sign_flips_choose_the_least_dynamic_tokens(small_unet, calls):
    unet = small_unet()
    config = CONFIG.replace(policy=Policy((FULL, FULL, FULL), 0.5), noise_alpha=0.0, sign_flip_prob=1.0)
    inputs = calls(3)
    with applied(unet, config):
        first, second, _ = run(unet, inputs)
    change = (second - first).abs().mean(dim=1).flatten(1)
    base = selected(unet, inputs, config)[-1]
    assert change.gather(1, base)[0].mean() < change[0].mean()


def test_a_self_attention_mask_hides_the_same_tokens_when_pruned(rng):
    plan = match_tokens(torch.randn(2, 16, 4, generator=rng), torch.tensor([[0, 5], [1, 6]]), 6)
    mask = torch.randn(2, 16, generator=rng)
    samples = torch.arange(2)[:, None]
    expected = mask[samples, plan.keep_idx]
    assert torch.equal(gather_mask(mask, plan, 4), expected)
    assert torch.equal(gather_mask(mask[:, None], plan, 4), expected[:, None])
    per_head = mask[:, None].repeat_interleave(4, dim=0)
    assert torch.equal(gather_mask(per_head, plan, 4), expected[:, None].repeat_interleave(4, dim=0))
    square = torch.randn(1, 1, 16, 16, generator=rng)
    gathered = gather_mask(square, plan, 4)
    for sample in range(2):
        kept = plan.keep_idx[sample]
        assert torch.equal(gathered[sample, 0], square[0, 0][kept][:, kept])


def test_a_processor_that_is_not_known_leaves_its_block_unpruned_with_one_warning(small_unet, calls):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Reshaping(AttnProcessor2_0):
        pass

    unet = small_unet()
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1.set_processor(Reshaping())
    tokens = attended_tokens(block.attn1)
    with applied(unet, CONFIG) as handle:
        with pytest.warns(UserWarning, match="Reshaping.*unpruned") as warned:
            run(unet, calls(6))
        assert len(handle.stats()["tokens_kept"]) == 2
    assert len(warned) == 1
    assert set(tokens) == {256}


def pixart():
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        sample_size=16,
        cross_attention_dim=16,
        caption_channels=12,
        in_channels=4,
        out_channels=8,
        norm_type="ada_norm_single",
    )
    inputs = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs, lambda block: (block.attn1,)


def sd3(dual=()):
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=16,
        dual_attention_layers=dual,
    )
    inputs = {"encoder_hidden_states": torch.randn(2, 5, 12), "pooled_projections": torch.randn(2, 12)}
    return model, inputs, lambda block: tuple(m for m in (block.attn, block.attn2) if m is not None)


@pytest.mark.parametrize("build", [pixart, sd3, lambda: sd3((0, 1))], ids=["pixart", "sd3", "sd3-dual"])
@torch.no_grad()
def test_transformers_prune_image_tokens_and_never_text(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs, attentions = build()
        samples = [torch.randn(2, 4, 16, 16) for _ in range(6)]
    model.eval()
    text = [attended_text(m) for m in attentions(model.transformer_blocks[0]) if hasattr(m, "add_k_proj")]
    tokens = [attended_tokens(module) for module in attentions(model.transformer_blocks[0])]
    with applied(model, CONFIG) as handle:
        for index, sample in enumerate(samples):
            output = model(sample, timestep=torch.tensor([900 - index] * 2), **inputs).sample
            assert output.isfinite().all()
        stats = handle.stats()
    assert stats["calls"] == {"full": 1, "depth-1": 2, "skip": 2, "depth-2": 1}
    assert all(seen == [32] * 4 for seen in tokens)
    assert all(seen == [5] * 4 for seen in text if seen)
    assert stats["flops"]["saved_by_pruning"] > 0


def attended_text(module):
    seen = []
    if module.add_k_proj is not None:
        module.add_k_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


@torch.no_grad()
def test_skip_layer_guidance_calls_of_sd3_are_not_counted():
    model, inputs, _ = sd3()
    model.eval()
    sample, timestep = torch.randn(2, 4, 16, 16), torch.tensor([900, 900])
    with applied(model, CONFIG) as handle:
        model(sample, timestep=timestep, **inputs)
        model(sample, timestep=timestep, **inputs, skip_layers=[1])
        assert handle.stats()["calls"] == {"full": 1}


def test_flops_are_split_into_cache_skip_pruning_and_matching(sd_unet, calls):
    from dato import unit_costs

    with applied(sd_unet, CONFIG) as handle:
        run(sd_unet, calls(6))
        flops = handle.stats()["flops"]
    costs = unit_costs(sd_unet, (2, 4, 16, 16), CONFIG)
    assert flops["without_dato"] == 6 * costs.full
    assert flops["saved_by_skip"] == 2 * costs.full
    assert flops["saved_by_cache"] == pytest.approx(3 * costs.full - 2 * costs.depth[1] - costs.depth[2])
    assert flops["with_dato"] == pytest.approx(POLICY.cost(costs))


def test_calls_of_separate_guidance_branches_have_their_own_stores(small_unet, calls):
    unet = small_unet()
    config = CONFIG.replace(policy=Policy((FULL, 0, FULL, 0), 0.0))
    cond, uncond = calls(4, batch=1), calls(4, batch=1)
    with torch.no_grad(), applied(unet, config) as handle:
        handle.calls_per_step = 2
        outputs = [[unet(*branch[index]).sample for branch in (cond, uncond)] for index in range(4)]
        assert handle.stats()["calls"] == {"full": 4, "skip": 4}
    for branch in (0, 1):
        assert torch.equal(outputs[1][branch], outputs[0][branch])
        assert torch.equal(outputs[3][branch], outputs[2][branch])
    assert not torch.equal(outputs[1][0], outputs[1][1])


def test_a_run_without_a_pipeline_wraps_at_the_length_of_the_policy(small_unet, calls):
    unet = small_unet()
    sample, _, text = calls(1)[0]
    with torch.no_grad(), applied(unet, CONFIG) as handle:
        for _ in range(12):
            unet(sample, 500, text)
        assert handle.stats()["calls"] == {"full": 2, "depth-1": 4, "skip": 4, "depth-2": 2}


def test_start_run_resamples_the_policy(small_unet, calls):
    unet = small_unet()
    with applied(unet, CONFIG) as handle:
        handle.start_run(num_calls=12)
        run(unet, calls(12))
        assert handle.stats()["calls"] == POLICY.for_run(12).actions()


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ({}, 5),
        ({"do_classifier_free_guidance": True}, 2),
        ({"do_classifier_free_guidance": False}, 1),
        ({"do_classifier_free_guidance": True, "do_perturbed_attention_guidance": True}, 3),
    ],
    ids=str,
)
def test_guidance_groups_are_read_from_the_pipeline(attributes, groups):
    assert guidance_groups(type("Pipeline", (), attributes)(), 5) == groups


def test_kernel_choices_agree(small_unet, calls):
    unet = small_unet()
    inputs = calls(6)
    outputs = []
    for choice in ("auto", "torch"):
        with applied(unet, CONFIG.replace(kernels=choice)):
            outputs.append(run(unet, inputs))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)


def test_no_plan_holds_an_index_outside_the_tokens(small_unet, calls):
    plans: list[TokenPlan] = []
    import dato.pruning

    original = dato.pruning.match_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dato.pruning, "match_tokens", lambda *a, **k: plans.append(original(*a, **k)) or plans[-1])
        unet = small_unet()
        with applied(unet, CONFIG):
            run(unet, calls(6, (9, 14)))
    assert plans
    for plan in plans:
        assert plan.gather_map.max() < plan.num_kept
        assert plan.keep_idx.max() < 9 * 14
