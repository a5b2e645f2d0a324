"""Answers requests: the steered answer, what every code would have written at one of its tokens, and the base LM's own
answer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from latent_control.analysis.explain import tokens_of_all
from latent_control.analysis.trace import Traced, generate_traced
from latent_control.decoding.guide import make_guide
from latent_control.decoding.stop_strings import stop_watch
from latent_control.text import spoken_text
from pipeline.steering.loading import Loaded
from pipeline.steering.records import AnswerVerdict, Candidates, CodeCandidate, Mass, SteeringAnswer, Token
from pipeline.steering.request import SteeringRequest, decode_request
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.tasks import Prompt, Score

KEPT = 64
"""Answers remembered, each with the states of its tokens."""
LISTED_MASSES = 12
T = TypeVar("T")


class Memory:
    """The last ``KEPT`` results by key."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def get(self, key: str, make: Callable[[], T]) -> T:
        """What was made for ``key``, or what ``make`` makes of it now."""
        if key not in self._kept:
            self._kept[key] = make()
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        found: T = self._kept[key]
        return found


class Steerer:
    """Steers one loaded policy. One caller at a time is let in; the others wait."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._lock, self._memory = threading.Lock(), Memory()

    # -- the three questions -----------------------------------------------------------------------------------------

    def answer(self, request: SteeringRequest) -> SteeringAnswer:
        """The steered answer.

        Raises:
            RefusedRequest: the request cannot be served.
        """
        with self._lock:
            traced = self._traced(request)
            return self._told(request, traced)

    def candidates(self, request: SteeringRequest, place: int) -> Candidates:
        """What every code would have written at token ``place`` of a request's answer.

        Raises:
            RefusedRequest: the request cannot be served, its answer has no such token, or the token lies inside a span.
        """
        with self._lock:
            traced, span = self._traced(request), self.loaded.limits.span
            if place >= len(traced.tokens):
                raise RefusedRequest(
                    f"place is {place}: the answer has tokens 0 to {len(traced.tokens) - 1}", param="place"
                )
            if place % span:
                first = place - place % span
                raise RefusedRequest(
                    f"place is {place}, inside the span of the code chosen at token {first}: ask about that one",
                    param="place",
                )
            return self._candidates(request, traced, place)

    def base(self, request: SteeringRequest) -> SteeringAnswer:
        """The base LM's own answer to the prompt, with the same temperature, top-k, seed and length; no codes."""
        with self._lock:
            ask, _ = decode_request(request.free(), self.loaded.encode(request.prompt), self.loaded.limits)
            key = f"base {ask.prompt} {ask.max_tokens} {ask.temperature} {ask.top_k} {ask.seed}"

            def make() -> tuple[list[int], str]:
                model = self.loaded.model
                out = model.generate(
                    torch.tensor([ask.prompt], device=model.codebook.device),
                    max_new_tokens=ask.max_tokens,
                    temperature=ask.temperature,
                    top_k=ask.top_k,
                    row_seeds=[ask.seed],
                    level="base",
                    watch=stop_watch(self.loaded.tokenizer, self.loaded.rollout.stop),
                )
                return out.tokens[0, : int(out.lengths[0])].tolist(), out.finish_reasons[0]

            tokens, reason = self._memory.get(key, make)
            return SteeringAnswer(
                text=spoken_text(self.loaded.tokenizer, tokens, self.loaded.rollout.stop),
                tokens=tuple(Token(id=token, text=self.word(token)) for token in tokens),
                finish_reason=reason,
                verdict=self.verdict(self.loaded.prompt(request.prompt), tokens),
            )

    # -- their parts -------------------------------------------------------------------------------------------------

    def word(self, token: int) -> str:
        """The text of one token, special ones by name."""
        text: str = self.loaded.tokenizer.decode([token], skip_special_tokens=False)
        return text

    def verdict(self, prompt: Prompt | None, tokens: Sequence[int]) -> AnswerVerdict | None:
        """The verifier's word on an answer to one of the task's prompts; ``None`` for another prompt."""
        if prompt is None:
            return None
        score = self.loaded.score(prompt, tokens)
        if isinstance(score, Score):
            return AnswerVerdict(reward=float(score.reward), success=bool(score.success), problem="")
        return AnswerVerdict(reward=None, success=False, problem=score.message)

    def _traced(self, request: SteeringRequest) -> Traced:
        loaded = self.loaded
        ask, barred = decode_request(request, loaded.encode(request.prompt), loaded.limits)
        count, span = loaded.limits.num_actions, loaded.limits.span

        def make() -> Traced:
            return generate_traced(
                loaded.model,
                ask.prompt,
                guide=make_guide(
                    ask.codes,
                    ask.allowed,
                    rows=1,
                    num_actions=count,
                    span=span,
                    barred=barred,
                    device=loaded.model.codebook.device,
                ),
                max_new_tokens=ask.max_tokens,
                temperature=ask.temperature,
                top_k=ask.top_k,
                seed=ask.seed,
                watch=stop_watch(loaded.tokenizer, loaded.rollout.stop),
            )

        return self._memory.get(f"steered {request.key()}", make)

    def _chances(self, request: SteeringRequest, traced: Traced, place: int) -> list[float]:
        """The policy's own at ``place``: at the temperature asked for, of greedy answers at that of training."""
        asked = request if request.temperature else self.loaded.rollout
        chances: list[float] = traced.chances(place, temperature=asked.temperature, top_k=asked.top_k).tolist()
        return chances

    def _told(self, request: SteeringRequest, traced: Traced) -> SteeringAnswer:
        span, tokens = self.loaded.limits.span, []
        for place, (token, code) in enumerate(zip(traced.tokens, traced.codes, strict=True)):
            chance = None if place % span else self._chances(request, traced, place)[code]
            forced = place < len(request.codes) and request.codes[place] is not None
            tokens.append(Token(id=token, text=self.word(token), code=code, chance=chance, forced=forced))
        return SteeringAnswer(
            text=spoken_text(self.loaded.tokenizer, traced.tokens, self.loaded.rollout.stop),
            tokens=tuple(tokens),
            finish_reason=traced.finish_reason,
            verdict=self.verdict(self.loaded.prompt(request.prompt), traced.tokens),
        )

    def _candidates(self, request: SteeringRequest, traced: Traced, place: int) -> Candidates:
        found, certainty = tokens_of_all(self.loaded.model, traced.states[place])
        chances = self._chances(request, traced, place)
        # What may be chosen where nothing is forced: by the whole answer's rules and those of this place.
        ask, barred = decode_request(request.but(codes=[]), self.loaded.encode(request.prompt), self.loaded.limits)
        may = set(range(len(chances)) if ask.allowed is None else ask.allowed) - set(barred.get(place, ()))
        rows = [
            CodeCandidate(
                code=code, chance=chance, token=token, text=self.word(token), certainty=sure, allowed=code in may
            )
            for code, (chance, token, sure) in enumerate(zip(chances, found.tolist(), certainty.tolist(), strict=True))
        ]
        rows.sort(key=lambda row: (-row.chance, row.code))
        masses: dict[int, list[CodeCandidate]] = {}
        for row in rows:
            masses.setdefault(row.token, []).append(row)
        summed = [
            Mass(
                token=token,
                text=some[0].text,
                chance=sum(row.chance for row in some),
                codes=len(some),
                best=some[0].code,
            )
            for token, some in masses.items()
        ]
        summed.sort(key=lambda mass: -mass.chance)
        return Candidates(
            place=place, chosen=traced.codes[place], codes=tuple(rows), tokens=tuple(summed[:LISTED_MASSES])
        )
