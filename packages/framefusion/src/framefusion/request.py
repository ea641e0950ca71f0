"""One prompt on its way through the decoder: which tokens are present where, and what the layers are given for them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from framefusion.attention import KEY
from framefusion.cache import Incoming, adopt, is_reduced, is_static
from framefusion.decoder_layer import SplitLayer
from framefusion.functional.reducer import Reducer
from framefusion.functional.selection import Selection
from framefusion.layout import TokenLayout
from framefusion.masks import as_mask, by_position, gathered, is_flash, widened

if TYPE_CHECKING:
    from framefusion.engine import Engine


@dataclass(frozen=True)
class StageTrace:
    """What one stage did to the sequences of a batch."""

    layer: int
    """The stage is before this layer's attention, and (but for stage 0) after the attention of the one before."""
    kind: tuple[str, ...]
    """By row: "merge", "capped" (merged to the budget), "prune" or "none"."""
    before: tuple[int, ...]
    """Vision tokens before it, by row."""
    after: tuple[int, ...]
    fraction: tuple[float | None, ...]
    """Share of the vision tokens that reached the threshold."""
    cap: tuple[float | None, ...]
    """Sparsity that the budget required."""


@dataclass
class State:
    """The tokens present after some stage."""

    positions: Tensor | None
    """(batch, n) int64 in the sequence of this forward; None: all of them."""
    valid: Tensor | None
    vision: tuple[int, ...]
    """Vision tokens, by row."""
    tokens: tuple[int, ...]
    """Tokens that are no padding, by row."""


class Request:
    """A forward of several tokens, with `reducer` None when nothing is to be reduced but the cache already is."""

    def __init__(
        self,
        engine: Engine,
        reducer: Reducer | None,
        shape: tuple[int, int],
        past: int,
        cache: Any,
        valid: Tensor | None,
        past_valid: Tensor | None,
        device: torch.device,
    ) -> None:
        self.engine = engine
        self.reducer = reducer
        self.batch, self.tokens = shape
        self.past = past
        self.cache = cache
        self.valid = valid
        self.past_valid = past_valid
        self.device = device
        self.layout: TokenLayout | None = None
        self.wanting = False
        self.importance: Tensor | None = None
        self.trace: list[StageTrace] = []
        self.group: Tensor | None = None
        """(batch, tokens) int64: the row each token has gone into, -1 once it has vanished; None: nothing has."""
        self.seconds = 0.0
        counts = tuple(reducer.lengths) if reducer is not None else (self.tokens,) * self.batch
        vision = tuple(one.tokens for one in reducer.budgets) if reducer is not None else (0,) * self.batch
        self.states = [State(None, valid, vision, counts)]
        self.lengths = counts
        """Tokens of each row before any stage, without padding."""
        self._selections: list[Selection | None] = []
        self._importances: dict[int, Tensor | None] = {}
        self._memo: dict[Any, Any] = {}

    @property
    def changed(self) -> bool:
        """Whether any token has left."""
        return self.states[-1].positions is not None

    def run(self, split: SplitLayer, original: Any, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        """Run one layer on the tokens that are left, with the stages that belong to it."""
        index, config = split.layer.index, self.engine.config
        if index == 0:
            hidden = self.stage(hidden, 0, None)
        elif config.placement == "layer_input":
            hidden = self.stage(hidden, index, self._importances.get(index - 1))
        after = config.placement == "post_attention" and self._due(index + 1)
        self.wanting = self._wants(index + 1) and not split.linear
        state = self.state_at(index)
        given = self.fit(split, arguments, state)
        if self.wanting:
            given[KEY] = self
        if not after:
            out = original(hidden, **given)
            self._importances[index] = self.importance
        else:
            hidden = split.attention(hidden, given)
            hidden = self.stage(hidden, index + 1, self.importance)
            out = split.rest(hidden, self._own_inputs(split, arguments, self.state_at(index + 1)))
        self.wanting, self.importance = False, None
        return out

    def kept(self) -> Tensor:
        """(batch, n) int64: positions left in the end, -1 for padding."""
        state = self.states[-1]
        positions = self._positions(state)
        return positions if state.valid is None else positions.masked_fill(~state.valid, -1)

    def groups(self) -> Tensor:
        """(batch, tokens) int64: the last row that each token went into, -1 where it vanished."""
        if self.group is not None:
            return self.group
        return torch.arange(self.tokens, device=self.device).expand(self.batch, -1)

    def labels(self, labels: Tensor) -> Tensor:
        """Labels (batch, tokens) of the tokens left in the end, -100 for padding."""
        state = self.states[-1]
        rows = labels.gather(1, self._positions(state).to(labels.device))
        return rows if state.valid is None else rows.masked_fill(~state.valid.to(labels.device), -100)

    def state_at(self, stage: int) -> State:
        """The tokens present after a stage."""
        return self.states[min(stage, len(self.states) - 1)]

    def _due(self, stage: int) -> bool:
        if stage < len(self._selections):
            return self._selections[stage] is not None
        return self.reducer is not None and self.reducer.active

    def _wants(self, stage: int) -> bool:
        fresh = stage >= len(self._selections)
        return fresh and self.reducer is not None and self.reducer.active and self.reducer.wants_importance

    def stage(self, hidden: Tensor, number: int, importance: Tensor | None) -> Tensor:
        """Run stage `number`, or do again what it did when a layer is recomputed for its gradients."""
        if number < len(self._selections):
            selection = self._selections[number]
            return hidden if selection is None else selection.apply(hidden)
        if self.reducer is None or not self.reducer.active:
            return hidden
        start = 0.0 if torch.compiler.is_compiling() else time.perf_counter()
        before = self.states[-1]
        shorter, selection = self.reducer.step(hidden, importance)
        self._selections += [None] * (number - len(self._selections)) + [selection]
        if selection is not None:
            if before.positions is None and self.cache is not None:
                self._adopt()
            group = torch.arange(self.tokens, device=self.device).expand(self.batch, -1)
            group = group if self.group is None else self.group
            rows = selection.group.gather(1, group.clamp(min=0))
            self.group = torch.where(group >= 0, rows, -1)
        vision = tuple(one.tokens for one in self.reducer.budgets)
        state = before
        if selection is not None:
            state = State(self.reducer.positions, self.reducer.valid, vision, tuple(self.reducer.lengths))
        self.states += [before] * (number - len(self.states))
        self.states[number:] = [state]
        decisions = self.reducer.last
        self.trace.append(
            StageTrace(
                number,
                tuple(one.kind for one in decisions),
                before.vision,
                vision,
                tuple(one.fraction for one in decisions),
                tuple(one.cap for one in decisions),
            )
        )
        if not torch.compiler.is_compiling():
            self.seconds += time.perf_counter() - start
        return shorter

    def _adopt(self) -> None:
        total = self.past + self.tokens
        positions = torch.arange(total, device=self.device).expand(self.batch, -1)
        valid = None
        if self.valid is not None or self.past_valid is not None:
            ones = torch.ones(self.batch, total, dtype=torch.bool, device=self.device)
            past = ones[:, : self.past] if self.past_valid is None else self.past_valid
            valid = torch.cat((past, ones[:, self.past :] if self.valid is None else self.valid), 1)
        adopt(self.cache, len(self.engine.layers), self.engine.applied, positions, valid)

    def keys_held(self, keys: int, queries: int) -> int:
        """How many of the `keys` handed to an attention are tokens: all, but for the free slots of a static cache."""
        if self.cache is None or not any(is_static(layer) for layer in self.cache.layers):
            return keys
        return self.past + queries

    def fit(self, split: SplitLayer, arguments: dict[str, Any], state: State) -> dict[str, Any]:
        """The arguments of a layer for the tokens present, and the announcement of these tokens to its cache."""
        given = self._own_inputs(split, arguments, state)
        layer = self._cache_layer(split)
        if is_reduced(layer):
            positions = self._positions(state) + self.past
            layer.incoming = Incoming(positions, state.valid, self.past + self.tokens)
        mask = arguments.get("attention_mask")
        if split.linear:
            given["attention_mask"] = mask if state.positions is None else state.valid
        elif state.positions is not None or is_reduced(layer):
            given["attention_mask"] = self._mask(split, mask, state, layer)
        if state.positions is None:
            return given
        given["position_embeddings"] = self._rows(arguments["position_embeddings"], state)
        if isinstance(ids := arguments.get("position_ids"), Tensor):
            # Beyond the rotary tables they tell flash attention alone something: that gaps end a packed sequence.
            given["position_ids"] = None if is_flash(self.engine.base) else self._rows(ids, state)
        return given

    def _own_inputs(self, split: SplitLayer, arguments: dict[str, Any], state: State) -> dict[str, Any]:
        given = {name: value for name, value in arguments.items() if name != KEY}
        for name in SEQUENCE_INPUTS:
            if state.positions is not None and isinstance(value := arguments.get(name), Tensor):
                given[name] = self._gather(value, state.positions)
        return given

    def _cache_layer(self, split: SplitLayer) -> Any:
        index = split.layer.index
        if self.cache is None or index >= len(self.cache.layers):
            return None
        return self.cache.layers[index]

    def _positions(self, state: State) -> Tensor:
        if state.positions is not None:
            return state.positions
        return torch.arange(self.tokens, device=self.device).expand(self.batch, -1)

    def _remembered(self, value: Any, state: State, make: Any, extra: Any = None) -> Any:
        # The same tensor comes to every layer: what is made of it is kept until another stage changes the tokens.
        if torch.compiler.is_compiling():
            return make()
        key = (id(value), id(state), extra)
        if key not in self._memo:
            self._memo[key] = (value, make())
        return self._memo[key][1]

    def _rows(self, value: Any, state: State) -> Any:
        """Rows of rotary tables (a tuple of (batch or 1, tokens, channels)) or position ids (batch or 1, tokens)."""
        positions = state.positions
        assert positions is not None
        if isinstance(value, tuple):
            parts = [self._remembered(one, state, lambda one=one: self._gather(one, positions)) for one in value]
            return tuple(parts)
        return self._remembered(value, state, lambda: value.expand(self.batch, -1).gather(1, positions))

    def _gather(self, value: Tensor, positions: Tensor) -> Tensor:
        rows = value.expand(self.batch, -1, -1)
        return rows.gather(1, positions[..., None].expand(-1, -1, rows.shape[-1]))

    def _mask(self, split: SplitLayer, mask: Any, state: State, layer: Any) -> Any:
        base, dtype = self.engine.base, self.engine.dtype
        if self.past:
            return self._mask_with_past(split, state, layer)
        if mask is not None and not isinstance(mask, Tensor):
            raise NotImplementedError(
                f"attention_mask is a {type(mask).__name__}, which cannot be shortened; use attn_implementation='sdpa'"
            )
        if is_flash(base):
            return state.valid
        if state.positions is None:
            return mask

        def shortened() -> Any:
            positions = self._positions(state)
            if mask is not None:
                return gathered(mask, positions, state.valid)
            if state.valid is None and base == "sdpa":
                return None
            window = split.layer.sliding_window
            return as_mask(by_position(positions, state.valid, positions, state.valid, window), base, dtype)

        found = self._remembered(mask, state, shortened, split.layer.sliding_window)
        if found is not None and is_static(layer):
            return widened(found, layer.max_cache_len)
        return found

    def _mask_with_past(self, split: SplitLayer, state: State, layer: Any) -> Tensor | None:
        if is_static(layer):
            raise NotImplementedError(
                "a static cache that holds a reduced prompt takes one token at a time; pass a DynamicCache to continue"
            )
        queries = self._positions(state) + self.past
        if is_reduced(layer):
            before, before_valid = layer.held()
        else:
            before = torch.arange(self.past, device=self.device).expand(self.batch, -1)
            before_valid = self.past_valid
        valid = state.valid
        if before_valid is not None or valid is not None:
            ones = torch.ones_like(before, dtype=torch.bool) if before_valid is None else before_valid
            new = torch.ones_like(queries, dtype=torch.bool) if valid is None else valid
            keys_valid: Tensor | None = torch.cat((ones, new), 1)
        else:
            keys_valid = None
        if is_flash(self.engine.base):
            return keys_valid
        keys = torch.cat((before, queries), 1)
        allowed = by_position(queries, valid, keys, keys_valid, split.layer.sliding_window)
        return as_mask(allowed, self.engine.base, self.engine.dtype)


SEQUENCE_INPUTS = ("per_layer_input",)
"""Arguments of a layer, beside those all layers have, with a row for each token: Gemma 4's own inputs of a layer."""
