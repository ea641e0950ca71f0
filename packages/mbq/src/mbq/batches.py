"""Calibration samples: from the processor's batches to what the first decoder layer receives, without padding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pared_hooks import DecoderView, Patch
from torch import Tensor

from mbq.errors import CalibrationError

Batch = Tensor | Mapping[str, Any]
IGNORED = -100
OWN_KEYS = ("labels", "answer_mask", "vision_mask")
TEXT_KEYS = {"input_ids", "attention_mask", "position_ids", "inputs_embeds"}


@dataclass
class Sample:
    """One sequence without padding, on the CPU: what layer 0 reads, and what every layer is called with."""

    hidden: Tensor
    """(1, T, C)."""
    answer: Tensor
    """bool (1, T): the answer's tokens."""
    vision: Tensor
    """bool (1, T): positions that hold image or video features."""
    arguments: dict[str, dict[str, Any]]
    """Keyword arguments of a layer, by type of layer."""
    additions: dict[int, Tensor] = field(default_factory=dict)
    """What the decoder adds to the input of a layer, (1, T, C), where it does (DeepStack)."""


class _Captured(Exception):
    pass


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The entries of a batch that the model takes, on `device`."""
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    return {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
        if key not in OWN_KEYS
    }


def masks(view: DecoderView, batch: Batch, positions: str = "answer") -> tuple[Tensor, Tensor, Tensor]:
    """(answer, vision, valid) of a batch, bool (B, T), on the CPU (section 3.2).

    The answer's tokens are those with a label; a tensor of token ids alone is text that is all answer. Vision tokens
    come from `mm_token_type_ids`, or from the image and video token ids of the configuration. `answer_mask` and
    `vision_mask` in the batch are taken as they are. Padding is in neither. `positions` "predicting" moves the answer's
    tokens by one, to where each is predicted.

    Raises CalibrationError naming what is missing.
    """
    entries = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch, "labels": batch}
    first = entries.get("input_ids", entries.get("inputs_embeds"))
    if not isinstance(first, Tensor) or first.dim() < 2 or first.shape[1] == 0:
        raise CalibrationError("batches: a batch needs input_ids (batch, tokens), or inputs_embeds with masks")
    shape = first.shape[:2]
    attention = entries.get("attention_mask")
    valid = torch.ones(shape, dtype=torch.bool) if attention is None else attention.cpu().bool()
    if "answer_mask" in entries:
        answer = entries["answer_mask"].cpu().bool()
    elif entries.get("labels") is not None:
        answer = entries["labels"].cpu() != IGNORED
    else:
        answer = torch.zeros(shape, dtype=torch.bool)
    if positions == "predicting":
        answer = torch.nn.functional.pad(answer[:, 1:], (0, 1))
    vision = _vision_mask(view, entries, shape)
    for name, mask in (("answer_mask", answer), ("vision_mask", vision), ("attention_mask", valid)):
        if mask.shape != shape:
            raise CalibrationError(
                f"batches: {name} has shape {tuple(mask.shape)}; that of the tokens is {tuple(shape)}"
            )
    return answer & valid, vision & valid, valid


def _vision_mask(view: DecoderView, entries: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
    if "vision_mask" in entries:
        return entries["vision_mask"].cpu().bool()
    kinds = entries.get("mm_token_type_ids")
    if isinstance(kinds, Tensor):
        return kinds.cpu() != 0
    vision = torch.zeros(shape, dtype=torch.bool)
    ids = entries.get("input_ids")
    for name in ("image_token_id", "video_token_id", "image_token_index", "video_token_index"):
        token = getattr(getattr(view.root, "config", None), name, None)
        if isinstance(token, int) and isinstance(ids, Tensor):
            vision |= ids.cpu() == token
    return vision


@torch.no_grad()
def capture(view: DecoderView, batch: Batch, positions: str = "answer") -> list[Sample]:
    """Run what comes before the decoder layers and return a sample for each row of the batch.

    The layers themselves do not run: each returns zeros, so that what the decoder adds between layers shows up as the
    input of the next one.
    """
    answer, vision, valid = masks(view, batch, positions)
    inputs = model_inputs(batch, next(view.embed.parameters()).device)
    seen: list[Tensor] = []
    arguments: dict[str, dict[str, Any]] = {}
    last = len(view.layers) - 1

    def record(index: int, layer_type: str) -> Any:
        def forward(original: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                raise CalibrationError(f"layer {index} is called with positional arguments, which mbq does not know")
            seen.append(hidden_states.cpu())
            arguments.setdefault(layer_type, kwargs)
            if index == last:
                raise _Captured
            return torch.zeros_like(hidden_states)

        return forward

    patch = Patch("mbq.capture")
    try:
        with patch:
            for layer in view.layers:
                patch.wrap_forward(layer.module, record(layer.index, layer.layer_type))
        runner = view.model if set(inputs) <= TEXT_KEYS else view.root
        with contextlib.suppress(_Captured):
            runner(**inputs, use_cache=False)
    finally:
        patch.remove()
    samples = []
    for row, keep in enumerate(valid):
        if not keep.any():
            continue
        kwargs = {
            kind: {name: _row(value, row, valid) for name, value in found.items()} for kind, found in arguments.items()
        }
        additions = {index: part[row, keep][None] for index, part in enumerate(seen) if index and part[row].any()}
        samples.append(
            Sample(seen[0][row, keep][None], answer[row, keep][None], vision[row, keep][None], kwargs, additions)
        )
    return samples


def micro_batches(samples: Iterable[Sample], size: int) -> Iterator[list[int]]:
    """Yield numbers of up to `size` samples that are equally long, in an order that does not depend on `size`.

    A sample that was padded comes with a mask and one that was not without: they do not run together.
    """
    alike: dict[tuple[int, Any], list[int]] = {}
    for index, sample in enumerate(samples):
        alike.setdefault((sample.hidden.shape[1], _kinds(sample.arguments)), []).append(index)
    for equal in alike.values():
        for start in range(0, len(equal), size):
            yield equal[start : start + size]


def _kinds(value: Any) -> Any:
    """Which arguments there are, and of what type."""
    if isinstance(value, Mapping):
        return tuple((name, _kinds(part)) for name, part in value.items())
    return tuple(map(_kinds, value)) if isinstance(value, tuple | list) else type(value)


def joined(values: list[Any], tokens: int, device: torch.device) -> Any:
    """One value of an argument for several samples: tensors joined along their batch dimension, on `device`."""
    first = values[0]
    if isinstance(first, tuple | list):
        return type(first)(joined(list(parts), tokens, device) for parts in zip(*values, strict=True))
    if not isinstance(first, Tensor):
        return first
    dim = _batch_dim(first, 1, tokens)
    return (first if dim is None else torch.cat(values, dim)).to(device)


def _batch_dim(value: Tensor, rows: int, tokens: int) -> int | None:
    """The dimension before the tokens: 0 of masks (B, 1, T, T) and of cos (B, T, D), 1 of cos (3, B, T, D)."""
    if value.dim() == 4 and value.shape[-1] == tokens and value.shape[-2] == tokens:
        return 0
    shape = value.shape
    # A batch may have as many rows as tokens.
    return next(
        (dim - 1 for dim in range(1, value.dim()) if shape[dim] == tokens and shape[dim - 1] in (1, rows)), None
    )


def _row(value: Any, row: int, valid: Tensor) -> Any:
    """The part of an argument that belongs to one row of the batch, without its padding, on the CPU."""
    if isinstance(value, tuple | list):
        return type(value)(_row(part, row, valid) for part in value)
    if not isinstance(value, Tensor):
        return value
    value = value.cpu()
    rows, tokens = valid.shape
    dim = _batch_dim(value, rows, tokens)
    if dim is None:
        return value
    picked = value.narrow(dim, row if value.shape[dim] > 1 else 0, 1)
    places = valid[row].nonzero()[:, 0]
    if value.dim() == 4 and value.shape[-1] == tokens and value.shape[-2] == tokens:
        return picked.index_select(2, places).index_select(3, places)
    return picked.index_select(dim + 1, places)
