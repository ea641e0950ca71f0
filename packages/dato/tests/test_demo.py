"""The demo and the bench on the zoo's model, made small."""

from __future__ import annotations

import pytest
import torch
from dato import PolicyError, demo
from dato.bench import arms, quality, run, speed
from dato.bench.controls import random_pruning
from dato.pruning import match_tokens
from pared_bench import BenchContext, DemoContext


@pytest.fixture
def few_prompts(monkeypatch):
    """Two prompts, so that a demo ends in seconds."""
    monkeypatch.setattr(demo, "PROMPTS", 2)
    monkeypatch.setattr(demo, "SHOWN", 2)
    monkeypatch.setattr(quality, "REFERENCE_PICTURES", 20)


def test_the_demo_compares_four_ways_to_sample_the_same_prompts(few_prompts, tmp_path):
    result = demo.run(DemoContext(out=tmp_path), preset="sd15-mild")
    (table,) = result.tables
    assert [row[0] for row in table.rows] == ["base", "cache only", "dato", "fewer steps"]
    assert table.rows[0][3] != table.rows[2][3]
    assert result.metrics["dato.flops_ratio"] > result.metrics["base.flops_ratio"] == 1
    assert len(result.figures) == 1


def test_the_demo_shows_a_prompt_of_the_user(few_prompts, tmp_path):
    result = demo.run(DemoContext(out=tmp_path), prompt="a large red circle")
    assert "a large red circle" in result.figures[0].caption


def test_an_unknown_preset_stops_the_demo_before_it_samples(tmp_path):
    with pytest.raises(PolicyError, match="sd15-coco"):
        demo.run(DemoContext(out=tmp_path), preset="sd15-cocoa")


@pytest.mark.parametrize(
    ("options", "named"),
    [({"experiments": "quality,sped"}, "sped"), ({"prompts": 1}, "prompts=1"), ({"prompts": 501}, "prompts=501")],
)
def test_wrong_options_of_the_bench_are_named(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        run(BenchContext(out=tmp_path), **options)


def test_latents_of_a_prompt_do_not_depend_on_the_number_of_prompts(zoo_pipe):
    assert torch.equal(arms.initial_latents(zoo_pipe, 5, 3)[:2], arms.initial_latents(zoo_pipe, 2, 3))
    assert not torch.equal(arms.initial_latents(zoo_pipe, 2, 3), arms.initial_latents(zoo_pipe, 2, 4))


def test_baselines_cost_what_the_policy_costs(zoo_pipe):
    costs = arms.costs_of(zoo_pipe, 1)
    target = arms.PRESET_CALLS * costs.full / 4
    assert arms.nearest_uniform(costs, target).cost(costs) == pytest.approx(target, rel=0.1)
    assert arms.nearest_steps(costs, target, 0) * costs.full == pytest.approx(target, rel=0.1)


def test_random_pruning_prunes_as_many_tokens_and_no_base_token(rng):
    from dato import pruning

    metric = torch.randn(2, 16, 4, generator=rng)
    base = torch.tensor([[0, 2, 8, 10], [1, 3, 9, 11]])
    with random_pruning(seed=0):
        plans = [pruning.match_tokens(metric, base, 6) for _ in range(2)]
    assert pruning.match_tokens is match_tokens
    for plan in plans:
        assert plan.prune_idx.shape == (2, 6)
        assert not any(torch.isin(plan.prune_idx[row], base[row]).any() for row in range(2))
        assert torch.equal(plan.keep_idx.gather(1, plan.gather_map).gather(1, plan.keep_idx), plan.keep_idx)
    assert not torch.equal(plans[0].prune_idx, plans[1].prune_idx)


def test_the_speed_bench_times_every_variant_against_the_plain_model(monkeypatch):
    small = {**speed.CPU_CONFIG, "block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 16}
    small |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2}
    small |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1}
    monkeypatch.setattr(speed, "PRESET_CALLS", 6)
    setting = speed.Setting("tiny", small, 16, 2, torch.float32)
    variants = {"base": None, "cache": speed.DaToConfig(policy=speed.Policy.uniform(6, 3, ratio=0.0))}
    records = speed.measure(setting, torch.device("cpu"), variants, rounds=1)
    assert {record.variant for record in records} == {"base", "cache"}
    assert all(record.settings["weights"] == "random" for record in records)
