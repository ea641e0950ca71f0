"""The methods that are compared, each a configuration of the same code."""

from __future__ import annotations

from typing import Any

from mbq.config import MBQConfig

# The zoo's model answers in a word, so that its answers are weighed where they are predicted.
MBQ = {"method": "mbq", "answer_positions": "predicting"}
# Name -> options beside bits, group size and activations.
WEIGHTS: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "AWQ (mse)": {"method": "awq", "loss": "mse"},
    "AWQ (mae)": {"method": "awq"},
    "MBQ": MBQ,
    "MBQ, no floor": {**MBQ, "ratio_floor": None},
    "MBQ, at the answer": {"method": "mbq"},
    "answer alone": {**MBQ, "vision_weight": 0.0},
    "vision alone": {**MBQ, "vision_weight": 1e6},
    "token-weighted": {"method": "token"},
    "GPTQ": {"method": "gptq"},
}
INTEGER: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "SmoothQuant": {"method": "smoothquant"},
    "AWQ (mse)": {"method": "awq", "loss": "mse"},
    "AWQ (mae)": {"method": "awq"},
    "MBQ": MBQ,
}
# Those of the comparisons that are made harder.
SEARCHED = {name: WEIGHTS[name] for name in ("RTN", "AWQ (mse)", "AWQ (mae)", "MBQ")}


def config(options: dict[str, Any], **more: Any) -> MBQConfig:
    """The configuration of one arm."""
    return MBQConfig(**options, **more)
