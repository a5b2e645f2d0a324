"""Which prompts are asked less often: those that were always right, or always wrong, when they were asked last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.rl.ledger import PLAYED, Attempt

LEAST = 0.05
"""Every prompt is asked with this probability at least: what was too hard may have become solvable."""


class Curriculum:
    """Decides at each position of the stream of prompts whether its prompt is asked, by the seed and by what the ledger
    has of that prompt: a resumed run learns it from there and decides alike.

    ``probability`` is that of a prompt whose last group had equal rewards; 1: every prompt is asked at its turn.
    """

    def __init__(self, probability: float, seed: int) -> None:
        self.probability, self.seed = probability, seed
        self.ties: Counter[int] = Counter()
        """By prompt: its last groups in a row whose rewards were all equal."""

    def learn(self, attempts: Sequence[Attempt]) -> None:
        """Take in attempts, oldest first; those that came to nothing do not count."""
        for attempt in attempts:
            if attempt.outcome in PLAYED and attempt.equal_rewards:
                self.ties[attempt.prompt_index] += 1
            elif attempt.outcome in PLAYED:
                self.ties.pop(attempt.prompt_index, None)

    def asks(self, position: int, prompt: int) -> bool:
        """Whether the prompt at ``position`` is asked."""
        if not self.ties[prompt]:
            return True
        probability = max(LEAST, self.probability ** self.ties[prompt])
        return bool(np.random.default_rng((self.seed, position)).random() < probability)
