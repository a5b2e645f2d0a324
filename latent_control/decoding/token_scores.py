"""Log-probabilities of tokens under the mixture over all codes, log sum_a pi(a) p(x | a): what the policy defines as a
language model, whatever a row's way of decoding, temperature and grammar.

Axes: b rows of a step, T tokens, N codes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from latent_control.base_lm import BaseLM
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.mixture import NUMBERS_AT_ONCE, MixtureDecoder
from latent_control.distributions import action_log_probs
from latent_control.policies.bank import Blend


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """``TokenScore(logp=-0.1, top=((7, -0.1), (9, -2.4)))``: of a token, and of the likeliest ones."""

    logp: float
    top: tuple[tuple[int, float], ...]


class ScoreRecorder:
    """A ``Pick`` that takes the tokens [b] it is given, and keeps their scores with the ``most`` likeliest tokens."""

    def __init__(self, tokens: torch.Tensor, most: int) -> None:
        self.tokens, self.most = tokens, most
        self.scores: list[TokenScore] = []

    def __call__(self, mixed: torch.Tensor, at: slice) -> torch.Tensor:
        tokens, logs = self.tokens[at], mixed.log()
        own = logs.gather(1, tokens[:, None])[:, 0].tolist()
        values, likeliest = logs.topk(min(self.most, logs.shape[1]), dim=-1)
        for logp, best, best_logps in zip(own, likeliest.tolist(), values.tolist(), strict=True):
            self.scores.append(TokenScore(logp=logp, top=tuple(zip(best, best_logps, strict=True))))
        return tokens


@torch.no_grad()
def prompt_scores(
    base: BaseLM,
    actor: ActionDecoder,
    prompt: Sequence[int],
    *,
    most: int,
    member: Blend | None = None,
    allowed: Sequence[int] | None = None,
) -> Iterator[list[TokenScore]]:
    """Scores of a prompt's tokens but its first, a few at a time: a server does something else meanwhile.

    Where a code lasts for several tokens, spans are laid from the second token on.

    Args:
        most: how many likeliest tokens each score has.
        member: of a bank, whose policy chooses.
        allowed: codes that may be chosen; ``None``: all.
    """
    ids = torch.tensor([prompt], device=base.lm.device)
    features, mask = base.features(ids[:, :-1]), torch.ones_like(ids[:, :-1])
    hidden = features.read(actor.reads)
    hidden = (hidden if actor.stack is None else actor.stack.hidden(hidden, mask))[0]
    logits = actor.logits(hidden, None if actor.bank is None or member is None else [member] * len(hidden))
    if allowed is not None:
        barred = torch.ones(logits.shape[-1], dtype=torch.bool, device=ids.device)
        barred[list(allowed)] = False
        logits = logits.masked_fill(barred, float("-inf"))
    log_probs, final = action_log_probs(logits), features.read("final")[0]
    mixture = MixtureDecoder(base, actor, None, slots=1)
    # Inside a span the codes' probabilities follow from the tokens before: one place after the other, in one slot.
    at_once = 1 if actor.span > 1 else max(1, NUMBERS_AT_ONCE // (logits.shape[-1] * mixture.vocabulary))
    for start in range(0, len(final), at_once):
        part = slice(start, start + at_once)
        recorder = ScoreRecorder(ids[0, 1:][part], most)
        rows = len(recorder.tokens)
        mixture.choose([0] * rows, [*range(start, start + rows)], final[part], log_probs[part], recorder)
        yield recorder.scores
