"""Key-value memory for continuous batching: a row per slot, all rows ending at the same column.

Every buffer is [slots, ..., columns, size]. A row's newest position always lies in column ``end - 1``, so one slice
writes or reads all rows, and distances between columns are distances between positions (sliding windows and relative
biases need no special care). Rows that enter later simply start later; whatever lies before a row's start is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class Buffer:
    """One tensor [slots, ..., columns, size] of a memory, replaced when it needs more columns."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data


class SlotMemory:
    """Buffers that rows enter, leave and move through together.

    In use are the first ``rows`` slots and the columns ``start`` to ``end``. Columns are added a few at a time, so that
    rows lie close together: memory spread over many pages is several times slower to read (6 blocks of 64 rows x 36
    columns x 128: 160 against 63 us).
    """

    # Columns added at a time: this number, or this share of those in use.
    LEAST_ROOM, ROOM_SHARE = 8, 1 / 16

    def __init__(self, slots: int, columns: int, *, room: int | None = None) -> None:
        """``room``: slots that have memory from the start, where not all ``slots`` have."""
        self.slots, self.room = slots, slots if room is None else min(room, slots)
        self.rows, self.start, self.end = 0, columns, columns
        self.capacity = columns
        self.buffers: list[Buffer] = []

    def buffer_like(self, rows: torch.Tensor) -> Buffer:
        """A new buffer for rows [B, ..., W, size]; zeros, because what is masked must still be finite."""
        self.buffers.append(Buffer(rows.new_zeros(self.room, *rows.shape[1:-2], self.capacity, rows.shape[-1])))
        return self.buffers[-1]

    def cache_like(self, cache: Cache) -> Cache:
        """A cache over slots for the layers of a prefilled one; blocks that were dropped have stored nothing."""
        # Masks follow the first layer that slides: an empty one in a dropped block's place must not be taken for it.
        return Cache(
            layers=[
                DynamicLayer() if layer.keys is None else self.new_layer(layer.keys, layer.values)
                for layer in cache.layers
            ]
        )

    def new_layer(self, keys: torch.Tensor, values: torch.Tensor) -> SlotLayer:
        """A layer for keys and values like these."""
        return SlotLayer(self, keys, values)

    def place(self, target: Buffer, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Put rows [B, ..., W, size] into ``slots`` [B] of ``target``, ending where all rows end."""
        target.data[..., self.end - rows.shape[-2] : self.end, :].index_copy_(0, slots, rows)

    def place_cache(self, target: Cache, cache: Cache, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """``place`` for rows number ``rows`` [B] of a prefilled cache, layer by layer."""
        for slot_layer, layer in zip(target.layers, cache.layers, strict=True):
            if isinstance(slot_layer, SlotLayer):
                self.place(slot_layer.key_buffer, layer.keys.index_select(0, rows), slots)
                self.place(slot_layer.value_buffer, layer.values.index_select(0, rows), slots)

    def require_rows(self, rows: int) -> None:
        """Have memory for the first ``rows`` slots; where there is less, for twice as many as before at least."""
        if rows <= self.room:
            return
        self.room = min(self.slots, max(rows, 2 * self.room))
        for buffer in self.buffers:
            old = buffer.data
            buffer.data = old.new_zeros(self.room, *old.shape[1:])
            buffer.data[: len(old)] = old

    def reserve(self, before: int, after: int) -> None:
        """Have at least ``before`` columns before ``end`` and ``after`` from there on; columns before ``start`` are
        dropped."""
        if self.end >= before and self.end + after <= self.capacity:
            return
        used = self.end - self.start
        left = max(0, before - used)
        end = left + used
        self.capacity = end + max(after, self.LEAST_ROOM, int(end * self.ROOM_SHARE))
        for buffer in self.buffers:
            old = buffer.data
            buffer.data = old.new_zeros(*old.shape[:-2], self.capacity, old.shape[-1])
            buffer.data[: self.rows, ..., left:end, :] = old[: self.rows, ..., self.start : self.end, :]
        self.start, self.end = left, end

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows between slots."""
        columns = slice(self.start, self.end)
        for buffer in self.buffers:
            buffer.data[targets, ..., columns, :] = buffer.data[sources, ..., columns, :]


class SlotLayer(CacheLayerMixin):
    """A ``transformers`` cache layer that writes column ``memory.end`` and reads the columns in use."""

    is_sliding = False  # keeps all columns; the mask does what a shorter memory would

    def __init__(self, memory: SlotMemory, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.memory, self.key_buffer, self.value_buffer = memory, memory.buffer_like(keys), memory.buffer_like(values)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the memory is there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one new position per row [rows, H, 1, d]; return all columns in use, [rows, H, W + 1, d]."""
        rows, start, end = self.memory.rows, self.memory.start, self.memory.end
        keys, values = self.key_buffer.data, self.value_buffer.data
        keys[:rows, :, end : end + 1] = key_states
        values[:rows, :, end : end + 1] = value_states
        return keys[:rows, :, start : end + 1], values[:rows, :, start : end + 1]

    def get_seq_length(self) -> int:
        """Columns before the new one."""
        return self.memory.end - self.memory.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns a mask must cover, offset of the first)"""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Without a limit of its own."""
        return -1


def slot_layers(cache: Cache, slot: int, columns: slice) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Per layer, keys and values [H, n, d] of a slot's ``columns``; ``None`` where a block stores nothing."""
    return [
        (layer.key_buffer.data[slot, :, columns], layer.value_buffer.data[slot, :, columns])
        if isinstance(layer, SlotLayer)
        else None
        for layer in cache.layers
    ]


class SpanMemory:
    """What a span of tokens carries on from its beginning: a value of each kind for every slot [slots, ...]."""

    def __init__(self, span: int, slots: int, device: torch.device) -> None:
        self.span, self.slots, self.device = span, slots, device
        self.kept: tuple[torch.Tensor, ...] = ()

    def inside(self, places: Sequence[int]) -> torch.Tensor:
        """[b] bool: rows of this many tokens do not begin a span."""
        return torch.tensor([place % self.span != 0 for place in places], device=self.device)

    def carry(self, slots: list[int], places: Sequence[int], *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``new`` [b, ...] where a span begins, what was kept inside it; that is kept for the next token."""
        if not self.kept:
            self.kept = tuple(x.new_zeros(self.slots, *x.shape[1:]) for x in new)
        inside = self.inside(places)
        now = tuple(
            torch.where(inside.view(-1, *[1] * (x.ndim - 1)), kept[slots], x)
            for kept, x in zip(self.kept, new, strict=True)
        )
        self.put(slots, *now)
        return now

    def put(self, slots: list[int], *values: torch.Tensor) -> None:
        """Keep ``values`` [b, ...] for ``slots``."""
        for kept, value in zip(self.kept, values, strict=True):
            kept[slots] = value

    def move(self, slots: list[int], to: list[int]) -> None:
        """Rows change their slots."""
        self.put(to, *(kept[slots] for kept in self.kept))
