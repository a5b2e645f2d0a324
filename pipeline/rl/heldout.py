"""Requests for held-out prompts: those of the final evaluation, and of the plays during reinforcement learning."""

from __future__ import annotations

from configs.schema import RunConfig
from latent_control.distributions import rollout_seed
from pipeline.rl.prompt_order import chunks
from rollout_workers.rollouts import HostSpec, RolloutRequest


def heldout_requests(
    config: RunConfig,
    prompts: int,
    pieces: int,
    *,
    samples: int,
    temperature: float,
    host: HostSpec | None = None,
    first_id: int = 0,
) -> list[RolloutRequest]:
    """``samples`` rollouts of each of the first ``prompts`` held-out prompts, in at most ``pieces`` requests.

    Every caller draws from the same random streams, made of the run's seed alone, so that the same model gets the same
    result.
    """
    seed = rollout_seed(config.seed, 1) >> 1
    return [
        RolloutRequest(
            request_id=first_id + place,
            split="heldout",
            prompt_indices=part,
            seeds=(seed,) * len(part),
            group_size=samples,
            host=host,
            temperature=temperature,
            top_k=config.rollout.top_k,
        )
        for place, part in enumerate(chunks(range(prompts), pieces))
    ]
