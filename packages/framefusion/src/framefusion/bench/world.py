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
CALIBRATION_SEED = 50_000


@dataclass
class World:
    """Model and processor, and the name they go by in records."""

    model: Any
    processor: Any
    name: str = "vlm-world"

    @classmethod
    def load(cls, folder: str, device: torch.device) -> World:
        """The shipped model, or one saved in `folder` by its recipe.

        Raises FileNotFoundError, with the line that trains it, when there are no weights.
        """
        import pared_zoo
        from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

        place = Path(folder) if folder else pared_zoo.path("vlm-world")
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
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
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        videos = [clip.permute(0, 2, 3, 1).numpy() for clip in frames]
        options = {"do_resize": False} if frames.shape[-1] == self.model.config.vision_config.image_size else {}
        inputs = self.processor(
            text=texts,
            videos=videos,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            do_sample_frames=False,
            **options,
        )
        return {name: value.to(self.model.device) for name, value in inputs.items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def encode(self, inputs: dict[str, Any]) -> Tensor:
        """What the vision tower makes of the clips, for all ways to answer about them."""
        pixels = inputs["pixel_values_videos"]
        features: Tensor = self.model.model.get_video_features(pixels, return_dict=True).pooler_output
        return features

    def layout(self, inputs: Mapping[str, Any]) -> TokenLayout:
        """Where the clip is in each row of a batch."""
        where = (inputs["input_ids"] == self.model.config.video_token_id).cpu()
        blocks = [
            [VideoBlock(int(row.int().argmax()), int(row.sum()) // self.frame_tokens, self.frame_tokens)]
            for row in where
        ]
        return TokenLayout.from_blocks(where.shape[1], *blocks)

    @torch.no_grad()
    def answer(self, inputs: dict[str, Any], features: Tensor, tokens: int = 5) -> list[str]:
        """Greedy answers about encoded clips, without the special tokens."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        prompt = inputs["input_ids"].shape[1]
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        encoded = {"video": BaseModelOutputWithPooling(pooler_output=features)}
        out = self.model.generate(**given, mm_encoder_outputs=encoded, max_new_tokens=tokens, do_sample=False)
        return [text.strip() for text in self.processor.batch_decode(out[:, prompt:], skip_special_tokens=True)]
