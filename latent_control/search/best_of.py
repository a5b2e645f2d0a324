"""What a search has to be compared with: the best of as many whole responses as its tokens buy, and single
responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latent_control.distributions import rollout_seed
from latent_control.search.decoder import ChunkDecoder, Job
from latent_control.search.segments import Judge, SearchResponse, Segment, response_of


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best of a prompt's responses."""

    response: SearchResponse
    value: float
    """Of single responses, which nobody judges, NaN"""
    tokens: int
    """Tokens generated for this prompt, all rows together"""
    responses: int


@dataclass(kw_only=True)
class _Purse:
    """Responses to one prompt, paid for by tokens."""

    root: Segment
    seed: int
    budget: int
    drawn: int = 0
    spent: int = 0
    best: tuple[float, SearchResponse] | None = None

    def affordable(self, longest: int) -> int:
        """Responses that can be drawn without overdrawing by more than one: none once the budget is spent."""
        left = self.budget - self.spent
        return 0 if left <= 0 else max(1, left // longest)

    def job(self, longest: int) -> Job:
        """The next responses."""
        first, self.drawn = self.drawn, self.drawn + self.affordable(longest)
        return Job(
            path=[self.root],
            seeds=[rollout_seed(self.seed, draw, 3) for draw in range(first, self.drawn)],
            room=longest,
        )

    def take(self, response: SearchResponse, judge: Judge, number: int) -> None:
        """Pay for a response and keep it if it is better."""
        value = judge(number, response)
        self.spent += len(response.tokens)
        if self.best is None or value > self.best[0]:
            self.best = value, response


def best_of_tokens(
    decoder: ChunkDecoder,
    prompts: Sequence[Sequence[int]],
    judge: Judge,
    *,
    budgets: Sequence[int],
    max_new_tokens: int,
    seeds: Sequence[int],
) -> list[Best]:
    """The response with the highest value (the first of equals) among those drawn until a prompt's budget of tokens is
    spent.

    The response that reaches the budget is finished and counts: best-of-n gets at least the budget, and less than one
    response more.
    """
    roots = decoder.prefill(prompts)
    purses = [_Purse(root=r, seed=s, budget=b) for r, s, b in zip(roots, seeds, budgets, strict=True)]
    while buying := [(i, purse) for i, purse in enumerate(purses) if purse.affordable(max_new_tokens)]:
        found = decoder.extend([purse.job(max_new_tokens) for _, purse in buying], max_new_tokens, keep=False)
        for (number, purse), segments in zip(buying, found, strict=True):
            for segment in segments:
                purse.take(response_of([segment]), judge, number)
    return [_best(purse) for purse in purses]


def best_of_n(
    decoder: ChunkDecoder,
    prompts: Sequence[Sequence[int]],
    judge: Judge,
    *,
    n: int,
    max_new_tokens: int,
    seeds: Sequence[int],
) -> list[Best]:
    """The response with the highest value (the first of equals) of ``n``."""
    purses = [
        _Purse(root=root, seed=seed, budget=n * max_new_tokens)
        for root, seed in zip(decoder.prefill(prompts), seeds, strict=True)
    ]
    found = decoder.extend([purse.job(max_new_tokens) for purse in purses], max_new_tokens, keep=False)
    for number, (purse, segments) in enumerate(zip(purses, found, strict=True)):
        for segment in segments:
            purse.take(response_of([segment]), judge, number)
    return [_best(purse) for purse in purses]


def _best(purse: _Purse) -> Best:
    assert purse.best is not None, "a budget is at least one token"
    return Best(response=purse.best[1], value=purse.best[0], tokens=purse.spent, responses=purse.drawn)


def play_once(
    decoder: ChunkDecoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seeds: Sequence[int], greedy: bool
) -> list[Best]:
    """One response to each prompt."""
    jobs = [
        Job(path=[root], seeds=[seed], room=max_new_tokens)
        for root, seed in zip(decoder.prefill(prompts), seeds, strict=True)
    ]
    found = decoder.extend(jobs, max_new_tokens, keep=False, greedy=greedy)
    return [
        Best(response=response_of([one]), value=float("nan"), tokens=len(one.tokens), responses=1) for (one,) in found
    ]
