"""``vlm-world``: a ``LlavaOnevisionForConditionalGeneration`` that answers questions about clips of the world."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from pared_zoo.recipes.attention import PLAIN, plain_attention
from pared_zoo.recipes.base import Batch, Recipe, Schedule, Track
from pared_zoo.recipes.chat import END, IMAGE, PAD, VIDEO, chat_processor, chat_tokenizer
from pared_zoo.recipes.sight import LOOKS, MOTIONS, PATH, PLACE, cells, look_loss, look_words, motion_loss
from pared_zoo.recipes.turns import IGNORED, Turns, right_answers, turn_mask
from pared_zoo.world import (
    Clip,
    ClipDistribution,
    Program,
    Question,
    Scene,
    SceneDistribution,
    camera_noise,
    questions,
    render_clips,
    sample_clips,
    sample_scenes,
)
from pared_zoo.world.clip_question import CLIP_QUESTIONS

SIDE, PATCH = 64, 8
#: Tokens of one frame: neighbouring patches are pooled two by two.
FRAME_TOKENS = (SIDE // PATCH // 2) ** 2
#: The layer of the text model whose output at the tokens of a clip has to tell how things moved.
MOTION_LAYER = 4
#: How much those answers count beside the questions, and how much what single frames show.
MOTION_WEIGHT, LOOK_WEIGHT = 1.0, 0.3
#: Size -> (width, layers, heads) of the vision tower, (width, layers, heads, key-value heads, inner width) of the text.
ARCHITECTURE: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "small": ((96, 4, 3), (192, 8, 6, 2, 512)),
    "base": ((192, 6, 6), (320, 10, 10, 2, 864)),
}
STILL = ("still", "appear", "vanish", "flash", "recolor")
#: What clips are drawn from in training: kinds that alone can be asked some questions are drawn more often.
_RARE = {"order": 4.0, "pair": 3.0, "recolor": 3.0, "flash": 2.0, "still_then_fast": 1.5, "fast_then_still": 1.5}
CLIPS = ClipDistribution({**ClipDistribution().kinds, **_RARE})
PICTURES = SceneDistribution(max_objects=3)
#: What one frame shows; all else that is asked about clips happens over time.
SHOWN = ("color", "shape", "size", "texture", "background")
#: Questions that name one thing among others: pictures teach that much faster than clips do.
NAMED = ("color", "shape", "size", "texture", "relation")
NAMED_ASKED = 8
MOVING = ClipDistribution({kind: weight for kind, weight in CLIPS.kinds.items() if kind not in STILL})


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        until: share of the steps at which it ends.
        frames: length of its clips; 1 for pictures.
        subjects: clips or pictures in the place of one sample of the schedule's batch.
        talked: how many of them are asked about.
        asked: questions about each of those.
        sees: whether the vision tower is trained.
        objects: most objects in a picture; clips have up to three.
        pictures: further pictures, of which what is where has to be told.
        named: how many of those are asked about, as ``NAMED`` says.
        silent: further clips, of which only how things move has to be told.
    """

    until: float
    frames: int
    subjects: int
    talked: int
    asked: int
    sees: bool
    objects: int = 3
    pictures: int = 0
    named: int = 0
    silent: int = 0


#: Naming what is where in pictures, and answering about some; answering about more objects; about short clips; about
#: clips of the full length.
STAGES = (
    Stage(until=0.04, frames=1, subjects=16, talked=4, asked=8, sees=True, objects=2),
    Stage(until=0.08, frames=1, subjects=8, talked=4, asked=8, sees=True, objects=3),
    Stage(until=0.25, frames=8, subjects=1, talked=1, asked=12, sees=True, pictures=6, named=3, silent=3),
    Stage(until=1.0, frames=16, subjects=1, talked=1, asked=12, sees=False, pictures=4, named=3),
)


class Pupil(torch.nn.Module):
    """The model, and heads that read from its tokens what is where and how it moved; they are thrown away.

    What is where has to be told in the text model's own words: a token's logit for "red" is its product with the
    embedding of "red", so that vision and text meet in one space before the text model learns to look things up.
    """

    words: torch.Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        width = model.config.text_config.hidden_size
        self.model = model
        self.place = torch.nn.Linear(width, LOOKS["object"] + PLACE)
        self.motion = torch.nn.Linear(width, sum(MOTIONS.values()) + PATH)
        self.register_buffer("words", torch.tensor(chat_tokenizer()(look_words())["input_ids"])[:, 0], persistent=False)

    def look(self, tokens: torch.Tensor) -> torch.Tensor:
        """Guesses (..., sum(LOOKS) + PLACE) about the cells of ``tokens`` (..., width), for ``look_loss``."""
        tokens = torch.nn.functional.rms_norm(tokens.float(), tokens.shape[-1:])
        there, point = self.place(tokens).split([LOOKS["object"], PLACE], dim=-1)
        named = tokens @ self.model.get_input_embeddings().weight[self.words].T
        return torch.cat([there, named, point], dim=-1)

    def see(self, pixels: torch.Tensor, trained: bool = True) -> torch.Tensor:
        """Tokens (clips, frames, FRAME_TOKENS, width) of pixels (clips, frames, 3, SIDE, SIDE) in -1 to 1.

        ``trained`` is whether the vision tower gets a gradient; the projector always does.
        """
        inner = self.model.model
        with _plain_products(pixels), torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            # The model reads the last layer's output, before the norm behind it.
            patches = inner.vision_tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[-1]
        return inner.apply_pooling(inner.multi_modal_projector(patches)).unflatten(0, pixels.shape[:2])

    def answer(self, tokens: torch.Tensor, opening: Sequence[int], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at the tokens of ``batch``, and the outputs of ``MOTION_LAYER`` at the clip's tokens, as ``see``."""
        inner, embed = self.model.model, self.model.get_input_embeddings()
        rows = len(tokens)
        begin = embed(torch.tensor(opening, device=tokens.device)).expand(rows, -1, -1)
        newline = inner.image_newline.expand(rows, 1, -1)
        parts = [begin, tokens.flatten(1, 2), newline, embed(batch["ids"])]
        embeddings = torch.cat([part.float() for part in parts], dim=1)
        prefix = embeddings.shape[1] - batch["ids"].shape[1]
        before = torch.arange(prefix, device=tokens.device).expand(rows, -1)
        out = inner.language_model(
            inputs_embeds=embeddings,
            attention_mask=turn_mask(batch["turns"], prefix),
            position_ids=torch.cat([before, prefix + batch["offsets"]], dim=1),
            output_hidden_states=True,
            use_cache=False,
        )
        told = out.hidden_states[MOTION_LAYER][:, len(opening) : prefix - 1]
        return self.model.lm_head(out.last_hidden_state[:, prefix:]), told.unflatten(1, tokens.shape[1:3])

    def follow(self, tokens: torch.Tensor, opening: Sequence[int]) -> torch.Tensor:
        """Outputs of ``MOTION_LAYER`` at a clip's tokens, shaped like them; the layers behind are not computed."""
        text = self.model.model.language_model
        begin = text.embed_tokens(torch.tensor(opening, device=tokens.device)).expand(len(tokens), -1, -1)
        states = torch.cat([begin.float(), tokens.flatten(1, 2).float()], dim=1)
        position_ids = torch.arange(states.shape[1], device=states.device)[None]
        rotary = text.rotary_emb(states, position_ids)
        for layer in text.layers[:MOTION_LAYER]:
            states = layer(states, attention_mask=None, position_ids=position_ids, position_embeddings=rotary)
        return states[:, len(opening) :].unflatten(1, tokens.shape[1:3])


class VlmWorld(Recipe):
    """Cross-entropy over the answers to several questions about each clip, none of which sees another.

    Before, the vision tower learns to tell what is where in pictures, and then answers about pictures and short clips
    are learnt; linear heads, thrown away afterwards, read what is where and how it moved from the tokens.
    """

    name = "vlm-world"
    library = "transformers"
    stages = STAGES
    schedules: ClassVar = {
        "small": Schedule(steps=10_500, batch_size=8, learning_rate=1.5e-3, warmup=200),
        "base": Schedule(steps=40_000, batch_size=64, learning_rate=8e-4, warmup=500, ema_decay=0.9995),
    }

    def build(self) -> torch.nn.Module:
        from transformers import AttentionInterface, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

        torch.manual_seed(self.seed_of(0))
        seen, text = ARCHITECTURE[self.size]
        tokenizer = chat_tokenizer()
        special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = LlavaOnevisionConfig(
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": seen[0],
                "intermediate_size": 4 * seen[0],
                "num_hidden_layers": seen[1],
                "num_attention_heads": seen[2],
                "image_size": SIDE,
                "patch_size": PATCH,
                "vision_use_head": False,
            },
            text_config={
                "model_type": "qwen2",
                "vocab_size": len(tokenizer),
                "hidden_size": text[0],
                "num_hidden_layers": text[1],
                "num_attention_heads": text[2],
                "num_key_value_heads": text[3],
                "intermediate_size": text[4],
                "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
                "tie_word_embeddings": True,
                # Narrow layers learn sooner from weights that keep the size of what they read.
                "initializer_range": text[0] ** -0.5,
                "bos_token_id": None,
                **special,
            },
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
            image_grid_pinpoints=[[SIDE, SIDE]],
            tie_word_embeddings=True,
        )
        model = LlavaOnevisionForConditionalGeneration(config)
        for layer in model.model.language_model.layers:
            for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                # All branches together add about as much as the embeddings are.
                branch.weight.data.mul_((2 * text[1]) ** -0.5)
        AttentionInterface.register(PLAIN, plain_attention)
        model.model.language_model.set_attn_implementation(PLAIN)
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(END)
        model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(PAD)
        return Pupil(model)

    def prepare(self, folder: Path, device: torch.device, track: Track) -> None:
        self._turns = Turns(chat_tokenizer())

    def stage(self, step: int) -> Stage:
        """The stage that ``step`` belongs to."""
        return next((s for s in self.stages if step < s.until * self.schedule.steps), self.stages[-1])

    def batch(self, step: int, rank: int, size: int) -> Batch:
        stage, seed = self.stage(step), self.seed_of(2, step, rank)
        count = size * stage.subjects
        if stage.frames == 1:
            scenes = sample_scenes(count, seed, SceneDistribution(max_objects=stage.objects))
            asked = [questions(scene, seed + i, stage.asked) for i, scene in enumerate(scenes)]
            clips = [picture(scene) for scene in scenes]
        else:
            clips = sample_clips(count, seed, stage.frames, CLIPS)
            asked = [interview(clip, seed + i, stage.asked) for i, clip in enumerate(clips)]
        right = cells(clips)
        batch = {"pixels": noisy_pixels(clips, seed), "sees": torch.tensor(stage.sees)} | vars(right)
        batch |= self._turns.pack(asked[: size * stage.talked])
        if stage.pictures:
            batch |= self._pictures(stage, self.seed_of(5, step, rank), size)
        if stage.silent:
            seed = self.seed_of(6, step, rank)
            clips = sample_clips(size * stage.silent, seed, stage.frames, MOVING)
            right = cells(clips)
            batch |= {"silent": noisy_pixels(clips, seed)}
            batch |= {"silent_motions": right.motions, "silent_paths": right.paths}
        return batch

    def _pictures(self, stage: Stage, seed: int, size: int) -> Batch:
        scenes = sample_scenes(size * stage.pictures, seed, PICTURES)
        # Those of more objects come first: they are asked about.
        scenes.sort(key=lambda scene: -len(scene.objects))
        further = [picture(scene) for scene in scenes]
        right = cells(further)
        batch = {"further": noisy_pixels(further, seed), "further_looks": right.looks, "further_places": right.places}
        asked = [questions(scene, seed, NAMED_ASKED, NAMED) for scene in scenes[: size * stage.named]]
        return batch | {f"further_{key}": value for key, value in self._turns.pack(asked).items()}

    def loss(self, module: Any, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        sees = bool(batch["sees"])
        tokens = module.see(to_pixels(batch["pixels"]), trained=sees)
        unknown = torch.tensor(torch.nan, device=tokens.device)
        terms = dict.fromkeys(("look", "seen", "motion", "followed", "answer", "right"), unknown)
        # Parameters without a gradient would stop processes that average gradients: all take part, some with none.
        terms["loss"] = 0 * torch.stack([p.sum() for p in module.parameters()]).sum()
        if sees:
            terms["look"], terms["seen"] = look_loss(module.look(tokens), batch["looks"], batch["places"])
            terms["loss"] = terms["loss"] + LOOK_WEIGHT * terms["look"]
        if "further" in batch:
            further = module.see(to_pixels(batch["further"]))
            looks = batch["further_looks"], batch["further_places"]
            terms["look"], terms["seen"] = look_loss(module.look(further), *looks)
            turns = {key: batch[f"further_{key}"] for key in ("ids", "labels", "turns", "offsets")}
            named, *_ = self._answers(module, further, turns)
            terms["loss"] = terms["loss"] + LOOK_WEIGHT * terms["look"] + named
        terms["answer"], terms["right"], told = self._answers(module, tokens, batch)
        terms["loss"] = terms["loss"] + terms["answer"]
        if tokens.shape[1] > 1:
            motions, paths = batch["motions"], batch["paths"]
            if "silent" in batch:
                silent = module.see(to_pixels(batch["silent"]), trained=False)
                told = torch.cat([told, module.follow(silent, self._turns.opening)])
                motions = torch.cat([motions, batch["silent_motions"]])
                paths = torch.cat([paths, batch["silent_paths"]])
            terms["motion"], terms["followed"] = motion_loss(module.motion(told), motions, paths)
            terms["loss"] = terms["loss"] + MOTION_WEIGHT * terms["motion"]
        return terms

    def _answers(self, module: Any, tokens: torch.Tensor, turns: Batch) -> tuple[torch.Tensor, ...]:
        """Loss of the answers of ``turns`` about the first of ``tokens``, share of right ones, see ``answer``."""
        logits, told = module.answer(tokens[: len(turns["ids"])], self._turns.opening, turns)
        labels, right = turns["labels"], right_answers(logits, turns["labels"], turns["turns"])
        total = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / right.isfinite().sum(), right.nanmean(), told

    def save(self, module: Any, folder: Path) -> None:
        module.model.half().save_pretrained(folder)
        chat_processor(SIDE, (SIDE // PATCH) ** 2).save_pretrained(folder)

    @staticmethod
    def load(folder: Path) -> Any:
        from transformers import LlavaOnevisionForConditionalGeneration

        return LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def evaluate(self, folder: Path, device: torch.device, track: Track) -> dict[str, float]:
        from pared_zoo.recipes.exam import examine

        return examine(self.load(folder).to(device), track)


def picture(scene: Scene) -> Clip:
    """A scene as a clip of one frame."""
    return Clip(scene.objects, (Program(),) * len(scene.objects), scene.background, "still", 1)


def noisy_pixels(clips: Sequence[Clip], seed: int) -> torch.Tensor:
    """Frames as a camera sees them: uint8 (clips, frames, 3, SIDE, SIDE)."""
    frames = camera_noise(render_clips(clips, SIDE), seed)
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 1, 4, 2, 3)))


def to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """What the processor makes of uint8 frames of the right size: float32 in -1 to 1."""
    return frames.float() / 127.5 - 1


def interview(clip: Clip, seed: int, n: int) -> list[Question]:
    """``n`` questions about a clip, or as many as there are, most of them about what happens in it."""
    happens = [kind for kind in CLIP_QUESTIONS if kind not in SHOWN]
    asked = questions(clip, seed, n - n // 4, happens)
    return asked + questions(clip, seed, n - len(asked), SHOWN)


def _plain_products(like: torch.Tensor) -> AbstractContextManager[Any]:
    """On a CPU they are faster than fused attention for the few patches of a frame."""
    return sdpa_kernel(SDPBackend.MATH) if like.device.type == "cpu" else nullcontext()
