"""One step's codes and tokens for rows that each have their own way of decoding.

Axes: b rows of a step, N codes, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.mixture import NUMBERS_AT_ONCE, MixtureDecoder
from latent_control.decoding.sampling_params import Decode
from latent_control.decoding.slot_memory import SpanMemory
from latent_control.decoding.stream_rows import NewToken, StreamRow
from latent_control.decoding.token_choice import PLAIN
from latent_control.decoding.token_scores import ScoreRecorder, TokenScore
from latent_control.distributions import action_log_probs, sample_actions


@dataclass(frozen=True, kw_only=True)
class StepChoice:
    """What a step chose, a list entry for each row."""

    tokens: list[int]
    codes: list[int]
    code_logp: list[float]
    scores: list[TokenScore | None]
    codes_left: list[int | None]
    complete: list[bool]
    """Whether the row's grammar lets nothing follow."""

    def news(self, place: int, row: int, finish: str | None) -> NewToken:
        """What to tell of the row number ``row`` in ``place``."""
        return NewToken(
            row=row,
            token=self.tokens[place],
            code=self.codes[place],
            code_logp=self.code_logp[place],
            score=self.scores[place],
            codes_left=self.codes_left[place],
            finish=finish,
        )


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of a step that are decoded the same way."""

    rows: Sequence[StreamRow]
    slots: list[int]
    final: torch.Tensor
    """[b, D]"""
    logits: torch.Tensor
    """[b, N], -inf where a code may not be chosen"""
    uniforms: torch.Tensor
    """[b] float64"""
    allowed: dict[int, torch.Tensor]
    """By place among the rows: tokens [V] that its grammar allows"""

    @property
    def places(self) -> list[int]:
        """How many tokens each has."""
        return [len(row.tokens) for row in self.rows]

    def of(self, decode: Decode) -> tuple[list[int], _Rows]:
        """Places of the rows with this way of decoding, and those rows."""
        some = [place for place, row in enumerate(self.rows) if row.params.decode == decode]
        if len(some) == len(self.rows):
            return some, self
        return some, _Rows(
            rows=[self.rows[place] for place in some],
            slots=[self.slots[place] for place in some],
            final=self.final[some],
            logits=self.logits[some],
            uniforms=self.uniforms[some],
            allowed={number: self.allowed[place] for number, place in enumerate(some) if place in self.allowed},
        )

    def temperatures(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[b, 1] to divide logits by, and which rows [b] take the most likely."""
        given = torch.tensor([row.params.temperature for row in self.rows], device=self.logits.device)
        greedy = given == 0
        return given.masked_fill(greedy, 1.0)[:, None], greedy


class StreamChooser:
    """Chooses for an engine's rows; ``mixture`` is over the codes that decoding by token sums over, ``scorer`` over
    all."""

    def __init__(self, actor: ActionDecoder, mixture: MixtureDecoder, scorer: MixtureDecoder, held: SpanMemory) -> None:
        assert actor.world_logits is not None, "a server's rows have codes"
        self.actor, self.mixture, self.scorer, self.held = actor, mixture, scorer, held
        self.world_logits = actor.world_logits

    def choose(
        self, rows: Sequence[StreamRow], slots: list[int], final: torch.Tensor, logits: torch.Tensor
    ) -> StepChoice:
        """Codes and tokens for rows in ``slots`` with final states [b, D] and policy logits [b, N]."""
        uniforms = torch.tensor([row.draws.random() for row in rows], dtype=torch.float64, device=logits.device)
        masks = {place: row.params.grammar.allowed() for place, row in enumerate(rows) if row.params.grammar}
        step = _Rows(
            rows=rows, slots=slots, final=final, logits=steered(logits, rows), uniforms=uniforms, allowed=masks
        )
        codes, tokens = (logits.new_zeros(len(rows), dtype=torch.long) for _ in range(2))
        logp, left = torch.zeros(len(rows), device=logits.device), dict[int, int]()
        ways: dict[Decode, Callable[[_Rows], _Chosen]] = {"code": self._by_code, "token": self._by_token}
        for decode, choose in ways.items():
            where, some = step.of(decode)
            if where:
                codes[where], tokens[where], logp[where], counts = choose(some)
                left |= {where[place]: count for place, count in counts.items()}
        written, scores = tokens.tolist(), self._scores(step, tokens)
        return StepChoice(
            tokens=written,
            codes=codes.tolist(),
            code_logp=logp.tolist(),
            scores=[scores.get(place) for place in range(len(rows))],
            codes_left=[left.get(place) for place in range(len(rows))],
            complete=[
                row.params.grammar is not None and row.params.grammar.take(token)
                for row, token in zip(rows, written, strict=True)
            ],
        )

    def _by_code(self, some: _Rows) -> _Chosen:
        """The policy's code and the world model's most likely token."""
        logits, best, left = some.logits, dict[int, torch.Tensor](), dict[int, int]()
        if some.allowed:
            logits, best, left = self._bound(some)
        divisors, greedy = some.temperatures()
        log_probs = among_likeliest(logits.float() / divisors, [row.params.top_k for row in some.rows])
        codes = torch.where(greedy, logits.argmax(-1), sample_actions(log_probs, some.uniforms))
        codes, logp = self._spanned(some, codes, log_probs)
        tokens = self.actor.emit(some.final, codes)
        for place, of_codes in best.items():
            tokens[place] = of_codes[codes[place]]
        return codes, tokens, logp, left

    def _by_token(self, some: _Rows) -> _Chosen:
        """A token of the mixture, and the code most responsible for it."""
        policy, (divisors, greedy) = action_log_probs(some.logits), some.temperatures()

        def pick(mixed: torch.Tensor, at: slice) -> torch.Tensor:
            values, logs, rows = mixed.clone(), mixed.log(), some.rows[at]
            for place, row in enumerate(rows):
                allowed = some.allowed.get(at.start + place)
                if allowed is not None or row.params.choice is not PLAIN:
                    logs[place] = row.params.choice.shifted(logs[place], row.counts)
                    if allowed is not None:  # the grammar's tokens may all be too unlikely for float32
                        logs[place] = logs[place].clamp_min(-100.0).masked_fill(~allowed, float("-inf"))
                    values[place] = logs[place].softmax(-1)
            log_probs = (logs / divisors[at]).log_softmax(-1)
            for place, row in enumerate(rows):
                log_probs[place] = row.params.choice.cut(log_probs[place])
            return torch.where(greedy[at], values.argmax(-1), sample_actions(log_probs, some.uniforms[at]))

        codes, tokens = self.mixture.choose(some.slots, some.places, some.final, policy, pick)
        codes, logp = self._spanned(some, codes, policy)
        return codes, tokens, logp, {}

    def _spanned(self, some: _Rows, codes: torch.Tensor, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [b] and their log-probabilities [b]; inside a span its code, which is no choice."""
        logp = log_probs.gather(-1, codes[:, None])[:, 0]
        if self.held.span == 1:
            return codes, logp
        (codes,) = self.held.carry(some.slots, some.places, codes)
        return codes, logp.masked_fill(self.held.inside(some.places), 0.0)

    def _bound(self, some: _Rows) -> tuple[torch.Tensor, dict[int, torch.Tensor], dict[int, int]]:
        """Where grammars bind: logits without the codes whose own most likely token is not allowed (with all of them
        where none is), each code's most likely allowed token [N], and how many codes are left."""
        logits, best, left = some.logits.clone(), dict[int, torch.Tensor](), dict[int, int]()
        codes = torch.arange(logits.shape[1], device=logits.device)
        for place, allowed in some.allowed.items():
            own, best[place] = self._tokens_of(some.final[place], codes, allowed)
            may, fits = logits[place] > float("-inf"), own == best[place]
            kept = may & fits if bool((may & fits).any()) else may
            logits[place] = logits[place].masked_fill(~kept, float("-inf"))
            if some.places[place] % self.held.span == 0:
                left[place] = int(kept.sum())
        return logits, best, left

    def _tokens_of(
        self, final: torch.Tensor, codes: torch.Tensor, allowed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each code's most likely token [N] after a final state [D], and its most likely allowed one [N]."""
        own, best = [], []
        for part in codes.split(max(1, NUMBERS_AT_ONCE // self.scorer.vocabulary)):
            world = self.world_logits(final.expand(len(part), -1), part)
            own.append(world.argmax(-1))
            best.append(world.masked_fill(~allowed, float("-inf")).argmax(-1))
        return torch.cat(own), torch.cat(best)

    def _scores(self, step: _Rows, tokens: torch.Tensor) -> dict[int, TokenScore]:
        """By place, of the rows that ask for them."""
        where = [place for place, row in enumerate(step.rows) if row.params.top_scores is not None]
        if not where:
            return {}
        wanted = [step.rows[place].params.top_scores or 0 for place in where]
        recorder = ScoreRecorder(tokens[where], max(wanted))
        slots, places = ([listed[place] for place in where] for listed in (step.slots, step.places))
        self.scorer.choose(slots, places, step.final[where], action_log_probs(step.logits[where]), recorder)
        cut = [replace(score, top=score.top[:most]) for score, most in zip(recorder.scores, wanted, strict=True)]
        return dict(zip(where, cut, strict=True))


_Chosen: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[int, int]]
"""Codes [b], tokens [b], log-probabilities of the codes [b], and by place how many codes a grammar left."""


def steered(logits: torch.Tensor, rows: Sequence[StreamRow]) -> torch.Tensor:
    """Logits [b, N], -inf where a row may not choose a code."""
    if not any(row.steered for row in rows):
        return logits
    count = logits.shape[1]
    may = torch.stack([row.may(count) if row.steered else torch.ones(count, dtype=torch.bool) for row in rows])
    return logits.masked_fill(~may.to(logits.device), float("-inf"))


def among_likeliest(scaled: torch.Tensor, counts: Sequence[int | None]) -> torch.Tensor:
    """Log-probabilities [b, N] of logits [b, N], each row's over its ``counts`` likeliest codes (``None``: all)."""
    codes = scaled.shape[1]
    wanted = [codes if count is None else min(count, codes) for count in counts]
    if min(wanted) < codes:
        ranks = torch.arange(codes, device=scaled.device) < torch.tensor(wanted, device=scaled.device)[:, None]
        order = scaled.topk(codes, dim=-1).indices
        scaled = scaled.masked_fill(~torch.zeros_like(ranks).scatter_(1, order, ranks), float("-inf"))
    return scaled.log_softmax(-1)
