"""Latents of many scenes, encoded once and kept in a file."""

from __future__ import annotations

import hashlib
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
        cache: safetensors file that is read when it was made from the same scenes and weights, and written otherwise.
        device: where to encode.
        track: progress display.

    Returns:
        float16 tensor (scenes, channels, height, width) on the CPU.
    """
    from diffusers import AutoencoderKL
    from safetensors import safe_open
    from safetensors.torch import save_file

    source = _source(scenes, vae, resolution)
    if cache.exists():
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("source") == source:
                return file.get_tensor("latents")
    model = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).to(device).eval()
    blocks = []
    for start in track(range(0, len(scenes), BLOCK), "encode scenes", None):
        pixels = to_model_range(render(scenes[start : start + BLOCK], resolution)).to(device)
        mean = model.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        blocks.append((mean * model.config["scaling_factor"]).half().cpu())
    latents = torch.cat(blocks).contiguous()
    temporary = cache.with_suffix(".tmp")
    save_file({"latents": latents}, temporary, {"source": source})
    temporary.replace(cache)
    return latents


def _source(scenes: Sequence[Scene], vae: Path, resolution: int) -> str:
    """A digest of all that the latents depend on."""
    digest = hashlib.sha256(repr((resolution, list(scenes))).encode())
    for file in sorted(vae.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
