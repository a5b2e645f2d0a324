"""Continuous batching for a server: rows enter and leave between steps, each with settings of its own.

A row draws from its own random stream and has its own columns of the caches, so it is the same whoever its neighbours
are, and the same as by ``Engine``. Axes: b rows of a step, N codes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch

from latent_control.base_lm import BaseLM
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.mixture import MixtureDecoder
from latent_control.decoding.prefill import PromptQueue
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.sampling_params import MIXTURE_CODES
from latent_control.decoding.slot_engine import SlotEngine
from latent_control.decoding.slot_memory import SlotMemory
from latent_control.decoding.stream_choice import StreamChooser
from latent_control.decoding.stream_rows import NewToken, RowParams, StreamRow

PREFILLED, FIRST_ROOM = 32, 16
"""Prompts prefilled at once, and slots that have memory from the start."""


class StreamEngine(SlotEngine):
    """``number = engine.add(params)``, then ``engine.step()`` until a ``NewToken`` of that row says how it finished."""

    def __init__(
        self,
        base: BaseLM,
        actor: ActionDecoder,
        *,
        slots: int,
        ends: Sequence[int],
        tree: PrefixTree | None = None,
        mixture_codes: int | None = MIXTURE_CODES,
    ) -> None:
        prompts = PromptQueue(base, actor, base.lm.device, repeats=1, slots=min(slots, PREFILLED), tree=tree)
        keeps = prompts.tree is not None and actor.stack is not None
        super().__init__(base, actor, prompts, slots, keeps_states=keeps)
        self.memory = SlotMemory(slots, 0, room=FIRST_ROOM)
        mixture, scorer = (MixtureDecoder(base, actor, codes, slots) for codes in (mixture_codes, None))
        self.mixtures = (mixture, scorer)
        self.chooser = StreamChooser(actor, mixture, scorer, self.held)
        self.ends, self.rows, self.numbers = frozenset(ends), dict[int, StreamRow](), count()
        self.news: list[NewToken] = []

    # -- between steps -----------------------------------------------------------------------------------------------

    def add(self, params: RowParams) -> int:
        """Take a row, which enters when a slot is free; its number.

        Raises:
            ValueError: the row is longer than the base is steady for.
        """
        self.base.require_steady(len(params.prompt) + params.max_tokens)
        number = next(self.numbers)
        self.rows[number] = StreamRow(params=params)
        self.prompts.add(number, params.prompt)
        return number

    def remove(self, number: int) -> None:
        """Let a row leave, wherever it is; nothing happens where it has left."""
        if number not in self.rows:
            return
        if number in self.rows_in:
            slot, row = self.rows_in.index(number), self.rows[number]
            if self.prompts.tree is not None and row.tokens:
                self._keep_response(slot, number, (*row.params.prompt, *row.tokens[:-1]))
            self.rows_in[slot] = None
        self.prompts.remove(number)
        del self.rows[number]

    @torch.no_grad()
    def step(self) -> list[NewToken]:
        """One token for every row in a slot."""
        self.news = []
        self._step()
        return self.news

    @property
    def waiting(self) -> int:
        """Rows that have no slot yet."""
        return len(self.rows) - sum(number is not None for number in self.rows_in)

    # -- the rows ----------------------------------------------------------------------------------------------------

    def _filled(self, row: int) -> int:
        return len(self.rows[row].params.prompt) + len(self.rows[row].tokens) - 1

    def _named(self) -> bool:
        return self.actor.bank is not None

    def _logits(self, rows: Sequence[int | None], hidden: torch.Tensor) -> torch.Tensor:
        members = [self.rows[row].params.member for row in rows if row is not None] if self._named() else None
        return self.actor.logits(hidden, members)

    def _choose(self, slots: list[int], final: torch.Tensor | None, logits: torch.Tensor) -> None:
        assert final is not None, "the world model reads the base's final state"
        numbers = [number for slot in slots if (number := self.rows_in[slot]) is not None]
        rows = [self.rows[number] for number in numbers]
        chosen = self.chooser.choose(rows, slots, final, logits)
        self.next_tokens[slots] = torch.tensor(chosen.tokens, device=logits.device)
        for place, (number, row) in enumerate(zip(numbers, rows, strict=True)):
            row.push(chosen.tokens[place])
            finish = "length" if len(row.tokens) == row.params.max_tokens else None
            if chosen.tokens[place] in self.ends or chosen.complete[place]:
                finish = "stop"
            self.news.append(chosen.news(place, number, finish))
            if finish is not None:
                self.remove(number)
