"""What `pared bench mbq` measures: quality over the number of bits."""

from __future__ import annotations

import torch
from pared_bench import BenchContext, Record

from mbq.apply import applied
from mbq.config import NEUTRAL_BITS, MbqConfig
from mbq.demo import TransformCodec, mean_psnr, pictures


@torch.no_grad()
def run(context: BenchContext) -> list[Record]:
    """Measure the quality of rounded coefficients, on more pictures with `--full`."""
    count = 512 if context.full else 64
    model = TransformCodec(torch.Generator().manual_seed(context.seed)).to(context.device)
    images = pictures(count, context.seed + 1).to(context.device)
    records = []
    for bits in context.track([NEUTRAL_BITS, 8, 6, 4, 3, 2], "rounding"):
        with applied(model, MbqConfig(bits=bits, skip=("synthesis",))):
            decibels = mean_psnr(model(images), images)
        settings = {"experiment": "transform codec", "bits": bits, "pictures": count}
        variant = "plain" if bits == NEUTRAL_BITS else f"{bits} bits"
        records.append(Record("mbq", variant, "PSNR", decibels, "dB", settings))
    return records
