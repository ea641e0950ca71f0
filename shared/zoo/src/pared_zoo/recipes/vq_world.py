"""``vq-world``: an Emu3VQVAE of the world's pictures, 16x16 tokens of 512 codes for 64x64 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import normalize

from pared_zoo.recipes.base import Batch, Recipe, Schedule, Track
from pared_zoo.recipes.codebook import code_usage, nearest_code, separate_codes, spread_codes
from pared_zoo.recipes.vae_world import to_model_range, to_pixels
from pared_zoo.world import render, sample_scenes

RESOLUTION, GRID = 64, 16
CODES, CHANNELS = 512, 8
EDGE_WEIGHT = 0.1
#: Pull of the encoder's output towards its code; the code is pulled with weight 1.
COMMITMENT = 0.25
#: How much it counts that a patch has the same direction whatever stands around it, and the side, in tokens, of the
#: blocks from which pictures are put together to see that.
LOCALITY, BLOCK = 0.3, 2
#: Least distance of codes, one minus their product: nearer ones look the same and would differ by chance.
APART = 0.012
#: Share of the steps before there is a codebook, share of them at which codes that nothing uses stop being moved, and
#: how often that is done in between.
CODES_FROM, CODES_SETTLE, MOVE_EVERY = 0.1, 0.7, 0.02
#: Pictures that tell where codes are needed; the same in every process.
PROBE_PICTURES = 64
EVALUATION_PICTURES = 500
EVALUATION_SEED = 10_000
#: Size -> base channels, multipliers of the three levels.
ARCHITECTURE: dict[str, tuple[int, tuple[int, ...]]] = {"small": (32, (1, 1, 2)), "base": (64, (1, 2, 2))}


class VqWorld(Recipe):
    """Squared error, a little absolute error of picture gradients, and codes on the unit sphere.

    Encoder and decoder first learn without codes; then the codebook is spread over what the encoder gives, learns
    along, and codes that nothing uses move to where one is missing. A patch has to keep its direction in a mosaic of
    two pictures: codes that depend on what is far away differ between equal patches, and a model of tokens would have
    to draw that difference as well.
    """

    name = "vq-world"
    library = "transformers"
    schedules: ClassVar = {
        "small": Schedule(steps=2000, batch_size=16, learning_rate=2e-3, ema_decay=0.995),
        "base": Schedule(steps=20_000, batch_size=128, learning_rate=1e-3),
    }

    def build(self) -> torch.nn.Module:
        from transformers import Emu3VQVAE, Emu3VQVAEConfig

        torch.manual_seed(self.seed_of(0))
        base, multiplier = ARCHITECTURE[self.size]
        return Emu3VQVAE(
            Emu3VQVAEConfig(
                codebook_size=CODES,
                embed_dim=CHANNELS,
                latent_channels=CHANNELS,
                # One picture is one frame: without this each token would stand for four.
                temporal_downsample_factor=1,
                base_channels=base,
                channel_multiplier=list(multiplier),
                num_res_blocks=1,
                attn_resolutions=[],
                hidden_size=base * multiplier[-1],
            )
        )

    def batch(self, step: int, rank: int, size: int) -> Batch:
        scenes = sample_scenes(size, self.seed_of(1, step, rank))
        return {"pixels": to_model_range(render(scenes, RESOLUTION)), "step": torch.tensor(step)}

    def loss(self, module: Any, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        step, begin = int(batch["step"]), self._codes_from
        if step == begin or (begin < step < CODES_SETTLE * self.schedule.steps and (step - begin) % self._every == 0):
            self._spread(module, step, everything=step == begin)
        pixels, weight = batch["pixels"], module.quantize.embedding.weight
        directions = encode_directions(module, pixels)
        codebook = normalize(weight.float(), dim=1)
        codes = codebook[nearest_code(directions.detach(), codebook)]
        pull = (directions - codes.detach()).square().mean()
        drag = (directions.detach() - codes).square().mean()
        # Without codes the weights of the codebook still take part: processes that average gradients wait for them.
        quantised = float(step >= begin)
        seen = directions + quantised * (codes - directions).detach()
        output = decode_directions(module, seen)
        error = output.float() - pixels
        square, edges = error.square().mean(), error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        mixed, own = mosaic(pixels, generator)
        wanted = torch.where(own[..., None], directions, directions.roll(1, 0))
        local = (encode_directions(module, mixed) - wanted).square().mean()
        loss = square + EDGE_WEIGHT * edges + quantised * (COMMITMENT * pull + drag) + LOCALITY * local
        return {"loss": loss, "square": square, "edges": edges, "codes": pull, "local": local}

    @property
    def _codes_from(self) -> int:
        return round(CODES_FROM * self.schedule.steps)

    @property
    def _every(self) -> int:
        return max(1, round(MOVE_EVERY * self.schedule.steps))

    @torch.no_grad()
    def _spread(self, module: Any, step: int, everything: bool) -> None:
        """Give codes that the probe does not use, or that are near another, a new place; or ``everything`` else."""
        weight = module.quantize.embedding.weight
        scenes = sample_scenes(PROBE_PICTURES, self.seed_of(3, step))
        pixels = to_model_range(render(scenes, RESOLUTION)).to(weight.device)
        directions = encode_directions(module, pixels).flatten(0, 2)
        codebook = normalize(weight.float(), dim=1)
        generator = torch.Generator().manual_seed(self.seed_of(4, step))
        if everything:
            weight.copy_(spread_codes(directions, CODES, generator, apart=APART))
            return
        counts = torch.bincount(nearest_code(directions, codebook), minlength=CODES)
        kept = separate_codes(codebook, counts, APART)
        moved = torch.ones(CODES, dtype=torch.bool, device=weight.device).index_fill(0, kept, False)
        weight[moved] = spread_codes(directions, CODES, generator, codebook[kept], APART)[len(kept) :]

    @torch.no_grad()
    def save(self, module: Any, folder: Path) -> None:
        weight = module.quantize.embedding.weight
        weight.copy_(normalize(weight.float(), dim=1))
        module.half().save_pretrained(folder)

    @staticmethod
    def load(folder: Path) -> Any:
        from transformers import Emu3VQVAE

        return Emu3VQVAE.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def evaluate(self, folder: Path, device: torch.device, track: Track) -> dict[str, float]:
        from pared_zoo.world import attribute_accuracy

        model = self.load(folder).to(device)
        scenes = sample_scenes(EVALUATION_PICTURES, EVALUATION_SEED)
        pictures = render(scenes, RESOLUTION)
        blocks, tokens = [], []
        for start in track(range(0, len(scenes), 50), "reconstruct world", None):
            tokens.append(encode_pictures(model, pictures[start : start + 50]))
            blocks.append(to_pixels(model.decode(tokens[-1])))
        reconstructed = np.concatenate(blocks)
        error = (reconstructed.astype(np.float64) - pictures).reshape(len(pictures), -1)
        used, perplexity = code_usage(torch.cat(tokens).cpu(), CODES)
        metrics: dict[str, float] = {"pictures": EVALUATION_PICTURES, "codes_used": used, "code_perplexity": perplexity}
        metrics["psnr"] = float(np.mean(10 * np.log10(255**2 / np.maximum((error**2).mean(axis=1), 1e-3))))
        accuracy = attribute_accuracy(reconstructed, scenes)
        return metrics | {f"accuracy_{k}": float(v) for k, v in accuracy.items()}


def mosaic(pixels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures whose blocks come from the same place of the picture itself or of the one before it in the batch.

    Args:
        pixels: (pictures, channels, side, side).
        generator: tosses a coin for every block of BLOCK by BLOCK tokens.

    Returns:
        Pictures of the same shape, and bool (pictures, GRID, GRID), True where a token's patch is the picture's own.
    """
    blocks = torch.rand(len(pixels), GRID // BLOCK, GRID // BLOCK, device=pixels.device, generator=generator) < 0.5
    own = blocks.repeat_interleave(BLOCK, dim=1).repeat_interleave(BLOCK, dim=2)
    patch = pixels.shape[-1] // GRID
    shown = own.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)[:, None]
    return torch.where(shown, pixels, pixels.roll(1, 0)), own


def encode_directions(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the codes stand for: unit vectors (pictures, height, width, channels) in float32.

    ``pixels`` are (pictures, 3, height, width) in -1 to 1. ``Emu3VQVAE.encode`` goes the same way and takes the nearest
    code; codes of equal length make that the one in the nearest direction.
    """
    hidden = model.encoder(pixels[:, None])
    hidden = model.quant_conv(hidden.permute(0, 2, 1, 3, 4))[:, :, 0]
    return normalize(hidden.permute(0, 2, 3, 1).float(), dim=-1)


def decode_directions(model: Any, directions: torch.Tensor) -> torch.Tensor:
    """Pixels (pictures, 3, height, width) of vectors shaped as ``encode_directions`` gives them."""
    quant = directions.permute(0, 3, 1, 2)[:, :, None]
    post = model.post_quant_conv(quant)
    return model.decoder(post.permute(0, 2, 1, 3, 4), quant.permute(0, 2, 1, 3, 4))


def encode_pictures(model: Any, pictures: np.ndarray) -> torch.Tensor:
    """Codes of uint8 pictures (n, side, side, 3), int64 (n, side / 4, side / 4), by the model's own ``encode``."""
    pixels = to_model_range(pictures).to(model.device)
    sizes = [pictures.shape[1:3]] * len(pictures)
    return torch.stack(model.encode(pixels, sizes).image_tokens)
