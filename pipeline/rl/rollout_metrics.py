"""The metrics of an update that come from its rollouts and from the workers that sampled them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence

import psutil
import torch

from configs.checks import GROUPED
from configs.schema import Improve
from latent_control.analysis.measures import usage_measures
from pipeline.rl.rollout_pool import FinishedRequest, RolloutPool
from rollout_workers.rollouts import RolloutSummary

TIED = 0.3
"""Share of groups without a difference from which a run warns."""


def rollout_metrics(batch: Sequence[FinishedRequest], *, version: int, num_actions: int) -> dict[str, float]:
    """Rewards, sizes, staleness and codes of the rollouts that update ``version`` trains on."""
    summaries = [finished.summary for finished in batch]
    rollouts, tokens = sum(s.rollouts for s in summaries), sum(s.tokens for s in summaries)
    ages = action_ages(batch, version)
    return {
        "reward": mean_reward(summaries),
        "success": sum(success for s in summaries for success in s.successes) / rollouts,
        **{f"reward/{name}": value for name, value in mean_parts(summaries).items()},
        **tied_groups(batch),
        "failures": sum(s.failures for s in summaries),
        "rollouts": rollouts,
        "tokens": tokens,
        "tokens_per_rollout": tokens / rollouts,
        "worker_seconds": sum(s.seconds for s in summaries),
        "worker_seconds_verifying": sum(s.verifying for s in summaries),
        "rollout_nodes": len({s.node for s in summaries}),
        "staleness_mean": sum(age * count for age, count in ages.items()) / ages.total(),
        "staleness_max": max(ages),
        **prefix_metrics(summaries),
        **code_measures(summaries, num_actions),
    }


def prefix_metrics(summaries: Sequence[RolloutSummary]) -> dict[str, float]:
    """Share of the prompt tokens that the workers' prefix caches held; nothing where there are none."""
    read, found = (sum(s.prompt_tokens[kind] for s in summaries) for kind in (0, 1))
    return {"prefix_cache_share": found / (read + found)} if read + found else {}


def worker_metrics(pool: RolloutPool) -> dict[str, float]:
    """Number, deaths and memory of the workers, memory of the driver."""
    return {
        "rollout_workers": len(pool.workers.actor_ids()),
        "worker_deaths": pool.watch.health.deaths,
        "worker_gib": max(pool.watch.health.memory.values(), default=0.0),
        "driver_gib": psutil.Process().memory_info().rss / 2**30,
    }


def mean_reward(summaries: Sequence[RolloutSummary]) -> float:
    """Mean over the rollouts that were judged."""
    rewards = [reward for s in summaries for reward in s.rewards if not math.isnan(reward)]
    return sum(rewards) / max(1, len(rewards))


def mean_parts(summaries: Sequence[RolloutSummary]) -> dict[str, float]:
    """Mean of each part of the score over the judged rollouts of several requests."""
    judged = [(s.rollouts - s.failures, s.part_means) for s in summaries if s.part_means]
    total = sum(count for count, _ in judged)
    return (
        {name: sum(count * means[name] for count, means in judged) / total for name in judged[0][1]} if judged else {}
    )


def tied_groups(batch: Sequence[FinishedRequest]) -> dict[str, float]:
    """Share of the groups trained on whose judged rewards are all equal (or fewer than two): group advantages are 0
    there; of all that were sampled, where some were left out. Nothing where groups are single rollouts."""
    batch = [finished for finished in batch if finished.request.group_size > 1]
    sampled = [tied for finished in batch for tied in finished.equal_rewards]
    left_out = sum(len(finished.left_out) for finished in batch)
    if not sampled:
        return {}
    trained = {"tied_groups": (sum(sampled) - left_out) / (len(sampled) - left_out)}
    return trained | ({"tied_groups_sampled": sum(sampled) / len(sampled)} if left_out else {})


def tied_warning(stage: str, improve: Improve, share: float | None) -> list[str]:
    """Says so where much of what stage ``stage`` sampled taught nothing, ``share`` of its groups over all updates, and
    what to do."""
    if share is None or share < TIED or improve.algorithm not in GROUPED:
        return []
    return [
        f"{stage}: in {share:.0%} of the groups all rewards were equal (tied_groups), so that these rollouts taught "
        "nothing; leave out prompts that are always or never solved, raise improve.group_size (now "
        f"{improve.group_size}) or rollout.temperature, or give parts of an answer a reward (reward.weights)"
    ]


def action_ages(batch: Sequence[FinishedRequest], version: int) -> Counter[int]:
    """How many actions were chosen by a policy this many updates older than ``version``."""
    ages: Counter[int] = Counter()
    for finished in batch:
        for chosen_by, _, count in finished.summary.policies:
            ages[version - chosen_by] += count
    return ages


def code_measures(summaries: Sequence[RolloutSummary], num_actions: int) -> dict[str, float]:
    """Health of the codebook by the codes of these rollouts: a policy that collapses is seen at once."""
    usage = torch.zeros(num_actions, dtype=torch.float64)
    for summary in summaries:
        for code, count in summary.code_counts.items():
            usage[code] += count
    return usage_measures(usage / usage.sum(), "rollouts") if usage.any() else {}


class IdleTime:
    """Measures from update to update how long learner and workers had nothing to do."""

    def __init__(self, pool: RolloutPool) -> None:
        self.pool, self._since = pool, time.perf_counter()

    def restart(self) -> None:
        """Count from now on."""
        self.pool.watch.busy_seconds()
        self._since = time.perf_counter()

    def shares(self, seconds_updating: float) -> dict[str, float]:
        """Shares of the time since the last call in which the learner had nothing to train on, and workers nothing to
        sample."""
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        busy, workers = self.pool.watch.busy_seconds(), len(self.pool.workers.actor_ids())
        return {
            "idle_learner": max(0.0, 1 - seconds_updating / elapsed),
            "idle_workers": max(0.0, 1 - busy / (elapsed * workers)),
        }
