"""What a rollout worker asks of the thing that decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from configs.schema import Decode
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.policies.bank import Blend
from latent_control.policies.latent import LatentPolicy
from latent_control.records import Generation
from rollout_workers.rollouts import Rollout


@dataclass(frozen=True, kw_only=True)
class DecodeJob:
    """One call's work: ``repeats`` rollouts of each prompt.

    ``DecodeJob(prompts=((5, 9, 2), (7, 1)), repeats=8, seeds=tuple(range(16)), max_new_tokens=48)``
    """

    prompts: tuple[tuple[int, ...], ...]
    """Token ids, no padding."""
    repeats: int
    seeds: tuple[int, ...]
    """One random stream per rollout, prompts outer: a rollout depends on its own stream, never on its company."""
    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int | None = None
    decode: Decode = "code"
    """"token": from the mixture over codes (engine ``local``)."""
    mixture_codes: int | None = None
    keep_features: bool = False
    """Also return the states the policy read, where the engine can (``ships_features``)."""
    aliases: int | None = None
    """Also find the codes, among this many most likely ones, that would have emitted the same token (engine
    ``local``)."""
    keep_responses: bool = False
    """A next turn will go on from the responses: keep what the base has computed of them, where the engine can."""
    members: tuple[Blend, ...] | None = None
    """Of each prompt, whose policy of the engine's bank chooses (engine ``local``); ``None``: the engine's own."""
    refresh: Callable[[], int] | None = None
    """Asked between decoding steps: may call the engine's ``use`` and returns the policy version from now on."""


class RolloutEngine(Protocol):
    """Decodes with the policy it was given last; ``rollout.engine`` of the config names which one."""

    level: str
    """"latent", "token" or "base"."""
    tokenizer: PreTrainedTokenizerBase
    world_hash: str
    """Of base LM, merge and codebook; "" at the levels without latent actions."""
    codebook_hash: str
    tree: PrefixTree | None
    """What is kept of prompts over calls; ``None``: nothing, or the engine itself keeps it."""
    ships_features: bool
    """Whether ``keep_features`` is possible; without it the learner recomputes them."""

    def use(self, policy: LatentPolicy) -> None:
        """Steer by ``policy`` as it is now; called again whenever its weights have changed."""
        ...

    def generate(self, job: DecodeJob) -> Generation:
        """Decode the job; rows are prompts outer, repeats inner.

        Where ``job.refresh`` changed the policy on the way, ``Generation.versions`` says which one chose each action.
        """
        ...

    def rescore(self, rollouts: Sequence[Rollout], *, temperature: float, top_k: int | None) -> list[np.ndarray] | None:
        """Per rollout, float32 [T]: log-probability of each action under the policy as it is now, by one pass over the
        whole row; NaN where no action was chosen. ``None``: this engine cannot say.
        """
        ...
