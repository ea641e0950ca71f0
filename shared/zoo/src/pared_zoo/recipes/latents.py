"""Latents and tokens of many scenes, encoded once and kept in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pared_zoo.recipes.base import Track
from pared_zoo.recipes.vae_world import to_model_range
from pared_zoo.recipes.vq_world import encode_pictures
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

    def blocks() -> Iterator[torch.Tensor]:
        model = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).to(device).eval()
        for start in track(range(0, len(scenes), BLOCK), "encode scenes", None):
            pixels = to_model_range(render(scenes[start : start + BLOCK], resolution)).to(device)
            mean = model.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            yield (mean * model.config["scaling_factor"]).half().cpu()

    return _kept(cache, "latents", _source(scenes, vae, resolution), blocks())


@torch.no_grad()
def tokenize_scenes(
    scenes: Sequence[Scene], vqmodel: Path, resolution: int, cache: Path, device: torch.device, track: Track
) -> torch.Tensor:
    """Tokens of each rendered scene, row by row.

    Args:
        scenes: what to render.
        vqmodel: an ``Emu3VQVAE`` directory.
        resolution, cache, device, track: as for ``encode_scenes``.

    Returns:
        int16 tensor (scenes, tokens) on the CPU.
    """
    from transformers import Emu3VQVAE

    def blocks() -> Iterator[torch.Tensor]:
        model = Emu3VQVAE.from_pretrained(vqmodel, dtype=torch.float32).to(device).eval()
        for start in track(range(0, len(scenes), BLOCK), "tokenize scenes", None):
            tokens = encode_pictures(model, render(scenes[start : start + BLOCK], resolution))
            yield tokens.flatten(1).to(torch.int16).cpu()

    return _kept(cache, "tokens", _source(scenes, vqmodel, resolution), blocks())


def _kept(cache: Path, name: str, source: str, blocks: Iterator[torch.Tensor]) -> torch.Tensor:
    """What ``cache`` holds from the same source, and otherwise the blocks, which it holds from then on."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    if cache.exists():
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("source") == source:
                return file.get_tensor(name)
    result = torch.cat(list(blocks)).contiguous()
    temporary = cache.with_suffix(".tmp")
    save_file({name: result}, temporary, {"source": source})
    temporary.replace(cache)
    return result


def _source(scenes: Sequence[Scene], model: Path, resolution: int) -> str:
    """A digest of all that the result depends on."""
    digest = hashlib.sha256(repr((resolution, list(scenes))).encode())
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
