"""Off-policy evaluation: estimators by hand and by enumeration of a two-armed bandit, the bootstrap's clusters,
verdicts."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rl_tools import Config, make_runner, sample

from configs.loading import dump_config
from configs.schema import DataSource, ImproveOffline
from latent_control import LatentActionLM
from latent_control.distributions import action_log_probs
from latent_control.off_policy import (
    ESTIMATORS,
    Estimate,
    Logged,
    OffPolicyReport,
    expected_rewards,
    importance_weights,
    off_policy_report,
    prompt_sums,
    verdict,
)
from latent_control.pretrained import world_hash
from pipeline.cli.evaluate import _versions
from pipeline.cli.output import off_policy_table
from pipeline.experiments.off_policy import judge
from pipeline.replay.dataset import HELDOUT, advantages, logged, read_rollouts
from pipeline.replay.writer import ReplayWriter
from pipeline.storage import checkpoints

pytest_plugins = ("rl_fixtures",)

# One step, two arms: the behaviour takes the second one time in five, the policy to be judged four times in five.
BEHAVIOUR, POLICY = np.array([0.8, 0.2]), np.array([0.2, 0.8])


def bandit(arms: list[int], prompts: list[int], rewards: np.ndarray) -> Logged:
    """Rollouts of one action each; ``rewards`` [P, 2]."""
    chosen, where = np.array(arms), np.array(prompts)
    return Logged(log_ratios=np.log(POLICY / BEHAVIOUR)[chosen], rewards=rewards[where, chosen], prompts=where)


def value(name: str, rollouts: Logged, cap: float | None = None) -> float:
    sums = prompt_sums(rollouts, cap)
    return float(ESTIMATORS[name]({key: column.sum() for key, column in sums.items()}))


def test_ips_and_wis_of_a_bandit_by_hand() -> None:
    # Four of the first arm (weight 1/4, reward 0), one of the second (weight 4, reward 1): exactly the behaviour's
    # odds.
    rollouts = bandit([0, 0, 0, 0, 1], [0, 0, 1, 1, 1], np.array([[0.0, 1.0], [0.0, 1.0]]))
    assert value("ips", rollouts) == pytest.approx(4 / 5)
    assert value("wis", rollouts) == pytest.approx(4 / (4 * 0.25 + 4))
    assert value("ips", rollouts, cap=2.0) == pytest.approx(2 / 5)


def test_doubly_robust_by_hand() -> None:
    # Prompt 0: rewards 0, 1 (weights 1/4, 4); prompt 1: reward 1 (weight 4). The other prompts count like 2 rollouts.
    rollouts = bandit([0, 1, 1], [0, 0, 1], np.array([[0.0, 1.0], [0.0, 1.0]]))
    q = np.array([(1 + 2 * 1) / 3, (0 + 2 * 1) / 3, (0 + 2 * 0.5) / 2])
    np.testing.assert_allclose(expected_rewards(rollouts.rewards, rollouts.prompts), q)
    residuals = np.array([0.25 * (0 - q[0]), 4 * (1 - q[1]), 4 * (1 - q[2])])
    assert value("dr", rollouts) == pytest.approx((q + residuals).mean())
    assert value("wdr", rollouts) == pytest.approx(q.mean() + residuals.sum() / 8.25)


def expectation(name: str, rewards: np.ndarray) -> float:
    """An estimator's mean over all 16 outcomes of two prompts x two rollouts, each as likely as the behaviour makes
    it."""
    prompts = [0, 0, 1, 1]
    outcomes = itertools.product([0, 1], repeat=4)
    return sum(
        float(np.prod(BEHAVIOUR[list(arms)])) * value(name, bandit(list(arms), prompts, rewards)) for arms in outcomes
    )


def test_ips_and_dr_are_unbiased_and_the_others_are_not() -> None:
    rewards = np.array([[0.0, 1.0], [0.5, 0.25]])
    truth = float((rewards @ POLICY).mean())
    assert expectation("ips", rewards) == pytest.approx(truth, abs=1e-12)
    assert expectation("dr", rewards) == pytest.approx(truth, abs=1e-12)
    assert abs(expectation("wis", rewards) - truth) > 0.01
    assert abs(expectation("wdr", rewards) - truth) > 0.01


def test_the_reward_model_takes_variance_away_where_prompts_differ() -> None:
    rng = np.random.default_rng(0)
    rewards = np.array([[0.0, 0.1], [0.9, 1.0]])[rng.integers(0, 2, 50)]
    prompts = np.repeat(np.arange(50), 8)
    runs = [bandit(list(rng.choice(2, 400, p=BEHAVIOUR)), list(prompts), rewards) for _ in range(200)]
    spread = {name: np.std([value(name, run) for run in runs]) for name in ("ips", "dr")}
    assert spread["dr"] < 0.5 * spread["ips"]


def test_the_same_policy_earns_the_behaviours_mean() -> None:
    rng = np.random.default_rng(0)
    rollouts = Logged(log_ratios=np.zeros(60), rewards=rng.random(60), prompts=np.repeat(np.arange(20), 3))
    report = off_policy_report(rollouts)
    assert report.effective == pytest.approx(60) and report.largest_share == pytest.approx(1 / 60)
    for name in ESTIMATORS:
        assert report.estimates[name].value == pytest.approx(rollouts.rewards.mean())
        assert report.gains[name].low == pytest.approx(0, abs=1e-12)


def test_effective_rollouts_by_hand() -> None:
    rollouts = Logged(log_ratios=np.log([1.0, 1.0, 2.0]), rewards=np.ones(3), prompts=np.array([0, 0, 1]))
    report = off_policy_report(rollouts, draws=10)
    assert report.effective == pytest.approx(16 / 6) and report.largest_share == pytest.approx(0.5)
    assert np.array_equal(importance_weights(np.log([1.0, 3.0]), 2.0), [1.0, 2.0])


def test_the_bootstrap_draws_prompts_not_rollouts() -> None:
    """Eight copies of each rollout bring no news: the interval stays; drawn one by one they would make it nearly three
    times narrower."""
    rng = np.random.default_rng(1)
    once = Logged(log_ratios=rng.normal(0, 0.3, 40), rewards=rng.random(40), prompts=np.arange(40))
    copies = Logged(
        log_ratios=np.repeat(once.log_ratios, 8), rewards=np.repeat(once.rewards, 8), prompts=np.repeat(once.prompts, 8)
    )
    alone = replace(copies, prompts=np.arange(320))
    widths = [e.high - e.low for e in (off_policy_report(one).estimates["wis"] for one in (once, copies, alone))]
    assert widths[1] == pytest.approx(widths[0])
    assert 2.3 < widths[0] / widths[2] < 3.4


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    covered = dict.fromkeys(ESTIMATORS, 0)
    for _ in range(100):
        rewards = rng.random((80, 2)) * np.array([0.5, 1.0])
        arms, prompts = rng.choice(2, 320, p=BEHAVIOUR), np.repeat(np.arange(80), 4)
        report = off_policy_report(bandit(list(arms), list(prompts), rewards), draws=400)
        truth = float((rewards @ POLICY).mean())
        for name, e in report.estimates.items():
            covered[name] += e.low <= truth <= e.high
    assert all(count >= 88 for count in covered.values()), covered


def made(
    *, effective: float = 500.0, share: float = 0.01, weight: tuple[float, float] = (0.9, 1.1), low: float = 0.02
) -> OffPolicyReport:
    one, gain = Estimate(value=0.5, low=0.45, high=0.55), Estimate(value=0.05, low=low, high=0.08)
    return OffPolicyReport(
        rollouts=1000,
        prompts=100,
        behaviour=one,
        estimates=dict.fromkeys(ESTIMATORS, one),
        gains=dict.fromkeys(ESTIMATORS, gain),
        effective=effective,
        largest_share=share,
        mean_weight=Estimate(value=1.0, low=weight[0], high=weight[1]),
        weight_cap=None,
    )


def test_verdicts() -> None:
    assert verdict(made())[0] == "yes" and verdict(made(low=-0.01))[0] == "no"
    assert verdict(made(), at_least=0.45)[0] == "yes" and verdict(made(), at_least=0.46)[0] == "no"
    for doubtful, why in (
        (made(effective=99), "99 effective"),
        (made(share=0.2), "20%"),
        (made(weight=(0.3, 0.8)), "not 1"),
    ):
        answer, words = verdict(doubtful)
        assert answer == "unknown" and why in words
    assert verdict(made(), more_doubts=["it knows them"]) == (
        "unknown",
        "cannot tell: it knows them. Judge it by rollouts it was not trained on, of a policy nearer to it",
    )


# -- stored rollouts and the command -----------------------------------------------------------------------------------


@pytest.fixture
def replay(config: Config, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A replay buffer of the tiny checkpoint: 40 prompts x 4 rollouts."""
    runner, folder = make_runner(config(), tiny_checkpoint), tmp_path / "first" / "replay"
    writer = ReplayWriter(folder, 4096, "first")
    for update in range(10):
        prompts = tuple(range(4 * update, 4 * update + 4))
        rollouts = sample(runner, prompt_indices=prompts, request_id=4 * update)
        writer.add([replace(r, policy_version=update) for r in rollouts])
    writer.close()
    return folder.parent


def stored(replay: Path, checkpoint: Path, **arguments):
    world = world_hash(LatentActionLM.from_pretrained(checkpoint))
    return read_rollouts([DataSource(kind="replay", path=str(replay))], world=world, **arguments)


def test_the_behaviour_policy_has_ratio_one(replay: Path, config: Config, tiny_checkpoint: Path) -> None:
    rollouts = stored(replay, tiny_checkpoint)
    found = logged(LatentActionLM.from_pretrained(tiny_checkpoint), rollouts, config().rollout)
    assert len(rollouts) > 100 and len(rollouts.prompt_ids) == 40
    assert np.abs(found.log_ratios).max() < 1e-4
    assert off_policy_report(found).estimates["dr"].value == pytest.approx(rollouts.rewards.mean(), abs=1e-4)


def test_ratios_are_the_policys_over_the_stored_ones(replay: Path, config: Config, tiny_checkpoint: Path) -> None:
    rollouts, model = stored(replay, tiny_checkpoint), LatentActionLM.from_pretrained(tiny_checkpoint)
    model.policy.head.weight.data *= 3
    found = logged(model, rollouts, config(rollout={"temperature": 0.5}).rollout)
    for i in range(0, len(rollouts), 31):
        ids = torch.from_numpy(rollouts.ids[i].astype(np.int64))[None]
        with torch.no_grad():
            log_probs = torch.log_softmax(model.policy_logits(model.features(ids))[0] / 0.5, -1)
        start = ids.shape[1] - len(rollouts.actions[i])
        logp = sum(float(log_probs[start - 1 + t, code]) for t, code in enumerate(rollouts.actions[i]))
        assert found.log_ratios[i] == pytest.approx(logp - rollouts.behaviour_logp[i], abs=1e-4)


def test_windows_and_splits_of_the_buffer(replay: Path, tiny_checkpoint: Path) -> None:
    everything = stored(replay, tiny_checkpoint)
    assert len(stored(replay, tiny_checkpoint, last_updates=3).prompt_ids) == 12
    assert len(stored(replay, tiny_checkpoint, versions=(2, 5)).prompt_ids) == 16
    training, held = everything.split(0.3)
    assert set(training.prompt_ids).isdisjoint(held.prompt_ids) and len(training) + len(held) == len(everything)
    assert training.chances.sum() == pytest.approx(1)
    assert set(stored(replay, tiny_checkpoint, versions=(0, 4)).split(0.3)[1].prompt_ids) <= set(held.prompt_ids)
    with pytest.raises(ValueError, match="no judged rollout"):
        stored(replay, tiny_checkpoint, versions=(50, 60))
    with pytest.raises(ValueError, match="another codebook or world model"):
        read_rollouts([DataSource(kind="replay", path=str(replay))], world="0" * 64)


def test_prompts_and_rewards_of_other_tasks_are_not_mixed(
    replay: Path, config: Config, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Prompt 7 of one task is another prompt than prompt 7 of the same task with other options."""
    everything, other = stored(replay, tiny_checkpoint), tmp_path / "other" / "replay"
    rollouts = sample(make_runner(config(), tiny_checkpoint), prompt_indices=(0, 1, 2, 3), group_size=2)
    writer = ReplayWriter(other, 4096, "b")
    writer.add(
        [replace(r, prompt_text=f"{r.prompt_text}!", reward=9.0, reward_hash="of another task") for r in rollouts]
    )
    writer.close()
    world = world_hash(LatentActionLM.from_pretrained(tiny_checkpoint))
    sources = [DataSource(kind="replay", path=str(path)) for path in (replay, other)]
    both = read_rollouts(sources, world=world)
    assert len(both.prompt_ids) == len(everything.prompt_ids) + 4 and both.definitions == 2
    assert advantages(both, "prompt")[-8:].tolist() == [0.0] * 8, "each is compared with its own kind"
    run_dir = run_folder(tmp_path / "run", config, tiny_checkpoint, "clone")
    found = judge(run_dir, [replay, other.parent], estimator="dr", at_least=0.0)
    assert found["verdict"] == "unknown" and "2 definitions" in found["words"]


def test_what_a_policy_does_outside_of_the_behaviours_top_k_is_missing_weight() -> None:
    """The behaviour tries the likelier two of four codes, the policy would choose the others: it would earn nothing."""
    chosen = np.arange(400) % 2
    logits, earns = torch.tensor([1.0, -2.0, 3.0, 2.9]), np.array([1.0, 0.0])
    for top_k, doubt in ((2, "weights average 0.00"), (None, "weights average 0.07")):
        log_probs = action_log_probs(logits, top_k=top_k)[chosen].numpy()
        rollouts = Logged(
            log_ratios=log_probs - np.log(0.5), rewards=earns[chosen], prompts=np.repeat(np.arange(50), 8)
        )
        for cap in (None, 5.0):
            report = off_policy_report(rollouts, cap=cap, draws=200)
            answer, words = verdict(report, "dr", at_least=0.1)
            assert answer == "unknown" and doubt in words
            assert np.isfinite([estimate.value for estimate in report.estimates.values()]).all()


def test_weights_beyond_all_numbers_are_doubts() -> None:
    rng = np.random.default_rng(0)
    for far in (800.0, 400.0):
        log_ratios = np.where(np.arange(400) == 3, far, 0.0)
        rollouts = Logged(log_ratios=log_ratios, rewards=rng.random(400), prompts=np.repeat(np.arange(100), 4))
        report = off_policy_report(rollouts, draws=200)
        assert (report.effective, report.largest_share) == pytest.approx((1.0, 1.0))
        assert np.isfinite([bound for one in report.gains.values() for bound in (one.low, one.high)]).all()


def run_folder(
    where: Path, make: Config, checkpoint: Path, stage: str, info: dict[str, object] | None = None, **sections: Any
) -> Path:
    """A run whose stage ``stage`` ended with ``checkpoint``."""
    where.mkdir()
    config = make(**{"actions": {"init": str(checkpoint), "updates": 0}, "tracking": {"enabled": False}} | sections)
    (where / "config.yaml").write_text(dump_config(config))
    model = LatentActionLM.from_pretrained(checkpoint)
    checkpoints.write(
        where / "checkpoints" / stage,
        files=lambda tmp: model.save_pretrained(tmp) and None,
        info={"stage": stage, **(info or {})},
    )
    return where


def test_a_checkpoint_is_judged_and_the_result_kept(
    replay: Path, config: Config, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    run_dir = run_folder(tmp_path / "second", config, tiny_checkpoint, "clone")
    result = judge(run_dir, [replay], estimator="dr", at_least=0.0)
    assert (result["verdict"], result["checkpoint"]) == ("yes", "clone")
    assert judge(run_dir / "checkpoints" / "clone", [replay], estimator="wis", last_updates=2)["report"]["prompts"] == 8
    assert judge(run_dir, [replay], estimator="dr", versions=(1, 3))["report"]["prompts"] == 12
    assert sorted(p.name for p in (run_dir / "off_policy").iterdir()) == [
        "clone-1.json",
        "clone-2.json",
        "clone-3.json",
    ]
    assert json.loads((run_dir / "off_policy" / "clone-1.json").read_text()) == result
    table = off_policy_table(result)
    assert (
        "behaviour" in table
        and "clone may go online: dr" in table
        and f"{len(stored(replay, tiny_checkpoint))} rollouts" in table
    )


@pytest.mark.parametrize("text", ["19", "5-2", "a-b", "-3"])
def test_versions_that_are_none_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"--versions is '{text}'; write the first and the last"):
        _versions(text)
    assert _versions("3-19") == (3, 19)


def test_only_heldout_prompts_judge_what_was_improved_offline(
    replay: Path, config: Config, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    offline = ImproveOffline(heldout_share=0.3, data=({"kind": "replay", "path": str(replay)},)).model_dump()
    run_dir = run_folder(
        tmp_path / "off", config, tiny_checkpoint, "improve_offline", {HELDOUT: 0.3}, improve_offline=offline
    )
    held = stored(replay, tiny_checkpoint).split(0.3)[1]
    assert judge(run_dir, [replay], estimator="dr")["report"]["rollouts"] == len(held)


def test_a_policy_is_not_judged_by_what_it_was_trained_on(
    replay: Path, config: Config, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    own = run_folder(tmp_path / "own", config, tiny_checkpoint, "improve")
    (replay / "replay").rename(own / "replay")
    result = judge(own, [own], estimator="dr", at_least=0.0)
    assert result["verdict"] == "unknown" and "improve was trained on the rollouts of own" in result["words"]
    # So was the one that did best on the way.
    best = own / "checkpoints" / "improve_best"
    (own / "checkpoints" / "improve").rename(best)
    assert "improve_best was trained on the rollouts of own" in judge(best, [own], estimator="dr")["words"]
    best.rename(own / "checkpoints" / "improve")
    # What grew out of it knows them too.
    later = {"init": str(own / "checkpoints" / "improve"), "updates": 0}
    child = run_folder(tmp_path / "child", config, tiny_checkpoint, "clone", actions=later)
    assert judge(child, [own / "replay"], estimator="dr")["verdict"] == "unknown"
    cloned = {"data": [{"kind": "replay", "path": str(own)}]}
    clone = run_folder(tmp_path / "clone", config, tiny_checkpoint, "clone", clone=cloned)
    assert "clone was trained on the rollouts of own" in judge(clone, [own], estimator="dr")["words"]


def test_results_reach_mlflow(replay: Path, config: Config, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    run_dir = run_folder(tmp_path / "tracked", config, tiny_checkpoint, "clone", tracking={})
    result = judge(run_dir, [replay], estimator="dr")
    known = SimpleNamespace(**json.loads((run_dir / "mlflow.json").read_text()))
    run = MlflowClient(tracking_uri=known.tracking_uri).get_run(known.runs["off_policy_clone"])
    assert run.data.metrics["dr/value"] == pytest.approx(result["report"]["estimates"]["dr"]["value"])
