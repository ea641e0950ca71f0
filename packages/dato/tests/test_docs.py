"""The numbers on the pages are those that the FLOP model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from dato import DaToConfig, Policy, unit_costs
from dato.adapters.known_configs import KNOWN_CONFIGS
from dato.costs import UnitCosts, model_on_meta
from diffusers import UNet2DConditionModel

PAGE = (Path(__file__).parents[1] / "docs" / "how-it-works.md").read_text(encoding="utf-8")
MODELS = {"SD 1.5": ("sd15", 64), "SD 2.1": ("sd21", 96), "SDXL": ("sdxl", 128)}


def table(heading: str) -> list[list[str]]:
    """Cells of the rows below the table heading that begins with `heading`."""
    lines = PAGE[PAGE.index(heading) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture(scope="module")
def costs_of():
    known: dict[tuple[str, int], UnitCosts] = {}

    def make(model: str, max_downsample: int = 1) -> UnitCosts:
        if (model, max_downsample) not in known:
            name, side = MODELS[model]
            unet = model_on_meta(UNet2DConditionModel, KNOWN_CONFIGS[name])
            config = DaToConfig(max_downsample=max_downsample)
            known[model, max_downsample] = unit_costs(unet, (2, 4, side, side), config)
        return known[model, max_downsample]

    return make


def test_the_table_of_calls_is_that_of_the_flop_model(costs_of):
    rows = table("| Model | full call")
    assert len(rows) == len(MODELS)
    for model, full, shallow, share, attention_share, attention_in_full in rows:
        # Shares count the attention of every resolution, also where it is not pruned by default.
        costs = costs_of(model.split(",")[0], 4)
        attention = sum(cost.total for cost in costs.attention if cost.unit < 1) / costs.depth[1]
        assert full == f"{costs.full / 1e12:.4g} TFLOP"
        assert shallow == f"{costs.depth[1] / 1e9:.1f} GFLOP"
        assert share == f"{costs.depth[1] / costs.full:.2%}".replace("%", " %")
        assert attention_share == (f"{attention:.0%}".replace("%", " %") if attention else "none")
        whole = sum(cost.total for cost in costs.attention) / costs.full
        assert attention_in_full == f"{whole:.1%}".replace("%", " %")


def test_the_table_of_policies_is_that_of_the_flop_model(costs_of):
    rows = table("| Policy | model")
    assert len(rows) == 5
    for preset, model, cached, pruned, matched in rows:
        costs = costs_of(model.split(",")[0], 2 if "max_downsample=2" in model else 1)
        policy = Policy.from_preset(preset.strip("`"))
        run = policy.num_calls * costs.full
        calls = [costs.call(depth, 0.4) for depth in (-1, *policy.depth[1:])]
        assert cached == f"{policy.with_ratio(0.0).speedup(costs):.2f}x"
        assert pruned == f"{run / sum(call.computed - call.saved for call in calls):.2f}x"
        assert matched == f"{policy.with_ratio(0.4).speedup(costs):.2f}x"
