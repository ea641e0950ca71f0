"""Real text for calibrating and judging: the language reference behind Python's help(), and passkey prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TRAINING_SHARE = 0.8
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
HEAD = "There is an important piece of information hidden in a lot of irrelevant text. Find it and memorize it. "
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """A prompt that hides five digits, and the digits; token ids (1, T) and (1, 5 or 6)."""

    prompt: Tensor
    answer: Tensor


def reference_tokens(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids of the corpus, those to calibrate on and those held out."""
    from pared_zoo.real import text_corpus

    ids = tokenizer(text_corpus().text, return_tensors="pt", verbose=False).input_ids[0]
    cut = int(TRAINING_SHARE * len(ids))
    return ids[:cut], ids[cut:]


def passkeys(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[Passkey]:
    """`count` prompts of about `length` tokens, each with other digits at another depth."""
    draw = random.Random(seed)
    filler = len(tokenizer(FILLER).input_ids)
    prompts = []
    for place in range(count):
        digits = "".join(draw.choice("0123456789") for _ in range(5))
        key = f"The pass key is {digits}. Remember it. {digits} is the pass key. "
        repeats = max((length - 80) // filler, 2)
        before = round((place + 0.5) / count * repeats)
        text = HEAD + FILLER * before + key + FILLER * (repeats - before) + QUESTION
        prompt = tokenizer(text, return_tensors="pt").input_ids
        whole = tokenizer(f"{text} {digits}", return_tensors="pt").input_ids
        if not torch.equal(whole[:, : prompt.shape[1]], prompt):
            raise ValueError("this tokenizer joins the question with the digits; it cannot be judged on passkeys")
        prompts.append(Passkey(prompt, whole[:, prompt.shape[1] :]))
    return prompts
