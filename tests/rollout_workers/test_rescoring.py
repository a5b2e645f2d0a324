"""A run checks itself: log-probabilities found again in what was written, by the worker, and what the learner makes of
a difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from engine_cases import POLICIES, Subjects, random_case, run
from rl_tools import Config, make_learner, make_runner, mix_up, sample, update, with_rewards

from latent_control.decoding.engine import Engine
from latent_control.decoding.rescoring import choices, mismatch_bound, rescored_logp
from latent_control.pretrained import array_hash
from pipeline.rl.algorithm import LatentRL
from pipeline.stages.improve import update_metrics
from rollout_workers.rollout_record import rescored
from rollout_workers.rollouts import HostSpec, PolicyVersion, Rollout, RolloutRequest

pytest_plugins = ("rl_fixtures",)

REWARDS = (1.0, 0.0, 0.5, 0.25) * 4


# -- the pass itself ---------------------------------------------------------------------------------------------------


def test_a_pass_over_finished_rows_finds_what_decoding_stored() -> None:
    """Any base, any policy, any span, temperature and top k; rows of different lengths in one pass."""
    subjects, levels = Subjects(), set()
    plain = [
        c
        for c in map(random_case, range(3_000, 3_400))
        if c.temperature and c.decode == "code" and not (c.codes or c.allowed or c.barred or c.changes)
    ]
    for case in plain[:60]:
        subject = subjects(case)
        levels.add(case.policy)
        out, lengths = run(case, subject), run(case, subject).lengths.tolist()
        rows = range(len(lengths))
        found = rescored_logp(
            subject.base,
            subject.actor,
            [case.prompts[row // case.repeats] for row in rows],
            [out.tokens[row, : lengths[row]].tolist() for row in rows],
            [out.actions[row, : lengths[row]].tolist() for row in rows],
            temperature=case.temperature,
            top_k=case.top_k,
        )
        for row, logp in enumerate(found):
            chosen = torch.from_numpy(choices(np.empty(0, bool), lengths[row], subject.actor.span))
            torch.testing.assert_close(logp[chosen], out.action_logp[row, : lengths[row]][chosen], rtol=0, atol=1e-4)
    assert levels == set(POLICIES)


def test_the_coarsest_number_type_sets_the_bound() -> None:
    assert mismatch_bound(torch.float32, torch.float32) == mismatch_bound(torch.float64) == 0.02
    assert mismatch_bound(torch.float32, torch.bfloat16) == mismatch_bound(torch.bfloat16) == 0.05


# -- the worker --------------------------------------------------------------------------------------------------------


def asked(**changes: Any) -> RolloutRequest:
    first = RolloutRequest(request_id=3, split="train", prompt_indices=(0, 1, 2, 3, 4), seeds=(3,) * 5, group_size=8)
    return replace(first, **changes)


@pytest.mark.parametrize("level", ["latent", "token"])
def test_a_worker_scores_some_rollouts_again(config: Config, tiny_checkpoint: Path, level: str) -> None:
    settings = config(rollout={"num_workers": 1, "batch_size": 3, "temperature": 1.3, "top_k": 5})
    runner = make_runner(settings, tiny_checkpoint, level)
    policy = own_policy(runner)
    rollouts, _ = runner.sample_request(asked(policy=policy, temperature=1.3, top_k=5, ship_features=True))
    scored = [r for r in rollouts if r.rescored_logp is not None]
    assert len(rollouts) == 40 and len(scored) == 2
    for r in scored:
        np.testing.assert_allclose(r.rescored_logp, r.action_logp, rtol=0, atol=1e-5)
    again, _ = runner.sample_request(asked(policy=policy, temperature=1.3, top_k=5, ship_features=True))
    assert [r.rescored_logp is None for r in again] == [r.rescored_logp is None for r in rollouts], (
        "which ones depends on the request"
    )
    greedy, _ = runner.sample_request(asked(policy=policy, temperature=0.0))
    assert all(r.rescored_logp is None for r in greedy)


def test_every_row_of_the_base_lm_too(config: Config, tiny_checkpoint: Path) -> None:
    """As ``latent-control sample`` decodes: more rows than slots, lengths that differ."""
    runner = make_runner(config(rollout={"num_workers": 1, "batch_size": 3, "max_new_tokens": 12}), tiny_checkpoint)
    host = HostSpec(level="base", checkpoint=str(tiny_checkpoint.parent / "base"))
    rollouts = runner.sample(
        request=asked(host=host, temperature=2.0, prompt_indices=tuple(range(20)), seeds=(3,) * 20)
    )
    assert len({len(r) for r in rollouts}) >= 3
    for r, logp in zip(rollouts, runner.engine.rescore(rollouts, temperature=2.0, top_k=None), strict=True):
        np.testing.assert_allclose(logp, r.action_logp, rtol=0, atol=1e-4)


def own_policy(runner: Any) -> PolicyVersion:
    """The worker's weights as a version that requests can name."""
    weights = {name: np.array(w) for name, w in runner.module.get_state().items()}
    return PolicyVersion(version=0, weights_hash=array_hash(weights), weights=weights)


def test_only_what_the_policy_in_use_chose_is_scored_again(config: Config, tiny_checkpoint: Path) -> None:
    runner = make_runner(config(), tiny_checkpoint)
    policy = own_policy(runner)
    request = asked(policy=policy)
    rollouts = runner.sample(request=request)
    mixed = [
        replace(r, action_versions=np.array([-1] * (len(r) - 2) + [0] * 2, np.int32), policy_version=-1)
        for r in rollouts
    ]
    scored = [r for r in rescored(runner.engine, request, mixed, 0) if r.rescored_logp is not None]
    assert len(scored) == 2
    for r in scored:
        assert np.isnan(r.rescored_logp[:-2]).all() and not np.isnan(r.rescored_logp[-2:]).any()


# -- the learner -------------------------------------------------------------------------------------------------------


def off_by(rollouts: Sequence[Rollout], difference: float) -> list[Rollout]:
    """Two rollouts in which a worker found other log-probabilities again; every other place could not be scored."""
    half = [np.where(np.arange(len(r)) % 2, np.nan, r.action_logp + difference).astype(np.float32) for r in rollouts]
    return [replace(r, rescored_logp=half[i]) if i in (2, 9) else r for i, r in enumerate(rollouts)]


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    ("bf16", "difference", "broken"), [(0, 0.019, 0), (0, 0.021, 1), (1, 0.045, 0), (1, 0.055, 1), (0, np.inf, 1)]
)
def test_an_update_on_rows_that_are_not_their_own_is_not_taken(
    config: Config, tiny_checkpoint: Path, mode: str, bf16: int, difference: float, broken: int
) -> None:
    settings = config(improve={"mode": mode, "mixed_precision": "bf16" if bf16 else "no"})
    rollouts = with_rewards(sample(make_runner(settings, tiny_checkpoint)), REWARDS)
    metrics = update(make_learner(settings, tiny_checkpoint), off_by(rollouts, difference))
    assert metrics["update_broken"] == 2 * broken and metrics["steps_taken"] == 1 - broken
    assert metrics["rescored_gap"] == pytest.approx(difference, abs=1e-5)


def test_the_bound_can_be_set(config: Config, tiny_checkpoint: Path) -> None:
    settings = config(improve={"max_logp_mismatch": 0.5})
    rollouts = with_rewards(sample(make_runner(settings, tiny_checkpoint)), REWARDS)
    learner = make_learner(settings, tiny_checkpoint)
    assert update(learner, off_by(rollouts, 0.4))["update_broken"] == 0
    assert update(make_learner(settings, tiny_checkpoint), rollouts)["rescored_gap"] == 0.0  # nothing was scored again


# -- both, and a run ---------------------------------------------------------------------------------------------------

FEW = {"num_workers": 1, "batch_size": 3, "max_new_tokens": 8}
"""Rows go on while others take the places of those that ended. The tiny policy is hardly sure of anything, so the
bounds below are far under the default; sound decoding keeps them."""


def test_an_update_on_rows_that_an_engine_mixed_up_is_not_taken(
    config: Config, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(improve={"max_logp_mismatch": 1e-4}, rollout=FEW)
    runner = make_runner(settings, tiny_checkpoint)
    wanted = asked(
        policy=own_policy(runner), prompt_indices=range(16), seeds=(3,) * 16, group_size=4, ship_features=True
    )

    def updated(number: int) -> dict[str, float]:
        """The first update of a new learner, on the rollouts of request ``number``."""
        rollouts, _ = runner.sample_request(replace(wanted, request_id=number))
        return update(make_learner(settings, tiny_checkpoint), with_rewards(rollouts, REWARDS * 4))

    sound = [updated(number) for number in range(2)]
    assert all(0 < m["rescored_gap"] < 1e-5 and m["update_broken"] == 0 for m in sound)
    monkeypatch.setattr(Engine, "_choose", Engine._choose)  # which is put back afterwards
    mix_up(runner)
    mixed = [updated(number) for number in range(2, 4)]
    assert max(m["rescored_gap"] for m in mixed) > 1e-4 and max(m["update_broken"] for m in mixed) > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"mode": "sync"}, {"mode": "async"}, {"mode": "async", "refresh_in_flight": True}])
def test_a_run_sees_an_engine_that_mixes_rows_up(
    algorithm: Callable[..., LatentRL], config: Config, mode: dict[str, Any]
) -> None:
    built = algorithm(config(improve={**mode, "max_logp_mismatch": 1e-4, "prompts_per_update": 16}, rollout=FEW))
    sound = [update_metrics(built.train()) for _ in range(3)]
    assert all(0 < m["rescored_gap"] < 1e-5 and m["updates_skipped"] == 0 for m in sound)
    ray.get([worker.apply.remote(mix_up) for worker in built.env_runner_group._worker_manager.actors().values()])
    mixed = [update_metrics(built.train()) for _ in range(3)]
    assert mixed[-1]["updates_skipped"] > 0 and mixed[-1]["rescored_gap"] > 1e-4
