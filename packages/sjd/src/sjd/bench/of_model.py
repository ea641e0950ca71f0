"""Passes and seconds of a picture with a model of the user's, by window and without sjd."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sjd.adapters.base import Inputs
from sjd.apply import applied, target_of
from sjd.config import SJDConfig
from sjd.decode import check_length

Draw = Callable[[int], Any]
WIDTHS = (8, 8, 16, 12, 14, 9)


def measure_model(
    name: str,
    windows: Sequence[int],
    prompt: str,
    images: int,
    refresh: str,
    guidance: float,
    top_k: int,
    device: str,
    size: int = 0,
) -> Iterator[str]:
    """Lines of a table. `size` is the side of a picture in tokens, 0 what the model's processor asks for.

    Raises `ConfigError` for wrong windows or refresh, or a picture that the model has too few positions for; ValueError
    for wrong images or size; what loading the model raises.
    """
    configs = [SJDConfig.from_dict({"window": window, "refresh": refresh}) for window in windows]
    if images < 1:
        raise ValueError(f"images={images!r} must be at least 1")
    if size < 0 or (size and name == "ar-world"):
        raise ValueError(f"size={size!r} must be 0, or a side in tokens of a model that draws several sizes")
    prepare = _zoo if name == "ar-world" else partial(_transformers, name, size)
    model, draw, ours = prepare(prompt, guidance, top_k, device)
    heads = ("passes", "tokens per pass", "ms per pass", "s per picture", "speed-up")
    yield " ".join(f"{head:>{width}}" for head, width in zip(("window", *heads), WIDTHS, strict=True))
    plain = _seconds(draw, images)
    yield f"{'none':>8} {'':>8} {'':>16} {'':>12} {plain:14.2f} {1.0:9.2f}"
    for config in configs:
        with applied(model, config) as handle:
            ours(0)
            handle.reset()
            seconds = _seconds(ours, images)
            stats = handle.stats()
        passes = stats["nfe"] / len(stats["images"])
        yield (
            f"{config.window:>8} {passes:8.1f} {stats['ratio']:16.2f} {stats['ms_per_pass']:12.1f} {seconds:14.2f} "
            f"{plain / seconds:9.2f}"
        )


def _seconds(draw: Draw, images: int) -> float:
    start = time.perf_counter()
    for seed in range(images):
        draw(seed)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / images


def _zoo(prompt: str, guidance: float, top_k: int, device: str) -> tuple[Any, Draw, Draw]:
    """The model, how it draws a picture, and how it does while sjd is on it."""
    import pared_zoo

    pipeline = pared_zoo.load("ar-world").to(device)
    text = prompt or "a large red circle left of a small blue square"

    def draw(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return pipeline(text, guidance_scale=guidance, top_k=top_k, generator=generator, output_type="pt")

    return pipeline, draw, draw


def _transformers(
    name: str, size: int, prompt: str, guidance: float, top_k: int, device: str
) -> tuple[Any, Draw, Draw]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True).eval().to(device)
    processor = AutoProcessor.from_pretrained(name)
    _, adapter = target_of(model)
    if size:
        adapter.resize(processor, size)
    made = adapter.inputs_for(processor, [prompt or "a lighthouse at dusk"])
    inputs: dict[str, Any] = {key: one.to(device) if isinstance(one, Tensor) else one for key, one in made.items()}
    ids = inputs["input_ids"]
    grid = inputs.pop("image_grid", None)
    asked = Inputs(ids, torch.ones_like(ids, dtype=torch.bool), inputs, grid)
    grammar = adapter.grammar(asked)
    alone, ours = {}, {} if grid is None else {"image_grid": grid}
    if grammar is not None:
        # Before anything is drawn: without sjd the model would not notice.
        check_length(adapter, [adapter.prompt(asked)], grammar)
    if grammar is not None and "generation_mode" not in inputs:
        inputs["max_new_tokens"] = grammar.length
        # Without a grammar, the model might end the picture early.
        alone["min_new_tokens"] = grammar.length

    def draw(seed: int, **more: Any) -> Any:
        torch.manual_seed(seed)
        return model.generate(**inputs, **more, do_sample=True, top_k=top_k, guidance_scale=guidance)

    return model, partial(draw, **alone), partial(draw, **ours)
