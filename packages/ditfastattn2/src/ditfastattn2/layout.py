"""Where picture, text and reference pictures lie in the sequence of one denoiser call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pared_hooks import DenoiserView
from torch import Tensor

MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")
"""Arguments of denoisers that say which text tokens are padding."""

# Arguments on whose content, not only on whose shape, a layout depends.
_READ = (*MASKS, "encoder_attention_mask_2", "image_embeds", "img_ids", "img_shapes")

CountText = Callable[[Mapping[str, Any]], Tensor]
"""From the arguments of a call to the number (B,) of its text tokens that are no padding; all of them come first."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Tokens of one call: those of the picture, in `frames` frames, of text, and of references behind the picture.

    `text_valid` (B,) counts the text tokens that are no padding, None where all are; `masked` tells that the call said
    so, and that masks inside attention say the same. `irregular` is True when padding is not behind the text.
    """

    num_vision: int
    num_text: int
    num_reference: int = 0
    frames: int = 1
    text_valid: Tensor | None = None
    masked: bool = False
    irregular: bool = False

    def of_site(self, text: Literal["first", "last"] | None) -> Tokens:
        """Return the sequence that an attention module with text on this side works on."""
        if text is None:
            return Tokens(self.num_vision, self.num_reference, False, self.frames, 0, 0)
        return Tokens(
            self.num_vision,
            self.num_text + self.num_reference,
            text == "first",
            self.frames,
            self.num_text,
            self.num_reference,
            self.text_valid,
        )


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of one attention: the picture's, and `num_text` others that meet everything (text and references).

    With text first the references lie behind the picture; `gathered` brings all that is not picture to one end.
    """

    num_vision: int
    num_text: int
    text_first: bool
    frames: int
    num_prompt: int
    num_reference: int
    prompt_valid: Tensor | None = None

    @property
    def valid(self) -> Tensor | None:
        """Text and reference tokens that are no padding, (B,): references come first, padding is behind the text."""
        return None if self.prompt_valid is None else self.prompt_valid + self.num_reference

    def padded(self, valid: Tensor | None) -> Tokens:
        """Return the same sequence with another number of valid text tokens."""
        return replace(self, prompt_valid=valid)

    def gathered(self, x: Tensor) -> Tensor:
        """Return `x` (B, S, H, D) with references and text side by side, references first."""
        if not (self.text_first and self.num_reference):
            return x
        prompt, vision, reference = x.split([self.num_prompt, self.num_vision, self.num_reference], dim=1)
        return torch.cat([reference, prompt, vision], dim=1)

    def spread(self, x: Tensor) -> Tensor:
        """Undo `gathered`."""
        if not (self.text_first and self.num_reference):
            return x
        reference, prompt, vision = x.split([self.num_reference, self.num_prompt, self.num_vision], dim=1)
        return torch.cat([prompt, vision, reference], dim=1)


class LayoutReader:
    """Reads the layout of each call; waits for the device only when a mask or position ids are new."""

    def __init__(self, view: DenoiserView, count_text: CountText | None = None) -> None:
        self._view = view
        self._count_text = count_text
        self._seen: tuple[Any, ...] = ()
        self._layout: Layout | None = None

    def read(self, call: Mapping[str, Any]) -> Layout:
        """Return the layout of a call with these arguments; raises `ConfigError` where its tokens are not known."""
        view = self._view
        sample = call[view.sample_name]
        num_text = view.num_text_tokens(**call) if view.family == "mmdit" else 0
        # Tensors themselves, not their addresses: a freed one may come back with another content.
        contents = [call.get(name) for name in _READ]
        versions = [one._version if isinstance(one, Tensor) and not one.is_inference() else 0 for one in contents]
        shapes = (tuple(sample.shape), num_text)
        known = self._layout is not None and self._seen[1:] == (versions, shapes)
        if known and all(old is new for old, new in zip(self._seen[0], contents, strict=True)):
            assert self._layout is not None
            return self._layout
        self._layout = self._read(sample, num_text, call)
        self._seen = (contents, versions, shapes)
        return self._layout

    def _read(self, sample: Tensor, num_text: int, call: Mapping[str, Any]) -> Layout:
        grid = self._view.grid(sample.shape, **call)
        vision = grid.num_tokens
        reference = sample.shape[1] - vision if sample.dim() == 3 else 0
        if self._count_text is not None:
            counts = self._count_text(call)
            valid = None if bool((counts == num_text).all()) else counts
            return Layout(vision, num_text, reference, grid.frames, valid, True)
        mask = next((call[name] for name in MASKS if call.get(name) is not None), None)
        if mask is None or num_text == 0:
            return Layout(vision, num_text, reference, grid.frames)
        valid, regular = valid_text(mask)
        return Layout(vision, num_text, reference, grid.frames, valid, True, not regular)


def valid_text(mask: Tensor) -> tuple[Tensor | None, bool]:
    """Return the number of tokens (B,) that a mask (B, T) keeps, None if all, and whether they are the first ones."""
    keep = mask.bool()
    counts = keep.sum(dim=1)
    ordered = torch.arange(keep.shape[1], device=keep.device) < counts[:, None]
    regular = bool((ordered == keep).all())
    return (None if bool(keep.all()) else counts), regular


def valid_text_of(mask: Tensor, sequence: Tokens) -> tuple[Tensor | None, bool]:
    """Return the same of a mask over the whole sequence, bool (B, S) or (B, 1, 1, S).

    Not regular is also a mask of another shape, one of numbers, and one that leaves out tokens of the picture.
    """
    tokens = sequence.num_vision + sequence.num_text
    if mask.dtype != torch.bool or mask.numel() != len(mask) * tokens or mask.shape[-1] != tokens:
        return None, False
    mask = mask.reshape(-1, tokens)
    start = 0 if sequence.text_first else sequence.num_vision + sequence.num_reference
    prompt = slice(start, start + sequence.num_prompt)
    valid, regular = valid_text(mask[:, prompt])
    others = torch.ones(tokens, dtype=torch.bool, device=mask.device)
    others[prompt] = False
    return valid, regular and bool(mask[:, others].all())
