"""What is called in place of the model's own forwards while FrameFusion is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from pared_hooks import DecoderView
from torch import Tensor
from transformers.cache_utils import Cache

from framefusion.attention import KEY
from framefusion.cache import Applied, check_cache, is_empty, is_reduced, is_static, new_cache, restore, snapshot
from framefusion.config import FrameFusionConfig
from framefusion.decoder_layer import SplitLayer, parameters
from framefusion.errors import UnsupportedCacheError
from framefusion.functional.decision import Budget
from framefusion.functional.reducer import Reducer, count_tokens
from framefusion.layout import TokenLayout
from framefusion.layout_source import LayoutSource
from framefusion.masks import as_mask, by_position, is_flash
from framefusion.request import Request
from framefusion.stats import Sizes, Stats

Strategy = Callable[[TokenLayout, "Tensor | None", list[Budget]], Reducer]
"""(layout on the device, valid (batch, tokens) bool or None, budget of each row) -> what carries the batch through."""


class Engine:
    """One application of the method to one model. Whatever belongs to a prompt is in its `Request`."""

    def __init__(
        self,
        view: DecoderView,
        config: FrameFusionConfig,
        strategy: Strategy | None,
        source: LayoutSource,
        base: str,
    ) -> None:
        self.view, self.config, self.base = view, config, base
        self.source = source
        # Counted here, so that a compiled prefill has nothing to ask the device for.
        fixed = source.layout
        self._counts = [] if fixed is None else count_tokens(fixed.patch, fixed.stream)
        self.layers = [SplitLayer(layer) for layer in view.layers]
        self.applied = Applied()
        self.stats = Stats(Sizes.of(view))
        self.last: Request | None = None
        self._strategy = strategy or self._framefusion
        self._decoder_names = parameters(view.model)
        self._current: ContextVar[Request | None] = ContextVar("framefusion.current", default=None)
        self._finished: ContextVar[Request | None] = ContextVar("framefusion.finished", default=None)
        self._odd_logits: ContextVar[bool] = ContextVar("framefusion.odd_logits", default=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoder's hidden states."""
        return next(self.view.model.parameters()).dtype

    def _framefusion(self, layout: TokenLayout, valid: Tensor | None, budgets: list[Budget]) -> Reducer:
        return Reducer(self.config, layout.patch, layout.stream, len(self.layers), valid, budgets)

    # -- forwards ------------------------------------------------------------------------------------------------------

    def run_decoder(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the decoder with a request where its prompt has a layout, or its cache is reduced."""
        given = {**dict(zip(self._decoder_names, args, strict=False)), **kwargs}
        inputs = given.get("inputs_embeds")
        inputs = given.get("input_ids") if inputs is None else inputs
        if not isinstance(inputs, Tensor) or inputs.shape[1] == 1:
            return original(*args, **kwargs)
        request, given = self._request(given, inputs)
        if request is None:
            return original(*args, **kwargs)
        saved = None if request.cache is None else snapshot(request.cache)
        compiling = torch.compiler.is_compiling()
        token = None if compiling else self._current.set(request)
        try:
            out = original(**{**given, KEY: request})
        except BaseException:
            if saved is not None:
                restore(request.cache, saved)
            raise
        finally:
            if token is not None:
                self._current.reset(token)
        if not compiling:
            self._finished.set(request)
            if request.reducer is not None:
                self.last = request
                self.stats.add(request, self.config.placement == "post_attention")
        return out

    def run_layer(self, split: SplitLayer, original: Callable[..., Any], hidden: Tensor, *args: Any, **kw: Any) -> Any:
        """Run one layer: with a request as it says, with a reduced cache under a mask for what the layer holds."""
        request = kw.pop(KEY, None)
        if request is not None:
            return request.run(split, original, hidden, split.bind(args, kw))
        cache = kw.get("past_key_values")
        index = split.layer.index
        if cache is None or index >= len(cache.layers) or not is_reduced(cache.layers[index]):
            return original(hidden, *args, **kw)
        arguments = split.bind(args, kw)
        arguments["attention_mask"] = self._mask_of(split, cache.layers[index], hidden)
        return original(hidden, **arguments)

    def run_deepstack(
        self, original: Callable[..., Tensor], hidden: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor
    ) -> Tensor:
        """Add visual features of a middle layer of the tower to the tokens that are left: means over their groups."""
        request = self._current.get()
        if request is None or request.group is None:
            return original(hidden, visual_pos_masks, visual_embeds)
        where = visual_pos_masks.to(hidden.device)
        group = request.group
        kept = where & (group >= 0)
        full = hidden.new_zeros((*where.shape, hidden.shape[-1]), dtype=torch.float32)
        full = full.masked_scatter(where[..., None].expand_as(full), visual_embeds.to(full))
        rows = group.clamp(min=0)
        sums = torch.zeros_like(hidden, dtype=torch.float32)
        sums = sums.scatter_add(1, rows[..., None].expand_as(full), full * kept[..., None])
        counts = torch.zeros_like(sums[..., 0]).scatter_add(1, rows, kept.float())
        return hidden + (sums / counts.clamp(min=1)[..., None]).to(hidden.dtype)

    def run_root(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note a `logits_to_keep` that names positions: after a reduction these would be others."""
        keep = kwargs.get("logits_to_keep")
        if not isinstance(keep, Tensor):
            return original(*args, **kwargs)
        token = self._odd_logits.set(True)
        try:
            return original(*args, **kwargs)
        finally:
            self._odd_logits.reset(token)

    def run_loss(self, original: Callable[..., Any], logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss with the labels of the tokens that are left."""
        request = self._finished.get()
        if request is not None and request.changed and logits.shape[1] != labels.shape[1]:
            labels = request.labels(labels)
        return original(logits, labels, *args, **kwargs)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _mask_of(self, split: SplitLayer, layer: Any, hidden: Tensor) -> Any:
        """The mask for new tokens behind a reduced past when nothing of them is reduced or padding."""
        layer.check()
        queries = hidden.shape[1]
        if is_static(layer):
            return as_mask(layer.decode_mask(queries), self.base, hidden.dtype)
        window = split.layer.sliding_window
        if queries == 1 and layer.valid is None and (window is None or layer.length < window):
            return None
        positions, valid = layer.held()
        new = torch.arange(layer.length, layer.length + queries, device=hidden.device).expand(positions.shape[0], -1)
        if valid is not None:
            valid = torch.cat((valid, torch.ones_like(new, dtype=torch.bool)), 1)
        if is_flash(self.base):
            return valid
        keys = torch.cat((positions, new), 1)
        return as_mask(by_position(new, None, keys, valid, window), self.base, hidden.dtype)

    def _request(self, given: dict[str, Any], inputs: Tensor) -> tuple[Request | None, dict[str, Any]]:
        """A request for this forward and the decoder's arguments, with a cache where the model would make one."""
        batch, tokens = inputs.shape[:2]
        cache = given.get("past_key_values")
        layout = self.source.layout_of(batch, tokens, cache)
        reduced = isinstance(cache, Cache) and any(is_reduced(layer) for layer in cache.layers)
        if layout is None and not reduced:
            return None, given
        past = 0 if cache is None else int(cache.get_seq_length())
        valid, past_valid = _validity(given.get("attention_mask"), batch, past, tokens)
        reducer = None if layout is None else self._reducer(layout, valid, inputs.device)
        if reducer is None and not reduced:
            return None, given
        if reducer is not None:
            self._check(given)
            if cache is None and self._caches(given):
                cache = new_cache(self.view.config)
                given = {**given, "past_key_values": cache}
            if isinstance(cache, Cache):
                check_cache(cache)
                if is_flash(self.base) and any(is_static(layer) for layer in cache.layers):
                    raise UnsupportedCacheError(
                        f"past_key_values is a {type(cache).__name__}, whose free slots {self.base!r} would attend to; "
                        "pass a DynamicCache, or use 'sdpa'"
                    )
                if past and not is_empty(cache) and any(is_static(layer) for layer in cache.layers):
                    raise NotImplementedError(
                        "past_key_values is a StaticCache that is not empty, which takes no further video; pass a "
                        "DynamicCache"
                    )
        for layer in cache.layers if reduced and isinstance(cache, Cache) else ():
            if is_reduced(layer):
                layer.check()
        request = Request(self, reducer, (batch, tokens), past, cache, valid, past_valid, inputs.device)
        request.layout = layout
        return request, given

    def _reducer(self, layout: TokenLayout, valid: Tensor | None, device: torch.device) -> Reducer | None:
        patch, stream = layout.patch, layout.stream
        counts = self._counts if layout is self.source.layout else count_tokens(patch, stream)
        if any(0 < tokens < self.config.min_vision_tokens for tokens, *_ in counts):
            few = torch.tensor([tokens < self.config.min_vision_tokens for tokens, *_ in counts])[:, None]
            patch, stream = (one.masked_fill(few.to(one.device), -1) for one in (patch, stream))
            counts = count_tokens(patch, stream)
        if not any(tokens for tokens, *_ in counts):
            return None
        budgets = [Budget(self.config, len(self.layers), *one) for one in counts]
        moved = TokenLayout(patch, layout.frame, stream).to(device)
        return self._strategy(moved, valid, budgets)

    def _check(self, given: dict[str, Any]) -> None:
        if given.get("output_attentions") or getattr(self.view.config, "output_attentions", False):
            raise NotImplementedError(
                "output_attentions=True: attention matrices of a reduced prompt differ in size from layer to layer; "
                "use `with handle.disabled():` for them"
            )
        if any(given.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k")):
            raise NotImplementedError("cu_seq_lens_q: packed sequences cannot be reduced; pass a padded batch")
        if self._odd_logits.get():
            raise NotImplementedError(
                "logits_to_keep is a tensor of positions, which change when tokens leave; pass the number of last ones"
            )
        if self._checkpoints and given.get("past_key_values") is not None:
            raise NotImplementedError(
                "past_key_values: gradient checkpointing runs layers twice and has no cache; pass use_cache=False alone"
            )

    @property
    def _checkpoints(self) -> bool:
        return bool(getattr(self.view.model, "gradient_checkpointing", False)) and self.view.model.training

    def _caches(self, given: dict[str, Any]) -> bool:
        chosen = given.get("use_cache")
        if self._checkpoints:
            return False
        return bool(getattr(self.view.config, "use_cache", True) if chosen is None else chosen)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let prompts pass unreduced; caches that are reduced already go on."""
        before, self.source.disabled = self.source.disabled, True
        try:
            yield
        finally:
            self.source.disabled = before


def _validity(mask: Any, batch: int, past: int, tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """Which of the new and of the past tokens are no padding, (batch, ...) bool; None: all."""
    mask = next(iter(mask.values()), None) if isinstance(mask, dict) else mask
    if not isinstance(mask, Tensor):
        return None, None
    if mask.ndim == 2:
        whole = mask.bool()
        new, before = whole[:, -tokens:], whole[:, :past]
    else:
        # A prepared mask: a token that does not see itself is padding.
        own = mask[:, 0, :, past : past + tokens].diagonal(dim1=-2, dim2=-1).expand(batch, -1)
        new = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
        before = new[:, :0]
    if torch.compiler.is_compiling():
        return new, before if past else None
    return None if bool(new.all()) else new, None if past == 0 or bool(before.all()) else before
