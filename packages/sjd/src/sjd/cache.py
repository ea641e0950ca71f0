"""`RaggedCache`: a transformers cache in fixed buffers whose rows have lengths of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers (rows, heads, slots, channels); see `RaggedCache`."""

    is_sliding = False
    is_compileable = True
    is_croppable = False

    def __init__(self, rows: RowLengths) -> None:
        super().__init__()
        self.shared = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for the dtype, device and heads of the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, channels = key_states.shape
        # Zeros, because what is masked must still be finite: a weight of 0 times NaN is NaN.
        self.keys = key_states.new_zeros(batch, heads, self.shared.slots, channels)
        self.values = value_states.new_zeros(batch, heads, self.shared.slots, value_states.shape[-1])
        if self.shared.static:
            # CUDA graphs write to them in place. Not asked for, torch._dynamo is not imported, which takes seconds.
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens (rows, heads, q, channels) behind each row's length; return what attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        queries, equal = key_states.shape[2], self.shared.equal
        if equal is not None:
            self.keys[:, :, equal : equal + queries] = key_states
            self.values[:, :, equal : equal + queries] = value_states
        else:
            # Layers of a model that is spread over devices have their keys where they are.
            row, slot = (place.to(key_states.device) for place in self.shared.places(queries))
            self.keys[row, :, slot] = key_states.transpose(1, 2)
            self.values[row, :, slot] = value_states.transpose(1, 2)
        visible = self.shared.visible
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask and its offset 0."""
        return self.shared.visible, 0

    def get_seq_length(self) -> int:
        """The tokens of the longest row."""
        return int(self.shared.lengths.max())

    def get_max_length(self) -> int:
        """Slots of a row."""
        return self.shared.slots

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in this order."""
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            indices = indices.to(self.keys.device)
            self.keys, self.values = self.keys[indices], self.values[indices]


class RowLengths:
    """How many tokens each row of a `RaggedCache` holds, shared by its layers.

    `equal` is the length of all rows where the host knows that they have the same one.
    """

    def __init__(self, rows: int, slots: int, device: torch.device | str, static: bool) -> None:
        self.slots, self.static = slots, static
        self.visible = slots
        self.equal: int | None = None
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.row = torch.arange(rows, device=device)[:, None]
        self._steps: dict[int, Tensor] = {}

    def places(self, queries: int) -> tuple[Tensor, Tensor]:
        """Row (rows, 1) and slot (rows, queries) of the next tokens."""
        if queries not in self._steps:
            self._steps[queries] = torch.arange(queries, device=self.lengths.device)
        return self.row, self.lengths[:, None] + self._steps[queries]

    def select(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in this order."""
        self.lengths = self.lengths[indices]
        self.row = self.row[: len(indices)]


class RaggedCache(Cache):
    """A cache of `layers` layers with `slots` slots a row, in which every row has its own length.

    New tokens are written behind `lengths` (rows,) int64; what lies there already, rejected drafts of an earlier pass,
    is overwritten. Committing and rolling back is setting `lengths`: nothing is copied. The caller masks what a query
    must not see, with `mask`. `show` lowers the slots that attention reads to those in use. `static` marks the buffers
    for compiled passes.
    """

    def __init__(self, layers: int, rows: int, slots: int, device: torch.device | str, *, static: bool = False) -> None:
        self.shared = RowLengths(rows, slots, device, static)
        super().__init__(layers=[RaggedLayer(self.shared) for _ in range(layers)])

    @property
    def slots(self) -> int:
        """Slots of a row."""
        return self.shared.slots

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row (rows,) int64."""
        return self.shared.lengths

    @lengths.setter
    def lengths(self, value: Tensor) -> None:
        self.place(value)

    def place(self, lengths: Tensor, equal: int | None = None) -> None:
        """Set the lengths (rows,); `equal` is their value where the host knows that all are the same."""
        self.shared.lengths.copy_(lengths)
        self.shared.equal = equal

    def show(self, slots: int, exactly: bool = False) -> None:
        """Let attention read the first `slots` slots; unless `exactly`, a multiple of 64, so that few shapes occur."""
        self.shared.visible = min(slots if exactly else -(-slots // 64) * 64, self.slots)

    def next_slots(self, queries: int) -> Tensor:
        """Slots (rows, queries) of the next tokens."""
        return self.shared.places(queries)[1]

    def mask(self, queries: int, padding: Tensor, dtype: torch.dtype) -> Tensor:
        """Additive mask (rows, 1, queries, shown slots) for the next tokens.

        `padding` (rows,) slots on the left are hidden from all but themselves.
        """
        own = self.next_slots(queries)[:, :, None]
        slot = torch.arange(self.shared.visible, device=own.device)
        hidden = (slot > own) | ((slot < padding[:, None, None]) & (slot != own))
        mask = torch.zeros(hidden.shape, dtype=dtype, device=own.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]

    def select(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in this order."""
        self.shared.select(indices)
        self.batch_select_indices(indices)
