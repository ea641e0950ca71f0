"""Tiny transformers of the real classes, each with a denoising loop of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TEXT = 6


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Tiny:
    """A model, its first sample, and the arguments of a call with a sample, a timestep and a text."""

    model: nn.Module
    sample: Tensor
    arguments: Callable[[Tensor, Tensor, Tensor], dict[str, Any]]
    text: Tensor
    vision: int
    """Vision tokens."""
    layers: int
    """Attention layers that a plan has."""
    more_text: int = 0
    """Text tokens beside those of `text`."""

    @property
    def num_text(self) -> int:
        return self.text.shape[1] + self.more_text

    def denoise(self, steps: int = 4, *, texts: tuple[Tensor, ...] | None = None, start: int = 0) -> Tensor:
        """Walk down `steps` timesteps from number `start` on; with two texts each step calls both, guided by 2."""
        x = self.sample
        for t in torch.linspace(900, 50, steps)[start:]:
            timestep = t.expand(len(x))
            outputs = [self.model(**self.arguments(x, timestep, text))[0] for text in texts or (self.text,)]
            guided = outputs[0] if len(outputs) == 1 else outputs[1] + 2 * (outputs[0] - outputs[1])
            x = x - guided[:, : x.shape[1]] / steps
        return x


def _sized(model: nn.Module) -> nn.Module:
    """Give a tiny model weights with which its heads differ and its output matters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / fan**0.5)
            elif not name.endswith("weight"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def sd3(dual: bool = False, heads: int = 4) -> Tiny:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        caption_projection_dim=16 * heads,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=32,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )

    def arguments(x: Tensor, t: Tensor, text: Tensor) -> dict[str, Any]:
        pooled = text.mean(1)
        return {"hidden_states": x, "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": t}

    return Tiny(_sized(model), draw(2, 4, 16, 16), arguments, draw(2, TEXT, 32, seed=2), 64, 3 if dual else 2)


def flux() -> Tiny:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)

    def arguments(x: Tensor, t: Tensor, text: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "encoder_hidden_states": text,
            "pooled_projections": text.mean(1),
            "timestep": t / 1000,
            "img_ids": ids,
            "txt_ids": torch.zeros(text.shape[1], 3),
            "guidance": torch.full((len(x),), 3.5),
        }

    return Tiny(_sized(model), draw(1, 64, 4), arguments, draw(1, TEXT, 32, seed=2), 64, 2)


def flux2() -> Tiny:
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    zero = torch.zeros(64, dtype=torch.long)
    ids = torch.stack([zero, row.flatten(), column.flatten(), zero], dim=1)

    def arguments(x: Tensor, t: Tensor, text: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "encoder_hidden_states": text,
            "timestep": t / 1000,
            "img_ids": ids,
            "txt_ids": torch.zeros(text.shape[1], 4),
            "guidance": torch.full((len(x),), 3.5),
        }

    return Tiny(_sized(model), draw(1, 64, 4), arguments, draw(1, TEXT, 32, seed=2), 64, 2)


def qwen_image(valid: int = TEXT - 2) -> Tiny:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    mask = (torch.arange(TEXT) < valid).long().expand(2, TEXT).clone()
    mask[0] = 1
    shapes = [[(1, 8, 8)]] * 2

    def arguments(x: Tensor, t: Tensor, text: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": mask,
            "timestep": t / 1000,
            "img_shapes": shapes,
        }

    return Tiny(_sized(model), draw(2, 64, 16), arguments, draw(2, TEXT, 16, seed=2), 64, 2)


def cogvideox() -> Tiny:
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), temporal_size=3)

    def arguments(x: Tensor, t: Tensor, text: Tensor) -> dict[str, Any]:
        return {"hidden_states": x, "encoder_hidden_states": text, "timestep": t, "image_rotary_emb": rotary}

    return Tiny(_sized(model), draw(2, 3, 4, 8, 8), arguments, draw(2, TEXT, 32, seed=2), 48, 2)


def wan() -> Tiny:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )

    def arguments(x: Tensor, t: Tensor, text: Tensor) -> dict[str, Any]:
        return {"hidden_states": x, "encoder_hidden_states": text, "timestep": t}

    return Tiny(_sized(model), draw(1, 16, 3, 8, 8), arguments, draw(1, TEXT, 32, seed=2), 48, 2)


def hunyuan_video() -> Tiny:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    mask = torch.ones(1, TEXT)
    mask[:, TEXT - 2 :] = 0

    def arguments(x: Tensor, t: Tensor, text: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "pooled_projections": text.mean(1)[:, :8],
            "timestep": t,
            "guidance": torch.full((len(x),), 6000.0),
        }

    return Tiny(_sized(model), draw(1, 4, 3, 4, 4), arguments, draw(1, TEXT, 16, seed=2), 48, 2)


def hunyuan_video_15(first_frame: bool = True) -> Tiny:
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(2, 4, 4),
    )
    mask, mask_2 = torch.ones(2, TEXT), torch.ones(2, 3)
    mask[0, 4:] = mask_2[1, 1:] = 0
    second, image = draw(2, 3, 16, seed=7), draw(2, 2, 16, seed=8)

    def arguments(x: Tensor, t: Tensor, text: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": second,
            "encoder_attention_mask_2": mask_2,
            "image_embeds": image * first_frame,
            "timestep": t,
        }

    return Tiny(_sized(model), draw(2, 4, 3, 4, 4), arguments, draw(2, TEXT, 16, seed=2), 48, 2, more_text=5)


MODELS: dict[str, Callable[[], Tiny]] = {
    "sd3": sd3,
    "sd35": lambda: sd3(dual=True),
    "flux": flux,
    "flux2": flux2,
    "qwen-image": qwen_image,
    "cogvideox": cogvideox,
    "wan": wan,
    "hunyuan-video": hunyuan_video,
    "hunyuan-video-15": hunyuan_video_15,
}
