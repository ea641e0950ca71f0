"""A CLIP tokenizer over the world's words."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from pared_zoo.world import attributes

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_GRAMMAR = "a an the there is are that picture of on in at to and front background no"
#: Words of questions, answers and motion, so that every text model of the world can share one vocabulary.
_TALK = (
    "what which where how many do does it yes not shape color size texture object objects same different first last "
    "then before after while from up down slowly fast quickly moves moving still stays stops bounces appears vanishes "
    "video frame"
)


def world_words() -> list[str]:
    """Every word of the world's captions and questions, sorted."""
    words = {*attributes.SHAPES, *attributes.COLORS, *attributes.SIZES, *attributes.TEXTURES, *attributes.BACKGROUNDS}
    words |= {"crosses" if shape == "cross" else shape + "s" for shape in attributes.SHAPES}
    phrases = (*attributes.RELATIONS, *attributes.PLACES, *attributes.COUNT_WORDS, _GRAMMAR, _TALK)
    return sorted(words.union(*(phrase.split() for phrase in phrases)))


def world_tokenizer(max_length: int) -> Any:
    """A ``CLIPTokenizer`` in which every word of the world is one token; other words fall back to letters.

    Args:
        max_length: ``model_max_length``, the padded length of a prompt in tokens.
    """
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("!"), ord("~") + 1) if not chr(c).isupper()]
    merges = byte_pair_merges([[*word[:-1], word[-1] + WORD_END] for word in world_words()])
    tokens = [START, END, *letters, *(letter + WORD_END for letter in letters), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length, pad_token=END)


def byte_pair_merges(pieces: list[list[str]]) -> list[tuple[str, str]]:
    """Byte-pair merges after which each word, given as the list of its letters, is one token.

    Ties go to the alphabetically first pair: the ids must not differ between processes, and those of the
    ``tokenizers`` trainer do.
    """
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for piece in pieces for pair in pairwise(piece)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(piece, best) for piece in pieces]
    return merges


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in piece:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged
