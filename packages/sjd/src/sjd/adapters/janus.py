"""Janus and Janus-Pro: a square of image tokens through embeddings and a head of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from sjd.adapters.base import Adapter, Inputs, Phase
from sjd.grammar import ImageGrammar


class Janus(Adapter):
    """`JanusForConditionalGeneration` with `generation_mode="image"`."""

    name = "janus"

    @property
    def head_module(self) -> Any:
        """The head of the image tokens."""
        return self.model.model.generation_head

    @property
    def vocabulary(self) -> int:
        """Image tokens; text has a head of its own."""
        return self.model.config.vq_config.num_embeddings

    def embed(self, ids: Tensor, phase: Phase) -> Tensor:
        """Text embeddings, or aligned embeddings of image tokens."""
        if phase == "prompt":
            return self.model.get_input_embeddings()(ids)
        return self.model.prepare_embeddings_for_image_generation(ids)

    def uncond(self, inputs: Inputs) -> Inputs:
        """Every token but begin of sequence and begin of image becomes padding, and is still attended."""
        return without_words(inputs, self.model.generation_config)

    @property
    def decoder(self) -> nn.Module:
        """The language model, which draws images, too."""
        return self.model.model.language_model

    def trunk(self, inputs_embeds: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
        """Hidden states behind the last norm."""
        return self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def grammar(self, inputs: Inputs) -> ImageGrammar:
        """All image tokens, no line ends, nothing behind."""
        side = round(self.model.model.vision_model.config.num_image_tokens**0.5)
        return ImageGrammar([inputs.image_grid or (side, side)], slice(0, self.vocabulary))

    def decode_image(self, tokens: Tensor, grammar: ImageGrammar) -> Tensor:
        """Pictures of the VQ model."""
        cells = tokens[:, grammar.cells().to(tokens.device)]
        picture = self.model.decode_image_tokens(cells).permute(0, 3, 1, 2)
        return (picture.float() / 2 + 0.5).clamp(0, 1)

    def codebook(self) -> Tensor:
        """Entries of the VQ model."""
        return self.model.model.vqmodel.quantize.embedding.weight

    def inputs_for(self, processor: Any, prompts: list[str]) -> dict[str, Any]:
        """Prompts with the begin of an image, padded on the left."""
        made = processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")
        return {**dict(made), "generation_mode": "image"}


def without_words(inputs: Inputs, generation_config: Any) -> Inputs:
    """The prompt with every token but begin of sequence and begin of image replaced by padding that is attended."""
    begin = generation_config.generation_kwargs["boi_token_id"]
    keep = (inputs.ids == generation_config.bos_token_id) | (inputs.ids == begin)
    return Inputs(inputs.ids.masked_fill(~keep, generation_config.pad_token_id), inputs.mask)
