"""What a worker writes down: the record of each rollout, a few of them scored again, the summary of a request."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import psutil
import ray

from latent_control.distributions import rollout_seed
from latent_control.text import whole_characters
from rollout_workers.engines import RolloutEngine
from rollout_workers.episode_player import PlayedEpisode
from rollout_workers.rollouts import Rollout, RolloutRequest, RolloutSummary
from rollout_workers.tasks import Failure, Score

RESCORED_SHARE = 1 / 32
"""Of the rollouts of a request, at least one: scored again when finished, so that a run sees an engine that mixes rows
up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Behaviour:
    """Who sampled and judged the rollouts of a request."""

    version: int
    """Of the policy in use when the request was finished."""
    hashes: Mapping[int, str]
    """Hash of the weights of every policy version that had a part."""
    reward_hash: str
    worker: int


def rollout_of(
    engine: RolloutEngine,
    request: RolloutRequest,
    played: PlayedEpisode,
    behaviour: Behaviour,
    number: int,
    seed: int,
    baseline: float | None,
) -> Rollout:
    """The record of the request's rollout ``number``."""
    row, verdict = played.row, played.verdict
    score = verdict if isinstance(verdict, Score) else None
    mixed = request.board is not None and row.versions[0] != row.versions[-1]
    version = int(row.versions[0]) if request.board is not None else behaviour.version
    # Seed, prompt and the policy asked for say which rollout this is: sampled again, however requests are cut, it
    # gets the same id.
    stream = request.seeds[number // request.group_size]
    asked = request.policy.weights_hash[:8] if request.policy else ""
    group = f"{request.split}-{stream}-{played.prompt.id}-{asked}"
    return Rollout(
        rollout_id=f"{group}-{number % request.group_size}",
        group_id=group,
        prompt_id=played.prompt.id,
        prompt_text=whole_characters(played.prompt.text),
        text=whole_characters(played.text),
        prompt_tokens=np.array(played.prompt_ids, np.int32),
        tokens=row.tokens,
        actions=row.actions,
        action_logp=row.action_logp,
        finish_reason=row.finish_reason,
        reward=score.reward if score else None,
        reward_parts=dict(score.parts) if score else {},
        success=score.success if score else False,
        failure=whole_characters(f"{verdict.kind}: {verdict.message}") if isinstance(verdict, Failure) else None,
        policy_version=version,
        policy_hash=behaviour.hashes[version],
        world_hash=engine.world_hash,
        codebook_hash=engine.codebook_hash,
        level=engine.level,
        seed=seed,
        worker=behaviour.worker,
        created=time.time(),
        reward_hash=behaviour.reward_hash,
        action_versions=row.versions if mixed else np.empty(0, np.int32),
        generated=row.generated,
        support=row.support,
        turn_rewards=played.turn_rewards,
        baseline=baseline,
        decode=request.decode,
        event_logp=row.event_logp,
        events=row.events,
        features=row.features,
    )


def rollouts_of(
    engine: RolloutEngine,
    request: RolloutRequest,
    played: Sequence[PlayedEpisode],
    behaviour: Behaviour,
    baselines: Sequence[float | None],
) -> list[Rollout]:
    """The records of a request's rollouts; ``baselines`` has one for each prompt."""
    seeds, each = row_seeds(request), request.group_size
    return [
        rollout_of(engine, request, one, behaviour, number, seeds[number], baselines[number // each])
        for number, one in enumerate(played)
    ]


def row_seeds(request: RolloutRequest) -> tuple[int, ...]:
    """The random stream of each rollout: of the seed and number of its prompt and of its place in the group."""
    streams = zip(request.seeds, request.prompt_indices, strict=True)
    return tuple(rollout_seed(seed, index, place) for seed, index in streams for place in range(request.group_size))


def rescored(engine: RolloutEngine, request: RolloutRequest, rollouts: list[Rollout], version: int) -> list[Rollout]:
    """The rollouts, a few of them with the log-probabilities that the policy in use, ``version``, gives to what was
    written.

    Only actions that this very version chose can be scored again; in rollouts that changed policies these are the last
    ones.
    """
    draw = np.random.default_rng([abs(request.request_id), version])
    numbers = sorted(draw.choice(len(rollouts), math.ceil(len(rollouts) * RESCORED_SHARE), replace=False).tolist())
    sample = [rollouts[number] for number in numbers]
    found = engine.rescore(sample, temperature=request.temperature, top_k=request.top_k)
    for number, rollout, logp in zip(numbers, sample, found or [], strict=bool(found)):
        mixed = rollout.action_versions
        versions = mixed if len(mixed) else np.full(len(rollout), rollout.policy_version)
        rollouts[number] = replace(rollout, rescored_logp=np.where(versions == version, logp, np.float32(np.nan)))
    return rollouts


def summary_of(
    request: RolloutRequest,
    rollouts: Sequence[Rollout],
    *,
    worker: int,
    hashes: Mapping[int, str],
    seconds: float,
    verifying: float = 0.0,
    prompt_tokens: tuple[int, int] = (0, 0),
) -> RolloutSummary:
    """What the driver sees of a finished request."""
    return RolloutSummary(
        request_id=request.request_id,
        worker=worker,
        policies=_policies(rollouts, hashes),
        rollouts=len(rollouts),
        tokens=sum(rollout.new_tokens for rollout in rollouts),
        failures=sum(r.failure is not None for r in rollouts),
        rewards=tuple(float("nan") if r.reward is None else r.reward for r in rollouts),
        successes=tuple(r.success for r in rollouts),
        seconds=seconds,
        verifying=verifying,
        part_means=_part_means(rollouts),
        node=ray.get_runtime_context().get_node_id() if ray.is_initialized() else "",
        rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
        failure_kinds=tuple(
            {r.failure.partition(":")[0]: r.failure for r in rollouts if r.failure is not None}.values()
        ),
        gib=psutil.Process().memory_info().rss / 2**30,
        prompt_tokens=prompt_tokens,
        code_counts=_code_counts(rollouts),
    )


def _policies(rollouts: Sequence[Rollout], hashes: Mapping[int, str]) -> tuple[tuple[int, str, int], ...]:
    """(version, hash, actions) of every policy that chose an action of these rollouts."""
    counts: Counter[int] = Counter()
    for rollout in rollouts:
        mixed = rollout.action_versions[rollout.mask].tolist() if len(rollout.action_versions) else []
        counts.update(mixed or [rollout.policy_version] * rollout.new_tokens)
    return tuple((version, hashes[version], counts[version]) for version in sorted(counts))


def _code_counts(rollouts: Sequence[Rollout]) -> dict[int, int]:
    """How often each code was chosen."""
    codes = [r.actions[r.mask] for r in rollouts if r.level == "latent"]
    return (
        dict(zip(*(x.tolist() for x in np.unique(np.concatenate(codes), return_counts=True)), strict=True))
        if codes
        else {}
    )


def _part_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of the rollouts that were judged; all of them have the same parts."""
    judged = [r.reward_parts for r in rollouts if r.failure is None]
    return {name: sum(parts[name] for parts in judged) / len(judged) for name in judged[0]} if judged else {}
