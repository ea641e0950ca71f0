"""GLM-Image: the grids of the request in reverse order, small preview first, with positions in three planes."""

from __future__ import annotations

import torch
from pared_hooks import ConfigError
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sjd.adapters.base import Adapter, Inputs, Prompt, feature
from sjd.grammar import ImageGrammar


class GlmImage(Adapter):
    """`GlmImageForConditionalGeneration`, alone or in diffusers' `GlmImagePipeline`."""

    name = "glm_image"

    def embed_prompt(self, inputs: Inputs) -> Tensor:
        """Embeddings of the prompt, its images as the tokens of the VQ model."""
        base, ids = self.model.model, inputs.ids
        features = feature(inputs.extras)
        if features is None and inputs.extras.get("pixel_values") is not None:
            features = base.get_image_features(
                inputs.extras["pixel_values"],
                inputs.extras["image_grid_thw"],
                inputs.extras.get("images_per_sample"),
                return_dict=True,
            )
        if features is not None:
            tokens = base.get_image_tokens(features.pooler_output).view(-1).to(ids.device)
            ids = ids.masked_scatter(base.get_placeholder_mask(ids, tokens), tokens)
        return self.embed(ids, "prompt")

    def prompt(self, inputs: Inputs) -> Prompt:
        """The prompt, and the positions of its tokens and of all that will be generated, from the image grids."""
        base = self.model.model
        grids = _grids(inputs)
        kept = base._cached_decode_position_ids, base._prefill_len
        try:
            positions, _ = base.get_rope_index(
                inputs.ids,
                image_grid_thw=grids,
                images_per_sample=inputs.extras.get("images_per_sample"),
                attention_mask=inputs.mask.long(),
            )
            behind = base._cached_decode_position_ids.permute(1, 0, 2)
        finally:
            base._cached_decode_position_ids, base._prefill_len = kept
        return Prompt(
            self.embed_prompt(inputs),
            inputs.mask.shape[1] - inputs.mask.sum(1),
            torch.cat((positions, behind.to(positions)), dim=-1),
        )

    def uncond(self, inputs: Inputs) -> Inputs:
        """There is no unconditional prompt for this model."""
        raise ConfigError("guidance_scale is not used by GLM-Image; valid: None or 1", "guidance_scale")

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

    def positions(self, slots: Tensor, prompt: Prompt) -> Tensor:
        """Temporal, row and column position (3, R, n); slots behind the end take the last ones."""
        assert prompt.table is not None
        return super().positions(slots.clamp(max=prompt.table.shape[2] - 1), prompt)

    def grammar(self, inputs: Inputs) -> ImageGrammar:
        """The grids that are not images of the prompt, last one first, then the end token."""
        grids = _grids(inputs)
        counts = inputs.extras.get("images_per_sample")
        rows = len(inputs.ids)
        split = torch.split(grids, counts.tolist()) if counts is not None else [grids] * rows
        layouts = set()
        for ids, own in zip(inputs.ids, split, strict=False):
            given = int((ids == self.model.config.image_end_token_id).sum())
            layouts.add(tuple((int(h), int(w)) for _, h, w in reversed(own.tolist()[given:])))
        if len(layouts) > 1:
            raise ConfigError(
                f"image_grid_thw asks for {sorted(layouts)}; all rows of a batch draw the same sizes", "image_grid_thw"
            )
        codes = slice(0, self.model.config.vq_config.num_embeddings)
        return ImageGrammar(layouts.pop(), codes, after=(self.model.config.image_end_token_id,))

    def codebook(self) -> Tensor:
        """Entries of the VQ model."""
        return self.model.model.vqmodel.quantize.embedding.weight


def _grids(inputs: Inputs) -> Tensor:
    grids = inputs.extras.get("image_grid_thw")
    if grids is None:
        raise ConfigError("image_grid_thw is missing; valid: what the processor returns", "image_grid_thw")
    return grids
