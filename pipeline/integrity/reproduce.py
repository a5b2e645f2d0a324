"""``latent-control reproduce RUN``: a stage of reinforcement learning once more, in the order that its ledger recorded,
hash by hash.

An asynchronous run depends on which worker answered when. The ledger has it: what each update took, in which order, and
with which policy it was sampled. Sampling that again, or reading it from the replay buffer, must give the very same
policies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from configs.loading import load_config
from configs.schema import Improve, RunConfig
from pipeline.cluster.connect import connected
from pipeline.replay.reader import ReplayReader
from pipeline.rl import ledger
from pipeline.rl.algorithm import LatentRL
from pipeline.rl.ledger import Attempt, Recorded
from pipeline.rl.published_policies import PublishedPolicies
from pipeline.rl.request_stream import RequestStream
from pipeline.rl.rollout_pool import FinishedRequest
from pipeline.runs import interrupts
from pipeline.runs.environment import calm_libraries
from pipeline.runs.layout import CONFIG, QUARANTINE, REPLAY
from pipeline.runs.stage_table import level_of
from pipeline.stages.improve import build, starting_point
from pipeline.stages.plan import sources_of
from rollout_workers.rollouts import Rollout, RolloutSummary


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """How a repetition went. ``Repeated(updates=200, different=None, ...)`` is bit for bit the run."""

    updates: int
    """That were repeated."""
    different: int | None
    """The first update after which the policy was another one; ``None``: none was."""


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """What an update took of one request."""

    positions: tuple[int, ...]
    version: int
    """Of the policy that sampled it."""
    rollouts: tuple[str, ...]


def repeat(run_dir: Path, stage: str, *, stored: bool, say: Callable[[str], None]) -> Repeated:
    """Repeat ``stage`` as far as its ledger goes, sampling again or (``stored``) from the replay buffer; writes nothing
    into the run.

    Raises:
        ValueError: the ledger is damaged or missing, or does not hold what a repetition needs.
    """
    calm_libraries()
    config = load_config(run_dir / CONFIG, check_paths=False)
    recorded = ledger.read(run_dir, stage)
    improve = config.improve
    problems = [*recorded.problems, *_obstacles(config, improve, recorded, stored)]
    if problems or improve is None:
        raise ValueError(f"{run_dir}: {stage} cannot be repeated: {'; '.join(problems) or 'it has no improve section'}")
    start = starting_point(config, improve, sources_of(config, run_dir)[stage], level_of(config, stage))
    with connected(config):
        torch.set_num_threads(config.cluster.learner_threads)
        algorithm = build(config, start)
        try:
            taken = _by_update(recorded)
            stream, published = algorithm.stream, algorithm.published
            algorithm.follow(
                _from_buffer(stream, published, taken, run_dir) if stored else _sampled_again(stream, taken)
            )
            return _compare(algorithm, recorded.policies, max(taken), say)
        finally:
            algorithm.stop()


def _obstacles(config: RunConfig, improve: Improve | None, recorded: Recorded, stored: bool) -> Iterator[str]:
    if not recorded.parts:
        yield "its ledger is empty (it is written with each checkpoint)"
    if improve is None:
        return
    if not stored and improve.refresh_in_flight:
        yield "improve.refresh_in_flight mixes policies within a rollout, which only --stored can repeat"
    if stored:
        if not config.replay.enabled:
            yield "--stored: replay.enabled is false, nothing was stored"
        if config.ships_features:
            yield (
                "--stored: base features are not stored, and improve.features is not recompute; repeat it without "
                "--stored"
            )
        if improve.equivalent_codes is not None or improve.algorithm == "remax":
            what = "improve.equivalent_codes and remax need numbers that are not stored"
            yield f"--stored: {what}; repeat it without --stored"


def _by_update(recorded: Recorded) -> dict[int, list[_Taken]]:
    """What each update took, in the order in which it took it."""
    rows: dict[int, dict[int, list[Attempt]]] = defaultdict(lambda: defaultdict(list))
    for attempt in recorded.attempts:
        if attempt.outcome in ledger.CONSUMED:
            rows[attempt.update][attempt.request].append(attempt)
    return {
        update: [
            _Taken(
                positions=tuple(row.position for row in of_request),
                version=of_request[0].oldest_version,
                rollouts=tuple(rollout for row in of_request for rollout in row.rollouts),
            )
            for of_request in requests.values()
        ]
        for update, requests in rows.items()
    }


def _sampled_again(stream: RequestStream, taken: Mapping[int, Sequence[_Taken]]) -> Iterator[list[FinishedRequest]]:
    """Each update's batch; all that a policy is to sample is asked for while it is the newest."""
    by_version: dict[int, list[_Taken]] = defaultdict(list)
    for update in sorted(taken):
        for one in taken[update]:
            by_version[one.version].append(one)
    for update in range(1, max(taken) + 1):
        stream.pool.submit([stream.request(one.positions) for one in by_version[update - 1]])
        yield stream.pool.take(one.positions[0] for one in taken[update])


def _stored(run_dir: Path) -> dict[str, dict[str, Any]]:
    return {
        row["rollout_id"]: row
        for folder in (REPLAY, QUARANTINE)
        if (run_dir / folder).is_dir()
        for row in ReplayReader(run_dir / folder, shuffle=False).rows()
    }


def _from_buffer(
    stream: RequestStream, published: PublishedPolicies, taken: Mapping[int, Sequence[_Taken]], run_dir: Path
) -> Iterator[list[FinishedRequest]]:
    """Each update's batch out of the replay buffer, or of the quarantine."""
    rows = _stored(run_dir)
    for update in range(1, max(taken) + 1):
        batch = []
        for one in taken[update]:
            missing = [rollout for rollout in one.rollouts if rollout not in rows]
            if missing:
                raise ValueError(
                    f"rollout {missing[0]} of update {update} is not in the replay buffer: see "
                    f"latent-control audit {run_dir}"
                )
            rollouts = [_rollout(rows[rollout]) for rollout in one.rollouts]
            asked = replace(published.current, version=one.version, weights_hash=published.hashes[one.version])
            request = replace(stream.request(one.positions), policy=asked)
            batch.append(FinishedRequest(request=request, rollouts=ray.put(rollouts), summary=_summary(one, rollouts)))
        yield batch


def _rollout(row: Mapping[str, Any]) -> Rollout:
    known = {name: row[name] for name in Rollout.__dataclass_fields__ if name in row}
    support = row["support"]  # stored flat; empty where all actions could be
    return Rollout(**known | {"support": support.reshape(len(row["actions"]), -1) if len(support) else support})


def _summary(one: _Taken, rollouts: Sequence[Rollout]) -> RolloutSummary:
    versions = {(r.policy_version, r.policy_hash) for r in rollouts}
    return RolloutSummary(
        request_id=one.positions[0],
        worker=0,
        policies=tuple((version, digest, 1) for version, digest in sorted(versions)),
        rollouts=len(rollouts),
        tokens=sum(r.new_tokens for r in rollouts),
        failures=sum(r.failure is not None for r in rollouts),
        rewards=tuple(float("nan") if r.reward is None else r.reward for r in rollouts),
        successes=tuple(r.success for r in rollouts),
        seconds=0.0,
        rollout_ids=one.rollouts,
    )


def _compare(
    algorithm: LatentRL,
    policies: Mapping[int, str],
    updates: int,
    say: Callable[[str], None],
) -> Repeated:
    if algorithm.policy.weights_hash != policies.get(0, algorithm.policy.weights_hash):
        raise ValueError("the stage's starting point is another one now: was an earlier stage run again?")
    for update in range(1, updates + 1):
        interrupts.check()
        algorithm.train()
        found = algorithm.policy.weights_hash
        if found != policies[update]:
            say(f"update {update}: the policy is {found[:12]}, recorded was {policies[update][:12]}")
            return Repeated(updates=update, different=update)
        if update % 10 == 0 or update == updates:
            say(f"update {update}/{updates}: policy {found[:12]}, as recorded")
    return Repeated(updates=updates, different=None)
