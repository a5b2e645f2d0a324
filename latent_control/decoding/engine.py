"""Continuous batching: finished rows leave their slots, waiting prompts enter them, and nobody waits for the slowest.

Per step: the base's blocks and the policy's on every live row, then one choice of codes and one emission of tokens for
live rows and entering ones together. The rollouts of a prompt share its prefill. A row draws from its own random
stream, so it is the same whoever its neighbours are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from transformers import Cache

from latent_control.aliases import chosen_event, event_log_prob, pack
from latent_control.base_lm import BaseLM
from latent_control.decoder_stack import DecoderStack
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.mixture import MixtureDecoder
from latent_control.decoding.prefill import PREFILL_TOKENS, Entry, Prefilled, PromptQueue, left_pad
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.sampling_params import SamplingParams, special_tokens
from latent_control.decoding.slot_memory import Buffer, SlotMemory, SpanMemory, slot_layers
from latent_control.distributions import action_log_probs, likeliest, sample_actions, uniform_streams
from latent_control.records import Generation, read_state

# Entering or squeezing copies caches, so it waits until this share of the slots is free.
ENTER_SHARE, SQUEEZE_SHARE = 1 / 16, 0.25


class Engine:
    """Decodes ``params.repeats`` rollouts of each prompt [B, P] on at most ``params.batch_size`` slots.

    ``refresh`` is asked before every step for the policy's version; when that has changed, the policy's caches are made
    again from the kept states, while the base's stay.
    """

    def __init__(
        self,
        base: BaseLM,
        actor: ActionDecoder,
        params: SamplingParams,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        refresh: Callable[[], int] | None = None,
        tree: PrefixTree | None = None,
    ) -> None:
        self.base, self.actor, self.params, self.refresh = base, actor, params, refresh
        rows, device = len(input_ids) * params.repeats, input_ids.device
        self.limits, self.lengths, self.stopped = params.limits(rows), [0] * rows, [False] * rows
        self.longest, self.slots = max(self.limits), min(params.batch_size or rows, rows)
        self.uniforms = uniform_streams(params.seeds(rows), self.longest).flatten().to(device)
        self.stop_tokens, self.pad_token = special_tokens(base.lm, params.stop_token)
        ids, mask = left_pad(input_ids, attention_mask, self.pad_token)
        self.prompts = PromptQueue(base, actor, ids, mask, repeats=params.repeats, slots=self.slots, tree=tree)
        self.lean_base, self.lean_stack = self.prompts.lean_base, self.prompts.lean_stack
        actor.require_members(params.members, len(input_ids))
        base.require_steady(max(self._filled(row) + 1 + limit for row, limit in enumerate(self.limits)))
        self.chosen: list[tuple[torch.Tensor, ...]] = []  # per step: cells, actions, tokens, logp, versions
        self.events: list[tuple[torch.Tensor, ...]] = []  # per step: cells, event_logp, packed events
        self.supports: list[tuple[torch.Tensor, ...]] = []  # per step: cells, the actions that could be sampled
        self.features: list[torch.Tensor | None] = [None] * rows
        self.version = refresh() if refresh else 0
        self.keeps_responses = params.keep_responses and self.prompts.tree is not None
        self.written: list[list[int]] = [[] for _ in range(rows if self.keeps_responses else 0)]
        self.keeps_states = params.return_features or bool((refresh or self.keeps_responses) and actor.stack)
        self.memory = SlotMemory(self.slots, 0)
        self.rows_in: list[int | None] = []  # per used slot, its row; None once that has finished
        self.position, self.next_tokens = (torch.zeros(self.slots, dtype=torch.long, device=device) for _ in range(2))
        self.held = SpanMemory(actor.span, self.slots, device)  # actions, versions
        self.mixture = MixtureDecoder(base, actor, params, self.slots) if params.decode == "token" else None
        self.base_cache: Cache | None = None
        self.stack_cache: Cache | None = None
        self.states: Buffer | None = None

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> Generation:
        """Decode until every row has finished."""
        while self._step():
            pass
        return _results(self)

    def _step(self) -> bool:
        """One token for every live row; False when there is none."""
        if self.refresh is not None and (version := self.refresh()) != self.version:
            self.version = version
            self._refresh_policy()
        entering = self._entering()
        live = [slot for slot, row in enumerate(self.rows_in) if row is not None]
        if not live and not entering:
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
            named = self.params.members is not None
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

    # -- one step ----------------------------------------------------------------------------------------------------

    def _filled(self, row: int) -> int:
        """Columns a row has filled: its prompt and every generated token but the last, which has not been fed."""
        return self.prompts.lengths[row // self.params.repeats] + self.lengths[row] - 1

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

    def _logits(self, rows: Sequence[int | None], hidden: torch.Tensor) -> torch.Tensor:
        """[b, actions] of live ``rows``; by each one's own policy, where rows name theirs."""
        named, each = self.params.members, self.params.repeats
        return self.actor.logits(hidden, named and [named[row // each] for row in rows if row is not None])

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

    def _choose(self, slots: list[int], final: torch.Tensor | None, logits: torch.Tensor) -> None:
        """An action and a token for the rows in ``slots``; rows that are done leave."""
        rows = [row for slot in slots if (row := self.rows_in[slot]) is not None]
        places = [self.lengths[row] for row in rows]
        at = [row * self.longest + place for row, place in zip(rows, places, strict=True)]
        cells = torch.tensor(at, device=logits.device)
        if self.params.guide is not None:
            logits = self.params.guide.apply(logits, rows, places)
        support = likeliest(logits, self.params.top_k)
        log_probs = action_log_probs(logits, temperature=self.params.code_temperature, support=support)
        if support is not None:
            self.supports.append((cells, support))
        uniforms, tokens = self.uniforms[cells], None
        if self.mixture is not None:
            actions, tokens = self.mixture.choose(slots, places, final, log_probs, uniforms)
        else:
            actions = logits.argmax(-1) if self.params.temperature == 0 else sample_actions(log_probs, uniforms)
        logp, versions = log_probs.gather(-1, actions[:, None])[:, 0], torch.full_like(cells, self.version)
        if self.actor.span > 1:  # inside a span no choice is made, so its log-probability is 0
            actions, versions = self.held.carry(slots, places, actions, versions)
            logp = logp.masked_fill(self.held.inside(places), 0.0)
        tokens = self.actor.emit(final, actions) if tokens is None else tokens
        self.chosen.append((cells, actions, tokens, logp, versions))
        if self.params.aliases:
            assert final is not None, "the world model reads the base's final state"
            event = chosen_event(self.actor.emit, final, log_probs, actions, tokens, self.params.aliases)
            self.events.append((cells, event_log_prob(log_probs, actions, event), pack(event)))
        if slots == list(range(len(slots))):  # rows that enter stand last, whatever their slot
            self.next_tokens[: len(slots)] = tokens
        else:
            self.next_tokens[slots] = tokens
        chosen, watch = tokens.tolist(), self.params.watch
        ended = watch(rows, chosen, actions.tolist()) if watch else [False] * len(rows)
        for slot, row, token, end in zip(slots, rows, chosen, ended, strict=True):
            self.lengths[row] += 1
            if self.keeps_responses:
                self.written[row].append(token)
            if end or token in self.stop_tokens:
                self.stopped[row] = True
            elif self.lengths[row] < self.limits[row]:
                continue
            self._leave(slot, row)

    def _leave(self, slot: int, row: int) -> None:
        if self.keeps_responses:
            _keep_response(self, slot, row)
        if self.params.return_features:
            assert self.states is not None
            kept = self.lengths[row] if self.actor.stack is None else self._filled(row)
            self.features[row] = self.states.data[slot, self.memory.end - kept : self.memory.end].clone()
        self.rows_in[slot] = None

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
            for held in (self.held, *([] if self.mixture is None else [self.mixture.held])):
                held.move(movers, gaps)
        for gap, mover in zip(gaps, movers, strict=True):
            self.rows_in[gap] = self.rows_in[mover]
        self.rows_in = self.rows_in[: len(live)]

    def _refresh_policy(self) -> None:
        """Make the policy's caches again from the states it read; the base's caches stay."""
        self.prompts.refresh()
        if self.actor.stack is None or not self.rows_in:
            return
        assert self.states is not None and self.stack_cache is not None
        rows, columns = len(self.rows_in), slice(self.memory.start, self.memory.end)
        at_once = max(1, PREFILL_TOKENS // (columns.stop - columns.start))
        for part in range(0, rows, at_once):
            slots = torch.arange(part, min(rows, part + at_once), device=self.position.device)
            states, mask = self.states.data[slots, columns], self.seen.data[slots, columns, 0].long()
            cache, _ = self.prompts.read_policy(states, mask)
            assert cache is not None
            self.memory.place_cache(self.stack_cache, cache, slots - part, slots)


def _keep_response(engine: Engine, slot: int, row: int) -> None:
    """Put what the row has read, its prompt and all but its last token, into the tree: a next turn follows it."""
    memory, prompts, states = engine.memory, engine.prompts, engine.states
    assert prompts.tree is not None and engine.base_cache is not None
    columns = slice(memory.end - engine._filled(row), memory.end)
    tokens = (*prompts.tokens(row // engine.params.repeats), *engine.written[row][:-1])
    read = None if states is None or engine.actor.stack is None else states.data[slot, columns]
    prompts.tree.insert(tokens, slot_layers(engine.base_cache, slot, columns), read, None)


def _results(engine: Engine) -> Generation:
    """What was chosen, gathered from the steps."""
    shape = len(engine.lengths), engine.longest
    actions, tokens, logp, versions = spread(engine.chosen, (-1, engine.pad_token, 0.0, -1), shape)
    event_logp, events = spread(engine.events, (0.0, 0), shape) if engine.events else (None, None)
    (support,) = spread(engine.supports, (0,), shape) if engine.supports else (None,)
    return Generation(
        event_logp=event_logp,
        events=events,
        support=support,
        tokens=tokens,
        actions=actions,
        action_logp=logp,
        versions=versions,
        lengths=torch.tensor(engine.lengths, device=engine.position.device),
        finish_reasons=tuple("stop" if stopped else "length" for stopped in engine.stopped),
        features=tuple(f for f in engine.features if f is not None) if engine.params.return_features else None,
    )


def spread(
    steps: Sequence[tuple[torch.Tensor, ...]], fills: Sequence[float], shape: tuple[int, int]
) -> Iterator[torch.Tensor]:
    """Columns [rows, longest, ...] with ``fills`` in them, from the cells and their values of each step."""
    cells, *columns = (torch.cat(parts) for parts in zip(*steps, strict=True))
    for column, fill in zip(columns, fills, strict=True):
        whole = column.new_full((shape[0] * shape[1], *column.shape[1:]), fill)
        yield whole.index_copy_(0, cells, column).view(*shape, *column.shape[1:])


def _last(states: torch.Tensor | None) -> torch.Tensor | None:
    """[B, D] at the last position of [B, T, D]."""
    return None if states is None else states[:, -1]
