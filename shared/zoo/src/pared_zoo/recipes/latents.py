"""Latents of many scenes, encoded once and kept in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pared_zoo.recipes.base import Track
from pared_zoo.recipes.vae_world import to_model_range
from pared_zoo.world import Scene, render

BLOCK = 100


@torch.no_grad()
def encode_scenes(
    scenes: Sequence[Scene], vae: Path, resolution: int, cache: Path, device: torch.device, track: Track
) -> torch.Tensor:
    """Means of the posterior of each rendered scene, times the autoencoder's scaling factor.

    Args:
        scenes: what to render.
        vae: an ``AutoencoderKL`` directory.
        resolution: side of the pictures in pixels.
        cache: safetensors file that is read when it holds as many latents, and written otherwise.
        device: where to encode.
        track: progress display.

    Returns:
        float16 tensor (scenes, channels, height, width) on the CPU.
    """
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file, save_file

    if cache.exists():
        latents = load_file(cache)["latents"]
        if len(latents) == len(scenes):
            return latents
    model = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).to(device).eval()
    blocks = []
    for start in track(range(0, len(scenes), BLOCK), "encode scenes", None):
        pixels = to_model_range(render(scenes[start : start + BLOCK], resolution)).to(device)
        mean = model.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        blocks.append((mean * model.config["scaling_factor"]).half().cpu())
    latents = torch.cat(blocks).contiguous()
    temporary = cache.with_suffix(".tmp")
    save_file({"latents": latents}, temporary)
    temporary.replace(cache)
    return latents
