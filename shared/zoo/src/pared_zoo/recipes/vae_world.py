"""``vae-world``: an AutoencoderKL of the world's pictures and of photographs, x4 down, four latent channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pared_zoo.recipes.base import Batch, Recipe, Schedule, Track
from pared_zoo.world import SceneDistribution, render, sample_scenes

RESOLUTION = 64
PHOTO_SHARE = 0.125
KL_WEIGHT = 1e-4
EDGE_WEIGHT = 0.1
EVALUATION_PICTURES = 500
EVALUATION_SEED = 10_000
#: Size -> channels of the three levels.
CHANNELS: dict[str, tuple[int, ...]] = {"small": (24, 32, 64), "base": (64, 96, 128)}


class VaeWorld(Recipe):
    """Squared error, a little absolute error of picture gradients (keeps outlines sharp) and a light KL term."""

    name = "vae-world"
    schedules: ClassVar = {
        "small": Schedule(steps=4000, batch_size=16, learning_rate=2e-3, ema_decay=0.995),
        "base": Schedule(steps=30000, batch_size=128, learning_rate=1e-3),
    }

    def build(self) -> torch.nn.Module:
        from diffusers import AutoencoderKL

        torch.manual_seed(self.seed_of(0))
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=CHANNELS[self.size],
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=RESOLUTION,
            mid_block_add_attention=False,
        )
        return model.to(memory_format=torch.channels_last)

    def batch(self, step: int, rank: int, size: int) -> Batch:
        from pared_zoo.real import photo_crops

        photos = round(PHOTO_SHARE * size)
        scenes = sample_scenes(size - photos, self.seed_of(1, step, rank), SceneDistribution())
        pixels = np.concatenate(
            [render(scenes, RESOLUTION), photo_crops(photos, RESOLUTION, self.seed_of(2, step, rank))]
        )
        return {"pixels": to_model_range(pixels)}

    def loss(self, module: Any, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        pixels = batch["pixels"].contiguous(memory_format=torch.channels_last)
        posterior = module.encode(pixels).latent_dist
        output = module.decode(posterior.sample(generator)).sample
        error = output - pixels
        square, edges = error.square().mean(), error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": square + EDGE_WEIGHT * edges + KL_WEIGHT * kl, "square": square, "edges": edges, "kl": kl}

    @torch.no_grad()
    def save(self, module: Any, folder: Path) -> None:
        scenes = sample_scenes(256, self.seed_of(5))
        device = next(module.parameters()).device
        latents = module.encode(to_model_range(render(scenes, RESOLUTION)).to(device)).latent_dist.mean
        module.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        module.half().save_pretrained(folder)

    @staticmethod
    def load(folder: Path) -> Any:
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()

    @torch.no_grad()
    def evaluate(self, folder: Path, device: torch.device, track: Track) -> dict[str, float]:
        from pared_zoo.real import photo_crops
        from pared_zoo.world import attribute_accuracy

        model = self.load(folder).to(device)
        scenes = sample_scenes(EVALUATION_PICTURES, EVALUATION_SEED)
        sets = {
            "world": render(scenes, RESOLUTION),
            "photos": photo_crops(EVALUATION_PICTURES, RESOLUTION, EVALUATION_SEED),
        }
        metrics: dict[str, float] = {"pictures": EVALUATION_PICTURES}
        for name, pixels in sets.items():
            blocks = []
            for start in track(range(0, len(pixels), 50), f"reconstruct {name}", None):
                latents = model.encode(to_model_range(pixels[start : start + 50]).to(device)).latent_dist.mean
                blocks.append(to_pixels(model.decode(latents).sample))
            reconstructed = np.concatenate(blocks)
            error = (reconstructed.astype(np.float64) - pixels).reshape(len(pixels), -1)
            metrics[f"psnr_{name}"] = float(np.mean(10 * np.log10(255**2 / np.maximum((error**2).mean(axis=1), 1e-3))))
            if name == "world":
                accuracy = attribute_accuracy(reconstructed, scenes)
                metrics |= {f"accuracy_{k}": float(v) for k, v in accuracy.items()}
        return metrics


def to_model_range(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (n, height, width, 3) to float32 (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pixels(values: torch.Tensor) -> np.ndarray:
    """Float (n, 3, height, width) in [-1, 1] to uint8 (n, height, width, 3)."""
    return values.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
