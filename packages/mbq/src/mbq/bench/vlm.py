"""Sections 10 A to C: sensitivities, and answers of ``vlm-world`` at W3 and W4A8, by method and calibration seed."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pared_bench import BenchContext, Record
from torch import Tensor

from mbq.bench.arms import INTEGER, SEARCHED, WEIGHTS, config
from mbq.bench.world import Exam, Mix, calibration_batches
from mbq.calibrate import calibrate
from mbq.config import MBQConfig
from mbq.layers import plan_layers
from mbq.quantize import quantize
from mbq.report import sensitivity_plot
from mbq.sensitivity import measure_sensitivity

GROUP = 64
# Sixteen samples of a few hundred tokens are small enough to run at once.
BATCH = 16


@dataclass
class Study:
    """What all comparisons share: the exam with its clips seen, and calibration samples by seed and mix.

    The language part is calibrated in bfloat16, as at full size, and examined in float32.
    """

    folder: Path | None
    samples: int
    clips: int
    seeds: int
    device: torch.device
    drawn: dict[tuple[int, Mix], list[dict[str, Tensor]]] = field(default_factory=dict)

    @cached_property
    def exam(self) -> Exam:
        """The exam of the model as it is."""
        return Exam.prepare(self.folder, self.clips, self.device)

    @cached_property
    def planted(self) -> Exam:
        """The exam of the model with outlier channels."""
        return self.exam.with_outliers()

    def batches(self, seed: int, mix: Mix) -> list[dict[str, Tensor]]:
        """Calibration samples in bfloat16; the model with outlier channels has the same ones."""
        if (seed, mix) not in self.drawn:
            found = calibration_batches(self.exam.model, self.samples, seed, mix)
            self.drawn[seed, mix] = [{**one, "inputs_embeds": one["inputs_embeds"].bfloat16()} for one in found]
        return self.drawn[seed, mix]


def sensitivities(context: BenchContext, study: Study) -> list[Record]:
    """Mean |gradient| by modality and layer, of the trained model and of the same one with random weights.

    The trained model's is drawn into sensitivity.png in the bench's folder.
    """
    records = []
    for name in ("trained", "random weights"):
        model = study.exam.model
        if name == "random weights":
            torch.manual_seed(context.seed)
            model = type(model)(model.config).to(context.device).eval()
        view, plans = plan_layers(model, MBQConfig(group_size=GROUP))
        batches = calibration_batches(model, study.samples, context.seed)
        for positions in ("answer", "predicting"):
            found = measure_sensitivity(view, plans, batches, positions=positions)
            means: dict[str, dict[str, list[float]]] = {
                modality: {str(kind): values for kind, values in by_kind.items()}
                for modality, by_kind in (("vision", found.vision), ("answer", found.answer))
            }
            settings = {"experiment": "sensitivity", "samples": study.samples, "positions": positions}
            for kind in ("attn", "mlp"):
                of_kind = {**settings, "kind": kind}
                for modality, by_kind in means.items():
                    for layer, mean in enumerate(by_kind[kind]):
                        metric = f"mean |gradient|, {modality}"
                        records.append(Record("mbq", name, metric, mean, "", {**of_kind, "layer": layer}))
                ratios = [v / a for v, a in zip(means["vision"][kind], means["answer"][kind], strict=True)]
                median = statistics.median(ratios)
                records.append(Record("mbq", name, "median vision / answer", median, "", of_kind))
            if (name, positions) == ("trained", "predicting"):
                sensitivity_plot(means).savefig(context.out / "sensitivity.png", dpi=140)
    return records


def compare(
    context: BenchContext,
    study: Study,
    bits: str,
    group_size: int = GROUP,
    arms: Mapping[str, dict[str, Any]] | None = None,
    mix: Mix = "single",
) -> list[Record]:
    """Score every arm at `bits` ("w3", "w2", "w4a8"): for each metric the mean over calibration seeds and its range."""
    eight = bits.endswith("a8")
    chosen = arms if arms is not None else INTEGER if eight else WEIGHTS
    exam = study.planted if eight else study.exam
    more: dict[str, Any] = {"w_bits": int(bits[1]), "batch_size": BATCH}
    more |= {"a_bits": 8} if eight else {"group_size": group_size}
    settings = {
        "experiment": f"{bits} on vlm-world" + (", planted outlier channels" if eight else ""),
        "bits": bits,
        "group": -1 if eight else group_size,
        "samples": study.samples,
        "mix": mix,
        "clips": study.clips,
    }
    scores: dict[str, list[Any]] = {"full precision": [exam.score(exam.model)]}
    light = copy.deepcopy(exam.model).to(torch.bfloat16)
    work = [(name, seed) for seed in range(study.seeds) for name in chosen if seed == 0 or name != "RTN"]
    for name, seed in context.track(work, f"{bits}, {mix}: calibrating and asking"):
        one = config(chosen[name], **more)
        result = calibrate(light, [] if one.method == "rtn" else study.batches(seed, mix), one)
        with quantize(exam.model, result, mode="fake"):
            scores.setdefault(name, []).append(exam.score(exam.model))
    records = []
    for name, found in scores.items():
        for metric in ("accuracy", "kl", "loss"):
            values = [float(getattr(score, metric)) for score in found]
            spread = (min(values), max(values)) if len(values) > 1 else None
            shown = {"kl": "KL of answers", "loss": "loss of answers"}.get(metric, metric)
            mean = statistics.fmean(values)
            records.append(Record("mbq", name, shown, mean, "", settings, spread=spread, samples=len(values)))
    return records


def harder(context: BenchContext, study: Study) -> list[Record]:
    """The comparison with fewer bits, other groups and other calibration data."""
    records = []
    for bits, group in (("w2", 32), ("w2", 64), ("w3", -1)):
        records += compare(context, study, bits, group, SEARCHED)
    mixes: tuple[Mix, ...] = ("pairs", "interleaved")
    for mix in mixes:
        records += compare(context, study, "w3", GROUP, SEARCHED, mix)
    return records
