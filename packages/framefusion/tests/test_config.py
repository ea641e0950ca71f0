from __future__ import annotations

import pytest
from framefusion import FrameFusionConfig
from pared_hooks import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cost", 0.0),
        ("cost", 1.1),
        ("similarity_threshold", 1.5),
        ("merge_floor", -0.1),
        ("budget_layers", 0),
        ("importance_queries", 0),
        ("prune_scope", "all"),
        ("average", "mean"),
        ("on_budget", "warn"),
        ("min_keep", -1),
        ("min_vision_tokens", -1),
        ("image_streams", "yes"),
        ("placement", "mlp"),
        ("merge_ratios", ()),
        ("merge_ratios", (0.3, 1.0)),
        ("importance_dtype", "float16"),
    ],
)
def test_a_wrong_value_names_its_field(field, value):
    with pytest.raises(ConfigError, match=field) as caught:
        FrameFusionConfig(**{field: value})
    assert isinstance(caught.value, ValueError)
    assert caught.value.field == field


def test_a_configuration_survives_json():
    config = FrameFusionConfig(cost=0.2, merge_ratios=(0.3, 0.2), budget_layers=28)
    assert FrameFusionConfig.from_json(config.to_json()) == config


def test_presets_are_those_of_the_published_code():
    assert FrameFusionConfig.preset("llava-video") == FrameFusionConfig()
    assert FrameFusionConfig.preset("minicpm-v").similarity_threshold == 0.7
    qwen = FrameFusionConfig.preset("qwen2-vl")
    assert (qwen.similarity_threshold, qwen.importance_queries, qwen.merge_floor, qwen.cost) == (0.5, 4, 0.1, 0.3)
    with pytest.raises(ConfigError, match="internvl"):
        FrameFusionConfig.preset("intern")
