"""What a model says about given text: next-token distributions of any level, their NLL and their KL to the base LM.

Axes: M response positions of a batch, m chosen ones, N codes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from latent_control.analysis.measures import POSITIONS, drawn
from latent_control.base_lm import BaseLM
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.losses import kl_divergence
from latent_control.model import LatentActionLM
from latent_control.records import TokenBatch

LogProbs = Callable[[torch.Tensor], torch.Tensor]
"""Chosen ones of a batch's response positions [m] -> log-probabilities of the next token [m, V]."""
Speaker = Callable[[TokenBatch], LogProbs]
"""A model that has read a batch answers for any of its response positions."""
# A latent speaker runs the head for every code: few positions at a time.
POSITIONS_AT_ONCE = 8


def latent_speaker(model: LatentActionLM) -> Speaker:
    """The marginal sum_a p(a) p_W(x|a) of a model with latent actions, at temperature 1.

    p(a) is the policy's, or, within a span, what the span's tokens so far make of it: proportional to pi(a) prod
    p_W(tokens|a).
    """

    def read(batch: TokenBatch) -> LogProbs:
        features, mask = model.features(batch.input_ids), batch.response_mask[:, 1:]
        final, policy = features.read("final")[:, :-1][mask], model.policy_logits(features)[:, :-1][mask]
        targets, first = batch.input_ids[:, 1:][mask], model.spans(mask).first
        start = torch.where(first, torch.arange(len(first), device=first.device), 0).cummax(0).values

        def world(rows: torch.Tensor) -> torch.Tensor:
            return torch.log_softmax(model.world_logits_of_all(final[rows]).float(), -1)  # [m, N, V]

        def answer(rows: torch.Tensor) -> torch.Tensor:
            belief = torch.log_softmax(policy[start[rows]].float(), -1)
            for back in range(1, model.config.span):
                inside = rows - back >= start[rows]
                told = world(rows[inside] - back).gather(
                    -1, targets[rows[inside] - back, None, None].expand(-1, belief.shape[1], 1)
                )
                belief[inside] += told[..., 0]
            return torch.logsumexp(torch.log_softmax(belief, -1)[..., None] + world(rows), 1)

        return answer

    return read


def token_speaker(base: BaseLM, actor: ActionDecoder) -> Speaker:
    """A model whose actions are tokens: the bare base LM, or a token-level policy on it."""

    def read(batch: TokenBatch) -> LogProbs:
        state = base.features(batch.input_ids).read(actor.reads)
        state = state if actor.stack is None else actor.stack.hidden(state)
        chosen = state[:, :-1][batch.response_mask[:, 1:]]
        return lambda rows: torch.log_softmax(actor.head(chosen[rows]).float(), -1)

    return read


@torch.no_grad()
def text_measures(
    speaker: Speaker, reference: Speaker, batches: Sequence[TokenBatch], *, positions: int = POSITIONS
) -> dict[str, float]:
    """At ``positions`` response positions drawn from ``batches``, at all where there are fewer (nats per token, the
    mean over positions).

    ``nll``: -log p(next token) of ``speaker``; ``nll_reference``: of ``reference``; ``kl``: KL(reference || speaker).
    """
    totals, count = torch.zeros(3, dtype=torch.float64), 0
    for batch, rows in drawn(batches, [int(batch.response_mask[:, 1:].sum()) for batch in batches], positions):
        answers = batch.input_ids[:, 1:][batch.response_mask[:, 1:]]
        said, wanted = speaker(batch), reference(batch)
        for few in rows.split(POSITIONS_AT_ONCE):
            ours, theirs = said(few), wanted(few)
            picked = answers[few, None]
            parts = (-ours.gather(-1, picked), -theirs.gather(-1, picked), kl_divergence(theirs, ours))
            totals += torch.stack([part.double().sum().cpu() for part in parts])
        count += len(rows)
    nll, reference_nll, kl = (totals / count).tolist()
    return {"nll": nll, "nll_reference": reference_nll, "kl": kl}
