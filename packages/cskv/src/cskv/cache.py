"""`CSKVCache`: old tokens as low-rank latents, recent ones exactly, as a transformers `Cache` (section 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, get_layer_types_and_kwargs

from cskv import fused
from cskv.branches import Branches
from cskv.config import CSKVConfig
from cskv.factors import LayerFactors
from cskv.functional import first_exact_columns, full_precision_tail, split_heads
from cskv.masks import windowed_mask
from cskv.plan import LayerPlan
from cskv.rotary import RotaryRows

ROLLBACK = 32
"""Tokens of the latest call that `crop` can take back without a loss of exact ones before them."""


@dataclass
class Usage:
    """Bytes that a cache held after its latest update, by layer and kind; `full` is what a full cache would hold."""

    tokens: int = 0
    batch: int = 0
    rotary: int = 0
    layers: dict[int, dict[str, int]] = field(default_factory=dict)

    def total(self, kind: str) -> int:
        """Bytes of one kind over all layers."""
        return sum(layer[kind] for layer in self.layers.values())


class Applied:
    """What a handle and its caches share: whether the handle is still on the model, and what was cached last.

    `handed` holds, for an attention module whose layer has just stored its new token, where fused attention is to read.
    """

    def __init__(self) -> None:
        self.removed = False
        self.usage = Usage()
        self.handed: dict[int, Handed] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Applied:
        return self


class FactorBuffers(nn.Module):
    """A of keys and values stacked, B, and biases of one layer, as buffers: they follow the model and are not saved."""

    down: Tensor | None
    up_k: Tensor | None
    up_v: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(self, plan: LayerPlan, factors: LayerFactors) -> None:
        super().__init__()
        (weight, bias_k), (_, bias_v) = plan.adapter.maps()
        sides = {
            "k": (factors.a_k, factors.b_k, bias_k) if plan.k_rank is not None else (None, None, None),
            "v": (factors.a_v, factors.b_v, bias_v) if plan.v_rank is not None else (None, None, None),
        }
        down = [a.to(weight) for a, _, _ in sides.values() if a is not None]
        self.register_buffer("down", torch.cat(down) if down else None, persistent=False)
        for side, (_, b, bias) in sides.items():
            self.register_buffer(f"up_{side}", None if b is None else b.detach().to(weight), persistent=False)
            self.register_buffer(f"bias_{side}", None if bias is None else bias.detach().clone(), persistent=False)


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """How one layer is cached. Shared by all caches of a handle. `fused`: single tokens go through pared_kernels."""

    plan: LayerPlan
    buffers: FactorBuffers
    config: CSKVConfig
    applied: Applied
    fused: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerSpec:
        # A copied cache belongs to the same model.
        return self

    def latents(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """c_K and c_V (B, n, rank) of the inputs (B, n, d) of the projections; None for a side without a factor."""
        buffers = self.buffers
        if buffers.down is None:
            return None, None
        latent = nn.functional.linear(hidden_states, buffers.down)
        k_rank = self.plan.k_rank or 0
        return (latent[..., :k_rank] if k_rank else None), (latent[..., k_rank:] if self.plan.v_rank else None)

    def keys(self, latents: Tensor, rotary: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """k_hat (B, H_kv, n, D) of stored latents (B, n, rank)."""
        adapter = self.plan.adapter
        if self.plan.k_rank is None:
            return split_heads(latents, adapter.num_kv_heads)
        keys = nn.functional.linear(latents, self.buffers.up_k, self.buffers.bias_k)  # type: ignore[arg-type]
        cos, sin = rotary() if adapter.uses_rope else (None, None)
        return adapter.finish_keys(keys, cos, sin)

    def values(self, latents: Tensor) -> Tensor:
        """v_hat (B, H_kv, n, D) of stored latents (B, n, rank)."""
        if self.plan.v_rank is not None:
            latents = nn.functional.linear(latents, self.buffers.up_v, self.buffers.bias_v)  # type: ignore[arg-type]
        return split_heads(latents, self.plan.adapter.num_kv_heads)


@dataclass
class Stage:
    """What the hook before an attention tells its cache layer, until the attention calls `update`."""

    hidden_states: Tensor
    cos: Tensor
    sin: Tensor
    rebuilt: int
    exact_from: int
    fused: bool


@dataclass(frozen=True)
class Handed:
    """A layer with the current token stored: attention reads `rebuilt` latents and exact tokens from there on."""

    layer: CSKVLayer
    rebuilt: int


class CSKVLayer(CacheLayerMixin):
    """Cache of one full-attention layer. `rotary` is shared by the layers of a cache; one of them, the owner, edits
    it."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, spec: LayerSpec, rotary: RotaryRows, usage: Usage, owns_rotary: bool) -> None:
        super().__init__()
        self.spec = spec
        self.rotary = rotary
        self.usage = usage
        self.owns_rotary = owns_rotary
        self.record_past = False
        self._key_branches = Branches(spec.plan.k_rank, spec.plan.k_quantization)
        self._value_branches = Branches(spec.plan.v_rank, spec.plan.v_quantization)
        self._stage: Stage | None = None
        # Where in the sequence the exact tail begins; tokens before it exist as latents alone.
        self._tail_from = 0
        self._keeps_prompt = spec.config.chunked_prefill == "exact"

    @property
    def sides(self) -> tuple[Branches, Branches]:
        """Keys and values."""
        return self._key_branches, self._value_branches

    @property
    def _lossless(self) -> bool:
        return self._key_branches.lossless and self._value_branches.lossless

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device of the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def stage(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_mask: Any,
        implementation: str,
        fused: bool = False,
    ) -> Any:
        """Take what the coming `update` needs, and return the attention mask that fits what it will return.

        `hidden_states` (B, q, d) are the inputs of the projections; `cos`, `sin` (B or 1, q, D_rot) of the new tokens;
        `fused` tells that fused attention will run and can read the layer itself. Raises RuntimeError when the handle
        was removed, and `UnsupportedAttentionError` as `windowed_mask` does.
        """
        self._check_applied()
        past, queries = self.get_seq_length(), hidden_states.shape[1]
        if queries == 1 and past:
            self._keeps_prompt = False
        first = self._first_exact(past, queries)
        rebuilt, exact_from = first(past + queries - 1), first(past)
        if past and rebuilt != exact_from:
            rows = first_exact_columns(
                queries,
                self.spec.config.window,
                self.spec.config.window_policy,
                begin=past,
                device=hidden_states.device,
            ).clamp(min=self._tail_from)
            attention_mask = windowed_mask(attention_mask, rows, past, rebuilt, exact_from, implementation)
        self._stage = Stage(hidden_states, cos, sin, rebuilt, exact_from, fused and queries == 1 and past > 0)
        return attention_mask

    def _first_exact(self, past: int, queries: int) -> Callable[[int], int]:
        """First column that the token at a place attends exactly."""
        config = self.spec.config
        if past == 0 or self._keeps_prompt or self._lossless:
            # The first chunk of a prompt attends exactly; and what loses nothing needs no window.
            return lambda place: 0 if past == 0 else self._tail_from
        return lambda place: max(
            place + 1 - full_precision_tail(place + 1, config.window, config.window_policy), self._tail_from
        )

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens and return all columns for attention; keys (rotated) and values (B, H_kv, q, D).

        Where fused attention reads the layer itself, the new token comes back as it is. Raises RuntimeError when the
        handle was removed or no hook has staged the inputs.
        """
        self._check_applied()
        stage, self._stage = self._stage, None
        queries = key_states.shape[2]
        if stage is None or stage.hidden_states.shape[1] != queries:
            raise RuntimeError(
                f"the cache of layer {self.spec.plan.index} got {queries} tokens without the inputs they come from; a "
                "CSKVCache works only in the model that its handle is applied to"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        keys_turn = self.spec.plan.adapter.uses_rope and self.spec.plan.k_rank is not None
        # Nothing that is stored carries a graph; the first chunk of a prompt passes through as it is.
        with torch.no_grad():
            if fuses := stage.fused and self._can_fuse(stage.hidden_states, key_states):
                rotary = self.rotary.reserve(stage.cos, stage.sin, past) if keys_turn else None
                fused.append(self, stage.hidden_states, key_states, value_states, rotary)
            else:
                if keys_turn:
                    self.rotary.extend(stage.cos, stage.sin, past)
                latents = self.spec.latents(stage.hidden_states)
                for side, latent, exact in zip(self.sides, latents, (key_states, value_states), strict=True):
                    side.append(latent, exact.detach())
            for side in self.sides:
                side.store.quantize(stage.rebuilt, touching=True)
            keys, values = key_states, value_states
            if fuses:
                self.spec.applied.handed[id(self.spec.plan.adapter.module)] = Handed(self, stage.rebuilt)
            elif past:
                keys, values = self.columns(stage.rebuilt, stage.exact_from)
            if not self.record_past:
                self._trim(queries)
        self._report(key_states)
        return keys, values

    def _can_fuse(self, hidden_states: Tensor, key_states: Tensor) -> bool:
        """Whether the kernels take this token: one dtype everywhere, and rotary rows whose halves repeat."""
        down = self.spec.buffers.down
        turns = self.spec.plan.adapter.uses_rope
        one_dtype = down is not None and hidden_states.dtype == down.dtype == key_states.dtype == self.dtype
        return one_dtype and (not turns or self.rotary.repeats)

    def columns(self, rebuilt: int, exact_from: int) -> tuple[Tensor, Tensor]:
        """Keys and values that attention reads: `rebuilt` tokens from latents, those from `exact_from` on exactly."""

        def rotary() -> tuple[Tensor, Tensor]:
            return self.rotary.rows(self.device, rebuilt)

        keys = self._key_branches.columns(rebuilt, exact_from, lambda latents: self.spec.keys(latents, rotary))
        return keys, self._value_branches.columns(rebuilt, exact_from, self.spec.values)

    def _trim(self, queries: int) -> None:
        """Drop exact tokens that no later token will attend to, also if some of the latest `queries` are taken back."""
        if self._keeps_prompt or self._lossless:
            return
        length, config = self.get_seq_length(), self.spec.config
        place = max(length - min(queries, ROLLBACK), 0)
        first = place + 1 - full_precision_tail(place + 1, config.window, config.window_policy)
        self._tail_from = max(self._tail_from, first)
        for side in self.sides:
            side.keep_tail(length - self._tail_from)
            # What is still exact is not read as latents: a rollback into it must not find it rounded.
            side.store.quantize(self._tail_from)

    def _report(self, states: Tensor) -> None:
        usage, length = self.usage, self.get_seq_length()
        full = 2 * states.shape[0] * length * self.spec.plan.adapter.width * states.element_size()
        usage.layers[self.spec.plan.index] = {**self.nbytes(), "full": full}
        usage.tokens, usage.batch, usage.rotary = length, states.shape[0], self.rotary.nbytes
        self.spec.applied.usage = usage

    def _check_applied(self) -> None:
        if self.spec.applied.removed:
            raise RuntimeError("the handle of this CSKVCache was removed from the model; the cache cannot go on")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, old and new tokens, and its offset 0."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Number of cached tokens."""
        return self._key_branches.store.length

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind: "compressed" latents, exact "tail", "metadata" of quantisation."""
        parts = [side.nbytes() for side in self.sides]
        return {kind: sum(part[kind] for part in parts) for kind in parts[0]}

    def activate_past_recording(self) -> None:
        """Keep all exact tokens until the next `crop`, so that a rollback of any length brings the window back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, whose number is given as a negative one.

        Up to `ROLLBACK` tokens of the latest call, the window is then what it was before them. Beyond, exact tokens
        that were dropped do not come back and the window starts anew. Raises ValueError for a positive number, as
        transformers does.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not valid: give the number of tokens to remove as a negative integer"
            )
        if not self.is_initialized:
            return
        length = self.get_seq_length() + tokens_to_remove
        if length <= 0:
            self.reset()
            return
        if tokens_to_remove:
            for side in self.sides:
                side.remove(-tokens_to_remove)
            if not self._lossless:
                self._tail_from = min(self._tail_from, length)
            if self.owns_rotary:
                self.rotary.truncate(length)
        self._trim(ROLLBACK)

    def reset(self) -> None:
        """Forget everything; the layer can be used for another sequence."""
        for side in self.sides:
            side.clear()
        self._stage = None
        self._tail_from = 0
        self._keeps_prompt = self.spec.config.chunked_prefill == "exact"
        self.is_initialized = False
        if self.owns_rotary:
            self.rotary.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the batch rows `beam_idx`, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices` (numbers or a mask), in this order."""
        if not self.is_initialized:
            return
        rows = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        for side in self.sides:
            for store in side.tensors():
                store.select(rows)
        if self.owns_rotary:
            self.rotary.select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        if not self.is_initialized:
            return
        for side in self.sides:
            for store in side.tensors():
                store.repeat(repeats)
        if self.owns_rotary:
            self.rotary.repeat(repeats)

    def offload(self) -> None:
        """Move what is kept to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Bring what is kept back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        for side in self.sides:
            for store in side.tensors():
                store.to(device)


class CSKVCache(Cache):
    """A transformers cache whose chosen full-attention layers are `CSKVLayer`s; the others are those of
    `DynamicCache`."""

    def __init__(self, layers: list[Any], *, offloading: bool = False, offload_only_non_sliding: bool = True) -> None:
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        # Whether the latest tokens came with a mask that nobody has looked at.
        self.padding_unchecked = True

    @classmethod
    def create(cls, text_config: Any, specs: dict[int, LayerSpec], **options: Any) -> CSKVCache:
        """An empty cache for a decoder with this configuration; `specs` by number of the layer."""
        return cls(_layers(text_config, specs), **options)

    @classmethod
    def adopt(cls, cache: Cache, text_config: Any, specs: dict[int, LayerSpec]) -> CSKVCache:
        """Turn an empty `DynamicCache` into a `CSKVCache`: the same object, so that its holders see the tokens."""
        recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
        cache.__class__ = cls
        cache.layers = _layers(text_config, specs)
        cache.layer_class_to_replicate = None
        assert isinstance(cache, CSKVCache)
        cache.padding_unchecked = True
        if recording:
            cache.activate_past_recording()
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, other layers and free rows included."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, CSKVLayer):
                total += sum(layer.nbytes().values()) + (layer.rotary.nbytes if layer.owns_rotary else 0)
            else:
                total += sum(tensor.nbytes for tensor in vars(layer).values() if isinstance(tensor, Tensor))
        return total


def _layers(text_config: Any, specs: dict[int, LayerSpec]) -> list[Any]:
    rotary, usage, owner = RotaryRows(), Usage(), min(specs)
    types, options = get_layer_types_and_kwargs(text_config)
    return [
        CSKVLayer(specs[index], rotary, usage, index == owner)
        if index in specs
        else DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs)
        for index, (layer_type, kwargs) in enumerate(zip(types, options, strict=True))
    ]
