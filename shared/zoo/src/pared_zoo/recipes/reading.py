"""A text encoder learns to read captions before a generator learns from it, as CLIP does for Stable Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from pared_zoo.recipes.base import Track
from pared_zoo.world import Scene, caption
from pared_zoo.world.attributes import BACKGROUNDS, COLORS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES

STEPS = 1000
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
#: What is read off a caption, and how many answers there are; the first answer of the last three is "nothing said".
QUESTIONS: dict[str, int] = {
    **{
        f"{attribute}_{slot}": len(words)
        for slot in (0, 1)
        for attribute, words in (("shape", SHAPES), ("color", COLORS), ("size", SIZES), ("texture", TEXTURES))
    },
    "background": len(BACKGROUNDS),
    "arrangement": 3,
    "place": 1 + len(PLACES),
    "objects": 3,
}


def answers(scene: Scene) -> list[int]:
    """Right answers to ``QUESTIONS``, as indices.

    Slot 0 is the left or upper object of a pair whatever the caption's order, for that is where a picture shows it;
    what is alone fills both slots.
    """
    objects, arrangement = [scene.objects[0], scene.objects[-1]], 0
    if scene.relation is not None:
        arrangement = 1 + (scene.relation in ("above", "below"))
        if RELATIONS.index(scene.relation) % 2:
            objects.reverse()
    words = [
        index
        for o in objects
        for index in (
            SHAPES.index(o.shape),
            list(COLORS).index(o.color),
            list(SIZES).index(o.size),
            TEXTURES.index(o.texture),
        )
    ]
    place = 0 if scene.place is None else 1 + list(PLACES).index(scene.place)
    return [*words, list(BACKGROUNDS).index(scene.background), arrangement, place, min(len(scene.objects), 3) - 1]


def caption_encoder(tokenizer: Any, width: int, layers: int, projection: bool = False) -> Any:
    """A new ``CLIPTextModel``, or one with projection, for captions of at most the tokenizer's length."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def caption_ids(scenes: Sequence[Scene], rng: np.random.Generator, tokenizer: Any, dropout: float) -> torch.Tensor:
    """Tokens (scenes, tokenizer's length) of one caption a scene; of the empty text for a share ``dropout``."""
    seeds, dropped = rng.integers(2**31, size=len(scenes)), rng.random(len(scenes)) < dropout
    texts = [
        "" if drop else caption(scene, int(seed)) for scene, seed, drop in zip(scenes, seeds, dropped, strict=True)
    ]
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


def read_once(
    text_encoder: Any,
    tokenizer: Any,
    scenes: Sequence[Scene],
    cache: Path,
    seeds: tuple[int, int],
    device: torch.device,
    track: Track,
) -> None:
    """``teach_reading`` from new weights, or load from ``cache`` what it came to; ``seeds`` are of weights and lessons.

    ``text_encoder`` changes in place, and is on the CPU afterwards.
    """
    from safetensors.torch import load_file, save_file

    if not cache.exists():
        with torch.random.fork_rng():
            torch.manual_seed(seeds[0])
            fresh = type(text_encoder)(text_encoder.config).to(device)
        teach_reading(fresh, tokenizer, scenes, seeds[1], track)
        temporary = cache.with_suffix(".tmp")
        save_file({k: v.contiguous().cpu() for k, v in fresh.state_dict().items()}, temporary)
        temporary.replace(cache)
    text_encoder.load_state_dict(load_file(cache))


def teach_reading(
    text_encoder: Any,
    tokenizer: Any,
    scenes: Sequence[Scene],
    seed: int,
    track: Track,
    steps: int = STEPS,
) -> float:
    """Train a ``CLIPTextModel`` in place so that the end of a caption tells what the scene holds.

    Args:
        text_encoder: the model; its pooled output is read by linear heads that are thrown away afterwards.
        tokenizer: pads to the model's length.
        scenes: what captions are about; each is worded anew every time.
        seed: draws scenes, wordings and the heads' start.
        track: progress display.
        steps: optimizer steps of ``BATCH_SIZE`` captions.

    Returns:
        Share of right answers over the last tenth of the steps.
    """
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = torch.nn.Linear(text_encoder.config.hidden_size, sum(QUESTIONS.values()))
    heads.to(next(text_encoder.parameters()).device)
    wanted = torch.tensor([answers(scene) for scene in scenes])
    parameters = [*text_encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    right: list[float] = []
    for _ in track(range(steps), "read captions", steps):
        rows = rng.integers(len(scenes), size=BATCH_SIZE)
        texts = [caption(scenes[row], int(rng.integers(2**31))) for row in rows]
        ids = tokenizer(texts, padding="max_length", return_tensors="pt")["input_ids"].to(heads.weight.device)
        target = wanted[torch.from_numpy(rows)].to(heads.weight.device)
        logits = heads(text_encoder(ids).pooler_output).split(list(QUESTIONS.values()), dim=1)
        loss = torch.stack([cross_entropy(guess, target[:, k]) for k, guess in enumerate(logits)]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        guesses = torch.stack([guess.detach().argmax(dim=1) for guess in logits], dim=1)
        right.append((guesses == target).float().mean().item())
    return float(np.mean(right[-max(1, steps // 10) :]))
