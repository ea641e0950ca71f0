"""How people and a vision-language model talk about the world: a Qwen2 tokenizer, a chat template, a processor."""

from __future__ import annotations

from typing import Any

from pared_zoo.recipes.tokenizer import byte_pair_merges, world_words

START, END, PAD, IMAGE, VIDEO = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>", "<video>"
#: Words of questions about clips and of their answers that captions do not have.
_CLIP_TALK = (
    "appear bounce change changes disappear disappears end flash flashes move or relative stay stop turn wait way"
)
_ROLES = ("user", "assistant", "system")
#: Every text begins with a space, so that a word is the same token in a question, at its beginning and in an answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'video' %}<video>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def chat_words() -> list[str]:
    """Every word of the world's captions, of its questions about scenes and clips and of their answers, sorted."""
    return sorted({*world_words(), *_CLIP_TALK.split()})


def chat_tokenizer() -> Any:
    """A ``Qwen2Tokenizer`` in which every word of the world is one token; other texts fall back to bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    merges = byte_pair_merges([list(role) for role in _ROLES] + [["Ġ", *word] for word in chat_words()])
    tokens = [PAD, START, END, IMAGE, VIDEO, *sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO, "start_token": START},
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def chat_processor(side: int, patches: int) -> Any:
    """The ``LlavaOnevisionProcessor`` of a model.

    Args:
        side: side of its square pictures and frames in pixels.
        patches: number of patches of a picture, that is of image tokens before any pooling.
    """
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    pixels = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=[[side, side]]),
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        tokenizer=chat_tokenizer(),
        num_image_tokens=patches,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        video_token=VIDEO,
        vision_aspect_ratio="anyres_max_9",
    )
