"""What `pared demo mbq` runs: a small vision-language model at 3 bits, by four methods."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from pared_bench import DemoContext, DemoResult, Figure, Table
from torch import Tensor

from mbq.bench.arms import WEIGHTS
from mbq.bench.sizes import tensor_bytes
from mbq.bench.world import Exam, calibration_batches
from mbq.calibrate import calibrate
from mbq.config import MBQConfig
from mbq.export import size_on_disk
from mbq.quantize import quantize
from mbq.report import sensitivity_plot

GROUP = 64
METHODS = ("RTN", "AWQ (mse)", "MBQ")
SHOWN = 6


def run(
    context: DemoContext,
    *,
    bits: Literal[2, 3, 4] = 3,
    samples: int = 16,
    clips: int = 32,
    model: Path | None = None,
) -> DemoResult:
    """Calibrate ``vlm-world`` on `samples` clips, quantise it to `bits`, ask 8 questions about each of `clips` others.

    `model` is a folder with another model of the same class; None: the one that the zoo ships.
    """
    exam = Exam.prepare(model, clips, context.device)
    batches = calibration_batches(exam.model, samples, context.seed)
    full = exam.score(exam.model)
    rows: list[tuple[Any, ...]] = [("float32", f"{100 * full.accuracy:.1f} %", None, f"{full.loss:.3f}")]
    answers = {"float32": answers_of(exam, exam.model)}
    found = {}
    for name in context.track(METHODS, "calibrating, quantising, asking"):
        config = MBQConfig(w_bits=bits, group_size=GROUP, batch_size=16, **WEIGHTS[name])
        result = calibrate(exam.model, [] if name == "RTN" else batches, config)
        # "fake" computes with the same numbers as "packed", in float products that are faster for whole clips.
        with quantize(exam.model, result, mode="fake"):
            score = exam.score(exam.model)
            answers[name] = answers_of(exam, exam.model)
        found[name] = result
        rows.append((name, f"{100 * score.accuracy:.1f} %", f"{score.kl:.4f}", f"{score.loss:.3f}"))
    context.log("packing and measuring sizes")
    sizes = _sizes(exam.model, found["MBQ"])
    quality = Table(
        f"{full.questions} questions about {clips} clips, weights in {bits} bits, groups of {GROUP}",
        ("method", "right answers", "KL of answers", "loss of answers"),
        rows,
        f"Calibrated on {samples} clips; KL is from the model in full precision. So few samples and questions leave "
        "noise: the bench measures with more, and with several draws.",
    )
    size = Table(
        "The language part in 16 bits and packed",
        ("weights", "on disk", "resident tensors", "bits per packed weight"),
        sizes,
        "Whole model files: vision tower, projector and embeddings stay in 16 bits.",
    )
    side = Table("Answers side by side", ("question", "expected", *answers), _side_by_side(exam, answers))
    ratios = [
        v / a
        for kind in ("attn", "mlp")
        for v, a in zip(found["MBQ"].sensitivity["vision"][kind], found["MBQ"].sensitivity["answer"][kind], strict=True)
    ]
    median = sorted(ratios)[len(ratios) // 2]
    picture = Figure.from_plot(
        "How much the loss depends on each kind of token", sensitivity_plot(found["MBQ"].sensitivity)
    )
    metrics = {
        "float32.accuracy": full.accuracy,
        "sensitivity.ratio": median,
        **{f"{row[0]}.kl": float(row[2]) for row in rows if row[2] is not None},
    }
    summary = (
        f"The loss depends {median:.2f} times as much on a vision token as on a token of the answer (median over "
        "layers). "
        f"MBQ weighs the errors of the search by that. KL of the answers from full precision at {bits} bits: "
        + ", ".join(f"{row[0]} {row[2]}" for row in rows[1:])
        + "."
    )
    return DemoResult(f"A vision-language model in {bits} bits", summary, [quality, size, side], [picture], metrics)


def _sizes(model: Any, result: Any) -> list[tuple[Any, ...]]:
    half = copy.deepcopy(model).to(torch.bfloat16)
    rows: list[tuple[Any, ...]] = [
        ("bfloat16", f"{size_on_disk(half) / 1e6:.2f} MB", f"{tensor_bytes(half) / 1e6:.2f} MB", None)
    ]
    handle = quantize(half, result, restore="none")
    bits = handle.stats()["bits_per_weight"]
    rows.append(
        (
            f"W{result.config.w_bits}, packed",
            f"{size_on_disk(half) / 1e6:.2f} MB",
            f"{tensor_bytes(half) / 1e6:.2f} MB",
            f"{bits:.3f}",
        )
    )
    return rows


@torch.no_grad()
def answers_of(exam: Exam, model: Any) -> list[str]:
    """What `model` answers to the first questions, as greedy decoding behind the right answer so far gives it."""
    from pared_zoo.recipes.chat import chat_tokenizer

    tokenizer = chat_tokenizer()
    logits, batch = exam.logits(model, 0), exam.blocks[0][1]
    return [tokenizer.decode(logits[place].argmax(-1)).strip() for place in _places(batch)[:SHOWN]]


def _places(batch: dict[str, Tensor]) -> list[tuple[int, Tensor]]:
    """(row, positions) of each answer without its end, one question of each clip first."""
    places = []
    for turn in range(1, int(batch["turns"].max()) + 1):
        for row in range(len(batch["turns"])):
            asked = (batch["turns"][row] == turn) & (batch["labels"][row] != -100)
            where = asked.nonzero()[:, 0]
            if len(where) > 1:
                places.append((row, where[:-1]))
    return places


def _side_by_side(exam: Exam, answers: dict[str, list[str]]) -> list[tuple[Any, ...]]:
    from pared_zoo.recipes.chat import END, START, chat_tokenizer

    tokenizer, batch = chat_tokenizer(), exam.blocks[0][1]
    rows = []
    for number, (row, where) in enumerate(_places(batch)[:SHOWN]):
        turn = batch["turns"][row, where[0]]
        text = tokenizer.decode(batch["ids"][row][batch["turns"][row] == turn])
        expected = tokenizer.decode(batch["labels"][row][where]).strip()
        rows.append(
            (text.split(END)[0].replace(START, "").strip(), expected, *(given[number] for given in answers.values()))
        )
    return rows
