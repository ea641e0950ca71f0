"""LlamaGen-class transformers: a class or a caption as prefix, then a square of image tokens with 2-D positions."""

from __future__ import annotations

from typing import Any

import torch
from pared_hooks import ConfigError
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sjd.adapters.base import Adapter, Inputs, Phase, Prompt, check_padding
from sjd.grammar import ImageGrammar


class LlamaGen(Adapter):
    """A model with the calls of `pared_zoo.llamagen.LlamaGenTransformer`; its prompt is a condition, not tokens."""

    name = "llamagen"

    def __init__(self, model: Any, pipeline: Any = None) -> None:
        super().__init__(model)
        self.pipeline = pipeline

    def check(self) -> None:
        """Its attention takes any mask and cache."""

    @property
    def device(self) -> torch.device:
        """Where conditions go."""
        return self.model.device

    @property
    def decoder(self) -> nn.Module:
        """The transformer itself."""
        return self.model

    @property
    def vocabulary(self) -> int:
        """Image tokens."""
        return self.model.config.vocab_size

    @property
    def head_module(self) -> Any:
        """The layer that gives logits."""
        return self.model.output

    @property
    def max_positions(self) -> int:
        """The prefix and the grid."""
        return self.model.prefix_length + self.model.num_tokens

    def layers(self) -> int:
        """Layers that cache keys and values."""
        return self.model.config.num_layers

    def embed(self, ids: Tensor, phase: Phase) -> Tensor:
        """Embeddings of image tokens."""
        return self.model.embed_tokens(ids)

    def condition(self, condition: Tensor, mask: Tensor | None) -> Prompt:
        """The prefix of a condition, with `mask` (B, prefix), True at its words, padded on the left.

        Raises `ConfigError` for a mask of another shape, or with padding elsewhere.
        """
        embeds = self.model.embed_condition(condition)
        shape = tuple(embeds.shape[:2])
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=embeds.device)
        elif tuple(mask.shape) != shape:
            raise ConfigError(
                f"condition_mask of shape {tuple(mask.shape)} is not valid: {shape}", "condition_mask"
            )  # fmt: skip
        mask = check_padding(mask.to(embeds.device, torch.bool), "condition_mask")
        return Prompt(embeds, shape[1] - mask.sum(1))

    def trunk(self, inputs_embeds: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
        """Hidden states behind the last norm."""
        return self.model.trunk(inputs_embeds, position_ids, mask, cache)

    def positions(self, slots: Tensor, prompt: Prompt) -> Tensor:
        """The slots themselves: padding lies inside the prefix and shifts nothing."""
        return slots

    def grammar(self, inputs: Inputs | None = None) -> ImageGrammar:
        """A square of image tokens."""
        side = self.model.config.grid_size
        return ImageGrammar([(side, side)], slice(0, self.vocabulary))

    def decode_image(self, tokens: Tensor, grammar: ImageGrammar) -> Tensor:
        """Pictures of the pipeline's VQ model."""
        if self.pipeline is None:
            return super().decode_image(tokens, grammar)
        return self.pipeline.decode_tokens(tokens)

    def codebook(self) -> Tensor:
        """Entries of the pipeline's VQ model."""
        if self.pipeline is None:
            return super().codebook()
        return self.pipeline.vqmodel.quantize.embedding.weight
