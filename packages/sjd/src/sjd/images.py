"""`generate_images`: prompts in, pictures out, for any model with an adapter and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pared_hooks import ConfigError
from torch import Tensor

from sjd.adapters.base import Inputs
from sjd.adapters.llamagen import LlamaGen
from sjd.apply import apply, target_of
from sjd.config import SJDConfig


def generate_images(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    config: SJDConfig | None = None,
    *,
    guidance_scale: float | None = None,
    seed: int | None = 0,
    **options: Any,
) -> list[Any]:
    """Return one PIL picture for each prompt.

    `model` is one of transformers, with its `processor`, or a LlamaGen pipeline, with None. `options` go to `generate`,
    such as temperature, top_k or do_sample. Raises what `apply` and `generate` raise, `UnsupportedModelError` for a
    model without a decoder, `ConfigError` for no prompts.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ConfigError("prompts is empty; valid: at least one", "prompts")
    target, adapter = target_of(model)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    with apply(model, config):
        if isinstance(adapter, LlamaGen):
            condition, mask = model.encode_prompt(prompts)
            tokens = target.generate(condition, mask, generator=generator, **options)
            return pictures(adapter.decode_image(tokens, adapter.grammar()))
        inputs = adapter.inputs_for(processor, prompts)
        inputs = {name: one.to(target.device) if isinstance(one, Tensor) else one for name, one in inputs.items()}
        ids = inputs["input_ids"]
        asked = Inputs(ids, torch.ones_like(ids, dtype=torch.bool), inputs, inputs.get("image_grid"))
        grammar = adapter.grammar(asked)
        if grammar is None:
            raise ConfigError(f"{type(target).__name__} does not know the size of the image from its prompt", "prompts")
        options.setdefault("do_sample", True)
        if "generation_mode" not in inputs:
            options.setdefault("max_new_tokens", grammar.length)
        tokens = target.generate(**inputs, generator=generator, **options)
        tokens = tokens[:, -grammar.length :]
        return pictures(adapter.decode_image(tokens, grammar))


def pictures(images: Tensor) -> list[Any]:
    """PIL pictures of images (B, 3, height, width) in 0..1."""
    from PIL import Image

    arrays = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]
