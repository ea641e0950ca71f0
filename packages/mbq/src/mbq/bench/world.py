"""The vision-language model of the zoo as an exam: clips, questions, calibration samples, and what is scored."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

CALIBRATION_SEED = 77_000
TEST_SEED = 91_000
QUESTIONS_PER_CLIP = 8
BLOCK = 8
FRAMES = 16
OUTLIERS, OUTLIER_SCALE = 3, 20.0
#: Of captions between two clips: the paper's code puts 512 tokens of text between pictures of some hundred tokens.
CAPTION_TOKENS = 64
Mix = Literal["single", "pairs", "interleaved"]


@dataclass(frozen=True)
class Score:
    """Over the answers to the test's questions: accuracy of greedy decoding, cross-entropy, KL from full precision."""

    accuracy: float
    loss: float
    kl: float
    questions: int


@dataclass
class Exam:
    """The model with the tokens of the test's clips, which quantising the language part does not change."""

    model: Any
    blocks: list[tuple[Tensor, dict[str, Tensor]]]
    reference: list[Tensor]

    @classmethod
    @torch.no_grad()
    def prepare(cls, folder: Path | None, clips: int, device: torch.device) -> Exam:
        """Load ``vlm-world`` (or the same class from `folder`) and look at `clips` clips."""
        from pared_zoo.recipes.chat import chat_tokenizer
        from pared_zoo.recipes.turns import Turns
        from pared_zoo.recipes.vlm_world import noisy_pixels, to_pixels
        from pared_zoo.world import questions, sample_clips

        model = load(folder).to(device)
        turns = Turns(chat_tokenizer())
        blocks = []
        for start in range(0, clips, BLOCK):
            count = min(BLOCK, clips - start)
            some = sample_clips(count, TEST_SEED + start, FRAMES)
            asked = [questions(clip, TEST_SEED + start + i, QUESTIONS_PER_CLIP) for i, clip in enumerate(some)]
            pixels = to_pixels(noisy_pixels(some, TEST_SEED + start).to(device))
            packed = {name: value.to(device) for name, value in turns.pack(asked).items()}
            blocks.append((_see(model, pixels), packed))
        return cls.of(model, blocks)

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, blocks: list[tuple[Tensor, dict[str, Tensor]]]) -> Exam:
        """The exam of `model`, whose answers are what others are compared with."""
        exam = cls(model, blocks, [])
        exam.reference = [exam.logits(model, number) for number in range(len(blocks))]
        return exam

    def with_outliers(self) -> Exam:
        """The same exam of a copy of the model with outlier channels planted."""
        model = copy.deepcopy(self.model)
        plant_outliers(model)
        return Exam.of(model, self.blocks)

    @torch.no_grad()
    def score(self, model: Any) -> Score:
        """Ask `model`, which is `self.model` or one with the same vision tower."""
        from pared_zoo.recipes.turns import IGNORED, right_answers

        right, losses, kls = [], [], []
        for number, reference in enumerate(self.reference):
            logits, batch = self.logits(model, number), self.blocks[number][1]
            labels = batch["labels"]
            asked = labels != IGNORED
            right.append(right_answers(logits, labels, batch["turns"]).flatten())
            ours, theirs = logits[asked].log_softmax(-1), reference[asked].log_softmax(-1)
            losses.append(-ours.gather(1, labels[asked][:, None])[:, 0])
            kls.append((theirs.exp() * (theirs - ours)).sum(-1))
        verdicts = torch.cat(right)
        verdicts = verdicts[verdicts.isfinite()]
        loss, kl = torch.cat(losses).double().mean(), torch.cat(kls).double().mean()
        return Score(float(verdicts.double().mean()), float(loss), float(kl), len(verdicts))

    def logits(self, model: Any, number: int) -> Tensor:
        """Logits (clips, tokens, words) at the questions and answers of block `number`, in float32."""
        from pared_zoo.recipes.chat import chat_tokenizer
        from pared_zoo.recipes.turns import Turns
        from pared_zoo.recipes.vlm_world import Pupil

        tokens, batch = self.blocks[number]
        logits, _ = Pupil(model).to(tokens.device).answer(tokens, Turns(chat_tokenizer()).opening, batch)
        return logits.float()


def load(folder: Path | None = None) -> Any:
    """The shipped ``vlm-world``, or the model in `folder`, in float32."""
    if folder is None:
        import pared_zoo

        return pared_zoo.load("vlm-world")
    from pared_zoo.recipes.vlm_world import VlmWorld

    return VlmWorld.load(folder)


@torch.no_grad()
def calibration_batches(model: Any, count: int, seed: int, mix: Mix = "single") -> list[dict[str, Tensor]]:
    """`count` clips with a question and its answer each, as embeddings with the masks that MBQ needs.

    Other clips than the test's. The same layout as in training: opening, tokens of the clip, newline, question, answer.
    With another `mix` than "single" two clips are one sample, as in the paper's code: one behind the other ("pairs"),
    or with captions of other clips between them, whose tokens count as answer ("interleaved").
    """
    parts = [_spoken(model, CALIBRATION_SEED + 1000 * seed + number) for number in range(count)]
    if mix == "single":
        return parts
    joined = []
    for number, (first, second) in enumerate(zip(parts[::2], parts[1::2], strict=False)):
        between = [] if mix == "pairs" else [_captions(model, CALIBRATION_SEED + 1000 * seed + number)]
        row = [first, *between, second]
        joined.append({name: torch.cat([part[name] for part in row], 1) for name in first})
    return joined


def _spoken(model: Any, place: int) -> dict[str, Tensor]:
    """The sample of one clip."""
    from pared_zoo.recipes.chat import chat_tokenizer
    from pared_zoo.recipes.turns import IGNORED, Turns
    from pared_zoo.recipes.vlm_world import noisy_pixels, to_pixels
    from pared_zoo.world import questions, sample_clips

    turns, embed = Turns(chat_tokenizer()), model.get_input_embeddings()
    device = embed.weight.device
    clip = sample_clips(1, place, FRAMES)
    packed = turns.pack([questions(clip[0], place, 1)])
    vision = _see(model, to_pixels(noisy_pixels(clip, place).to(device))).flatten(1, 2)
    ids, following = packed["ids"].to(device), packed["labels"].to(device)
    opening = embed(torch.tensor([turns.opening], device=device))
    embeds = torch.cat([opening, vision, model.model.image_newline[None, None], embed(ids)], 1)
    before = opening.shape[1] + vision.shape[1] + 1
    labels = torch.full(embeds.shape[:2], IGNORED, device=device)
    # The pack says of each token which one follows; here a label stands at the token itself.
    labels[:, before + 1 :] = following[:, :-1]
    is_vision = torch.zeros_like(labels, dtype=torch.bool)
    is_vision[:, opening.shape[1] : before - 1] = True
    return {"inputs_embeds": embeds, "labels": labels, "vision_mask": is_vision}


def _captions(model: Any, place: int) -> dict[str, Tensor]:
    """CAPTION_TOKENS tokens of what is said of other clips, all of them answer."""
    from pared_zoo.recipes.chat import chat_tokenizer
    from pared_zoo.world import clip_caption, sample_clips

    clips = sample_clips(CAPTION_TOKENS // 8, place + 500, FRAMES)
    ids = chat_tokenizer()("".join(f" {clip_caption(clip)}" for clip in clips), return_tensors="pt").input_ids
    ids = ids[:, :CAPTION_TOKENS].to(model.device)
    return {
        "inputs_embeds": model.get_input_embeddings()(ids),
        "labels": ids,
        "vision_mask": torch.zeros_like(ids, dtype=torch.bool),
    }


@torch.no_grad()
def plant_outliers(model: Any) -> None:
    """Multiply three channels of every norm's output by 20 and divide the weights that read them: the same function.

    Large language models have such channels, small ones do not, and they are what makes activations hard to round.
    """
    from pared_hooks import DecoderView

    for layer in DecoderView.of(model).layers:
        readers = {
            "attention": [layer.projections[role] for role in ("query", "key", "value")],
            "mlp": [layer.mlp_projections[role] for role in ("gate", "up")],
        }
        for role, linears in readers.items():
            norm: Any = layer.norms[role]
            channels = torch.arange(OUTLIERS) * (len(norm.weight) // OUTLIERS)
            norm.weight[channels] *= OUTLIER_SCALE
            for linear in linears:
                linear.weight[:, channels] /= OUTLIER_SCALE  # type: ignore[index, operator]


def _see(model: Any, pixels: Tensor) -> Tensor:
    """Tokens (clips, frames, 16, C) of pixels, as the model itself computes them."""
    from pared_zoo.recipes.vlm_world import Pupil

    return Pupil(model).to(pixels.device).see(pixels, trained=False)
