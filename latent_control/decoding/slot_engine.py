"""Rows in slots: the base's and the policy's caches of rows that enter, take a token at each step, and leave.

Which rows there are and how their tokens are chosen is the business of ``Engine``, which decodes a fixed batch, and of
``StreamEngine``, into which rows enter between steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby

import torch
from transformers import Cache

from latent_control.base_lm import BaseLM
from latent_control.decoder_stack import DecoderStack
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.lean_blocks import Place
from latent_control.decoding.mixture import MixtureDecoder
from latent_control.decoding.prefill import Entry, Prefilled, PromptQueue
from latent_control.decoding.slot_memory import Buffer, SlotMemory, SpanMemory, slot_layers
from latent_control.records import read_state

# Entering or squeezing copies caches, so it waits until this share of the slots is free.
ENTER_SHARE, SQUEEZE_SHARE = 1 / 16, 0.25


class SlotEngine(ABC):
    """Decodes the rows of ``prompts`` on at most ``slots`` slots."""

    seen: Buffer
    """[S, W, 1], True on each slot's own columns; made when the first rows enter."""
    place: Place
    """Where the rows of the step under way stand, for lean blocks."""

    def __init__(
        self, base: BaseLM, actor: ActionDecoder, prompts: PromptQueue, slots: int, *, keeps_states: bool
    ) -> None:
        self.base, self.actor, self.prompts, self.slots, self.keeps_states = base, actor, prompts, slots, keeps_states
        self.lean_base, self.lean_stack = prompts.lean_base, prompts.lean_stack
        self.memory = SlotMemory(slots, 0)
        self.rows_in: list[int | None] = []  # per used slot, its row; None once that has finished
        device = prompts.device
        self.position, self.next_tokens = (torch.zeros(slots, dtype=torch.long, device=device) for _ in range(2))
        self.held = SpanMemory(actor.span, slots, device)  # actions, versions
        self.mixtures: tuple[MixtureDecoder, ...] = ()
        self.base_cache: Cache | None = None
        self.stack_cache: Cache | None = None
        self.states: Buffer | None = None

    @abstractmethod
    def _filled(self, row: int) -> int:
        """Columns a row has filled: its prompt and every generated token but the last, which has not been fed."""

    @abstractmethod
    def _logits(self, rows: Sequence[int | None], hidden: torch.Tensor) -> torch.Tensor:
        """[b, actions] of live ``rows``, by each one's own policy."""

    @abstractmethod
    def _named(self) -> bool:
        """Whether rows name their policies."""

    @abstractmethod
    def _choose(self, slots: list[int], final: torch.Tensor | None, logits: torch.Tensor) -> None:
        """An action and a token for the rows in ``slots``; rows that are done leave."""

    # -- one step ----------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """One token for every live row; False when there is none."""
        entering = self._entering()
        live = [slot for slot, row in enumerate(self.rows_in) if row is not None]
        if not live:
            self.memory.start = self.memory.end  # nobody's columns
            if not entering:
                return False
        final, logits = self._advance(live) if live else (None, None)
        slots = live
        if entering:
            final, logits = self._enter(entering, final, logits)
            slots = live + [slot for slot, _ in entering]
        assert logits is not None
        self._choose(slots, final, logits)
        self._squeeze()
        return True

    def _entering(self) -> list[tuple[int, Entry]]:
        """(slot, entry) pairs for the free slots, once enough of them are free."""
        free = [slot for slot, row in enumerate(self.rows_in) if row is None]
        free += range(len(self.rows_in), self.slots)
        if len(free) < max(1, self.slots * ENTER_SHARE):
            return []
        return [(slot, self.prompts.pop()) for slot in free if self.prompts]

    def _enter(
        self, entering: list[tuple[int, Entry]], final: torch.Tensor | None, logits: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Copy prefilled rows into their slots; returns final states and logits of the live rows followed by theirs."""
        finals, all_logits = [] if final is None else [final], [] if logits is None else [logits]
        for _, group in groupby(entering, key=lambda pair: id(pair[1].prompts)):
            pairs = list(group)
            prompts = pairs[0][1].prompts
            slots = torch.tensor([slot for slot, _ in pairs], device=self.position.device)
            rows = torch.tensor([entry.index for _, entry in pairs], device=self.position.device)
            self._place(prompts, rows, slots)
            named = self._named()
            own = [entry.row for _, entry in pairs]
            all_logits.append(self._logits(own, prompts.states[rows, -1]) if named else prompts.logits[rows])
            if prompts.final is not None:
                finals.append(prompts.final[rows])
        for slot, entry in entering:
            self.rows_in[slot:] = [entry.row, *self.rows_in[slot + 1 :]]
        return (torch.cat(finals) if finals else None), torch.cat(all_logits)

    def _place(self, prompts: Prefilled, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Caches, states and mask of prefilled ``rows`` into ``slots``."""
        memory, mask = self.memory, prompts.mask[..., None].bool()
        memory.require_rows(int(slots.max()) + 1)
        memory.reserve(before=prompts.mask.shape[1], after=0)
        if self.base_cache is None:
            self.base_cache = memory.cache_like(prompts.base_cache)
            self.stack_cache = None if prompts.stack_cache is None else memory.cache_like(prompts.stack_cache)
            self.states = memory.buffer_like(prompts.states) if self.keeps_states else None
            self.seen = memory.buffer_like(mask)
        memory.place_cache(self.base_cache, prompts.base_cache, rows, slots)
        if self.stack_cache is not None and prompts.stack_cache is not None:
            memory.place_cache(self.stack_cache, prompts.stack_cache, rows, slots)
        if self.states is not None:
            memory.place(self.states, prompts.states[rows], slots)
        self.seen.data[slots] = False
        memory.place(self.seen, mask[rows], slots)
        self.position[slots] = prompts.mask.sum(1)[rows]
        memory.rows = max(memory.rows, int(slots.max()) + 1)
        memory.start = min(memory.start, memory.end - prompts.mask.shape[1])

    def _advance(self, live: list[int]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Feed each live row its last token; final states [b, D] and policy logits [b, actions] of the live rows."""
        memory, rows = self.memory, len(self.rows_in)
        memory.rows = rows
        # Columns that only rows since finished had filled need not be kept; some bases have masks of a fixed width.
        if memory.end == memory.capacity or memory.end - memory.start >= self.base.positions:
            memory.start = memory.end - max(self._filled(row) for row in self.rows_in if row is not None)
            memory.reserve(before=0, after=1)
        self.seen.data[:rows, memory.end] = True
        final, late = self._base_step()
        state = read_state(self.actor.reads, final, late)
        assert state is not None, f"the base supplies no {self.actor.reads!r} state"
        if self.states is not None:
            self.states.data[:rows, memory.end] = state
        hidden = state if self.actor.stack is None else self._stack_step(self.actor.stack, state)
        self.position[live] += 1  # not of finished rows, which may stand at the last position there is
        memory.end += 1
        if len(live) < rows:
            final, hidden = None if final is None else final[live], hidden[live]
        return final, self._logits([self.rows_in[slot] for slot in live], hidden)

    def _base_step(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        rows = self.memory.rows
        tokens, positions = self.next_tokens[:rows], self.position[:rows]
        assert self.base_cache is not None
        if self.lean_base is not None:
            x = self.base.decoder.get_input_embeddings()(tokens)
            self.place = self.lean_base.place(positions, self._seen(), x)
            return self.lean_base.step(x, self.place, self.base_cache, self.base.late_blocks)
        features = self.base.features(tokens[:, None], self._seen().long(), self.base_cache, positions[:, None])
        return _last(features.final), _last(features.late)

    def _stack_step(self, stack: DecoderStack, state: torch.Tensor) -> torch.Tensor:
        assert self.stack_cache is not None
        if self.lean_base is not None and self.lean_stack is not None:  # one architecture: the place is the same
            hidden, _ = self.lean_stack.step(state.to(stack.head.weight.dtype), self.place, self.stack_cache)
            assert hidden is not None
            return hidden
        positions = self.position[: self.memory.rows, None]
        return stack.hidden(state[:, None], self._seen().long(), self.stack_cache, positions)[:, -1]

    def _seen(self) -> torch.Tensor:
        """[rows, W + 1], True on the row's own columns, the new one included."""
        return self.seen.data[: self.memory.rows, self.memory.start : self.memory.end + 1, 0]

    def _squeeze(self) -> None:
        """When nobody is left to enter, close the gaps that finished rows leave."""
        live = [slot for slot, row in enumerate(self.rows_in) if row is not None]
        if self.prompts or not live or len(live) > len(self.rows_in) * (1 - SQUEEZE_SHARE):
            return
        gaps = [slot for slot in range(len(live)) if self.rows_in[slot] is None]
        movers = live[len(live) - len(gaps) :]
        if gaps:
            self.memory.move(movers, gaps)
            for vector in (self.position, self.next_tokens):
                vector[gaps] = vector[movers]
            for held in (self.held, *(mixture.held for mixture in self.mixtures)):
                held.move(movers, gaps)
        for gap, mover in zip(gaps, movers, strict=True):
            self.rows_in[gap] = self.rows_in[mover]
        self.rows_in = self.rows_in[: len(live)]

    def _keep_response(self, slot: int, row: int, tokens: tuple[int, ...]) -> None:
        """Put what the row has read, its prompt and all but its last token, into the tree: a next turn follows it."""
        tree, columns = self.prompts.tree, slice(self.memory.end - self._filled(row), self.memory.end)
        assert tree is not None and self.base_cache is not None
        read = None if self.states is None or self.actor.stack is None else self.states.data[slot, columns]
        tree.insert(tokens, slot_layers(self.base_cache, slot, columns), read, None)


def _last(states: torch.Tensor | None) -> torch.Tensor | None:
    """[B, D] at the last position of [B, T, D]."""
    return None if states is None else states[:, -1]
