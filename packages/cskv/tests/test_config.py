"""The configuration of section 8: defaults, JSON, and every refusal."""

from __future__ import annotations

import json

import pytest
from cskv import CSKVConfig
from pared_hooks import ConfigError

WRONG = [
    ("k_density", 0.0),
    ("k_density", 1.5),
    ("v_density", -0.25),
    ("k_rank", 0),
    ("k_rank", ()),
    ("v_rank", (4, 0)),
    ("v_rank", 2.5),
    ("init", "random"),
    ("asvd_alpha", 1.5),
    ("window", -1),
    ("window_policy", "dilated"),
    ("k_bits", 3),
    ("v_bits", 16),
    ("quant_group", 4),
    ("quant_group", 20),
    ("v_group", 0),
    ("zero_point", "none"),
    ("layers", (0, 0)),
    ("layers", ()),
    ("layers", (-1,)),
    ("chunked_prefill", "fast"),
    ("backend", "cuda"),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_is_refused_with_its_field(field, value):
    with pytest.raises(ConfigError, match=field) as error:
        CSKVConfig(**{field: value})
    assert isinstance(error.value, ValueError)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("side", ["k", "v"])
def test_a_rank_and_a_density_of_one_side_exclude_each_other(side):
    with pytest.raises(ConfigError, match=f"{side}_density"):
        CSKVConfig(**{f"{side}_rank": 8, f"{side}_density": 0.3})


def test_a_block_needs_a_window_and_quantises_whole_windows():
    with pytest.raises(ConfigError, match="window"):
        CSKVConfig(window=0, window_policy="block")
    with pytest.raises(ConfigError, match="quant_group"):
        CSKVConfig(window=16, window_policy="block", k_bits=4)
    CSKVConfig(window=16, window_policy="block", k_bits=4, quant_group=16)
    CSKVConfig(window=1, window_policy="block")


@pytest.mark.parametrize(
    "config",
    [
        CSKVConfig(),
        CSKVConfig(k_rank=8, v_rank=(16, 24), k_bits=4, v_bits=2, v_group=8, layers=(1, 3)),
        CSKVConfig(k_density=1, window=8, window_policy="block", quant_group=8, zero_point="clamped"),
    ],
)
def test_a_configuration_survives_json(config):
    assert CSKVConfig.from_json(config.to_json()) == config


def test_an_unknown_key_is_refused_by_name():
    values = json.loads(CSKVConfig().to_json()) | {"windows": 3}
    with pytest.raises(ConfigError, match="windows"):
        CSKVConfig.from_dict(values)
