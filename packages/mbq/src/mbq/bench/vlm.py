"""Sections 10 A to C: sensitivities, and answers of ``vlm-world`` at W3 and W4A8, by method and calibration seed."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pared_bench import BenchContext, Record

from mbq.bench.arms import INTEGER, SEARCHED, config
from mbq.bench.world import Exam, calibration_batches
from mbq.calibrate import calibrate
from mbq.config import MBQConfig
from mbq.layers import plan_layers
from mbq.quantize import quantize
from mbq.sensitivity import measure_sensitivity

GROUP = 64


def sensitivities(context: BenchContext, folder: Path | None, samples: int) -> list[Record]:
    """Mean |gradient| by modality and layer, of the trained model and of the same one with random weights."""
    records = []
    exam = Exam.prepare(folder, 0, context.device)
    for name in ("trained", "random weights"):
        model = exam.model
        if name == "random weights":
            torch.manual_seed(context.seed)
            model = type(model)(model.config).to(context.device).eval()
        view, plans = plan_layers(model, MBQConfig(group_size=GROUP))
        batches = calibration_batches(model, samples, context.seed)
        for positions in ("answer", "predicting"):
            found = measure_sensitivity(view, plans, batches, positions=positions)
            for kind in ("attn", "mlp"):
                ratios = [v / a for v, a in zip(found.vision[kind], found.answer[kind], strict=True)]  # type: ignore[index]
                settings = {"experiment": "sensitivity", "kind": kind, "samples": samples, "positions": positions}
                for layer, ratio in enumerate(ratios):
                    records.append(Record("mbq", name, "vision / answer", ratio, "", {**settings, "layer": layer}))
                median = statistics.median(ratios)
                records.append(Record("mbq", name, "median vision / answer", median, "", settings))
    return records


def compare(
    context: BenchContext,
    folder: Path | None,
    bits: str,
    samples: int,
    clips: int,
    seeds: int,
    group_size: int = GROUP,
    arms: Mapping[str, dict[str, Any]] | None = None,
) -> list[Record]:
    """Score every arm at `bits` ("w3", "w2", "w4a8"); one record a seed and metric, and the mean with its range.

    The language part is calibrated in bfloat16, as at full size, and scored in float32.
    """
    eight = bits.endswith("a8")
    chosen = arms if arms is not None else INTEGER if eight else SEARCHED
    exam = Exam.prepare(folder, clips, context.device, outliers=eight)
    more: dict[str, Any] = {"w_bits": int(bits[1])} | ({"a_bits": 8} if eight else {"group_size": group_size})
    settings = {
        "experiment": f"{bits} on vlm-world" + (", planted outlier channels" if eight else ""),
        "bits": bits,
        "group": -1 if eight else group_size,
        "samples": samples,
        "clips": clips,
    }
    scores: dict[str, list[Any]] = {"full precision": [exam.score(exam.model)]}
    light = copy.deepcopy(exam.model).to(torch.bfloat16)
    work = [(name, seed) for seed in range(seeds) for name in chosen if seed == 0 or name != "RTN"]
    for name, seed in context.track(work, f"{bits}: calibrating and asking"):
        one = config(chosen[name], **more)
        batches = [] if one.method == "rtn" else _light(calibration_batches(exam.model, samples, seed))
        result = calibrate(light, batches, one)
        handle = quantize(exam.model, result, mode="fake")
        scores.setdefault(name, []).append(exam.score(exam.model))
        handle.remove()
    records = []
    for name, found in scores.items():
        for metric in ("accuracy", "kl", "loss"):
            values = [float(getattr(score, metric)) for score in found]
            spread = (min(values), max(values)) if len(values) > 1 else None
            shown = {"kl": "KL of answers", "loss": "loss of answers"}.get(metric, metric)
            mean = statistics.fmean(values)
            records.append(Record("mbq", name, shown, mean, "", settings, spread=spread, samples=len(values)))
    return records


def _light(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{**batch, "inputs_embeds": batch["inputs_embeds"].to(torch.bfloat16)} for batch in batches]
