"""What `pared demo framefusion` shows: a clip with its tokens drawn on, the answers without and with FrameFusion."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pared_bench import DemoContext, DemoResult, Figure, Table
from torch import Tensor

from framefusion.apply import applied
from framefusion.config import FrameFusionConfig
from framefusion.film import draw_tokens, processor_inputs, read_film
from framefusion.inspection import pictures_of, token_states
from framefusion.stats import Sizes

FRAMES = 16
ROUNDS = 5
QUESTIONS = 6


@dataclass
class Run:
    """What one prompt cost."""

    seconds: float
    tokens: float
    flops: float


def run(
    context: DemoContext,
    *,
    video: str = "",
    question: str = "",
    model: str = "",
    cost: float = 0.3,
    threshold: float = 0.9,
    frames: int = FRAMES,
) -> DemoResult:
    """Ask about a clip of the zoo's world, or about a video file, dense and with FrameFusion.

    `model` is the id or folder of a model of transformers; without it, the zoo's vlm-world. Raises `ConfigError` for a
    wrong cost or threshold, ValueError for a question without a video or fewer than two frames.
    """
    config = FrameFusionConfig(cost=cost, similarity_threshold=threshold)
    if frames < 2:
        raise ValueError(f"frames={frames!r} must be at least 2")
    language_model, processor = load(model, context.device)
    if video:
        film = read_film(video, frames)
        asked = [(question or "what happens in this video?", "")]
    elif model:
        raise ValueError(f"model={model!r} needs a video of your own: --video FILE --question ...")
    else:
        film, asked = _zoo_clip(context.seed, frames)
        asked = [(question, "")] if question else asked
    shown = film if not _small(language_model) else _square(film, language_model)
    prompts = {text: processor_inputs(processor, shown, text, context.device) for text, _ in asked}
    first, inputs = next(iter(prompts.items()))
    rows = [
        (text, right or None, *_answers(language_model, processor, prompts[text], config))
        for text, right in context.track(asked, "asking")
    ]
    dense, fused, states = _compare(language_model, inputs, config, (shown.shape[2], shown.shape[1]))
    figure = None
    if states is not None:
        sheet = draw_tokens(pictures_of(shown, len(states)), states)
        caption = f'Asked "{first}". Above: what the model is shown; below: what has become of each token in the end.'
        figure = Figure.from_image("Each frame and its tokens", sheet, caption)
    cost_table = Table(
        "One prompt",
        ("run", "vision tokens, mean over layers", "FLOPs of the prefill", "time of the prefill"),
        [_row("dense", dense, dense), _row(f"framefusion, cost {cost:g}", fused, dense)],
        "Time is the fastest of a few runs on this machine; on prompts as short as this one it is mostly overhead.",
    )
    answers = Table("Answers", ("question", "right", "dense", "framefusion"), rows)
    same = sum(one[2] == one[3] for one in rows)
    summary = (
        f"FrameFusion keeps {fused.tokens:.0f} of {dense.tokens:.0f} vision tokens on the average over layers and does "
        f"{fused.flops / dense.flops:.0%} of the FLOPs. {same} of {len(rows)} answers are those of the dense model."
    )
    metrics = {
        "tokens_ratio": fused.tokens / dense.tokens,
        "flops_ratio": fused.flops / dense.flops,
        "time_ratio": fused.seconds / dense.seconds,
        "same_answers": same / len(rows),
    }
    return DemoResult(
        "FrameFusion: fewer video tokens, the same answer",
        summary,
        [answers, cost_table],
        [figure] if figure else [],
        metrics,
    )


def _row(name: str, one: Run, dense: Run) -> tuple[str, str, str, str]:
    return (
        name,
        f"{one.tokens:.0f} ({one.tokens / dense.tokens:.0%})",
        f"{one.flops / 1e9:.2f} G ({one.flops / dense.flops:.0%})",
        f"{1e3 * one.seconds:.0f} ms ({one.seconds / dense.seconds:.0%})",
    )


def load(name: str, device: torch.device) -> tuple[Any, Any]:
    """Model and processor of this id or folder, or the zoo's; raises what transformers raises for an unknown one."""
    if not name:
        from framefusion.bench.world import World

        world = World.load("", device)
        return world.model, world.processor
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True)
    return model.eval().to(device), AutoProcessor.from_pretrained(name)


def _zoo_clip(seed: int, frames: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    from pared_zoo.world import camera_noise, iter_clips, questions, render_clips

    number, clip = next((i, one) for i, one in enumerate(iter_clips(90_000 + seed, frames)) if one.kind == "order")
    film = camera_noise(render_clips([clip], 64), seed + number)[0]
    return film, [(one.text, one.answer) for one in questions(clip, seed, QUESTIONS)]


def _small(model: Any) -> bool:
    return getattr(model.config.vision_config, "image_size", 384) == 64


def _square(film: np.ndarray, model: Any) -> np.ndarray:
    from framefusion.bench.redundancy import fit_frames

    side = model.config.vision_config.image_size
    if film.shape[1:3] == (side, side):
        return film
    return fit_frames(film, len(film), side).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def _answers(model: Any, processor: Any, inputs: dict[str, Any], config: FrameFusionConfig) -> tuple[str, str]:
    """Answers of the dense model and with FrameFusion."""
    prompt = inputs["input_ids"].shape[1]

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        return str(processor.batch_decode(out[:, prompt:], skip_special_tokens=True)[0]).strip()

    dense = answer()
    with applied(model, config):
        return dense, answer()


@torch.no_grad()
def _compare(
    model: Any, inputs: dict[str, Any], config: FrameFusionConfig, shape: tuple[int, int]
) -> tuple[Run, Run, Tensor | None]:
    """One prompt, dense and with FrameFusion, and what has become of its tokens; `shape` is that of a frame."""

    def prefill() -> float:
        seconds = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            model(**inputs, logits_to_keep=1)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    dense_seconds = prefill()
    with applied(model, config) as handle:
        fused_seconds = prefill()
        states = token_states(handle, *shape)
        report = handle.stats()
        sizes: Sizes = handle.sizes
    prompt, tokens = inputs["input_ids"].shape[1], report["vision_tokens"]
    dense_flops = sizes.layers * sizes.flops(prompt, prompt)
    dense = Run(dense_seconds, tokens, dense_flops)
    fused = Run(fused_seconds, (report["cost"] or 1.0) * tokens, dense_flops * (report["flops_ratio"] or 1.0))
    return dense, fused, states
