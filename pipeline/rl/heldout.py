"""Requests for held-out prompts: those of the final evaluation, and those during reinforcement learning."""

from __future__ import annotations

import time

from configs.schema import Decode, RunConfig
from latent_control.distributions import rollout_seed
from pipeline.rl.guards import check_hashes
from pipeline.rl.prompt_order import chunks
from pipeline.rl.published_policies import PublishedPolicies
from pipeline.rl.rollout_metrics import mean_reward
from pipeline.rl.rollout_pool import RolloutPool
from rollout_workers.rollouts import HostSpec, RolloutRequest


def heldout_requests(
    config: RunConfig,
    prompts: int,
    pieces: int,
    *,
    samples: int,
    temperature: float,
    decode: Decode = "code",
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
            top_k=config.rollout.top_k if decode == "code" else None,
            decode=decode,
            mixture_codes=config.decoding.mixture_codes,
        )
        for place, part in enumerate(chunks(range(prompts), pieces))
    ]


def play_heldout(config: RunConfig, pool: RolloutPool, published: PublishedPolicies) -> dict[str, float]:
    """Held-out prompts played with the policy as published, sampled and greedy (by code), beside training: this touches
    no random stream, no prompt, no replay buffer and no metric of training.

    Returns:
        ``heldout_success`` and ``heldout_reward`` (sampled), ``heldout_greedy`` (success), and what it took.
    """
    assert config.improve is not None
    started, prompts, tokens = time.perf_counter(), config.improve.evaluate_prompts, 0
    means: dict[str, tuple[float, float]] = {}
    for mode, temperature in (("sampled", config.rollout.temperature), ("greedy", 0.0)):
        # Requests of training have ids from 0 on.
        requests = heldout_requests(
            config, prompts, pool.most_workers(config), samples=1, temperature=temperature, first_id=-prompts
        )
        pool.submit(requests)
        batch = pool.take(request.request_id for request in requests)
        check_hashes(batch, published.hashes)
        summaries = [finished.summary for finished in batch]
        tokens += sum(summary.tokens for summary in summaries)
        means[mode] = (sum(success for s in summaries for success in s.successes) / prompts, mean_reward(summaries))
    (success, reward), (greedy, _) = means["sampled"], means["greedy"]
    return {
        "heldout_success": success,
        "heldout_reward": reward,
        "heldout_greedy": greedy,
        "heldout_tokens": float(tokens),
        "seconds_heldout": time.perf_counter() - started,
    }
