"""The methods that are compared, each a configuration of the same code."""

from __future__ import annotations

from typing import Any

from mbq.config import MBQConfig

# The zoo's model answers in a word, so that its answers are weighed where they are predicted.
# Name -> options beside bits, group size and activations.
SEARCHED: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "AWQ (mse)": {"method": "awq", "loss": "mse"},
    "AWQ (mae)": {"method": "awq"},
    "MBQ": {"method": "mbq", "answer_positions": "predicting"},
    "MBQ, no floor": {"method": "mbq", "answer_positions": "predicting", "ratio_floor": None},
    "MBQ, at the answer": {"method": "mbq"},
    "token-weighted": {"method": "token"},
    "GPTQ": {"method": "gptq"},
}
INTEGER: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "SmoothQuant": {"method": "smoothquant"},
    "AWQ (mae)": {"method": "awq"},
    "MBQ": {"method": "mbq", "answer_positions": "predicting"},
}


def config(options: dict[str, Any], **more: Any) -> MBQConfig:
    """The configuration of one arm."""
    return MBQConfig(**options, **more)
