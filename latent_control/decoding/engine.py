"""Continuous batching: finished rows leave their slots, waiting prompts enter them, and nobody waits for the slowest.

Per step: the base's blocks and the policy's on every live row, then one choice of codes and one emission of tokens for
live rows and entering ones together. The rollouts of a prompt share its prefill. A row draws from its own random
stream, so it is the same whoever its neighbours are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from latent_control.aliases import chosen_event, event_log_prob, pack
from latent_control.base_lm import BaseLM
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.mixture import MixtureDecoder, pick_tokens
from latent_control.decoding.prefill import PREFILL_TOKENS, PromptQueue, left_pad
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.sampling_params import SamplingParams, special_tokens
from latent_control.decoding.slot_engine import SlotEngine
from latent_control.distributions import action_log_probs, likeliest, sample_actions, uniform_streams
from latent_control.records import Generation


class Engine(SlotEngine):
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
        self.params, self.refresh = params, refresh
        rows, device = len(input_ids) * params.repeats, input_ids.device
        slots = min(params.batch_size or rows, rows)
        self.limits, self.lengths, self.stopped = params.limits(rows), [0] * rows, [False] * rows
        self.longest = max(self.limits)
        self.uniforms = uniform_streams(params.seeds(rows), self.longest).flatten().to(device)
        self.stop_tokens, self.pad_token = special_tokens(base.lm, params.stop_token)
        ids, mask = left_pad(input_ids, attention_mask, self.pad_token)
        prompts = PromptQueue(base, actor, device, repeats=params.repeats, slots=slots, tree=tree)
        for number, (row, length) in enumerate(zip(ids.tolist(), mask.sum(1).tolist(), strict=True)):
            prompts.add(number, tuple(row[len(row) - length :]))
        self.keeps_responses = params.keep_responses and prompts.tree is not None
        keeps_states = params.return_features or bool((refresh or self.keeps_responses) and actor.stack)
        super().__init__(base, actor, prompts, slots, keeps_states=keeps_states)
        actor.require_members(params.members, len(input_ids))
        base.require_steady(max(self._filled(row) + 1 + limit for row, limit in enumerate(self.limits)))
        self.chosen: list[tuple[torch.Tensor, ...]] = []  # per step: cells, actions, tokens, logp, versions
        self.events: list[tuple[torch.Tensor, ...]] = []  # per step: cells, event_logp, packed events
        self.supports: list[tuple[torch.Tensor, ...]] = []  # per step: cells, the actions that could be sampled
        self.features: list[torch.Tensor | None] = [None] * rows
        self.version = refresh() if refresh else 0
        self.written: list[list[int]] = [[] for _ in range(rows if self.keeps_responses else 0)]
        if params.decode == "token":
            self.mixtures = (MixtureDecoder(base, actor, params.mixture_codes, slots),)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> Generation:
        """Decode until every row has finished."""
        while self._step():
            pass
        return _results(self)

    def _step(self) -> bool:
        """As always, by the policy's version of now."""
        if self.refresh is not None and (version := self.refresh()) != self.version:
            self.version = version
            self._refresh_policy()
        return super()._step()

    # -- the rows ----------------------------------------------------------------------------------------------------

    def _filled(self, row: int) -> int:
        return len(self.prompts.prompts[row // self.params.repeats]) + self.lengths[row] - 1

    def _named(self) -> bool:
        return self.params.members is not None

    def _logits(self, rows: Sequence[int | None], hidden: torch.Tensor) -> torch.Tensor:
        named, each = self.params.members, self.params.repeats
        return self.actor.logits(hidden, named and [named[row // each] for row in rows if row is not None])

    def _choose(self, slots: list[int], final: torch.Tensor | None, logits: torch.Tensor) -> None:
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
        if self.mixtures:
            pick = partial(pick_tokens, temperature=self.params.temperature, uniforms=uniforms)
            actions, tokens = self.mixtures[0].choose(slots, places, final, log_probs, pick)
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
            prompt = self.prompts.prompts[row // self.params.repeats]
            self._keep_response(slot, row, (*prompt, *self.written[row][:-1]))
        if self.params.return_features:
            assert self.states is not None
            kept = self.lengths[row] if self.actor.stack is None else self._filled(row)
            self.features[row] = self.states.data[slot, self.memory.end - kept : self.memory.end].clone()
        self.rows_in[slot] = None

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
