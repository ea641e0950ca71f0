"""The language of ``emu3-world``: words, codes of pictures and the marks between them, in the names that Emu3 has."""

from __future__ import annotations

from typing import Any

import torch

from pared_zoo.recipes.tokenizer import byte_pair_merges, world_words

PAD, BEGIN, END = "<|endoftext|>", "<|extra_203|>", "<|extra_204|>"
IMAGE, IMAGE_START, IMAGE_TOKEN, IMAGE_END = "<image>", "<|image start|>", "<|image token|>", "<|image end|>"
LINE_END, FRAME_END = "<|extra_200|>", "<|extra_201|>"
MARKS = (PAD, BEGIN, END, IMAGE, IMAGE_START, IMAGE_TOKEN, IMAGE_END, LINE_END, FRAME_END)
#: Words that captions begin with: without a space in front they are other tokens.
_FIRST = ("a", "an", "there", "two", "three", "four")


def emu3_tokenizer(codes: int, max_length: int) -> Any:
    """A ``GPT2Tokenizer`` with a token for every word of the world and every code; other texts fall back to bytes.

    Args:
        codes: of the picture tokenizer; they are the last tokens, in order.
        max_length: ``model_max_length``.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Tokenizer

    merges = byte_pair_merges([list(word) for word in _FIRST] + [["Ġ", *word] for word in world_words()])
    tokens = [*MARKS, *sorted(ByteLevel.alphabet()), *(a + b for a, b in merges), *map(code_token, range(codes))]
    return GPT2Tokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens={
            "image_token": IMAGE,
            "boi_token": IMAGE_START,
            "eoi_token": IMAGE_END,
            "image_wrapper_token": IMAGE_TOKEN,
            "eof_token": FRAME_END,
            "eol_token": LINE_END,
        },
        model_max_length=max_length,
        padding_side="left",
    )


def code_token(code: int) -> str:
    """The name of a code in Emu3's vocabulary."""
    return f"<|visual token {code:06d}|>"


def emu3_processor(tokenizer: Any, side: int, factor: int) -> Any:
    """The ``Emu3Processor`` of a model.

    Args:
        tokenizer: of ``emu3_tokenizer``.
        side: of its square pictures in pixels.
        factor: pixels per code and direction.
    """
    from transformers import Emu3ImageProcessor, Emu3Processor

    image_processor = Emu3ImageProcessor(
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        min_pixels=side**2,
        max_pixels=side**2,
        spatial_factor=factor,
    )
    return Emu3Processor(image_processor, tokenizer)


def picture_prompt(caption: str, grid: int) -> str:
    """What a picture of ``grid`` x ``grid`` codes is drawn behind, as ``Emu3Processor`` makes it of a caption."""
    return f"{BEGIN}{caption}{IMAGE_START}{grid}*{grid}{IMAGE_TOKEN}"


def picture_tokens(codes: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """What stands behind such a prompt: rows of codes with their ends, the end of the frame, of the picture, of all.

    Args:
        codes: int (pictures, height, width).
        tokenizer: of ``emu3_tokenizer``.

    Returns:
        int64 (pictures, height * (width + 1) + 3).
    """
    line, *ends = tokenizer.convert_tokens_to_ids([LINE_END, FRAME_END, IMAGE_END, END])
    first = tokenizer.convert_tokens_to_ids(code_token(0))
    rows = torch.nn.functional.pad(codes.long() + first, (0, 1), value=line).flatten(1)
    return torch.cat([rows, torch.tensor(ends).expand(len(rows), -1)], dim=1)


def picture_codes(tokens: torch.Tensor, grid: int, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of drawn pictures, and which of them were drawn by the rules.

    Args:
        tokens: int64 (pictures, grid * (grid + 1) + 3), as ``picture_tokens`` gives them.
        grid: codes of a row.
        tokenizer: of ``emu3_tokenizer``.

    Returns:
        int64 (pictures, grid, grid) with code 0 where a token is none, and bool (pictures,): every code, line end and
        end in its place.
    """
    first = tokenizer.convert_tokens_to_ids(code_token(0))
    codes = tokens[:, :-3].unflatten(1, (grid, grid + 1))[:, :, :-1] - first
    codes = torch.where((codes >= 0) & (first + codes < len(tokenizer)), codes, 0)
    return codes, (picture_tokens(codes, tokenizer) == tokens).all(dim=1)
