"""``emu3-world``: an ``Emu3ForConditionalGeneration`` that draws 64x64 pictures of the world from captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from pared_zoo.llamagen import GrowingCache, draw_tokens, guided
from pared_zoo.recipes.attention import PLAIN, plain_attention
from pared_zoo.recipes.base import Batch, Recipe, Schedule, Track
from pared_zoo.recipes.emu3_text import emu3_processor, emu3_tokenizer, picture_codes, picture_prompt, picture_tokens
from pared_zoo.recipes.latents import tokenize_scenes
from pared_zoo.recipes.painting import painted_accuracy
from pared_zoo.recipes.reading import QUESTIONS, answers
from pared_zoo.recipes.sd_world import HELD_OUT_SEED, held_out_scenes, training_scenes
from pared_zoo.recipes.vae_world import to_pixels
from pared_zoo.recipes.vq_world import CODES, GRID, RESOLUTION
from pared_zoo.shipped import path
from pared_zoo.world import caption

CFG_DROPOUT = 0.1
MAX_LENGTH = 512
#: Tokens of a picture with its line ends and the three ends behind it.
PICTURE_LENGTH = GRID * (GRID + 1) + 3
GUIDANCE_SCALE = 1.5
#: The layer whose output at the last token of a prompt has to tell what the caption says, and how much that counts.
READING_LAYER, READING_WEIGHT = 2, 0.1
#: Label of what is not asked for.
IGNORED = -100
#: Size -> scenes encoded once, width, layers, heads, key-value heads and inner width of the text model.
ARCHITECTURE: dict[str, tuple[int, ...]] = {
    "small": (40_000, 192, 6, 3, 1, 512),
    "base": (400_000, 320, 10, 5, 5, 864),
}


class Reader(torch.nn.Module):
    """The model, and heads that read captions at the end of its prompts; they are thrown away."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.questions = torch.nn.Linear(model.config.text_config.hidden_size, sum(QUESTIONS.values()))

    def forward(self, input_ids: torch.Tensor, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (rows, PICTURE_LENGTH, vocabulary) of the picture's tokens, and those of the reading heads.

        ``input_ids`` (rows, tokens) are padded on the right, which nothing before can see; ``prompts`` (rows,) are the
        lengths of the prompts.
        """
        out = self.model.model.text_model(input_ids=input_ids, output_hidden_states=True, use_cache=False)
        last = prompts[:, None] - 1
        places = (last + torch.arange(PICTURE_LENGTH, device=last.device))[..., None]
        states = out.last_hidden_state
        states = states.gather(1, places.expand(-1, -1, states.shape[-1]))
        read = out.hidden_states[READING_LAYER]
        read = read.gather(1, last[..., None].expand(-1, -1, read.shape[-1]))[:, 0].float()
        return self.model.lm_head(states), self.questions(torch.nn.functional.rms_norm(read, read.shape[-1:]))


class Emu3World(Recipe):
    """Cross-entropy of the tokens of a picture, its line ends and ends behind a caption, caption dropout for guidance.

    Linear heads, thrown away afterwards, read what the caption says at the prompt's last token, two layers up. The
    picture tokenizer is ``vq-world`` and stays as it is.
    """

    name = "emu3-world"
    library = "transformers"
    schedules: ClassVar = {
        "small": Schedule(steps=1200, batch_size=64, learning_rate=2e-3, ema_decay=0.995, muon_learning_rate=4e-3),
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
        from transformers import AttentionInterface, Emu3Config, Emu3ForConditionalGeneration, Emu3VQVAE

        torch.manual_seed(self.seed_of(0))
        _, width, layers, heads, groups, inner = ARCHITECTURE[self.size]
        tokenizer, vqmodel = emu3_tokenizer(CODES, MAX_LENGTH), Emu3VQVAE.from_pretrained(path("vq-world"))
        special = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = Emu3Config(
            vq_config=vqmodel.config.to_dict(),
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": width,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": groups,
                "max_position_embeddings": MAX_LENGTH,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
                "attention_dropout": 0.0,
                # Narrow layers learn sooner from weights that keep the size of what they read.
                "initializer_range": width**-0.5,
                "tie_word_embeddings": True,
                **special,
            },
            vocabulary_map=tokenizer.get_vocab(),
            tie_word_embeddings=True,
        )
        model = Emu3ForConditionalGeneration(config)
        model.model.vqmodel.load_state_dict(vqmodel.state_dict())
        model.model.vqmodel.requires_grad_(False)
        for layer in model.model.text_model.layers:
            for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                # All branches together add about as much as the embeddings are.
                branch.weight.data.mul_((2 * layers) ** -0.5)
        AttentionInterface.register(PLAIN, plain_attention)
        model.model.text_model.set_attn_implementation(PLAIN)
        for name, value in special.items():
            setattr(model.generation_config, name, value)
        # The defaults would take the likeliest code, or one of the 50 likeliest.
        model.generation_config.do_sample, model.generation_config.top_k = True, 0
        return Reader(model)

    def muon_parameters(self, module: Any) -> list[torch.nn.Parameter]:
        return [p for p in module.model.model.text_model.layers.parameters() if p.ndim == 2]

    def prepare(self, folder: Path, device: torch.device, track: Track) -> None:
        self._tokenizer = emu3_tokenizer(CODES, MAX_LENGTH)
        self._scenes = training_scenes(ARCHITECTURE[self.size][0], self.seed_of(1))
        cache = folder / "tokens.safetensors"
        tokens = tokenize_scenes(self._scenes, path("vq-world"), RESOLUTION, cache, device, track)
        self._pictures = picture_tokens(tokens.unflatten(1, (GRID, GRID)), self._tokenizer)
        self._answers = torch.tensor([answers(scene) for scene in self._scenes])

    def batch(self, step: int, rank: int, size: int) -> Batch:
        rng = np.random.default_rng([self.seed_of(2, step, rank)])
        rows = rng.integers(len(self._scenes), size=size)
        seeds = rng.integers(2**31, size=size)
        dropped = torch.from_numpy(rng.random(size) < CFG_DROPOUT)
        texts = [
            picture_prompt("" if drop else caption(self._scenes[row], int(seed)), GRID)
            for row, seed, drop in zip(rows, seeds, dropped, strict=True)
        ]
        prompts = self._tokenizer(texts)["input_ids"]
        lengths = torch.tensor([len(ids) for ids in prompts])
        picked = torch.from_numpy(rows)
        input_ids = torch.full((size, int(lengths.max()) + PICTURE_LENGTH), self._tokenizer.pad_token_id)
        for row, (ids, number) in enumerate(zip(prompts, picked, strict=True)):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            input_ids[row, len(ids) : len(ids) + PICTURE_LENGTH] = self._pictures[number]
        asked = self._answers[picked].masked_fill(dropped[:, None], IGNORED)
        return {"input_ids": input_ids, "prompts": lengths, "pictures": self._pictures[picked], "answers": asked}

    def loss(self, module: torch.nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        logits, read = module(batch["input_ids"], batch["prompts"])
        draw = cross_entropy(logits.float().flatten(0, 1), batch["pictures"].flatten())
        guesses = read.split(list(QUESTIONS.values()), dim=1)
        wanted = batch["answers"].unbind(dim=1)
        # A sum over what was asked: a batch without any caption has no mean.
        total = torch.stack(
            [cross_entropy(g, w, ignore_index=IGNORED, reduction="sum") for g, w in zip(guesses, wanted, strict=True)]
        ).sum()
        read_loss = total / (batch["answers"] != IGNORED).sum().clamp(min=1)
        return {"loss": draw + READING_WEIGHT * read_loss, "draw": draw, "read": read_loss}

    def save(self, module: Any, folder: Path) -> None:
        module.model.half().save_pretrained(folder)
        emu3_processor(emu3_tokenizer(CODES, MAX_LENGTH), RESOLUTION, RESOLUTION // GRID).save_pretrained(folder)

    @staticmethod
    def load(folder: Path) -> Any:
        from transformers import Emu3ForConditionalGeneration

        return Emu3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def evaluate(self, folder: Path, device: torch.device, track: Track) -> dict[str, float]:
        model, tokenizer = self.load(folder).to(device), emu3_tokenizer(CODES, MAX_LENGTH)
        kept: list[torch.Tensor] = []

        def paint(prompts: list[str], seed: int) -> np.ndarray:
            generator = torch.Generator(device).manual_seed(seed)
            codes, by_the_rules = picture_codes(draw_pictures(model, tokenizer, prompts, generator), GRID, tokenizer)
            kept.append(by_the_rules)
            return to_pixels(model.model.vqmodel.decode(codes))

        scenes = held_out_scenes()
        metrics = painted_accuracy(paint, scenes, HELD_OUT_SEED, track)
        metrics["drawn_by_the_rules"] = torch.cat(kept).float().mean().item()
        return metrics | {"prompts": len(scenes), "guidance_scale": GUIDANCE_SCALE}


@torch.no_grad()
def draw_pictures(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    generator: torch.Generator,
    guidance_scale: float = GUIDANCE_SCALE,
) -> torch.Tensor:
    """Draw the tokens of pictures with guidance and without any rule: headers are given, line ends are up to the model.

    Returns:
        int64 (prompts, PICTURE_LENGTH).
    """
    texts = [picture_prompt(text, GRID) for text in [*prompts, *[""] * len(prompts)]]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    mask, tokens = inputs["attention_mask"], []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = GrowingCache(model.config.text_config.num_hidden_layers, mask.shape[1] + PICTURE_LENGTH - 1)
    new = inputs["input_ids"]
    while True:
        out = model(input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        drawn = draw_tokens(guided(out.logits[:, -1].float(), guidance_scale), generator=generator)
        tokens.append(drawn)
        if len(tokens) == PICTURE_LENGTH:
            return torch.stack(tokens, dim=1)
        new = drawn.repeat(2)[:, None]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
