"""How near heads look."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from pared_zoo.recipes.heads import near_mass


class Painting:
    """Runs its transformer twice, as a pipeline of two steps would."""

    def __init__(self, fail: bool = False) -> None:
        self.transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
            pos_embed_max_size=8,
        )  # fmt: skip
        self.fail = fail

    @torch.no_grad()
    def __call__(self, prompts, output_type, steps):
        for _ in range(steps):
            rows = len(prompts)
            noisy, text, pooled = torch.randn(rows, 4, 8, 8), torch.randn(rows, 5, 8), torch.randn(rows, 8)
            self.transformer(noisy, text, pooled, torch.full((rows,), 500.0))
        if self.fail:
            raise KeyboardInterrupt
        return SimpleNamespace(images=None)


def test_heads_that_see_no_difference_look_everywhere_alike():
    painting = Painting()
    for block in painting.transformer.transformer_blocks:
        block.attn.to_q.weight.data.zero_()
        block.attn.to_q.bias.data.zero_()
    near = near_mass(painting, ["a", "b"], 8, steps=2)
    # Of 64 tokens, those up to 4 places away.
    expected = sum(min(63, i + 4) - max(0, i - 4) + 1 for i in range(64)) / 64**2
    assert near.shape == (2, 2)
    assert near.flatten().tolist() == pytest.approx([expected] * 4, rel=1e-5)


def test_a_head_that_finds_its_own_place_looks_near_and_its_neighbour_does_not():
    painting = Painting()
    attn = painting.transformer.transformer_blocks[0].attn
    norm = painting.transformer.transformer_blocks[0].norm1
    norm.linear.weight.data.zero_()
    norm.linear.bias.data.zero_()
    for layer in (attn.to_q, attn.to_k):
        layer.bias.data.zero_()
        layer.weight.data.zero_()
        layer.weight.data[:8, :8] = 40 * torch.eye(8)
    near = near_mass(painting, ["a"], 8, steps=1)
    assert near[0, 0] > 2 * near[0, 1]


def test_processors_are_restored_even_after_an_interruption():
    painting = Painting(fail=True)
    before = painting.transformer.attn_processors
    with pytest.raises(KeyboardInterrupt):
        near_mass(painting, ["a"], 8, steps=1)
    assert painting.transformer.attn_processors == before
