"""Groups of equal rewards give way to fresh prompts, and prompts that taught nothing are asked less often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from rl_tools import Config

from learners.collate import Collate
from pipeline.rl.accounting import Records
from pipeline.rl.algorithm import LatentRL
from pipeline.rl.curriculum import LEAST, Curriculum
from pipeline.rl.ledger import Attempt, Ledger, Outcome, read
from pipeline.rl.request_stream import SyncStream, left_out
from pipeline.rl.rollout_metrics import tied_groups
from pipeline.rl.rollout_pool import FinishedRequest
from pipeline.stages.improve import update_metrics
from rollout_workers.rollouts import Rollout, RolloutRequest, RolloutSummary

pytest_plugins = ("rl_fixtures",)

NAN = float("nan")


def finished(*groups: list[float]) -> FinishedRequest:
    """A request whose groups have these rewards."""
    rewards, prompts = tuple(reward for group in groups for reward in group), tuple(range(len(groups)))
    request = RolloutRequest(
        request_id=0, split="train", prompt_indices=prompts, seeds=prompts, group_size=len(groups[0])
    )
    summary = RolloutSummary(
        request_id=0, worker=1, policies=(), rollouts=len(rewards), tokens=0, failures=0, rewards=rewards,
        successes=tuple(reward == 1.0 for reward in rewards), seconds=0.0,
    )  # fmt: skip
    return FinishedRequest(request=request, rollouts=None, summary=summary)  # type: ignore[arg-type]


MIXED, RIGHT, WRONG, HALF_JUDGED = [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [NAN, 1.0]


def test_the_last_sampled_of_the_groups_of_equal_rewards_are_left_out() -> None:
    first, second = finished(MIXED, RIGHT, HALF_JUDGED), finished(WRONG, MIXED)
    assert first.equal_rewards == [False, True, True] and second.equal_rewards == [True, False]
    found = left_out([first, second], 3)
    assert [one.left_out for one in found] == [{2}, {0}] and [one.trained for one in found] == [4, 2]
    assert tied_groups(found) == {"tied_groups": pytest.approx(1 / 3), "tied_groups_sampled": pytest.approx(3 / 5)}
    assert [one.left_out for one in left_out([first, second], 2)] == [{1, 2}, {0}]
    whole = left_out([first, second], 5)
    assert [one.left_out for one in whole] == [set(), set()] and tied_groups(whole) == {"tied_groups": 0.6}


# -- curriculum --------------------------------------------------------------------------------------------------------


def attempt(prompt: int, outcome: Outcome, equal: bool) -> Attempt:
    return Attempt(
        position=0, attempt=0, prompt_index=prompt, outcome=outcome, update=1, request=0, worker=1, equal_rewards=equal
    )


def share_asked(curriculum: Curriculum, prompt: int) -> float:
    return float(np.mean([curriculum.asks(position, prompt) for position in range(4000)]))


def test_a_prompt_is_asked_less_often_with_every_group_of_equal_rewards_in_a_row() -> None:
    curriculum = Curriculum(0.5, seed=3)
    assert share_asked(curriculum, 7) == 1.0
    for ties, probability in enumerate((0.5, 0.25, 0.125, 0.0625, LEAST, LEAST), start=1):
        curriculum.learn([attempt(7, "tied" if ties % 2 else "trained", True)])
        assert share_asked(curriculum, 7) == pytest.approx(probability, abs=0.025), ties
        assert share_asked(curriculum, 8) == 1.0
    curriculum.learn([attempt(7, "trained", False)])
    assert share_asked(curriculum, 7) == 1.0


def test_what_came_to_nothing_teaches_nothing_and_another_seed_draws_otherwise() -> None:
    one, other = Curriculum(0.5, seed=0), Curriculum(0.5, seed=1)
    for curriculum in (one, other):
        curriculum.learn([attempt(7, outcome, True) for outcome in ("lost", "stale", "passed")])
        assert share_asked(curriculum, 7) == 1.0
        curriculum.learn([attempt(7, "skipped", True)])
    draws = [[curriculum.asks(position, 7) for position in range(100)] for curriculum in (one, other, one)]
    assert draws[0] == draws[2] != draws[1]


# -- on Ray ------------------------------------------------------------------------------------------------------------

SETTINGS = {"group_size": 2, "dynamic_sampling": 5.0, "curriculum": 0.5, "max_logp_mismatch": 1.0}


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[list[Rollout]]:
    """What the learner was given, update by update."""
    given: list[list[Rollout]] = []
    original = Collate.__call__

    def spy(self: Collate, *, episodes: list[Rollout], **kwargs: Any) -> Any:
        given.append(list(episodes))
        return original(self, episodes=episodes, **kwargs)

    monkeypatch.setattr(Collate, "__call__", spy)
    return given


def few_prompts(algorithm: LatentRL, count: int) -> LatentRL:
    """The same algorithm on the first ``count`` prompts alone, so that they come again."""
    make = replace(algorithm.stream.make, prompt_count=count)
    algorithm.stream = SyncStream(make, algorithm.pool, algorithm.accounting)
    return algorithm


def groups(rollouts: list[Rollout]) -> list[list[float | None]]:
    return [[r.reward for r in rollouts[first : first + 2]] for first in range(0, len(rollouts), 2)]


def test_updates_hold_no_group_of_equal_rewards_and_ledger_and_resume_know_all(
    algorithm: Callable[..., LatentRL], config: Config, trained_on: list[list[Rollout]], tmp_path: Path
) -> None:
    """Ten prompts, two rollouts each, cold enough that many are alike."""
    settings = config(improve=SETTINGS, rollout={"temperature": 0.25, "num_workers": 1})
    built = few_prompts(algorithm(settings), 10)
    stored: list[str] = []
    built.accounting._store = lambda refs: stored.extend(r.rollout_id for ref in refs for r in ray.get(ref))  # type: ignore[method-assign]
    ledger = Ledger(tmp_path, "improve")
    ledger.begin(0)
    built.attach(Records(ledger=ledger))
    metrics = [update_metrics(built.train()) for _ in range(4)]
    built.flush()
    state = built.learner_state()
    later = [update_metrics(built.train()) for _ in range(3)]
    rest = list(ledger.pending)

    for given, found in zip(trained_on, [*metrics, *later], strict=True):
        assert len(given) == 8 and all(a != b for a, b in groups(given)), "four groups, each with two rewards"
        assert found["tied_groups"] == 0.0
        assert found["rollouts"] == 8 + 2 * found["extra_groups"], "metrics are of all that was sampled"
    assert sum(found["extra_groups"] for found in metrics) >= 4, "ties are common here"
    attempts = read(tmp_path, "improve").attempts
    outcomes = Counter(one.outcome for one in attempts)
    assert outcomes["trained"] == 16 and outcomes["tied"] == sum(found["extra_groups"] for found in metrics)
    assert outcomes["passed"] == sum(found["prompts_passed"] for found in metrics) > 0
    assert sorted(one.position for one in attempts) == list(range(len(attempts))), "every position has its outcome"
    assert {one.outcome for one in attempts if one.equal_rewards} == {"tied"}
    learned = [r.rollout_id for given in trained_on[:4] for r in given]
    assert [r for one in attempts if one.outcome == "trained" for r in one.rollouts] == learned
    played = [r for one in attempts for r in one.rollouts]
    assert stored[: len(played)] == played, "the buffer has what was left out, too"

    weights_hash = built.policy.weights_hash
    few_prompts(built, 10)
    built.restore_learner(state)
    built.attach(Records(ledger=Ledger(tmp_path, "other")), attempts)
    repeated = [update_metrics(built.train()) for _ in range(3)]
    for name in ("reward", "extra_groups", "prompts_passed", "tied_groups"):
        assert [found[name] for found in repeated] == [found[name] for found in later], name
    assert built.policy.weights_hash == weights_hash
    assert built.accounting.records.ledger.pending == rest  # type: ignore[union-attr]


def test_the_bound_is_kept_where_everything_is_alike(algorithm: Callable[..., LatentRL], config: Config) -> None:
    """Four prompts an update and half as many more; what is left over stays in the batch, and is called tied."""
    settings = config(improve={**SETTINGS, "dynamic_sampling": 0.5}, rollout={"temperature": 0.01, "num_workers": 1})
    built = algorithm(settings)
    found = [update_metrics(built.train()) for _ in range(2)]
    assert [one["extra_groups"] for one in found] == [2.0, 2.0] and all(one["rollouts"] == 12 for one in found)
    assert all(one["tied_groups"] > 0.5 for one in found)
