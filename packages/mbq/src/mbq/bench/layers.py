"""Single linear layers: packed, beside dequantising the weight first, and beside the dense bfloat16 layer."""

from __future__ import annotations

from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import time_paired
from torch import nn

from mbq.functional import quantize_weight
from mbq.modules import QuantLinear

#: (rows, columns) of layers of SmolLM2-1.7B and of Qwen2-7B.
SHAPES = ((2048, 2048), (3584, 3584))
ROWS_OF_X = (1, 16, 128)
VARIANTS: dict[str, dict[str, Any]] = {
    "W3A16": {"bits": 3, "group_size": 128},
    "W4A16": {"bits": 4, "group_size": 128},
    "W4A8": {"bits": 4, "group_size": -1, "symmetric": True},
}
BASELINE = "dequantise, then multiply"


@torch.no_grad()
def run(context: BenchContext) -> list[Record]:
    """Time of every variant for a few rows of x, and its speed-up over both baselines."""
    generator = torch.Generator().manual_seed(context.seed)
    records = []
    work = [(shape, name) for shape in SHAPES for name in VARIANTS]
    for (rows, columns), name in context.track(work, "linear layers"):
        weight = torch.randn(rows, columns, generator=generator)
        packed = quantize_weight(weight, **VARIANTS[name], scale_dtype=torch.float16)
        layer = QuantLinear.pack(packed, None, 8 if name == "W4A8" else 16, torch.bfloat16).to(context.device)
        dense = weight.to(context.device, torch.bfloat16)
        for many in ROWS_OF_X:
            x = torch.randn(many, columns, generator=generator).to(dense)
            ways = {
                BASELINE: lambda x=x, layer=layer: nn.functional.linear(x, layer.dequantized(x.dtype)),
                "bfloat16": lambda x=x, dense=dense: nn.functional.linear(x, dense),
                name: lambda x=x, layer=layer: layer(x),
            }
            settings = {"experiment": "linear layer", "rows": rows, "columns": columns, "rows of x": many, "for": name}
            timings = time_paired(ways, device=context.device, rounds=7, warmup=1)
            records += timings.records("mbq", BASELINE, settings)
            ratio = timings.speedup(name, "bfloat16")
            span = (ratio.low, ratio.high)
            records.append(Record("mbq", name, "speed-up over bfloat16", ratio.value, "×", settings, span))
    return records
