"""The pipeline: a caption or a class, tokens, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from pared_zoo.llamagen.captions import caption_features
from pared_zoo.llamagen.transformer import LlamaGenTransformer

OUTPUT_TYPES = ("pil", "np", "pt")


class LlamaGenPipeline(DiffusionPipeline):
    """Pictures from captions or classes by a ``LlamaGenTransformer``.

    Args:
        transformer: the model that draws tokens.
        vqmodel: the picture tokenizer, with ``decode(tokens (rows, height, width))`` giving (rows, 3, side, side) in -1
            to 1, such as ``Emu3VQVAE``.
        text_encoder: a ``CLIPTextModel``, for models of captions.
        tokenizer: its ``CLIPTokenizer``.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vqmodel"
    _optional_components: ClassVar = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: LlamaGenTransformer,
        vqmodel: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vqmodel=vqmodel, text_encoder=text_encoder, tokenizer=tokenizer)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def encode_prompt(self, prompt: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text features of captions, as the transformer takes them.

        Of a caption longer than the model has places for, the end is kept; see ``caption_features``.

        Returns:
            Features (captions, caption_length, caption_channels), zeros on the left of a shorter caption, and bool
            (captions, caption_length), True at features.
        """
        words = self.tokenizer(list(prompt), padding="max_length", truncation=True, return_tensors="pt")
        words = words.to(self.text_encoder.device)
        features, mask = caption_features(
            self.text_encoder,
            words["input_ids"],
            words["attention_mask"],
            self.transformer.config["caption_length"],
        )
        return features.to(self.transformer.dtype), mask

    @torch.no_grad()
    def decode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pictures (rows, 3, side, side) in 0 to 1 of tokens int64 (rows, grid_size ** 2)."""
        size = self.transformer.config["grid_size"]
        return (self.vqmodel.decode(tokens.view(-1, size, size)).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: Sequence[int] | None = None,
        guidance_scale: float = 2.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_tokens: bool = False,
    ) -> Any:
        """Draw one picture per prompt or class.

        Args:
            prompt: captions, for a model of captions.
            class_labels: labels, for a model of classes.
            guidance_scale, temperature, top_k, top_p, generator: as for ``LlamaGenTransformer.generate``.
            output_type: ``"pil"``, ``"np"`` (rows, side, side, 3) in 0 to 1, or ``"pt"`` (rows, 3, side, side).
            return_tokens: also return the tokens.

        Returns:
            ``ImagePipelineOutput``, or (pictures, tokens int64 (rows, grid_size ** 2)) with ``return_tokens``.

        Raises:
            ValueError: for a condition that the model does not take, or a setting outside its range.
        """
        kind = self.transformer.config["condition"]
        given = {"caption": prompt, "class": class_labels}
        if given[kind] is None or sum(value is not None for value in given.values()) != 1:
            wanted, other = ("prompt", "class_labels") if kind == "caption" else ("class_labels", "prompt")
            raise ValueError(f"this model takes {wanted} and no {other}: its condition is a {kind}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} must be one of {OUTPUT_TYPES}")
        mask = None
        if kind == "caption":
            assert prompt is not None
            condition, mask = self.encode_prompt([prompt] if isinstance(prompt, str) else prompt)
            mask = None if bool(mask.all()) else mask
        else:
            condition = torch.as_tensor(class_labels, device=self.transformer.device)
        tokens = self.transformer.generate(
            condition,
            mask,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
        pictures = self.decode_tokens(tokens)
        # They are in 0 to 1 already; left to itself, the processor would take them for -1 to 1.
        pictures = self.image_processor.postprocess(pictures, output_type, do_denormalize=[False] * len(pictures))
        self.maybe_free_model_hooks()
        return (pictures, tokens) if return_tokens else ImagePipelineOutput(images=pictures)
