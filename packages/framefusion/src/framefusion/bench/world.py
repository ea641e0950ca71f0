"""The zoo's vision-language model of the procedural world, with what its prompts need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framefusion.layout import TokenLayout, VideoBlock

FRAMES = 16
BLOCK = 32
"""Clips or prompts at once."""
CALIBRATION_SEED = 50_000


@dataclass
class World:
    """Model and processor, and the name they go by in records."""

    model: Any
    processor: Any
    name: str = "vlm-world"

    @classmethod
    def load(cls, folder: str, device: torch.device, dtype: torch.dtype = torch.float32) -> World:
        """The shipped model, or one saved in `folder` by its recipe, in `dtype`.

        Raises FileNotFoundError, with the line that trains it, when there are no weights.
        """
        import pared_zoo
        from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

        place = Path(folder) if folder else pared_zoo.path("vlm-world")
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(place, dtype=dtype)
        return cls(model.eval().to(device), AutoProcessor.from_pretrained(place), "vlm-world")

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame."""
        vision = self.model.config.vision_config
        return int(math.ceil(vision.image_size // vision.patch_size / 2) ** 2)

    @property
    def depth(self) -> int:
        """Layers of the text model."""
        return int(self.model.config.text_config.num_hidden_layers)

    def prompts(self, frames: Tensor, questions: Sequence[str]) -> dict[str, Any]:
        """Arguments of the model for one question about each clip; `frames` uint8 (clips, frames, 3, side, side)."""
        return {**self.texts(questions, frames.shape[1]), "pixel_values_videos": self._pixels(frames)}

    def texts(self, questions: Sequence[str], frames: int) -> dict[str, Any]:
        """Ids and mask of questions about clips of `frames` frames, as the processor makes them with the clips."""
        token = self.processor.video_token
        # The tokens of the clip, and one behind them for its end.
        clip = token * (frames * self.frame_tokens + 1)
        rows = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            ).replace(token, clip)
            for question in questions
        ]
        inputs = self.processor.tokenizer(rows, padding=True, padding_side="left", return_tensors="pt")
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _pixels(self, frames: Tensor) -> Tensor:
        videos = [clip.permute(0, 2, 3, 1).numpy() for clip in frames]
        options = {"do_resize": False} if frames.shape[-1] == self.model.config.vision_config.image_size else {}
        out = self.processor.video_processor(videos, return_tensors="pt", do_sample_frames=False, **options)
        pixels: Tensor = out["pixel_values_videos"].to(self.model.device, self.model.dtype)
        return pixels

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """What tower and projector make of clips, (clips, tokens, channels), for all ways to answer about them."""
        parts = []
        for start in range(0, len(frames), BLOCK):
            pixels = self._pixels(frames[start : start + BLOCK])
            parts.append(self.model.model.get_video_features(pixels, return_dict=True).pooler_output)
        return torch.cat(parts)

    def layout(self, inputs: Mapping[str, Any]) -> TokenLayout:
        """Where the clip is in each row of a batch."""
        where = (inputs["input_ids"] == self.model.config.video_token_id).cpu()
        blocks = [
            [VideoBlock(int(row.int().argmax()), int(row.sum()) // self.frame_tokens, self.frame_tokens)]
            for row in where
        ]
        return TokenLayout.from_blocks(where.shape[1], *blocks)

    @staticmethod
    def encoded(features: Tensor) -> dict[str, Any]:
        """The argument of the model that gives it encoded clips."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return {"mm_encoder_outputs": {"video": BaseModelOutputWithPooling(pooler_output=features)}}

    @torch.no_grad()
    def answer(self, inputs: dict[str, Any], features: Tensor, tokens: int = 5) -> list[str]:
        """Greedy answers about encoded clips, without the special tokens."""
        prompt = inputs["input_ids"].shape[1]
        options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False}
        out = self.model.generate(**inputs, **self.encoded(features), **options)
        return [text.strip() for text in self.processor.batch_decode(out[:, prompt:], skip_special_tokens=True)]
