"""Prompts on their way into slots: the base and the policy over whole prompts, in passes over prompts of similar
length."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from transformers import Cache

from latent_control.base_lm import BaseLM
from latent_control.decoder_stack import position_ids
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.lean_blocks import lean_blocks
from latent_control.records import Features

# Tokens of one prefill pass, padding included; padding may add this share to the real tokens, or anything to a small
# pass.
PREFILL_TOKENS, PREFILL_PADDING, SMALL_PASS = 16384, 0.25, 512


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


class PromptQueue:
    """Prompts [B, P] (left padded) and the ``repeats`` rows of each, prefilled for at most ``slots`` rows at a time."""

    def __init__(
        self, base: BaseLM, actor: ActionDecoder, ids: torch.Tensor, mask: torch.Tensor, *, repeats: int, slots: int
    ) -> None:
        self.base, self.actor, self.ids, self.mask = base, actor, ids, mask
        self.repeats, self.slots = repeats, slots
        self.lengths: list[int] = mask.sum(1).tolist()
        self.unread = deque(range(len(ids)))  # prompts not prefilled yet
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

    def _prefill(self) -> None:
        """One slots-full of prompts through the base and the policy, in passes over prompts of similar length."""
        count = min(len(self.unread), max(1, self.slots // self.repeats))
        prompts = sorted((self.unread.popleft() for _ in range(count)), key=lambda prompt: self.lengths[prompt])
        while prompts:
            taken = 1
            total = self.lengths[prompts[0]]
            for prompt in prompts[1:]:
                total += self.lengths[prompt]
                padded = (taken + 1) * self.lengths[prompt]
                if padded > PREFILL_TOKENS or padded > max(SMALL_PASS, total * (1 + PREFILL_PADDING)):
                    break
                taken += 1
            self._prefill_pass(prompts[:taken])
            prompts = prompts[taken:]

    def _prefill_pass(self, prompts: list[int]) -> None:
        width = self.lengths[prompts[-1]]
        ids, mask = self.ids[prompts, -width:], self.mask[prompts, -width:]
        features, cache = self.read_base(ids, mask)
        states = features.read(self.actor.reads)
        if self.actor.stack is None:
            states = states[:, -1:]
        final = None if features.final is None else features.final[:, -1]
        stack_cache, logits = self.read_policy(states, mask)
        done = Prefilled(
            base_cache=cache, stack_cache=stack_cache, mask=mask, states=states, final=final, logits=logits
        )
        self.entries.extend(
            Entry(row=prompt * self.repeats + place, prompts=done, index=index)
            for index, prompt in enumerate(prompts)
            for place in range(self.repeats)
        )

    def read_base(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[Features, Cache]:
        """The base over whole prompts; its final state at the last position only, where nothing reads the others."""
        cache = self.base.new_cache()
        if self.lean_base is None:
            return self.base.features(ids, mask, cache, position_ids(mask)), cache
        x = self.base.decoder.get_input_embeddings()(ids)
        final, late = self.lean_base.prefill(
            x, mask, cache, self.base.late_blocks, last_only=self.actor.stack is None or self.actor.reads == "late"
        )
        return Features(final=final, late=late), cache

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
