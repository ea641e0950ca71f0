"""Plans as data: files, checks, other resolutions and numbers of steps."""

from __future__ import annotations

import json
import random

import pytest
from dfa_models import MODELS
from ditfastattn2 import Config, LayerPlan, Plan, PlanMismatch
from ditfastattn2 import functional as f
from pared_hooks import ConfigError, DenoiserView


@pytest.fixture
def plan():
    return Plan(
        model="SD3Transformer2DModel",
        model_digest="0123456789abcdef",
        layers=(LayerPlan("blocks.0.attn", 3, "last"), LayerPlan("blocks.0.attn2", 3, None)),
        num_vision=256,
        num_text=40,
        num_steps=3,
        config=Config(block=(16, 16)),
        choices={"cond": ("--- ---", "-ab cda", "aab ---")},
    )


def test_a_plan_survives_its_file(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["schema"] == "pared.dfa2/1"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_of_flux_for_50_steps_is_a_small_file(tmp_path):
    draw = random.Random(0)
    layers = tuple(LayerPlan(f"transformer_blocks.{index}.attn", 24, "first", 0.01234, 0.1234) for index in range(57))
    rows = tuple(" ".join("".join(draw.choice("-abcd") for _ in range(24)) for _ in layers) for _ in range(50))
    plan = Plan("FluxTransformer2DModel", "0" * 16, layers, 16384, 512, 50, Config(), {"cond": rows})
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_size < 200_000
    assert Plan.load(tmp_path / "plan.json") == plan


def test_densities_are_those_of_the_windows(plan):
    window = {"a": 0, "b": 16, "c": 8, "d": 4}
    expected = f.plan_density([-1, window["a"], window["b"]], 256, 40, False, (16, 16))
    assert plan.density_at("cond", 1, 0) == pytest.approx(expected)
    # The second attention of a block has no text.
    expected = f.plan_density([window["c"], window["d"], 0], 256, 0, False, (16, 16))
    assert plan.density_at("cond", 1, 1) == pytest.approx(expected)
    assert plan.density_at("cond", 0, 0) == 1


def test_kept_weighs_layers_by_their_tokens(plan):
    computed = sum(
        3 * tokens**2 * plan.density_at("cond", step, layer)
        for layer, tokens in ((0, 296), (1, 256))
        for step in range(3)
    )
    assert plan.kept() == pytest.approx(computed / (9 * (296**2 + 256**2)))


def test_the_summary_tells_layers_steps_methods_and_errors(plan):
    layer = LayerPlan("blocks.0.attn", 3, "last", mean_error=0.0123, max_error=0.25)
    text = plan.replace(layers=(layer, plan.layers[1])).summary()
    assert "blocks.0.attn2" in text
    assert "error 0.0123, at most 0.2500" in text
    assert "c arrow:1/16" in text
    assert f"{1 - plan.kept():.1%} of attention removed" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"choices": {}}, "choices"),
        ({"choices": {"cond": ("--- ---",)}}, "choices"),
        ({"choices": {"cond": ("--- ---", "-ab cd", "aab ---")}}, "choices"),
        ({"choices": {"cond": ("--- ---", "-ab cde", "aab ---")}}, "choices"),
        ({"num_vision": 0}, "num_vision"),
        ({"num_steps": 0}, "num_steps"),
        ({"layers": ()}, "layers"),
        ({"guidance": "maybe"}, "guidance"),
    ],
)
def test_wrong_fields_are_named(plan, change, named):
    with pytest.raises(ConfigError, match=named):
        plan.replace(**change)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "pared.dfa2/2"}', '{"schema": "pared.dfa2/1"}'])
def test_files_that_are_no_plan_are_refused(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError):
        Plan.load(tmp_path / "plan.json")


# Other runs


def test_windows_follow_the_resolution(plan):
    larger = plan.retarget(V=1024, T=77)
    assert (larger.num_vision, larger.num_text) == (1024, 77)
    assert larger.choices == plan.choices
    expected = f.plan_density([-1, 0, 64], 1024, 77, False, (16, 16))
    assert larger.density_at("cond", 1, 0) == pytest.approx(expected)


def test_steps_are_mapped_by_position_and_reuse_needs_its_predecessor(plan):
    rows = tuple(f"{letter}bc ---" for letter in "-aaaabaaa")
    plan = plan.replace(num_steps=9, choices={"cond": rows})
    fewer = plan.retarget(steps=5).choices["cond"]
    # Steps 0, 2, 4, 6, 8 of the old plan: what they reused is not computed any more.
    assert fewer == tuple(f"{letter}bc ---" for letter in "-----")
    more = plan.retarget(steps=17).choices["cond"]
    assert more[0] == rows[0]
    assert more[-1] == rows[-1]
    assert [row[0] for row in more].count("a") > 9
    assert plan.retarget(steps=9) == plan


def test_a_retargeted_plan_never_reuses_at_its_first_step(plan):
    plan = plan.replace(choices={"cond": ("aaa aaa",) * 3})
    for steps in (1, 2, 3, 7):
        if steps != 3:
            assert "a" not in plan.retarget(steps=steps).choices["cond"][0]


# Models


def test_a_plan_lists_what_differs_in_a_model(plan_of):
    sd3, flux = MODELS["sd3"](), MODELS["flux"]()
    plan = plan_of(sd3)
    view = DenoiserView.of(sd3.model)
    assert plan.differences(view) == []
    for changed, difference in (
        (plan.replace(model="X"), "class SD3Transformer2DModel instead of X"),
        (plan.replace(model_digest="x"), "another configuration"),
    ):
        with pytest.raises(PlanMismatch, match=difference):
            changed.check_model(view)
    assert plan.replace(model_digest="x").differences(view, strict=False) == []
    found = plan.differences(DenoiserView.of(flux.model))
    assert any("class FluxTransformer2DModel" in one for one in found)
    assert any("layers" in one for one in found)


def test_a_plan_fits_a_model_whose_configuration_leaves_out_defaults(plan_of):
    from diffusers.configuration_utils import FrozenDict

    tiny = MODELS["sd3"]()
    plan, view = plan_of(tiny), DenoiserView.of(tiny.model)
    kept = {name: value for name, value in tiny.model.config.items() if name not in ("qk_norm", "_class_name")}
    tiny.model._internal_dict = FrozenDict(kept | {"dual_attention_layers": []})
    assert plan.differences(view) == []
    tiny.model._internal_dict = FrozenDict(kept | {"qk_norm": "rms_norm"})
    assert plan.differences(view) == ["another configuration of SD3Transformer2DModel"]


def test_another_number_of_heads_is_a_difference(plan_of):
    import dfa_models

    plan = plan_of(MODELS["sd3"]())
    found = plan.differences(DenoiserView.of(dfa_models.sd3(heads=6).model))
    assert found == ["[6] heads instead of [4]"]
