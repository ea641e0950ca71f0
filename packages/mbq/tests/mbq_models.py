"""Tiny models of the real classes with random weights, and calibration batches for them."""

from __future__ import annotations

import torch

IMAGE, VIDEO = 60, 61
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "sliding_window": 4}
WORDS = [f"w{number}" for number in range(50)]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def language_model(name="Llama", **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**TEXT, **options})
    return spread(getattr(transformers, f"{name}ForCausalLM")(config))


def qwen2_vl(**options):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope, **options},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return spread(Qwen2VLForConditionalGeneration(config))


def llava_onevision(**options):
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, **options},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return spread(LlavaOnevisionForConditionalGeneration(config))


def qwen2_5_vl(**options):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope, **options},
        vision_config={**vision, "patch_size": 4, "fullatt_block_indexes": [0]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return spread(Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl(**options):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope, **options},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return spread(Qwen3VLForConditionalGeneration(config))


def internvl(**options):
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, **options},
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_seq_length=4,
        image_token_id=IMAGE,
    )
    return spread(InternVLForConditionalGeneration(config))


def smolvlm(**options):
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    text = {"model_type": "llama", **TEXT, **options}
    config = SmolVLMConfig(text_config=text, vision_config=VISION, scale_factor=2, image_token_id=IMAGE)
    return spread(SmolVLMForConditionalGeneration(config))


def llava_next_video(**options):
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        text_config={"model_type": "llama", **TEXT, **options},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return spread(LlavaNextVideoForConditionalGeneration(config))


def video_llama3(**options):
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    vision = {key: value for key, value in VISION.items() if key != "image_size"}
    config = VideoLlama3Config(text_config={"model_type": "qwen2", **TEXT, **options}, vision_config=vision)
    return spread(VideoLlama3ForConditionalGeneration(config))


def gemma3_vl(**options):
    """With an image of four tokens, which attend to each other in both directions."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={**TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING, **options},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=62,
        eoi_token_index=63,
    )
    return spread(Gemma3ForConditionalGeneration(config))


def gemma3(**options):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    heads = {"head_dim": 16, "query_pre_attn_scalar": 16}
    return spread(Gemma3ForCausalLM(Gemma3TextConfig(**{**TEXT, **heads, **SLIDING, **options})))


def qwen3_5(**options):
    """Two layers, the first of linear attention."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    layers = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    return spread(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**TEXT, "head_dim": 16, **linear, **layers, **options})))


def spread(model):
    """Norms away from one and channels of different size, so that scales and modalities matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1 and "vision" not in name and "visual" not in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def text_batches(count=3, length=12, rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (rows, length), generator=generator) for _ in range(count)]


def explicit_batches(model, count=3, vision=6, text=8, seed=0):
    """Embeddings with explicit masks: the first positions are vision, the last four the answer."""
    generator = torch.Generator().manual_seed(seed)
    hidden = model.get_input_embeddings().weight.shape[1]
    batches = []
    for _ in range(count):
        tokens = vision + text
        embeds = (0.5 * torch.randn(1, tokens, hidden, generator=generator)).to(model.dtype)
        embeds[:, :vision] *= 3
        labels = torch.randint(3, 60, (1, tokens), generator=generator)
        labels[:, :-4] = -100
        is_vision = torch.zeros(1, tokens, dtype=torch.bool)
        is_vision[:, :vision] = True
        batches.append({"inputs_embeds": embeds, "labels": labels, "vision_mask": is_vision})
    return batches


def qwen2_vl_batches(count=3, seed=0):
    """What the processor gives: one image of 16 patches, 4 tokens, in each sample."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        text = torch.randint(3, 60, (1, 8), generator=generator)
        ids = torch.cat([torch.tensor([[62]]), torch.full((1, 4), IMAGE), torch.tensor([[63]]), text], 1)
        labels = ids.clone()
        labels[:, :-4] = -100
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == IMAGE).int(),
                "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
                "labels": labels,
            }
        )
    return batches


def tokenizer():
    """One token for each of WORDS, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "<unk>", "user", "assistant", *WORDS]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", chat_template=TEMPLATE)
