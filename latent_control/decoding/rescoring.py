"""Log-probabilities of finished rows once more, by one pass over their tokens: what decoding stored must equal them.

Decoding keeps caches, moves rows between slots and changes policies under way; a pass over what was written does none
of that. Where both differ, a row holds tokens or states that are not its own, and must not be trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from latent_control.base_lm import BaseLM
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.distributions import action_log_probs
from latent_control.text import padded

MISMATCH = {torch.float32: 0.02, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Bound of the mean difference between stored and recomputed log-probabilities in nats, by the number type that
computes them. A faulty engine was at 0.09; what rounding alone gives is 1e-6, 0.02 and 0.003
(``benchmarks/rescoring.py``)."""


def mismatch_bound(*dtypes: torch.dtype) -> float:
    """The bound where base and policy compute in ``dtypes``: that of the coarsest; others count as float32."""
    return max(MISMATCH.get(dtype, MISMATCH[torch.float32]) for dtype in dtypes)


def choices(generated: np.ndarray | Sequence[bool], length: int, span: int) -> np.ndarray:
    """bool [T]: where actions were chosen that last for ``span`` tokens, again from the beginning of each response.

    ``generated`` bool [T] is False at observed tokens; empty: all were generated.
    """
    places, mask = np.arange(length), np.asarray(generated, bool) if len(generated) else np.ones(length, bool)
    before = np.maximum.accumulate(np.where(mask, -1, places))  # the last observed token
    return mask & ((places - before - 1) % span == 0)


@torch.no_grad()
def rescored_logp(
    base: BaseLM,
    actor: ActionDecoder,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    actions: Sequence[Sequence[int]],
    *,
    temperature: float,
    top_k: int | None,
    supports: Sequence[np.ndarray | None] | None = None,
) -> list[torch.Tensor]:
    """Per row, float32 [T]: log-probability of each action under ``actor`` as it is now, given the prompt and the
    tokens before it, over ``supports`` (each [T, k], as ``Generation.support``).

    Rows are padded to the longest one and go through the base in one pass. Places where no action was chosen (observed
    tokens, all but the first of a span) hold the log-probability that theirs would have had.
    """
    device, whole = base.lm.device, [[*prompt, *written[:-1]] for prompt, written in zip(prompts, tokens, strict=True)]
    ids, mask = padded(whole, device)
    hidden = base.features(ids, mask).read(actor.reads)
    if actor.stack is not None:
        hidden = actor.stack.hidden(hidden, mask)
    found = []
    for row, (prompt, chosen, among) in enumerate(
        zip(prompts, actions, supports or [None] * len(prompts), strict=True)
    ):
        logits = actor.head(hidden[row, len(prompt) - 1 : len(prompt) - 1 + len(chosen)])
        taken = torch.tensor(chosen, device=device)
        support = None if among is None else torch.from_numpy(among).long().to(device)
        log_probs = action_log_probs(logits, temperature=temperature, top_k=top_k, keep=taken, support=support)
        found.append(log_probs.gather(-1, taken[:, None])[:, 0])
    return found
