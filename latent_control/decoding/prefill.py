"""Prompts on their way into slots: the base and the policy over whole prompts, in passes over prompts of similar
length."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache

from latent_control.base_lm import BaseLM
from latent_control.decoder_stack import last_positions, position_ids
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.lean_blocks import lean_blocks
from latent_control.decoding.prefix_tree import (
    Prefix,
    PrefixTree,
    past_cache,
    row_layers,
    shareable,
    shared_beginnings,
)
from latent_control.records import Features

# Tokens of one prefill pass, padding included; padding may add this share to the real tokens, or anything to a small
# pass.
PREFILL_TOKENS, PREFILL_PADDING, SMALL_PASS = 16384, 0.25, 512
# Fewer known tokens than this are read again, unless they are the whole prompt: it costs less than to look them up.
SHARED_TOKENS = 16


def left_pad(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pad_token: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows with all padding moved to the left and common padding cut off."""
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    if bool((attention_mask.sum(1) == 0).any()):
        raise ValueError("a row of attention_mask is all zero: every prompt needs at least one token")
    order = attention_mask.bool().int().argsort(dim=1, stable=True)
    ids, mask = input_ids.gather(1, order), attention_mask.gather(1, order).long()
    width = int(mask.sum(1).max())
    return ids[:, -width:].masked_fill(mask[:, -width:] == 0, pad_token), mask[:, -width:]


@dataclass(kw_only=True)
class Prefilled:
    """Prompts after their base pass, waiting for slots."""

    base_cache: Cache
    stack_cache: Cache | None
    mask: torch.Tensor
    """[b, P]"""
    states: torch.Tensor
    """[b, P, D], what the policy reads; [b, 1, D], at the last position, where it reads no other"""
    final: torch.Tensor | None
    """[b, D], the base's final state at the last position"""
    logits: torch.Tensor
    """[b, actions], at the last position"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row on its way into a slot."""

    row: int
    prompts: Prefilled
    index: int


@dataclass(frozen=True, kw_only=True)
class Known:
    """A prompt and what is known of it."""

    tokens: tuple[int, ...]
    entries: list[int]
    """The prompts of the call that are this one."""
    prefix: Prefix

    @property
    def left(self) -> int:
        """Tokens that must pass through the base: the last one too, unless the final state after it is known."""
        whole = self.prefix.length == len(self.tokens) and self.prefix.end is not None
        return 0 if whole else max(1, len(self.tokens) - self.prefix.length)


class PromptQueue:
    """Prompts by number and the ``repeats`` rows of each, prefilled for at most ``slots`` rows at a time.

    Equal prompts share their pass; with a ``tree``, what earlier calls have read is not read again.
    """

    def __init__(
        self,
        base: BaseLM,
        actor: ActionDecoder,
        device: torch.device,
        *,
        repeats: int,
        slots: int,
        tree: PrefixTree | None = None,
    ) -> None:
        self.base, self.actor, self.device = base, actor, device
        self.repeats, self.slots = repeats, slots
        self.tree = tree if tree is not None and shareable(base.new_cache()) else None
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.unread: deque[int] = deque()  # prompts not prefilled yet
        self.entries: deque[Entry] = deque()
        self.lean_base = lean_blocks(base.decoder)
        self.lean_stack = None if actor.stack is None else lean_blocks(actor.stack.decoder)

    def __bool__(self) -> bool:
        """Whether rows are left to enter."""
        return bool(self.entries or self.unread)

    def pop(self) -> Entry:
        """The next row; its prompt is prefilled with others where it has not been."""
        if not self.entries:
            self._prefill()
        return self.entries.popleft()

    def add(self, prompt: int, tokens: tuple[int, ...]) -> None:
        """Take a prompt's token ids, without padding."""
        self.prompts[prompt] = tokens
        self.unread.append(prompt)

    def remove(self, prompt: int) -> None:
        """Forget a prompt, and its rows that have not entered."""
        del self.prompts[prompt]
        self.unread = deque(other for other in self.unread if other != prompt)
        self.entries = deque(entry for entry in self.entries if entry.row // self.repeats != prompt)

    def _prefill(self) -> None:
        """One slots-full of prompts through the base and the policy, in passes over prompts of which a similar number
        of tokens is left to read."""
        count = min(len(self.unread), max(1, self.slots // self.repeats))
        asked: dict[tuple[int, ...], list[int]] = {}
        for _ in range(count):
            prompt = self.unread.popleft()
            asked.setdefault(self.prompts[prompt], []).append(prompt)
        if self.tree is not None:
            for beginning in shared_beginnings(list(asked), SHARED_TOKENS):
                if self.tree.match(beginning).length < len(beginning):
                    self._read([self._known(beginning, [])])
        waiting = sorted(
            (self._known(tokens, prompts) for tokens, prompts in asked.items()),
            key=lambda known: (known.left, len(known.tokens)),
        )
        while waiting:
            taken, total, longest = 1, waiting[0].left, len(waiting[0].tokens)
            for known in waiting[1:]:
                total += known.left
                longest = max(longest, len(known.tokens))
                padded = (taken + 1) * known.left
                if (taken + 1) * longest > PREFILL_TOKENS or padded > max(SMALL_PASS, total * (1 + PREFILL_PADDING)):
                    break
                if known.left != waiting[0].left and (known.prefix.length or waiting[0].prefix.length):
                    break  # rows that go on from a prefix would read tokens of it again, not padding
                taken += 1
            done = self._read(waiting[:taken])
            self.entries.extend(
                Entry(row=prompt * self.repeats + place, prompts=done, index=index)
                for index, known in enumerate(waiting[:taken])
                for prompt in known.entries
                for place in range(self.repeats)
            )
            waiting = waiting[taken:]

    def _known(self, tokens: tuple[int, ...], prompts: list[int]) -> Known:
        prefix = Prefix(length=0, parts=()) if self.tree is None else self.tree.match(tokens)
        if prefix.length < min(SHARED_TOKENS, len(tokens)):
            prefix = Prefix(length=0, parts=())
        return Known(tokens=tokens, entries=prompts, prefix=prefix)

    def _read(self, rows: Sequence[Known]) -> Prefilled:
        """Rows as one pass over what is left of them: equally many tokens where any of them goes on from a prefix."""
        width, fed = max(len(row.tokens) for row in rows), max(row.left for row in rows)
        device = self.device
        lengths = [len(row.tokens) for row in rows]
        mask = (torch.arange(width, device=device) >= width - torch.tensor(lengths, device=device)[:, None]).long()
        known = [max(0, length - fed) for length in lengths]
        cache = past_cache(
            [row.prefix for row in rows], known, self.base.new_cache() if self.tree is None else DynamicCache()
        )
        past = [row.prefix.states(length) for row, length in zip(rows, known, strict=True)]
        if fed:
            ids = torch.tensor([self._last(row.tokens, fed) for row in rows], device=device)
            features = self.read_base(ids, mask, cache)
            if self.actor.stack is None:
                features = features.last()
            states = features.read(self.actor.reads)
            final = None if features.final is None else features.final[:, -1]
        else:
            ends = [row.prefix.end for row in rows]
            final, states = (torch.stack([end[part] for end in ends if end is not None]) for part in (0, 1))
            states = states[:, None]
        if self.actor.stack is not None:
            states = _with_past(past, states[:, states.shape[1] - fed :], width)
        self._keep(rows, cache, states, final, width, fed)
        stack_cache, logits = self.read_policy(states, mask)
        return Prefilled(
            base_cache=cache, stack_cache=stack_cache, mask=mask, states=states, final=final, logits=logits
        )

    def _last(self, tokens: tuple[int, ...], count: int) -> list[int]:
        """The last ``count`` tokens, left padded."""
        last = list(tokens[-count:])
        return [0] * (count - len(last)) + last

    def _keep(
        self,
        rows: Sequence[Known],
        cache: Cache,
        states: torch.Tensor,
        final: torch.Tensor | None,
        width: int,
        fed: int,
    ) -> None:
        """Put what was computed into the tree, and count it."""
        if self.tree is None:
            return
        whole = self.actor.stack is not None
        for number, row in enumerate(rows):
            new = min(fed, len(row.tokens))
            self.tree.computed += new
            self.tree.reused += len(row.tokens) - new
            if new:
                own = states[number, states.shape[1] - new :] if whole else None
                layers = row_layers(cache, number, width - new)
                end = None if final is None else (final[number], states[number, -1])
                self.tree.insert(row.tokens, layers, own, end)

    def read_base(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> Features:
        """The base over tokens [B, S], the last of rows [B, W] that ``mask`` shows; ``cache`` holds what lies before
        them. Its final state at the last position only, where nothing reads the others."""
        if self.lean_base is None:
            return self.base.features(ids, mask, cache, last_positions(mask, ids.shape[1]))
        x = self.base.decoder.get_input_embeddings()(ids)
        final, late = self.lean_base.prefill(
            x, mask, cache, self.base.late_blocks, last_only=self.actor.stack is None or self.actor.reads == "late"
        )
        return Features(final=final, late=late)

    def read_policy(self, states: torch.Tensor, mask: torch.Tensor) -> tuple[Cache | None, torch.Tensor]:
        """The policy over whole prompts: its cache and the logits at the last position."""
        if self.actor.stack is None:
            return None, self.actor.head(states[:, -1])
        cache = self.actor.stack.new_cache()
        if self.lean_stack is None:
            hidden: torch.Tensor | None = self.actor.stack.hidden(states, mask, cache, position_ids(mask))
        else:
            hidden, _ = self.lean_stack.prefill(
                states.to(self.actor.stack.head.weight.dtype), mask, cache, last_only=True
            )
        assert hidden is not None
        return cache, self.actor.head(hidden[:, -1])

    def refresh(self) -> None:
        """Read the prefilled prompts again with the policy as it is now."""
        for prompts in {id(entry.prompts): entry.prompts for entry in self.entries}.values():
            prompts.stack_cache, prompts.logits = self.read_policy(prompts.states, prompts.mask)


def _with_past(past: Sequence[torch.Tensor | None], states: torch.Tensor, width: int) -> torch.Tensor:
    """States [B, S, D] with those before them, [B, ``width``, D], left padded."""
    whole = states.new_zeros(len(states), width, states.shape[-1])
    whole[:, width - states.shape[1] :] = states
    for row, before in enumerate(past):
        if before is not None:
            end = width - states.shape[1]
            whole[row, end - len(before) : end] = before
    return whole
