"""Attention of one layer at one step, each head by its own method."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn2.config import DiTFastAttnV2Config
from ditfastattn2.functional import headwise_arrow_attention, plan_density, reorder_tokens
from ditfastattn2.layout import Tokens
from ditfastattn2.methods import Method
from ditfastattn2.plan import methods_of

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Full attention on (B, H, S, D) by a backend that the user has chosen."""

Remainder = tuple[int, bool]
"""What a residual belongs to: the window of its arrow, and whether frames are reordered."""


@dataclass(frozen=True)
class Launch:
    """Heads computed together: their windows over all heads (0 for those left out), and what is done around them."""

    windows: tuple[int, ...]
    reorder: bool
    halved: bool

    @property
    def heads(self) -> list[int]:
        """The heads computed here."""
        return [head for head, window in enumerate(self.windows) if window != 0]


@dataclass(frozen=True)
class Program:
    """What letters of one layer mean at given token counts: launches, heads to be recalled, residuals to be added."""

    launches: tuple[Launch, ...]
    cached: tuple[int, ...]
    residuals: tuple[tuple[int, Remainder], ...]
    """(head, remainder) of every head whose arrow gets one."""
    pairs: float
    """Query-key pairs computed, in units of those of one full head."""


@lru_cache(maxsize=65536)
def program(
    letters: str,
    config: DiTFastAttnV2Config,
    num_vision: int,
    num_text: int,
    text_first: bool,
    batched: bool,
) -> Program:
    """Return the program of a layer; `batched` tells that the batch holds both guidance branches."""
    methods = methods_of(letters, config)
    groups: dict[tuple[bool, bool], list[int]] = {}
    residuals: list[tuple[int, Remainder]] = []
    pairs = 0.0
    for head, method in enumerate(methods):
        if method.kind == "cached":
            continue
        window = window_of(method, config, num_vision, num_text, text_first)
        halved = method.shares_guidance and batched
        group = groups.setdefault((method.reorder and window > 0, halved), [0] * len(methods))
        group[head] = window
        share = plan_density([window], num_vision, num_text, text_first, config.mask_block)
        pairs += share / 2 if halved else share
        if method.residual:
            residuals.append((head, remainder_of(method, num_vision)))
    return Program(
        launches=tuple(Launch(tuple(windows), *key) for key, windows in sorted(groups.items())),
        cached=tuple(head for head, method in enumerate(methods) if method.kind == "cached"),
        residuals=tuple(residuals),
        pairs=pairs,
    )


def window_of(method: Method, config: DiTFastAttnV2Config, num_vision: int, num_text: int, text_first: bool) -> int:
    """Return the window a method runs with: -1 where its blocks would cover everything anyway."""
    window = method.window(num_vision)
    if window > 0 and plan_density([window], num_vision, num_text, text_first, config.mask_block) == 1:
        return -1
    return window


def remainder_of(method: Method, num_vision: int) -> Remainder:
    """Return what a residual of this method is stored under."""
    return method.window(num_vision), method.reorder


@dataclass(frozen=True, eq=False)
class Inputs:
    """Queries, keys and values of one attention, (B, S, H, D) in the order of `sequence.gathered`.

    `scale` None is D ** -0.5; `dense` is where full attention goes if the user has chosen a backend.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sequence: Tokens
    scale: float | None = None
    dense: Dense | None = None

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Return the same with `function` of queries, keys and values."""
        return replace(self, q=function(self.q), k=function(self.k), v=function(self.v))

    def of_heads(self, heads: Collection[int]) -> Inputs:
        """Return some heads alone."""
        return self.map(lambda one: pick(one, heads))

    def conditional_half(self) -> Inputs:
        """Return the second half of a guidance batch, the conditional one."""
        half = slice(len(self.q) // 2, None)
        valid = self.sequence.prompt_valid
        sequence = self.sequence.padded(None if valid is None else valid[half])
        return replace(self.map(lambda one: one[half]), sequence=sequence)


def compute(launches: tuple[Launch, ...], inputs: Inputs, out: Tensor | None, config: DiTFastAttnV2Config) -> Tensor:
    """Run `launches` and return them in `out` (B, S, H, D), new without it; its other heads stay."""
    if len(launches) == 1 and not launches[0].halved and all(window == -1 for window in launches[0].windows):
        # All heads full: nothing is faster than the attention of torch, or gives its very result.
        return full_attention(inputs)
    q = inputs.q
    if out is None:
        complete = sum(len(launch.heads) for launch in launches) == inputs.heads
        out = (torch.empty if complete else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    for launch in launches:
        full = [head for head, window in enumerate(launch.windows) if window == -1]
        if inputs.dense is not None and full and not launch.halved:
            put(out, full, full_attention(inputs.of_heads(full)))
            launch = replace(launch, windows=tuple(0 if window == -1 else window for window in launch.windows))
        if launch.heads:
            _run(launch, inputs, out, config)
    return out


def _run(launch: Launch, inputs: Inputs, out: Tensor, config: DiTFastAttnV2Config) -> None:
    """Write the heads of one launch into `out`."""
    if not (launch.reorder or launch.halved):
        _attend(inputs, launch.windows, config, out)
        return
    heads = launch.heads
    part = inputs.conditional_half() if launch.halved else inputs
    part = part.of_heads(heads)
    order = (inputs.sequence.num_text, inputs.sequence.frames, inputs.sequence.text_first)
    if launch.reorder:
        part = part.map(lambda one: reorder_tokens(one, *order))
    result = _attend(part, tuple(launch.windows[head] for head in heads), config, None)
    if launch.reorder:
        result = reorder_tokens(result, *order, inverse=True)
    half = len(out) // 2
    put(out[half:] if launch.halved else out, heads, result)
    if launch.halved:
        put(out[:half], heads, result)


def _attend(inputs: Inputs, windows: tuple[int, ...], config: DiTFastAttnV2Config, out: Tensor | None) -> Tensor:
    sequence = inputs.sequence
    return headwise_arrow_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        windows,
        sequence.num_text,
        sequence.text_first,
        config.mask_block,
        sequence.valid,
        inputs.scale,
        out,
        config.backend,
    )


def full_attention(inputs: Inputs) -> Tensor:
    """Full attention of all heads, (B, S, H, D)."""
    q, k, v = (one.transpose(1, 2) for one in (inputs.q, inputs.k, inputs.v))
    mask = _key_mask(inputs.sequence, q)
    if inputs.dense is not None and mask is None:
        return inputs.dense(q, k, v).transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=inputs.scale).transpose(1, 2)


def _key_mask(sequence: Tokens, like: Tensor) -> Tensor | None:
    """Bool (B, 1, 1, S): the tokens that are no padding, in the order of `gathered`; None if all."""
    if sequence.valid is None:
        return None
    position = torch.arange(sequence.num_vision + sequence.num_text, device=like.device)
    start = 0 if sequence.text_first else sequence.num_vision
    is_padding = (position - start >= sequence.valid[:, None]) & (position >= start)
    is_padding &= position < start + sequence.num_text
    return ~is_padding[:, None, None, :]


def pick(x: Tensor, heads: Collection[int]) -> Tensor:
    """Return some heads of (B, S, H, D), in their order."""
    if x.dtype == torch.float8_e4m3fn:
        # Not every device can index these; bytes it can.
        return pick(x.view(torch.uint8), heads).view(x.dtype)
    return x if tuple(heads) == tuple(range(x.shape[2])) else x.index_select(2, _index(tuple(heads), x.device))


def put(out: Tensor, heads: Collection[int], source: Tensor) -> None:
    """Write `source` (B, S, h, D) into some heads of `out` (B, S, H, D)."""
    out.index_copy_(2, _index(tuple(heads), out.device), source)


@lru_cache(maxsize=8192)
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept: to make one anew would let the device wait at every layer.
    return torch.tensor(heads, device=device)
