"""The claims of section 10 in miniature, on the zoo's Stable Diffusion of the procedural world."""

from __future__ import annotations

from collections import defaultdict

import pytest
from dato import DaToConfig, Policy, preset_names
from dato.bench import mechanism, quality, searching
from dato.bench.arms import Arm, sample
from pared_bench import BenchContext

PROMPTS = 64


def by_variant(records):
    """Values of records by variant and metric."""
    values = defaultdict(dict)
    for record in records:
        values[record.variant][record.metric] = record.value
    return values


def test_pruning_on_top_of_the_cache_costs_less_than_a_decibel_on_sixteen_prompts(zoo_pipe):
    from pared_bench.quality import psnr
    from pared_zoo.recipes.sd_world import GUIDANCE_SCALE, held_out_scenes
    from pared_zoo.world import caption

    texts = [caption(scene) for scene in held_out_scenes(16)]
    policy = Policy.from_preset("sd15-coco")
    configs = [None, DaToConfig(policy=policy.with_ratio(0.0)), DaToConfig(policy=policy.with_ratio(0.4))]
    base, cached, pruned = (
        sample(zoo_pipe, texts, Arm("arm", config), guidance_scale=GUIDANCE_SCALE) for config in configs
    )
    with_cache, with_both = (float(psnr(one.images, base.images).mean()) for one in (cached, pruned))
    assert with_both > with_cache - 1
    assert base.flops > 4 * cached.flops > 4 * pruned.flops


@pytest.fixture(scope="module")
def found(zoo_pipe, tmp_path_factory):
    """Records of the search, and the policies it found at the cost of the presets."""
    return searching.run(BenchContext(out=tmp_path_factory.mktemp("search")), zoo_pipe)


@pytest.fixture(scope="module")
def scores(zoo_pipe, found):
    return by_variant(quality.run(BenchContext(), zoo_pipe, PROMPTS, found[1]))


@pytest.mark.proof
@pytest.mark.parametrize("preset", preset_names())
def test_pruning_on_top_of_the_cache_costs_less_than_a_decibel(scores, preset):
    assert scores[f"{preset}: dato"]["psnr"] > scores[f"{preset}: cache only"]["psnr"] - 1


@pytest.mark.proof
def test_pruning_similar_tokens_beats_pruning_random_ones(scores):
    assert scores["sd15-coco: dato"]["psnr"] > scores["sd15-coco: random pruned tokens"]["psnr"]


@pytest.mark.proof
def test_searched_policies_beat_uniform_caching_at_their_cost(scores, found):
    for number in range(1, len(found[1]) + 1):
        searched, uniform = scores[f"searched-{number}: dato"], scores[f"searched-{number}: DeepCache uniform"]
        assert searched["psnr"] > uniform["psnr"]


@pytest.mark.proof
def test_the_search_beats_the_presets(found):
    records = by_variant(found[0])
    assert records["search"]["hypervolume"] > records["presets"]["hypervolume"]
    assert records["search"]["presets matched or dominated"] == len(preset_names())


@pytest.mark.proof
def test_pruning_keeps_more_of_the_dynamics_than_the_cache_alone(zoo_pipe):
    dynamics = {
        name: values["dynamics"] for name, values in by_variant(mechanism.run(BenchContext(), zoo_pipe)).items()
    }
    for preset in preset_names():
        assert dynamics[f"{preset}: dato"] >= dynamics[f"{preset}: cache only"]
