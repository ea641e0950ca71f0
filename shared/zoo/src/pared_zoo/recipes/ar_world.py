"""``ar-world``: a LlamaGen pipeline for 64x64 pictures of the world, one of 512 codes at each of 16x16 places."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from pared_zoo.llamagen import LlamaGenPipeline, LlamaGenTransformer
from pared_zoo.llamagen.captions import caption_features
from pared_zoo.recipes.attention import plain_attention
from pared_zoo.recipes.base import Batch, Recipe, Schedule, Track
from pared_zoo.recipes.latents import tokenize_scenes
from pared_zoo.recipes.layout import layouts
from pared_zoo.recipes.painting import BLOCK, load_pipeline, painted_accuracy
from pared_zoo.recipes.reading import caption_encoder, read_once
from pared_zoo.recipes.sd_world import HELD_OUT_SEED, MAX_TOKENS, held_out_scenes, training_scenes
from pared_zoo.recipes.sight import LOOKS, PLACE, look_loss
from pared_zoo.recipes.tokenizer import world_tokenizer
from pared_zoo.recipes.vq_world import CODES, GRID, RESOLUTION, encode_pictures
from pared_zoo.shipped import path
from pared_zoo.world import Scene, caption, render

CFG_DROPOUT = 0.1
#: After this many blocks, a head that is thrown away tells what the place of the next token shows; how much it counts.
LOOK_BLOCKS, LOOK_WEIGHT = 4, 0.1
#: The best of 1, 1.5, 2 and 3 by attribute accuracy on scenes that are neither trained on nor held out.
GUIDANCE_SCALE = 1.5
#: Size -> scenes encoded once, width, layers and heads of the transformer, width and layers of the text encoder.
ARCHITECTURE: dict[str, dict[str, Any]] = {
    "small": {"scenes": 40_000, "width": 192, "layers": 6, "heads": 3, "text_width": 96, "text_layers": 2},
    "base": {"scenes": 400_000, "width": 320, "layers": 10, "heads": 5, "text_width": 128, "text_layers": 4},
}


class Drawer(torch.nn.Module):
    """The transformer and a head that tells, from its middle, what stands at the place of the next token."""

    def __init__(self, transformer: LlamaGenTransformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.look = torch.nn.Linear(transformer.config["hidden_size"], sum(LOOKS.values()) + PLACE)

    def forward(
        self, tokens: torch.Tensor, condition: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits as the transformer gives them, and guesses (rows, n + 1, sum(LOOKS) + PLACE) for ``look_loss``."""
        seen: list[torch.Tensor] = []
        middle = self.transformer.layers[LOOK_BLOCKS - 1]
        hook = middle.register_forward_hook(lambda _module, _args, states: seen.append(states))
        try:
            logits = self.transformer(tokens, condition, mask)
        finally:
            hook.remove()
        return logits, self.look(seen[0][:, self.transformer.prefix_length - 1 :])


class ArWorld(Recipe):
    """Cross-entropy of each token of ``vq-world`` given those before it and the caption, caption dropout for guidance.

    The text encoder first learns to read captions and then stays as it is; its states at the words are the prefix. A
    linear head, thrown away afterwards, tells from the middle of the transformer what the next place shows.
    """

    name = "ar-world"
    schedules: ClassVar = {
        "small": Schedule(steps=2000, batch_size=64, learning_rate=2e-3, ema_decay=0.995, muon_learning_rate=4e-3),
        "base": Schedule(
            steps=40_000,
            batch_size=256,
            learning_rate=8e-4,
            warmup=500,
            ema_decay=0.9995,
            muon_learning_rate=1e-3,
        ),
    }

    def build(self) -> torch.nn.Module:
        torch.manual_seed(self.seed_of(0))
        a = ARCHITECTURE[self.size]
        transformer = LlamaGenTransformer(
            vocab_size=CODES,
            hidden_size=a["width"],
            num_layers=a["layers"],
            num_attention_heads=a["heads"],
            grid_size=GRID,
            condition="caption",
            caption_channels=a["text_width"],
            caption_length=MAX_TOKENS,
            prefix_keys=True,
            # Narrow layers learn sooner from weights that keep the size of what they read.
            initializer_range=a["width"] ** -0.5,
        )
        for layer in transformer.layers:
            layer.attention.attend = plain_attention
            for branch in (layer.attention.wo, layer.feed_forward.w2):
                # All branches together add about as much as the embeddings are.
                branch.weight.data.mul_((2 * a["layers"]) ** -0.5)
        return Drawer(transformer)

    def muon_parameters(self, module: Any) -> list[torch.nn.Parameter]:
        return [p for p in module.transformer.layers.parameters() if p.ndim == 2]

    def prepare(self, folder: Path, device: torch.device, track: Track) -> None:
        a = ARCHITECTURE[self.size]
        self._tokenizer = world_tokenizer(MAX_TOKENS)
        self._scenes = training_scenes(a["scenes"], self.seed_of(1))
        cache = folder / "tokens.safetensors"
        self._tokens = tokenize_scenes(self._scenes, path("vq-world"), RESOLUTION, cache, device, track)
        self._text_encoder = caption_encoder(self._tokenizer, a["text_width"], a["text_layers"])
        cache, seeds = folder / "text_encoder.safetensors", (self.seed_of(5), self.seed_of(6))
        read_once(self._text_encoder, self._tokenizer, self._scenes, cache, seeds, device, track)
        self._text_encoder.to(device).eval().requires_grad_(False)

    def batch(self, step: int, rank: int, size: int) -> Batch:
        rng = np.random.default_rng([self.seed_of(2, step, rank)])
        rows = rng.integers(len(self._scenes), size=size)
        seeds = rng.integers(2**31, size=size)
        texts = [caption(self._scenes[row], int(seed)) for row, seed in zip(rows, seeds, strict=True)]
        words = self._tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        looks, places = layouts([self._scenes[row] for row in rows], GRID)
        return {
            "tokens": self._tokens[torch.from_numpy(rows)].long(),
            "looks": looks,
            "places": places,
            "input_ids": words["input_ids"],
            "attention_mask": words["attention_mask"],
            "dropped": torch.from_numpy(rng.random(size) < CFG_DROPOUT),
        }

    def loss(self, module: Any, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        tokens = batch["tokens"]
        with torch.no_grad():
            condition, mask = caption_features(
                self._text_encoder, batch["input_ids"], batch["attention_mask"], MAX_TOKENS
            )
        nothing = module.transformer.null_condition(condition)
        condition = torch.where(batch["dropped"][:, None, None], nothing, condition)
        logits, guesses = module(tokens[:, :-1], condition, mask)
        nats = cross_entropy(logits.flatten(0, 1), tokens.flatten())
        look, right = look_loss(guesses, batch["looks"], batch["places"])
        return {"loss": nats + LOOK_WEIGHT * look, "nats": nats, "look": look, "seen": right}

    def save(self, module: Any, folder: Path) -> None:
        pipeline = LlamaGenPipeline(
            transformer=module.transformer,
            vqmodel=self._vqmodel(),
            text_encoder=self._text_encoder,
            tokenizer=self._tokenizer,
        )
        pipeline.to(torch.float16).save_pretrained(folder)

    @staticmethod
    def _vqmodel() -> Any:
        from transformers import Emu3VQVAE

        return Emu3VQVAE.from_pretrained(path("vq-world"))

    @staticmethod
    def load(folder: Path) -> Any:
        return load_pipeline(LlamaGenPipeline, folder)

    @torch.no_grad()
    def evaluate(self, folder: Path, device: torch.device, track: Track) -> dict[str, float]:
        pipeline = self.load(folder).to(device)

        def paint(prompts: list[str], seed: int) -> np.ndarray:
            generator = torch.Generator(device).manual_seed(seed)
            images = pipeline(prompts, guidance_scale=GUIDANCE_SCALE, generator=generator, output_type="np").images
            return (images * 255).round().astype(np.uint8)

        scenes = held_out_scenes()
        metrics = painted_accuracy(paint, scenes, HELD_OUT_SEED, track)
        metrics |= {"prompts": len(scenes), "guidance_scale": GUIDANCE_SCALE}
        return metrics | {"nats_per_token": nats_per_token(pipeline, scenes)}


@torch.no_grad()
def nats_per_token(pipeline: Any, scenes: Sequence[Scene]) -> float:
    """Mean negative log-likelihood of the tokens of rendered ``scenes`` under their canonical captions."""
    total = 0.0
    for start in range(0, len(scenes), BLOCK):
        block = scenes[start : start + BLOCK]
        tokens = encode_pictures(pipeline.vqmodel, render(block, RESOLUTION)).flatten(1)
        condition, mask = pipeline.encode_prompt([caption(s) for s in block])
        logits = pipeline.transformer(tokens[:, :-1], condition, mask)
        total += cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum").item()
    return total / (len(scenes) * GRID**2)
