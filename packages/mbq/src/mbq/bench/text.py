"""Section 10 D: perplexity of SmolLM2-135M, where there is no vision and MBQ is AWQ with an absolute error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from pared_bench import BenchContext, Record
from torch import Tensor

from mbq.bench.arms import config
from mbq.calibrate import calibrate
from mbq.quantize import quantize

GROUP = 64
LENGTH = 512
ARMS: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "AWQ (mse)": {"method": "awq", "loss": "mse"},
    "AWQ (mae)": {"method": "awq"},
    "MBQ": {"method": "mbq"},
}
WORK = (*((name, 3) for name in ARMS), ("RTN", 4), ("MBQ", 4))


def texts(tokenizer: Any, count: int, held_out: bool) -> list[Tensor]:
    """Sequences (1, 512) of Python's language reference: its first four fifths, or the last."""
    from pared_zoo.real import text_corpus

    ids = tokenizer(text_corpus().text, return_tensors="pt", verbose=False).input_ids[0]
    cut = int(0.8 * len(ids))
    part = ids[cut:] if held_out else ids[:cut]
    stride = (len(part) - LENGTH) // max(count - 1, 1)
    return [part[i * stride : i * stride + LENGTH][None] for i in range(count)]


@torch.no_grad()
def perplexity(model: Any, held: list[Tensor]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each sequence."""
    total, count = 0.0, 0
    for ids in held:
        logits = model(ids.to(model.device), use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(total / count)


def run(
    context: BenchContext, samples: int = 4, held_out: int = 8, work: Sequence[tuple[str, int]] = WORK
) -> list[Record]:
    """Perplexity in groups of 64 of each (arm, bits) in `work`; and how many scales of MBQ are exactly those of AWQ."""
    from pared_zoo.real import smollm2

    model, tokenizer = smollm2()
    model.to(context.device, torch.bfloat16)
    held, calibration = texts(tokenizer, held_out, True), texts(tokenizer, samples, False)
    settings = {
        "experiment": "perplexity of SmolLM2-135M",
        "group": GROUP,
        "samples": samples,
        "scored_tokens": len(held) * (LENGTH - 1),
    }
    records = [Record("mbq", "full precision", "perplexity", perplexity(model, held), "", settings)]
    scales: dict[str, list[Tensor]] = {}
    for name, bits in context.track(work, "SmolLM2: calibrating and reading"):
        one = config(ARMS[name], w_bits=bits, group_size=GROUP)
        with warnings.catch_warnings():
            # There are no vision tokens, on purpose.
            warnings.simplefilter("ignore", UserWarning)
            result = calibrate(model, calibration, one)
        if bits == 3:
            scales[name] = [group.scale for group in result.groups]
        handle = quantize(model, result, mode="fake")
        records.append(Record("mbq", name, "perplexity", perplexity(model, held), "", {**settings, "bits": f"w{bits}"}))
        handle.remove()
    if {"MBQ", "AWQ (mae)"} <= set(scales):
        equal = sum(a.equal(b) for a, b in zip(scales["MBQ"], scales["AWQ (mae)"], strict=True))
        share = equal / len(scales["MBQ"])
        records.append(Record("mbq", "MBQ", "scales equal to AWQ (mae)", share, "", {**settings, "bits": "w3"}))
    return records
