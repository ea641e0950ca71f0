from __future__ import annotations

import pytest
from dato import FULL, DaToConfig, Policy, PolicyError
from pared_hooks import ConfigError


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": "no-such"},
        {"policy": 3},
        {"policy": Policy([FULL], 0.8)},
        {"patch": (0, 2)},
        {"patch": (1, 1)},
        {"patch": (2, 9)},
        {"patch": (2, 2, 2)},
        {"max_downsample": 3},
        {"diff_gamma": -1.0},
        {"diff_gamma": float("inf")},
        {"noise_alpha": float("nan")},
        {"normalize_diff": 1},
        {"diff_update": "always"},
        {"sign_flip_prob": 1.5},
        {"selection": "best"},
        {"recover": "nearest"},
        {"metric": "keys"},
        {"cfg_aligned": "yes"},
        {"cfg_groups": 0},
        {"reuse_match": 0},
        {"share_match": None},
        {"kept_multiple": 0},
        {"reuse_controlnet": 2},
        {"backend": "compiled"},
        {"min_tokens": 0},
        {"allow_grad": "no"},
        {"seed": 0.5},
        {"kernels": "cuda"},
    ],
    ids=lambda changes: f"{next(iter(changes))}={next(iter(changes.values()))}",
)
def test_a_wrong_value_names_its_field(changes):
    with pytest.raises(ConfigError) as caught:
        DaToConfig(**changes)
    assert caught.value.field == next(iter(changes))


def test_an_unknown_policy_is_a_policy_error():
    with pytest.raises(PolicyError, match="sd15-coco"):
        DaToConfig(policy="no-such")


def test_the_largest_ratio_depends_on_the_patch():
    DaToConfig(policy=Policy([FULL], 0.8), patch=(3, 3))
    with pytest.raises(ConfigError, match=r"at most 0\.5"):
        DaToConfig(policy=Policy([FULL], 0.6), patch=(1, 2))


@pytest.mark.parametrize("policy", ["sd15-mild", Policy([FULL, 1, 0], [0.1, 0.2, 0.3])])
def test_json_brings_the_config_back(policy):
    config = DaToConfig(policy=policy, patch=(1, 2), seed=None, reuse_match=3)
    assert DaToConfig.from_json(config.to_json()) == config


def test_a_named_policy_is_resampled_to_the_run():
    assert DaToConfig(policy="uniform-4").policy_for(9).depth == (FULL, 1, 1, 1, FULL, 1, 1, 1, FULL)


def test_image_to_image_takes_the_tail_of_the_policy():
    policy = DaToConfig(policy="sd15-coco").policy_for(51, first_call=20)
    assert policy.depth == (FULL, *Policy.from_preset("sd15-coco").depth[21:])
