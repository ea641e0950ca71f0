# ruff: noqa: RUF012
"""Tiny models of the real classes with random weights, and prompts as their processors make them.

Every frame is 16 tokens. A prompt is a list of parts: ("text", n), ("video", frames), ("image", n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.08,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "initializer_range": 0.1,
}
IMAGE, VIDEO, START, END, NEWLINE = 310, 311, 312, 313, 314
FRAME = 16
MOVING = 0.25
"""Strength of what changes from frame to frame, beside a still picture of strength 1."""


def frames_of(count, rng, shape):
    """`count` pictures of this shape: one still picture, and in the lower half of its rows something that moves."""
    still = torch.randn(shape, generator=rng)
    moving = torch.randn(count, *shape, generator=rng)
    moving[..., : shape[-2] // 2, :] *= 0.1
    return still + MOVING * moving


def _seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@dataclass
class Prompt:
    """One sequence, not padded: token ids, and the model's inputs for what is in it by name."""

    ids: list[int]
    inputs: dict
    types: list[int]


class Family:
    """How a family writes prompts. Subclasses fill `model`, `video`, `image` and, where it differs, `join`."""

    name = ""
    types = None
    """Name of the argument that says which tokens are images (1) and videos (2)."""

    def model(self, **options):
        raise NotImplementedError

    def prompt(self, rng, *parts):
        ids, types, inputs = [], [], {}
        for kind, count in parts:
            new = (
                torch.randint(3, 300, (count,), generator=rng).tolist()
                if kind == "text"
                else getattr(self, kind)(rng, count, inputs)
            )
            ids += new
            types += [{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in new]
        return Prompt(ids, inputs, types)

    def batch(self, *prompts):
        """Arguments of the model for prompts of any length, padded on the left."""
        longest = max(len(one.ids) for one in prompts)
        pads = [longest - len(one.ids) for one in prompts]
        out = {
            "input_ids": torch.tensor([[0] * pad + one.ids for pad, one in zip(pads, prompts, strict=True)]),
            "attention_mask": torch.tensor(
                [[0] * pad + [1] * len(one.ids) for pad, one in zip(pads, prompts, strict=False)]
            ),
        }
        if self.types is not None:
            out[self.types] = torch.tensor([[0] * pad + one.types for pad, one in zip(pads, prompts, strict=False)])
        names = dict.fromkeys(name for one in prompts for name in one.inputs)
        for name in names:
            out[name] = self.join(name, [one.inputs[name] for one in prompts if name in one.inputs])
        return out

    def join(self, name, values):
        return torch.cat([torch.cat(one) for one in values])

    def prompts(self, rng):
        """Four sequences of unequal length; one of them has an image and two videos."""
        more = 4 if self.same_length else 3
        return [
            self.prompt(rng, ("text", 4), ("video", 4), ("text", 6)),
            self.prompt(
                rng, ("text", 3), ("image", 1), ("text", 9), ("video", 4), ("text", 14), ("video", more), ("text", 8)
            ),
            self.prompt(rng, ("text", 2), ("video", 4 if self.same_length else 5), ("text", 3)),
            self.prompt(rng, ("text", 11), ("video", 4), ("text", 2)),
        ]

    same_length = False
    """Whether all videos of a batch must have equally many frames."""

    def __str__(self):
        return self.name


def _add(inputs, **tensors):
    for name, tensor in tensors.items():
        inputs.setdefault(name, []).append(tensor)


class Qwen2VL(Family):
    name, kind, types = "qwen2-vl", "Qwen2VL", "mm_token_type_ids"
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 4}
    text = {}
    stamps = False

    def model(self, **options):
        import transformers

        config = getattr(transformers, f"{self.kind}Config")(
            text_config={**TEXT, "rope_parameters": self.rope, **self.text, **options},
            vision_config={**self.vision, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.1},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )
        return _seeded(lambda: getattr(transformers, f"{self.kind}ForConditionalGeneration")(config))

    def pixels(self, rng, count):
        return frames_of(count, rng, (64, 96)).reshape(count * 64, 96)

    def video(self, rng, frames, inputs):
        _add(inputs, pixel_values_videos=self.pixels(rng, frames), video_grid_thw=torch.tensor([[frames, 8, 8]]))
        if not self.stamps:
            return [START] + [VIDEO] * (FRAME * frames) + [END]
        return [token for frame in range(frames) for token in (20 + frame, 9, START, *[VIDEO] * FRAME, END)]

    def image(self, rng, count, inputs):
        out = []
        for _ in range(count):
            _add(inputs, pixel_values=self.pixels(rng, 1), image_grid_thw=torch.tensor([[1, 8, 8]]))
            out += [START] + [IMAGE] * FRAME + [END]
        return out


class Qwen25VL(Qwen2VL):
    name, kind = "qwen2.5-vl", "Qwen2_5_VL"
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": 64,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }

    def video(self, rng, frames, inputs):
        # Frames a position apart. Where a video takes more positions in time than in space, transformers counts an
        # answer and the same text in a prompt differently, and no second turn is a whole chat at once.
        _add(inputs, second_per_grid_ts=torch.tensor([0.25]))
        return super().video(rng, frames, inputs)


class Qwen3VL(Qwen2VL):
    name, kind, stamps = "qwen3-vl", "Qwen3VL", True
    rope = {**Qwen2VL.rope, "mrope_interleaved": True}
    text = {"head_dim": 16}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }


class Qwen3VLMoe(Qwen3VL):
    name, kind = "qwen3-vl-moe", "Qwen3VLMoe"
    text = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


class LlavaOnevision(Family):
    name, same_length = "llava-onevision", True
    trailing = 1

    def model(self, **options):
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

        config = LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **TEXT, **options},
            vision_config={"model_type": "siglip_vision_model", **VISION},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=[[32, 32]],
        )
        return _seeded(lambda: LlavaOnevisionForConditionalGeneration(config))

    def video(self, rng, frames, inputs):
        _add(inputs, pixel_values_videos=frames_of(frames, rng, (3, 32, 32))[None])
        return [START] + [VIDEO] * (FRAME * frames + self.trailing) + [END]

    def image(self, rng, count, inputs):
        # The whole image and its one tile, whose rows end with newlines; neither is pooled.
        tokens = 64 + 8 * 9
        for _ in range(count):
            _add(inputs, pixel_values=frames_of(2, rng, (3, 32, 32))[None], image_sizes=torch.tensor([[32, 32]]))
        return ([START] + [IMAGE] * tokens + [END]) * count


class LlavaNextVideo(LlavaOnevision):
    name, trailing = "llava-next-video", 0

    def model(self, **options):
        from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

        config = LlavaNextVideoConfig(
            text_config={"model_type": "llama", **TEXT, **options},
            vision_config={"model_type": "siglip_vision_model", **VISION},
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=[[32, 32]],
        )
        return _seeded(lambda: LlavaNextVideoForConditionalGeneration(config))


class InternVL(Family):
    name = "internvl"

    def model(self, **options):
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        vision = {**VISION, "image_size": [32, 32], "patch_size": [4, 4]}
        config = InternVLConfig(
            text_config={"model_type": "qwen2", **TEXT, **options},
            vision_config=vision,
            downsample_ratio=0.5,
            image_seq_length=FRAME,
            image_token_id=IMAGE,
        )
        return _seeded(lambda: InternVLForConditionalGeneration(config))

    def video(self, rng, frames, inputs):
        _add(inputs, pixel_values=frames_of(frames, rng, (3, 32, 32)))
        return [t for frame in range(frames) for t in (15, 20 + frame, 9, START, *[IMAGE] * FRAME, END)]

    def image(self, rng, count, inputs):
        return [token for _ in range(count) for token in self.video(rng, 1, inputs)]


class SmolVLM(InternVL):
    name = "smolvlm"

    def model(self, **options):
        from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

        config = SmolVLMConfig(
            text_config={"model_type": "llama", **TEXT, **options},
            vision_config=VISION,
            scale_factor=2,
            image_token_id=IMAGE,
            pad_token_id=0,
        )
        return _seeded(lambda: SmolVLMForConditionalGeneration(config))

    def join(self, name, values):
        # (batch, images, channels, height, width), rows with fewer images filled with black ones.
        rows = [torch.cat(one) for one in values]
        most = max(len(one) for one in rows)
        return torch.stack([torch.cat((one, one.new_zeros(most - len(one), *one.shape[1:]))) for one in rows])


class VideoLlama3(Family):
    name = "video-llama3"
    kept = 0.8
    """Share of a video's tokens that its processor leaves, all of the first frame among them."""

    def model(self, **options):
        from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

        vision = {key: value for key, value in VISION.items() if key != "image_size"}
        config = VideoLlama3Config(
            text_config={"model_type": "qwen2", **TEXT, **options},
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
        return _seeded(lambda: VideoLlama3ForConditionalGeneration(config))

    def pixels(self, rng, count):
        return frames_of(count, rng, (64, 48)).reshape(count * 64, 48)

    def video(self, rng, frames, inputs):
        kept = torch.rand(frames * FRAME, generator=rng) < self.kept
        kept[:FRAME] = True
        _add(
            inputs,
            pixel_values_videos=self.pixels(rng, frames),
            video_grid_thw=torch.tensor([[frames, 8, 8]]),
            video_merge_sizes=torch.tensor([2]),
            video_compression_mask=kept,
        )
        return [START] + [VIDEO] * int(kept.sum()) + [END]

    def image(self, rng, count, inputs):
        out = []
        for _ in range(count):
            _add(
                inputs,
                pixel_values=self.pixels(rng, 1),
                image_grid_thw=torch.tensor([[1, 8, 8]]),
                image_merge_sizes=torch.tensor([2]),
            )
            out += [START] + [IMAGE] * FRAME + [END]
        return out


class MiniCPM(Family):
    name = "minicpm-v-4.6"
    kind = "MiniCPMV4_6"
    text = {
        "model_type": "qwen3_5_text",
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }

    def model(self, **options):
        import transformers

        vision = {**VISION, "num_hidden_layers": 4, "insert_layer_id": 2}
        config = getattr(transformers, f"{self.kind}Config")(
            text_config={**TEXT, **self.text, **options},
            vision_config=vision,
            insert_layer_id=2,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
        return _seeded(lambda: getattr(transformers, f"{self.kind}ForConditionalGeneration")(config))

    def pixels(self, rng, frames):
        pixels = frames_of(frames, rng, (64, 4, 3 * 4)).reshape(frames * 64, 4, 3, 4)
        return pixels.permute(2, 3, 0, 1).reshape(1, 3, 4, frames * 64 * 4)

    def video(self, rng, frames, inputs):
        sizes = torch.tensor([[8, 8]] * frames)
        _add(inputs, pixel_values_videos=self.pixels(rng, frames), target_sizes_videos=sizes)
        return [t for _ in range(frames) for t in (START, *[VIDEO] * 4, END)]

    def image(self, rng, count, inputs):
        _add(inputs, pixel_values=self.pixels(rng, count), target_sizes=torch.tensor([[8, 8]] * count))
        return [START, *[IMAGE] * 4, END] * count

    def join(self, name, values):
        dim = 3 if name.startswith("pixel_values") else 0
        return torch.cat([torch.cat(one, dim) for one in values], dim)


class MiniCPM47(MiniCPM):
    name, kind, types = "minicpm-v-4.7", "MiniCPMV4_7", "mm_token_type_ids"


class Gemma3(Family):
    name, types = "gemma3", "token_type_ids"

    def model(self, **options):
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

        text = {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 48,
        }
        config = Gemma3Config(
            text_config={**TEXT, **text, **options},
            vision_config=VISION,
            mm_tokens_per_image=FRAME,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        )
        return _seeded(lambda: Gemma3ForConditionalGeneration(config))

    def video(self, rng, frames, inputs):
        _add(inputs, pixel_values=frames_of(frames, rng, (3, 32, 32)))
        return [t for frame in range(frames) for t in (20 + frame, START, *[IMAGE] * FRAME, END)]

    def image(self, rng, count, inputs):
        return [t for _ in range(count) for t in self.video(rng, 1, inputs)]


class Gemma4(Family):
    name, types = "gemma4", "mm_token_type_ids"

    def model(self, **options):
        from transformers import Gemma4Config, Gemma4ForConditionalGeneration

        text = {
            "head_dim": 16,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 48,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
            "use_bidirectional_attention": "vision",
        }
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
            "default_output_length": FRAME,
        }
        config = Gemma4Config(
            text_config={**TEXT, **text, **options},
            vision_config=vision,
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            boi_token_id=START,
            eoi_token_id=END,
        )
        return _seeded(lambda: Gemma4ForConditionalGeneration(config))

    def video(self, rng, frames, inputs):
        places = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1).reshape(1, 64, 2)
        _add(
            inputs,
            pixel_values_videos=frames_of(frames, rng, (64, 48)),
            video_position_ids=places.repeat(frames, 1, 1),
            num_frames_per_video=torch.tensor([frames]),
        )
        return [t for frame in range(frames) for t in (20 + frame, START, *[VIDEO] * FRAME, END)]

    def image(self, rng, count, inputs):
        places = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1).reshape(1, 64, 2)
        _add(inputs, pixel_values=frames_of(count, rng, (64, 48)), image_position_ids=places.repeat(count, 1, 1))
        return [START, *[IMAGE] * FRAME, END] * count


FAMILIES = {
    family.name: family
    for family in (
        Qwen2VL(),
        Qwen25VL(),
        Qwen3VL(),
        Qwen3VLMoe(),
        LlavaOnevision(),
        LlavaNextVideo(),
        InternVL(),
        SmolVLM(),
        VideoLlama3(),
        MiniCPM(),
        MiniCPM47(),
        Gemma3(),
        Gemma4(),
    )
}
