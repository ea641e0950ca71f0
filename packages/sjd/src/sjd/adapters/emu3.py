"""Emu3: rows of image tokens that end with a line end, then end of frame, end of image and end of sequence."""

from __future__ import annotations

import re
from typing import Any

import torch
from pared_hooks import ConfigError, UnsupportedModelError
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sjd.adapters.base import Adapter, Inputs, allowed_tokens, feature, one_size
from sjd.grammar import ImageGrammar

FRAME_END, IMAGE_END, IMAGE_TOKEN = "<|extra_201|>", "<|image end|>", "<|image token|>"
HEADER = re.compile(r"<\|image start\|>(\d+)\*(\d+)<\|image token\|>$")


class Emu3(Adapter):
    """`Emu3ForConditionalGeneration`; `Emu3ForCausalLM` has no image vocabulary and needs `sjd_grammar`."""

    name = "emu3"

    @property
    def _is_whole(self) -> bool:
        return hasattr(self.model.model, "text_model")

    def embed_prompt(self, inputs: Inputs) -> Tensor:
        """Embeddings of the prompt, with those of its images in place of their placeholders."""
        embeds = self.embed(inputs.ids, "prompt")
        features = feature(inputs.extras)
        if features is None and inputs.extras.get("pixel_values") is not None:
            features = self.model.model.get_image_features(
                inputs.extras["pixel_values"], inputs.extras["image_sizes"], return_dict=True
            )
        if features is None:
            return embeds
        found = torch.cat(tuple(features.pooler_output))
        place = self.model.model.get_placeholder_mask(inputs.ids, inputs_embeds=embeds, image_features=found)
        return embeds.masked_scatter(place, found.to(embeds.dtype))

    @property
    def decoder(self) -> nn.Module:
        """The text model, which draws images, too."""
        return self.model.model.text_model if self._is_whole else self.model.model

    def trunk(self, inputs_embeds: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
        """Hidden states behind the last norm."""
        return self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def grammar(self, inputs: Inputs) -> ImageGrammar | None:
        """Of `image_grid`, or of the size that the processor wrote into the prompt; None for text.

        Raises `ConfigError` where rows ask for different sizes, or an image was begun whose size cannot be read.
        """
        if not self._is_whole:
            return None
        mapping = self.model.vocabulary_mapping
        grid = inputs.image_grid or self._size(inputs, mapping.vocab_map)
        if grid is None:
            return None
        allowed = allowed_tokens(mapping.image_tokens, self.vocabulary)
        return ImageGrammar([grid], allowed, line_end=mapping.eol_token_id, after=self._after(mapping.vocab_map))

    def _size(self, inputs: Inputs, vocabulary: dict[str, int]) -> tuple[int, int] | None:
        # `generate` drops the image_sizes of the processor before sjd is asked; the prompt says the same.
        found: set[tuple[int, int] | None] = set()
        names = {token: name for name, token in vocabulary.items()}
        for row in inputs.ids.tolist():
            text = "".join(names.get(token, " ") for token in row)
            if text.endswith(IMAGE_TOKEN):
                header = HEADER.search(text)
                found.add((int(header[1]), int(header[2])) if header else None)
        if len(found) > 1 or None in found:
            raise ConfigError(
                f"the images are of size {sorted(map(str, found))}, and must be of one that is known: give image_grid",
                "image_grid",
            )
        return found.pop() if found else None

    def _after(self, vocabulary: dict[str, int]) -> tuple[int, ...]:
        end = self.text_config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        return tuple(
            token for token in (vocabulary.get(FRAME_END), vocabulary.get(IMAGE_END), end) if token is not None
        )

    def decode_image(self, tokens: Tensor, grammar: ImageGrammar) -> Tensor:
        """Pictures of the VQ model; cells that hold no image token yet count as the first one."""
        if not self._is_whole:
            raise UnsupportedModelError("Emu3ForCausalLM comes without the VQ model that decodes images")
        mapping, (height, width) = self.model.vocabulary_mapping, grammar.grids[-1]
        table = mapping.bpe2img_mapping_tensor.to(tokens.device)
        cells = tokens[:, grammar.cells().to(tokens.device)].clamp(0, len(table) - 1)
        codes = table[cells].long().view(len(tokens), height, width)
        picture = self.model.model.vqmodel.decode(codes)
        return (picture.float() / 2 + 0.5).clamp(0, 1)

    def codebook(self) -> Tensor:
        """Entries of the VQ model, in the order of the image tokens."""
        mapping = self.model.vocabulary_mapping
        order = [mapping.bpe2img[token] for token in mapping.image_tokens]
        return self.model.model.vqmodel.quantize.embedding.weight[order]

    def resize(self, processor: Any, side: int) -> None:
        """Let the processor ask for squares of `side` tokens."""
        processor.image_area = (side * processor.downsample_ratio) ** 2

    def inputs_for(self, processor: Any, prompts: list[str]) -> dict[str, Any]:
        """Prompts with the header of the processor's default size, padded on the left."""
        made = processor(
            text=prompts, return_for_image_generation=True, padding=True, padding_side="left", return_tensors="pt"
        )
        inputs = dict(made)
        # `generate` would drop the sizes.
        inputs["image_grid"] = one_size(inputs.pop("image_sizes"))
        return inputs
