"""The methods that are compared, each a configuration of the same code."""

from __future__ import annotations

from typing import Any

from mbq.config import MBQConfig

# Name -> options beside bits, group size and activations.
SEARCHED: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "AWQ (mse)": {"method": "awq", "loss": "mse"},
    "AWQ (mae)": {"method": "awq"},
    "MBQ": {"method": "mbq"},
    "MBQ, no floor": {"method": "mbq", "ratio_floor": None},
    "token-weighted": {"method": "token"},
    "GPTQ": {"method": "gptq"},
}
INTEGER: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "SmoothQuant": {"method": "smoothquant"},
    "AWQ (mae)": {"method": "awq"},
    "MBQ": {"method": "mbq"},
}


def config(options: dict[str, Any], **more: Any) -> MBQConfig:
    """The configuration of one arm."""
    return MBQConfig(**options, **more)
