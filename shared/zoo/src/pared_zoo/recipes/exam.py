"""Questions about clips that no training saw, and how many of them a model answers right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from pared_zoo.recipes.base import Track
from pared_zoo.recipes.chat import chat_tokenizer
from pared_zoo.recipes.turns import Turns, right_answers
from pared_zoo.recipes.vlm_world import Pupil, noisy_pixels, to_pixels
from pared_zoo.world import Clip, Question, iter_clips, questions
from pared_zoo.world.clip_question import CLIP_QUESTIONS

#: Seed of the clips that are kept for measuring.
EXAM_SEED = 30_000
PER_TASK = 500
FRAMES = 16
#: Asks for the colour or shape of an object that shows in a single frame.
NEEDLE = "needle"
TASKS: tuple[str, ...] = (*CLIP_QUESTIONS, NEEDLE)
BLOCK = 8

Sheet = tuple[int, Clip, dict[str, Question]]


def exam(per_task: int = PER_TASK, seed: int = EXAM_SEED, frames: int = FRAMES) -> list[Sheet]:
    """Clips and what to ask about each.

    Args:
        per_task: questions of each of ``TASKS``, each about another clip.
        seed: of the stream of clips; the seed of a clip's camera noise is this plus its number.
        frames: length of the clips.

    Returns:
        (number of the clip in its stream, clip, question by task), in the order of the stream.
    """
    missing = dict.fromkeys(TASKS, per_task)
    sheets: list[Sheet] = []
    for number, clip in enumerate(iter_clips(seed, frames)):
        if not any(missing.values()):
            return sheets
        asked = {}
        for task in [t for t, n in missing.items() if n]:
            kinds = [task]
            if task == NEEDLE:
                kinds = ["agent_color", "agent_shape"] if clip.kind == "flash" else []
            found = questions(clip, seed + number, 1, kinds) if kinds else []
            if found:
                asked[task] = found[0]
                missing[task] -= 1
        if asked:
            sheets.append((number, clip, asked))
    raise AssertionError("the stream of clips is endless")


def exam_pixels(sheets: Iterable[Sheet], seed: int = EXAM_SEED) -> torch.Tensor:
    """Noisy frames of the clips, uint8 (clips, frames, 3, side, side)."""
    return torch.cat([noisy_pixels([clip], seed + number) for number, clip, _ in sheets])


@torch.no_grad()
def examine(model: Any, track: Track, per_task: int = PER_TASK, seed: int = EXAM_SEED) -> dict[str, float]:
    """Share of right answers under greedy decoding in bfloat16, by task and as the plain mean over tasks.

    Args:
        model: the ``LlavaOnevisionForConditionalGeneration``.
        track: progress display.
        per_task: questions of each task.
        seed: of the clips.
    """
    pupil, turns = Pupil(model), Turns(chat_tokenizer())
    pupil.to(model.device).eval()
    verdicts: dict[str, list[float]] = {task: [] for task in TASKS}
    sheets = exam(per_task, seed)
    for start in track(range(0, len(sheets), BLOCK), "ask vlm-world", None):
        block = sheets[start : start + BLOCK]
        batch = {k: v.to(model.device) for k, v in turns.pack([list(q.values()) for _, _, q in block]).items()}
        with torch.autocast(model.device.type, torch.bfloat16):
            tokens = pupil.see(to_pixels(exam_pixels(block, seed).to(model.device)))
            logits, _ = pupil.answer(tokens, turns.opening, batch)
        right = right_answers(logits, batch["labels"], batch["turns"]).tolist()
        for (_, _, asked), row in zip(block, right, strict=True):
            for task, verdict in zip(asked, row, strict=False):
                verdicts[task].append(verdict)
    metrics: dict[str, float] = {f"accuracy_{task}": float(np.mean(v)) for task, v in verdicts.items()}
    metrics["accuracy_mean"] = float(np.mean(list(metrics.values())))
    return metrics | {"frames": FRAMES, "questions_per_task": per_task, "clips": len(sheets)}
