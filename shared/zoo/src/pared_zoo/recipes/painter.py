"""The trained parts of ``mmdit-world``: how they see a picture token by token, or four tokens as one."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch.nn.functional import avg_pool2d, pad

from pared_zoo.recipes.attention import PlainJointAttention
from pared_zoo.recipes.sight import LOOKS, PLACE

#: Half of the heads are to look near: at most so many rows of tokens ahead or back.
NEAR_ROWS = 1.5
#: After this many blocks, a head that is thrown away reads from the image tokens what stands where.
LOOK_BLOCKS = 3


class Painter(torch.nn.Module):
    """Frozen text encoders and the transformer of a ``StableDiffusion3Pipeline``, and what only training needs.

    Most of the training sees four neighbouring tokens as one. Such a token weighs as much in attention as the four that
    it stands for, and is embedded and read out by the layers of single tokens, with a part of its own added that knows
    the four apart; so single tokens find all but that part already learnt.

    Args:
        text_encoder, text_encoder_2: ``CLIPTextModelWithProjection``.
        transformer: ``SD3Transformer2DModel`` with patches of one latent.
    """

    def __init__(self, text_encoder: Any, text_encoder_2: Any, transformer: Any) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = (
            text_encoder.requires_grad_(False),
            text_encoder_2.requires_grad_(False),
        )
        self.transformer = transformer
        channels, width = transformer.config.in_channels, transformer.inner_dim
        self.merged_in = torch.nn.Conv2d(channels, width, kernel_size=2, stride=2, bias=False)
        self.merged_out = torch.nn.Linear(width, 4 * channels)
        self.look = torch.nn.Linear(width, sum(LOOKS.values()) + PLACE)
        self.attention = PlainJointAttention(transformer.config.num_attention_heads // 2)
        transformer.set_attn_processor(self.attention)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor, blank: torch.Tensor, merged: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the transformer says of noisy latents, what it sees there, and how far its near heads look.

        Args:
            noisy: latents (rows, channels, side, side).
            timesteps: (rows,) from 0 to 1000.
            input_ids: tokens of captions (rows, tokens).
            blank: (rows,) logarithm of the number of zero tokens behind the caption's.
            merged: whether four tokens are seen as one.

        Returns:
            Velocity, shaped like ``noisy``; guesses (rows, image tokens, sum(LOOKS) + PLACE) for ``look_loss``; the
            mean of -log of the share of attention to image tokens that the first heads of all layers give to near ones.
        """
        transformer = self.transformer
        side = noisy.shape[-1]
        self.attention.near, self.attention.farness = near_tokens(side // 2 if merged else side, noisy.device), []
        context, pooled = self.read(input_ids)
        # Equal tokens stay equal in every layer: one, its score raised by the log of their number, stands for all.
        context = transformer.context_embedder(pad(context, (0, 0, 0, 1)))
        states = self._merge(noisy) if merged else transformer.pos_embed(noisy)
        bias = torch.zeros(context.shape[:2], device=noisy.device)
        bias[:, -1] = blank
        if merged:
            bias -= math.log(4)
        condition = transformer.time_text_embed(timesteps, pooled)
        guesses = states.new_zeros(0)
        for k, block in enumerate(transformer.transformer_blocks, start=1):
            context, states = block(
                hidden_states=states,
                encoder_hidden_states=context,
                temb=condition,
                joint_attention_kwargs={"text_bias": bias},
            )
            if k == LOOK_BLOCKS:
                guesses = self.look(states)
        states = transformer.norm_out(states, condition)
        out = transformer.proj_out(states)
        far = torch.stack(self.attention.farness).mean()
        if merged:
            apart = self.merged_out(states).unflatten(-1, (4, -1))
            # (rows, height, width, 2, 2, channels) to (rows, channels, height, 2, width, 2).
            four = (out.unsqueeze(2) + apart).unflatten(2, (2, 2)).unflatten(1, (side // 2, side // 2))
            return four.permute(0, 5, 1, 3, 2, 4).reshape(noisy.shape), guesses, far
        return out.transpose(1, 2).reshape(noisy.shape), guesses, far

    @torch.no_grad()
    def read(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Text tokens and pooled projections, as ``StableDiffusion3Pipeline.encode_prompt`` makes them."""
        outputs = [
            encoder(input_ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        tokens = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
        return tokens, torch.cat([out.text_embeds for out in outputs], dim=-1)

    def merging(self) -> torch.Tensor:
        """Zero that depends on what only merged tokens use: processes that average gradients wait for all of them."""
        return 0 * (self.merged_in.weight.sum() + self.merged_out.weight.sum() + self.merged_out.bias.sum())

    def _merge(self, noisy: torch.Tensor) -> torch.Tensor:
        """Tokens of two by two latents, at the mean of their four positions."""
        embed = self.transformer.pos_embed
        half = noisy.shape[-1] // 2
        positions = embed.cropped_pos_embed(*noisy.shape[-2:])
        positions = positions.unflatten(1, (half, 2, half, 2)).mean(dim=(2, 4)).flatten(1, 2)
        tokens = embed.proj(avg_pool2d(noisy, 2)) + self.merged_in(noisy)
        return tokens.flatten(2).transpose(1, 2) + positions


@cache
def near_tokens(side: int, device: torch.device) -> torch.Tensor:
    """Which of the tokens of a square picture, counted row by row, are near each: bool (tokens, tokens)."""
    at = torch.arange(side * side, device=device)
    return (at[:, None] - at).abs() <= NEAR_ROWS * side
