"""The transformer: class or caption in front, then the tokens of a picture in raster order."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from transformers.cache_utils import Cache

from pared_zoo.llamagen.blocks import RMSNorm, TransformerBlock
from pared_zoo.llamagen.cache import GrowingCache
from pared_zoo.llamagen.conditions import CaptionEmbedder, LabelEmbedder
from pared_zoo.llamagen.sampling import check_sampling, draw_tokens, guided

CONDITIONS = ("class", "caption")


class LlamaGenTransformer(ModelMixin, ConfigMixin):
    """LlamaGen (Sun et al. 2024): pre-norm Llama blocks without biases, two-dimensional rotary positions.

    A sequence is ``prefix_length`` places of the condition, then one place per token. The state at the last place of
    the prefix gives token 0, that of token i gives token i + 1. In checkpoints of LlamaGen queries and keys of the
    prefix are zero vectors, because their rotary factors are: every token sees the mean of the prefix's values. With
    ``prefix_keys`` they are kept, unturned, so that a token chooses among the words by what they say and by where in
    the picture it stands: a small model learns from captions in a fraction of the samples.

    Args:
        vocab_size: codes of the picture's tokenizer.
        hidden_size: width; a multiple of ``num_attention_heads`` times four.
        num_layers: blocks.
        num_attention_heads: heads of the same width.
        grid_size: a picture is ``grid_size ** 2`` tokens.
        condition: ``"class"``, one label in one place, or ``"caption"``, text features.
        num_classes: labels; one more stands for no condition.
        caption_channels: width of the text features.
        caption_length: places for text features, padded on the left.
        prefix_keys: whether queries and keys of the prefix are kept; False for checkpoints of LlamaGen.
        multiple_of: the inner width is two thirds of four times the width, rounded up to a multiple of this.
        rms_norm_eps: of the norms.
        rope_theta: base of the rotary frequencies.
        dropout: of the embedded tokens and of both branches of a block, in training.
        initializer_range: standard deviation of new weights; those of the output are zero.

    Raises:
        ValueError: for an unknown condition, or a width that does not fit the heads.
    """

    _no_split_modules: ClassVar = ["TransformerBlock"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        grid_size: int = 16,
        condition: str = "class",
        num_classes: int = 1000,
        caption_channels: int = 2048,
        caption_length: int = 120,
        prefix_keys: bool = False,
        multiple_of: int = 256,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        if condition not in CONDITIONS:
            raise ValueError(f"condition={condition!r} must be one of {CONDITIONS}")
        if hidden_size % (4 * num_attention_heads):
            # A head turns by rows and by columns, and each turn takes two channels.
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of 4 * {num_attention_heads} heads")
        inner = -(-(8 * hidden_size // 3) // multiple_of) * multiple_of
        self.prefix_length = 1 if condition == "class" else caption_length
        self.num_tokens = grid_size**2
        self.tok_embeddings = nn.Embedding(vocab_size, hidden_size)
        self.tok_dropout = nn.Dropout(dropout)
        self.cls_embedding: LabelEmbedder | CaptionEmbedder
        if condition == "class":
            self.cls_embedding = LabelEmbedder(num_classes, hidden_size)
        else:
            self.cls_embedding = CaptionEmbedder(caption_channels, caption_length, hidden_size)
        self.layers = nn.ModuleList(
            TransformerBlock(hidden_size, inner, num_attention_heads, rms_norm_eps, dropout, index)
            for index in range(num_layers)
        )
        self.norm = RMSNorm(hidden_size, rms_norm_eps)
        self.output = nn.Linear(hidden_size, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=initializer_range)
        nn.init.zeros_(self.output.weight)

    # Conditions

    def null_condition(self, condition: torch.Tensor) -> torch.Tensor:
        """What stands for no condition, shaped like ``condition``: the label after the last, or the null caption."""
        return self.cls_embedding.null(condition)

    def embed_condition(self, condition: torch.Tensor) -> torch.Tensor:
        """The prefix (rows, prefix_length, hidden_size) of labels int64 (rows,) or of text features.

        Text features are (rows, caption_length, caption_channels), padded on the left; what stands at padding does not
        matter as long as the attention mask hides it.

        Raises:
            ValueError: for a shape or a label that the model does not have.
        """
        return self.cls_embedding(condition)

    def attention_mask(
        self, condition_mask: torch.Tensor, queries: int, first_slot: int, keys: int | None = None
    ) -> torch.Tensor:
        """Causal attention that hides a caption's padding from all but itself.

        Args:
            condition_mask: bool (rows, prefix_length), True at words.
            queries: number of consecutive places that ask.
            first_slot: the first of them.
            keys: places that are seen at most; default all up to the last query.

        Returns:
            bool (rows, 1, queries, keys), True where a place is seen.
        """
        keys = first_slot + queries if keys is None else keys
        asked = torch.arange(first_slot, first_slot + queries, device=condition_mask.device)[:, None]
        slots = torch.arange(keys, device=condition_mask.device)[None]
        rest = condition_mask.new_ones(len(condition_mask), max(0, keys - self.prefix_length))
        words = torch.cat([condition_mask[:, :keys], rest], dim=1)[:, None, None]
        return (slots <= asked) & (words | (slots == asked))

    # Parts of the forward pass

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (rows, n, hidden_size) of tokens int64 (rows, n)."""
        return self.tok_dropout(self.tok_embeddings(tokens))

    def trunk(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """All blocks and the last norm.

        Args:
            inputs_embeds: (rows, n, hidden_size).
            position_ids: places in the sequence, int64 (n,) or (rows, n); the prefix has 0 to prefix_length - 1.
            attention_mask: (rows or 1, 1, n, keys), bool with True where a place is seen, or float to be added; None is
                causal, with the queries as the last n of all keys.
            past_key_values: a cache of transformers, to which keys and values of the n places are appended.

        Returns:
            (rows, n, hidden_size).
        """
        rotation = self.rotation(position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotation, attention_mask, past_key_values)
        return self.norm(hidden_states)

    def rotation(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the turns of each pair of channels, float32, with a dimension for the heads.

        The first half of the pairs turns by the token's row, the other by its column. The prefix has zeros, or is not
        turned where it has keys.
        """
        half = self.config["hidden_size"] // self.config["num_attention_heads"] // 2
        exponents = torch.arange(0, half, 2, device=position_ids.device, dtype=torch.float32) / half
        frequencies = self.config["rope_theta"] ** -exponents
        cell = (position_ids - self.prefix_length)[..., None]
        size = self.config["grid_size"]
        angles = torch.cat([cell.div(size, rounding_mode="floor") * frequencies, (cell % size) * frequencies], dim=-1)
        in_picture = cell >= 0
        angles = angles * in_picture
        shown = 1.0 if self.config["prefix_keys"] else in_picture.float()
        return (angles.cos() * shown).unsqueeze(-3), (angles.sin() * shown).unsqueeze(-3)

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab_size) in float32 of what ``trunk`` gives."""
        return self.output(hidden_states).float()

    # Whole sequences, and one piece after the other

    def forward(
        self, tokens: torch.Tensor, condition: torch.Tensor, condition_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Teacher forcing.

        Args:
            tokens: the first n tokens of a picture, int64 (rows, n), n from 0 to num_tokens.
            condition: as for ``embed_condition``.
            condition_mask: bool (rows, prefix_length), True at words; None when there is no padding.

        Returns:
            Logits float32 (rows, n + 1, vocab_size): ``[:, i]`` is the distribution of token i given those before it.
        """
        inputs = torch.cat([self.embed_condition(condition), self.embed_tokens(tokens)], dim=1)
        length = inputs.shape[1]
        mask = None if condition_mask is None else self.attention_mask(condition_mask, length, 0)
        hidden_states = self.trunk(inputs, torch.arange(length, device=inputs.device), mask)
        return self.head(hidden_states[:, self.prefix_length - 1 :])

    def prefill(
        self, condition: torch.Tensor, past_key_values: Cache, condition_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Put the prefix into an empty cache; logits (rows, vocab_size) of token 0."""
        prefix = self.embed_condition(condition)
        mask = None if condition_mask is None else self.attention_mask(condition_mask, self.prefix_length, 0)
        positions = torch.arange(self.prefix_length, device=prefix.device)
        return self.head(self.trunk(prefix, positions, mask, past_key_values)[:, -1])

    def step(
        self,
        tokens: torch.Tensor,
        past_key_values: Cache,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append tokens int64 (rows, n) to the cache; logits (rows, n, vocab_size) of the tokens behind each.

        Token i of a picture has position ``prefix_length + i``. The mask is that of ``trunk``: None sees padding.
        """
        return self.head(self.trunk(self.embed_tokens(tokens), position_ids, attention_mask, past_key_values))

    @torch.no_grad()
    def generate(
        self,
        condition: torch.Tensor,
        condition_mask: torch.Tensor | None = None,
        *,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draw the tokens of one picture per row, one after the other.

        Args:
            condition: as for ``embed_condition``.
            condition_mask: as for ``forward``; rows of the null condition use that of their conditional row.
            guidance_scale: of ``pared_zoo.llamagen.guided``; 1 runs no rows of the null condition.
            temperature, top_k, top_p, generator: of ``pared_zoo.llamagen.draw_tokens``.

        Returns:
            int64 (rows, num_tokens).

        Raises:
            ValueError: for a setting outside its range.
        """
        check_sampling(temperature, top_k, top_p)
        if not guidance_scale >= 0:
            raise ValueError(f"guidance_scale={guidance_scale!r} must be at least 0")
        copies = 1 if guidance_scale == 1 else 2
        if copies == 2:
            condition = torch.cat([condition, self.null_condition(condition)])
            condition_mask = None if condition_mask is None else condition_mask.repeat(2, 1)
        cache = GrowingCache(len(self.layers), self.prefix_length + self.num_tokens - 1)
        logits = self.prefill(condition, cache, condition_mask)
        tokens: list[torch.Tensor] = []
        while True:
            mixed = guided(logits, guidance_scale) if copies == 2 else logits
            tokens.append(draw_tokens(mixed, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator))
            if len(tokens) == self.num_tokens:
                return torch.stack(tokens, dim=1)
            slot = self.prefix_length + len(tokens) - 1
            mask = None if condition_mask is None else self.attention_mask(condition_mask, 1, slot)
            position = torch.tensor([slot], device=logits.device)
            logits = self.step(tokens[-1].repeat(copies)[:, None], cache, position, mask)[:, -1]
