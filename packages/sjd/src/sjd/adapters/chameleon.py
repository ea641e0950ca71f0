"""Chameleon, and the checkpoints that draw images with its class: Anole and Lumina-mGPT."""

from __future__ import annotations

from pared_hooks import ConfigError
from torch import Tensor
from transformers.cache_utils import Cache

from sjd.adapters.base import Adapter, Inputs, allowed_tokens, feature
from sjd.grammar import ImageGrammar

LUMINA_IMAGE = slice(4, 8196)
LUMINA_END, LUMINA_BEGIN, LUMINA_LINE, LUMINA_SIZE = 8196, 8197, 8803, 8804


def lumina_grammar(height: int, width: int, *, header: bool = True) -> ImageGrammar:
    """The layout of Lumina-mGPT: begin and size tokens (with `header`), rows that end with a line end, image end.

    `height` and `width` in tokens; size tokens count in pairs of them. Raises `GrammarError` for an empty grid.
    """
    before = (LUMINA_BEGIN, LUMINA_SIZE + height // 2, LUMINA_SIZE + width // 2) if header else ()
    return ImageGrammar(
        [(height, width)], LUMINA_IMAGE, line_end=LUMINA_LINE, before=before, after=(LUMINA_END,)
    )  # fmt: skip


class Chameleon(Adapter):
    """`ChameleonForConditionalGeneration`, past its forward: that one sets every image token's logit to the minimum."""

    name = "chameleon"

    def embed_prompt(self, inputs: Inputs) -> Tensor:
        """Embeddings of the prompt, with those of its images in place of their placeholders."""
        embeds, base = self.embed(inputs.ids, "prompt"), self.model.model
        features = feature(inputs.extras)
        if features is None and inputs.extras.get("pixel_values") is not None:
            features = base.get_image_features(inputs.extras["pixel_values"], return_dict=True)
        if features is None:
            return embeds
        found = features.pooler_output
        place = base.get_placeholder_mask(inputs.ids, inputs_embeds=embeds, image_features=found)
        return embeds.masked_scatter(place, found.to(embeds.dtype))

    def trunk(self, inputs_embeds: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
        """Hidden states behind the last norm."""
        return self.model.model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def grammar(self, inputs: Inputs) -> ImageGrammar:
        """Anole's: a square of image tokens without line ends, and the image end where there is room for it."""
        mapping = self.model.model.vocabulary_mapping
        if not mapping.image_tokens:
            raise ConfigError("config.vocabulary_map names no image token (IMGIMG..); give sjd_grammar", "sjd_grammar")
        vq = self.model.config.vq_config
        side = vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)
        height, width = inputs.image_grid or (side, side)
        end = mapping.vocab_map.get("<eoss>")
        after = () if end is None or inputs.new_tokens <= height * width else (end,)
        return ImageGrammar([(height, width)], allowed_tokens(mapping.image_tokens, self.vocabulary), after=after)

    def codebook(self) -> Tensor:
        """Entries of the VQ model, in the order of the image tokens."""
        mapping = self.model.model.vocabulary_mapping
        order = [mapping.bpe2img[token] for token in mapping.image_tokens]
        return self.model.model.vqmodel.quantize.embedding.weight[order]
