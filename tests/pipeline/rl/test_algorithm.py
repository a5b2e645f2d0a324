"""The RL loops on real Ray: plumbing by counting, repeatability, killed workers, the asynchronous window, several
learners."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.training_data import TrainingData
from rl_tools import Config, EvenTask, host_of, rllib_config, slow_down

from configs.schema import RunConfig
from latent_control.algorithms import ALGORITHMS, Outcomes
from latent_control.pretrained import array_hash
from learners.collate import Collate
from learners.settings import Fault
from pipeline.rl.accounting import Records
from pipeline.rl.algorithm import LatentRL
from pipeline.rl.ledger import Ledger, read
from pipeline.rl.prompt_order import prompt_indices
from pipeline.rl.rollout_pool import FinishedRequest, PartLost, RolloutPool
from pipeline.stages.improve import replay_actor, update_metrics
from pipeline.storage import checkpoints
from rollout_workers.rollouts import Rollout
from rollout_workers.tasks import Score

pytest_plugins = ("rl_fixtures",)

Algorithms = Callable[..., LatentRL]


@pytest.fixture(scope="module")
def shared(ray_session: None, config: Config, tiny_checkpoint: Path) -> Iterator[LatentRL]:
    """Two workers and a learner in this process. Tests start it from version 0 with ``fresh``.

    Some make it asynchronous, of which the learner is not told: it goes on comparing its log-probabilities with
    those of the workers.
    """
    algorithm = rllib_config(config(improve={"max_logp_mismatch": 1.0}), host_of(tiny_checkpoint)).build_algo()
    algorithm.start = algorithm.learner_state()
    yield algorithm
    algorithm.stop()


def use(algorithm: LatentRL, config: RunConfig) -> None:
    """Another config on the same workers and learner."""
    algorithm.use(config)
    algorithm.learner_group._learner.improve = config.improve


@pytest.fixture
def fresh(shared: LatentRL, config: Config) -> LatentRL:
    """``shared`` as it was built."""
    use(shared, config())
    shared.restore_learner(shared.start)
    return shared


@contextmanager
def consumed(
    algorithm: LatentRL, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[int, list[FinishedRequest], list[Rollout]]]]:
    """What each update is given: (version before it, answers, their rollouts out of the object store)."""
    found: list[tuple[int, list[FinishedRequest], list[Rollout]]] = []
    original = LatentRL._minibatches

    def spy(self: LatentRL, answers: list[FinishedRequest]) -> Any:
        found.append((self.policy.version, answers, [r for a in answers for r in ray.get(a.rollouts)]))
        return original(self, answers)

    monkeypatch.setattr(LatentRL, "_minibatches", spy)
    yield found


def train(algorithm: LatentRL, updates: int) -> list[dict[str, float]]:
    return [update_metrics(algorithm.train()) for _ in range(updates)]


def kill(algorithm: LatentRL, worker: int) -> None:
    """SIGKILL the process of a rollout worker."""
    actor = algorithm.env_runner_group._worker_manager.actors()[worker]
    os.kill(ray.get(actor.apply.remote(lambda _: os.getpid())), signal.SIGKILL)


def wait_until_healthy(algorithm: LatentRL) -> None:
    deadline = time.monotonic() + 60
    while len(algorithm.env_runner_group.healthy_worker_ids()) < 2:
        assert time.monotonic() < deadline, "the worker did not come back"
        algorithm.pool.poll(0.1)


# -- plumbing ----------------------------------------------------------------------------------------------------------


def test_everyone_counts_the_same(fresh: LatentRL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Driver's summary, rollouts in the object store and the learner's batch agree, update by update."""
    batches: list[tuple[list[Rollout], dict[str, torch.Tensor]]] = []
    original = Collate.__call__

    def spy(self: Collate, *, episodes: list[Rollout], **kwargs: Any) -> Any:
        batch = original(self, episodes=episodes, **kwargs)
        batches.append((episodes, batch[DEFAULT_MODULE_ID]))
        return batch

    monkeypatch.setattr(Collate, "__call__", spy)
    hashes = [fresh.policy.weights_hash]
    with consumed(fresh, monkeypatch) as given:
        metrics = []
        for _ in range(3):
            metrics += train(fresh, 1)
            hashes.append(fresh.policy.weights_hash)
    assert len(set(hashes)) == 4, "every update changes the weights"
    task, seen = EvenTask(), set()
    for number, ((version, answers, rollouts), (episodes, batch)) in enumerate(zip(given, batches, strict=True)):
        assert version == number and len(rollouts) == 16
        assert {(r.policy_version, r.policy_hash) for r in rollouts} == {(number, hashes[number])}
        prompts = [f"countdown/train/{i}" for i in prompt_indices(number, 4, size=1_000_000, seed=0)]
        assert [r.prompt_id for r in rollouts] == [p for p in prompts for _ in range(4)]
        # The driver saw summaries only; they are those of the rollouts, which are those the learner got, in the same
        # order.
        assert [r for a in answers for r in a.summary.rewards] == [r.reward for r in rollouts]
        assert metrics[number]["reward"] == pytest.approx(np.mean([r.reward for r in rollouts]))
        assert metrics[number]["rollouts"] == 16 and metrics[number]["tokens"] == sum(map(len, rollouts))
        assert [r.rollout_id for r in episodes] == [r.rollout_id for r in rollouts]
        taken = batch[Columns.LOSS_MASK]
        rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
        outcomes = Outcomes(rewards=rewards, valid=torch.ones(16, dtype=torch.bool), group_size=4, taken=taken)
        assert torch.equal(batch[Columns.ADVANTAGES], ALGORITHMS["grpo"].estimate(outcomes).advantages)
        for row, rollout in enumerate(rollouts):
            mask = batch[Columns.LOSS_MASK][row]
            assert batch[Columns.ACTIONS][row][mask].tolist() == rollout.actions.tolist()
            assert batch["tokens"][row][: len(rollout.prompt_tokens)].tolist() == rollout.prompt_tokens.tolist()
            verdict = task.score(task.prompts("train")[int(rollout.prompt_id.rsplit("/", 1)[1])], rollout.text)
            assert isinstance(verdict, Score) and verdict.reward == rollout.reward
        assert metrics[number]["logp_gap"] < 1e-5 and metrics[number]["staleness_max"] == 0
        seen |= {r.rollout_id for r in rollouts}
    assert len(seen) == 48
    assert fresh.policy.version == 3 == fresh.learner_group._learner._weights_seq_no


def test_policy_weights_only_travel(fresh: LatentRL) -> None:
    trained = fresh.learner_group._learner.module[DEFAULT_MODULE_ID].trained()
    assert fresh.weights.keys() == trained.keys() and array_hash(fresh.weights) == fresh.policy.weights_hash
    assert fresh.env_runner_group.local_env_runner is None, "the driver hosts no language model"


def test_failed_verdicts_are_counted_and_masked(fresh: LatentRL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout whose first token ends it has no text: the verifier cannot judge."""
    with consumed(fresh, monkeypatch) as given:
        metrics = train(fresh, 4)
    failed = [sum(r.reward is None for r in rollouts) for _, _, rollouts in given]
    assert [m["failures"] for m in metrics] == failed
    assert all(
        (r.reward is None) == (r.text == "") == (r.failure == "empty: nothing was generated")
        for _, _, rs in given
        for r in rs
    )


def test_playing_heldout_prompts_leaves_training_as_it_was(fresh: LatentRL, undisturbed: Undisturbed) -> None:
    """Same rewards and weights to the last bit as without; the same policy gets the same result however often it
    plays."""
    fresh.use(fresh.run_config.model_copy(update={"improve": fresh.improve.model_copy(update={"evaluate_prompts": 6})}))
    rewards, plays = [], [fresh.play_heldout(), fresh.play_heldout()]
    for _ in range(3):
        rewards += [m["reward"] for m in train(fresh, 1)]
        plays.append(fresh.play_heldout())
    assert rewards == undisturbed[0]
    assert same(fresh.weights, undisturbed[1])
    results = [{name: value for name, value in play.items() if name != "seconds_heldout"} for play in plays]
    assert results[0] == results[1] != results[-1]
    assert all(0 <= r["heldout_reward"] <= 1 and r["heldout_tokens"] >= 12 for r in results)


# -- repeatability -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(shared: LatentRL, config: Config) -> tuple[list[float], dict[str, np.ndarray]]:
    """Rewards of three updates from version 0, and the weights after them."""
    use(shared, config())
    shared.restore_learner(shared.start)
    return [m["reward"] for m in train(shared, 3)], shared.weights


Undisturbed = tuple[list[float], dict[str, np.ndarray]]


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_same_config_and_seed_same_run(algorithm: Algorithms, config: Config, undisturbed: Undisturbed) -> None:
    """Other processes, the same bits."""
    again = algorithm(config())
    assert [m["reward"] for m in train(again, 3)] == undisturbed[0]
    assert same(again.weights, undisturbed[1])


def test_another_seed_is_another_run(fresh: LatentRL, config: Config, undisturbed: Undisturbed) -> None:
    use(fresh, config(seed=1))
    assert [m["reward"] for m in train(fresh, 2)] != undisturbed[0][:2]


def test_continues_from_its_state_as_if_never_stopped(
    fresh: LatentRL, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    train(fresh, 2)
    checkpoints.save_tree(tmp_path, "learner", fresh.learner_state())
    train(fresh, 2)
    fresh.restore_learner(checkpoints.load_tree(tmp_path, "learner"))
    assert fresh.policy.version == 2
    assert [m["reward"] for m in train(fresh, 1)] == undisturbed[0][2:]
    assert same(fresh.weights, undisturbed[1])


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_error_in_a_worker_reaches_the_caller_as_itself(fresh: LatentRL) -> None:
    asked = fresh.stream.requests_for(range(4))[0]
    for broken, policy, error, message in (
        (replace(asked, prompt_indices=(10**9,), seeds=(0,)), fresh.policy, IndexError, "out of range"),
        (asked, replace(fresh.policy, version=7, weights_hash="0" * 64), ValueError, "announced was 000000000000"),
    ):
        right, fresh.published.current = fresh.policy, policy
        fresh.pool.submit([broken])
        with pytest.raises(error, match=message):
            fresh.pool.take([broken.request_id])
        fresh.pool.forget()
        fresh.published.current = right
    assert len(train(fresh, 1)) == 1, "the workers live on"


# -- asynchronous ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_asynchronous_updates_stay_within_the_staleness(
    fresh: LatentRL, config: Config, monkeypatch: pytest.MonkeyPatch, max_staleness: int
) -> None:
    use(fresh, config(improve={"mode": "async", "max_staleness": max_staleness}))
    with consumed(fresh, monkeypatch) as given:
        metrics = train(fresh, 8)
    assert [version for version, _, _ in given] == list(range(8))
    for (version, _, rollouts), found in zip(given, metrics, strict=True):
        ages = [version - r.policy_version for r in rollouts for _ in range(len(r))]
        assert min(ages) >= 0 and max(ages) <= max_staleness
        assert found["staleness_max"] == max(ages) and found["staleness_mean"] == pytest.approx(np.mean(ages))
        assert [found[f"staleness_{age}"] for age in range(max_staleness + 1)] == pytest.approx(
            [ages.count(age) / len(ages) for age in range(max_staleness + 1)]
        )
        assert 0 <= found["idle_learner"] <= 1 and 0 <= found["idle_workers"] <= 1
    if max_staleness:
        assert max(m["staleness_max"] for m in metrics) > 0, "workers run ahead"
        assert min(m["idle_workers"] for m in metrics[2:]) < 0.2, "they always have something to do"
    assert len({r.rollout_id for _, _, rs in given for r in rs}) == 8 * 16


def test_a_resumed_asynchronous_run_loses_and_doubles_no_prompt(
    fresh: LatentRL, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second request of every update is held back as long as the bound allows, so consumption is out of order at
    the stop."""
    use(fresh, config(improve={"mode": "async", "max_staleness": 2}))
    original = RolloutPool._collect

    def hold_back(self: RolloutPool, ready: list[ray.ObjectRef]) -> None:
        late = [r for r in ready if self.running[r].requests[0].request_id == 2 and fresh.policy.version < 2]
        original(self, [r for r in ready if r not in late])

    monkeypatch.setattr(RolloutPool, "_collect", hold_back)
    with consumed(fresh, monkeypatch) as given:
        train(fresh, 2)
        assert 2 not in {a.request.request_id for _, answers, _ in given for a in answers}
        checkpoints.save_tree(tmp_path, "learner", state := fresh.learner_state())
        assert {2, 3} <= set(state["unasked"]) and state["next_position"] > 8
        train(fresh, 1)  # in vain
        del given[2:]
        fresh.restore_learner(checkpoints.load_tree(tmp_path, "learner"))
        train(fresh, 4)
    prompts = [r.prompt_id for _, _, rollouts in given for r in rollouts[::4]]
    wanted = [f"countdown/train/{i}" for u in range(9) for i in prompt_indices(u, 4, size=1_000_000, seed=0)]
    unasked = [wanted[p] for p in fresh.learner_state()["unasked"]]
    assert sorted(prompts + unasked) == sorted(wanted[: fresh.stream.next_position]) and len(prompts) == 24
    assert [max(v - r.policy_version for r in rollouts) <= 2 for v, _, rollouts in given] == [True] * 6


def test_rollouts_in_flight_go_on_with_new_policies(
    fresh: LatentRL, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each action carries its version, and its log-probability is that of its own version's weights over the whole
    prefix."""
    use(fresh, config(improve={"mode": "async", "max_staleness": 1, "refresh_in_flight": True}))
    fresh.restore_learner(fresh.start)
    weights = {}
    original = LatentRL.publish

    def keep(self: LatentRL, version: int) -> None:
        original(self, version)
        weights[version] = self.weights

    monkeypatch.setattr(LatentRL, "publish", keep)
    weights[0] = fresh.weights
    workers = fresh.env_runner_group._worker_manager.actors().values()
    # Out of step: workers that end together always begin with the newest policy.
    ray.get([worker.apply.remote(slow_down, 0.1 * (2 + place)) for place, worker in enumerate(workers)])
    with consumed(fresh, monkeypatch) as given:
        metrics = train(fresh, 6)
    ray.get([worker.apply.remote(slow_down, 0.0) for worker in workers])
    rollouts = [r for _, _, rs in given for r in rs]
    mixed = [r for r in rollouts if len(r.action_versions)]
    assert mixed, "no rollout met a new policy"
    module = fresh.learner_group._learner.module[DEFAULT_MODULE_ID]
    for rollout in mixed:
        assert rollout.action_versions.shape == rollout.actions.shape
        assert (np.diff(rollout.action_versions) >= 0).all() and rollout.policy_version == rollout.action_versions[0]
        for version in set(rollout.action_versions.tolist()):
            module.set_state(weights[version])
            with torch.no_grad():
                logits = module.policy(torch.from_numpy(np.array(rollout.features))[None])[
                    0, len(rollout.prompt_tokens) - 1 :
                ]
            logp = (
                logits.log_softmax(-1).gather(1, torch.tensor(rollout.actions, dtype=torch.long)[:, None])[:, 0].numpy()
            )
            own = rollout.action_versions == version
            assert np.abs(logp - rollout.action_logp)[own].max() < 1e-4
            # An update whose rewards are all the same changes nothing: its version is another name for the same
            # weights.
            others = {int(v) for v in set(rollout.action_versions.tolist()) - {version}}
            differ = all(any((weights[v][k] != weights[version][k]).any() for k in weights[v]) for v in others)
            assert not others or not differ or np.abs(logp - rollout.action_logp)[~own].max() > 1e-4
    for (version, _, rs), found in zip(given, metrics, strict=True):
        ages = np.concatenate(
            [version - (r.action_versions if len(r.action_versions) else np.full(len(r), r.policy_version)) for r in rs]
        )
        assert found["staleness_mean"] == pytest.approx(ages.mean()) and found["staleness_max"] == ages.max() <= 1
    module.set_state(fresh.weights)


# -- several learners, the token level, learning -----------------------------------------------------------------------


def learner_weights(algorithm: LatentRL) -> list[dict[str, np.ndarray]]:
    results = algorithm.learner_group.foreach_learner(lambda learner: learner.module[DEFAULT_MODULE_ID].get_state())
    return [result.get() for result in results]


def gradients(algorithm: LatentRL, parts: list[list[Rollout]]) -> list[dict[str, np.ndarray]]:
    """The gradient each learner holds after an update on these parts, which are dealt to the learners in order."""
    refs = [ray.put(part) for part in parts]
    rows = sum(map(len, parts)) // max(1, algorithm.run_config.cluster.num_learners)
    algorithm.learner_group.update(
        training_data=TrainingData(episodes_refs=refs), num_epochs=1, minibatch_size=rows, num_total_minibatches=1
    )
    results = algorithm.learner_group.foreach_learner(
        lambda learner: {
            name: p.grad.numpy().copy() for name, p in learner.module[DEFAULT_MODULE_ID].unwrapped().trained().items()
        }
    )
    return [result.get() for result in results]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_two_learners_hold_the_same_weights_and_train_as_one(
    algorithm: Algorithms, config: Config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one = algorithm(config(improve={"algorithm": name}, rollout={"num_workers": 1}))
    two = algorithm(config(improve={"algorithm": name}, rollout={"num_workers": 1}, cluster={"num_learners": 2}))
    with consumed(two, monkeypatch) as given:
        train(two, 2)
    first, second = learner_weights(two)
    assert same(first, second) and not same(two.weights, one.weights)
    assert same(two.weights, {tensor: first[tensor] for tensor in two.weights})
    assert [len(rollouts) for _, _, rollouts in given] == [16, 16]
    # Most of the first learner's rollouts failed: each token must still count as much as on the second.
    parts = [ray.get(a.rollouts) for a in given[1][1]]
    parts[0] = [replace(r, reward=None if i % 4 > 1 else float(i)) for i, r in enumerate(parts[0])]
    one.restore_learner(two.learner_state())
    (alone,) = gradients(one, parts)
    size = max(float(np.abs(g).max()) for g in alone.values())
    for together in gradients(two, parts):
        assert max(float(np.abs(together[name] - alone[name]).max()) for name in alone) < 1e-5 * size
    # A gradient that is not finite on one learner keeps both from the step: neither is left waiting for the other.
    before = learner_weights(two)
    gradients(two, [[replace(r, reward=float("nan")) for r in parts[0]], parts[1]])
    assert all(same(old, new) for old, new in zip(before, learner_weights(two), strict=True))


@pytest.mark.slow
def test_learners_that_a_policy_is_split_over_publish_it_whole_and_go_on_from_its_checkpoint(
    algorithm: Algorithms, config: Config, tmp_path: Path
) -> None:
    """Their steps are tested in tests/learners/test_sharded_learner.py."""
    settings = {"improve": {"shard": True, "features": "recompute"}, "cluster": {"num_learners": 2}}
    two = algorithm(config(rollout={"num_workers": 1}, **settings))
    first = two.weights
    train(two, 2)
    checkpoints.save_tree(tmp_path, "learner", two.learner_state())
    second = two.weights
    train(two, 1)
    third = two.weights
    assert not same(first, second) and not same(second, third)
    two.restore_learner(checkpoints.load_tree(tmp_path, "learner"))
    assert same(two.weights, second)
    train(two, 1)
    assert same(two.weights, third)
    one = algorithm(config(rollout={"num_workers": 1}))
    assert same(one.weights, first)
    one.restore_learner(checkpoints.load_tree(tmp_path, "learner"))
    assert same(one.weights, second)


@pytest.mark.slow
def test_a_learner_that_does_not_take_its_state_is_a_loss(algorithm: Algorithms, config: Config) -> None:
    """Silent (SIGSTOP) as it is restored: a run would wait for it for ever."""
    built = algorithm(config(rollout={"num_workers": 1}, cluster={"num_learners": 1, "learner_timeout_seconds": 2.0}))
    state = built.learner_state()
    (result,) = built.learner_group.foreach_learner(lambda _: os.getpid())
    os.kill(result.get(), signal.SIGSTOP)
    with pytest.raises(PartLost, match="a learner actor was lost"):
        built.restore_learner(state)


def test_broken_updates_are_skipped_kept_counted_and_stop_the_run(
    fresh: LatentRL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bound that no log-probability can keep; the second broken update is one too many."""
    use(
        fresh,
        fresh.run_config.model_copy(update={"improve": fresh.improve.model_copy(update={"max_skipped_updates": 1})}),
    )
    ledger, kept = Ledger(tmp_path, "improve"), {}
    ledger.begin(0)
    fresh.attach(
        Records(ledger=ledger, quarantine=lambda update, rollouts, reason: kept.__setitem__(update, (rollouts, reason)))
    )
    before = fresh.weights
    learner = fresh.learner_group._learner
    rules = learner.improve
    (whole,) = train(fresh, 1)
    assert whole["updates_skipped"] == 0 and whole["steps_taken"] > 0 and not same(fresh.weights, before)
    before, learner.improve = fresh.weights, rules.model_copy(update={"max_logp_mismatch": -1.0})
    try:
        (broken,) = train(fresh, 1)
        assert broken["updates_skipped"] == 1 and broken["steps_taken"] == 0 and same(fresh.weights, before)
        assert fresh.policy.version == 2 and list(kept) == [2] and kept[2][1] == Fault.NOT_FOUND_AGAIN.reason
        with pytest.raises(FloatingPointError, match=r"update 3 was broken .* as were 1 before"):
            fresh.train()
    finally:
        learner.improve = rules
    assert list(kept) == [2, 3] and same(fresh.weights, before)
    fresh.flush()
    found = read(tmp_path, "improve")
    rollouts = [r for a in found.attempts if a.update == 2 for r in a.rollouts]
    assert {a.outcome for a in found.attempts if a.update == 1} == {"trained"} and rollouts == [
        r.rollout_id for r in kept[2][0]
    ]
    assert all(a.outcome == "skipped" and "rescored_gap is beyond" in a.reason for a in found.attempts if a.update >= 2)


def test_token_level_trains_the_last_block_only(algorithm: Algorithms, config: Config) -> None:
    tokens = algorithm(
        config(improve={"level": "token", "features": "recompute"}, rollout={"num_workers": 1}), level="token"
    )
    module = tokens.learner_group._learner.module[DEFAULT_MODULE_ID]
    head, before = module.policy.head.weight.clone(), tokens.weights
    metrics = train(tokens, 2)
    assert all(m["logp_gap"] < 1e-5 for m in metrics)
    assert torch.equal(module.policy.head.weight, head) and "head.weight" not in tokens.weights
    assert any(not np.array_equal(before[name], tokens.weights[name]) for name in before)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_it_learns(fresh: LatentRL, config: Config, mode: str) -> None:
    """Even words are rewarded; less than half of them are even by chance."""
    use(fresh, config(improve={"mode": mode, "max_staleness": 1}))
    rewards = [m["reward"] for m in train(fresh, 30)]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.25


# -- workers die (last, since they take seconds to come back) ----------------------------------------------------------


@pytest.mark.slow
def test_a_worker_killed_while_sampling_costs_nothing(
    fresh: LatentRL, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pipeline.runs.context import StageContext
    from pipeline.runs.metrics_log import RunLog

    context = StageContext(config=fresh.run_config, run_dir=tmp_path, log=RunLog(tmp_path, quiet=True), task=EvenTask())
    fresh.attach(Records(replay=replay_actor(context, "improve")))
    original, killed = RolloutPool._send, []

    def send_then_kill(self: RolloutPool, worker: int, request: Any) -> None:
        if fresh.policy.version == 1 and not killed:
            killed.append(worker)
            kill(fresh, worker)  # asked while idle, so that the request meets a dying worker
        original(self, worker, request)

    monkeypatch.setattr(RolloutPool, "_send", send_then_kill)
    with consumed(fresh, monkeypatch) as given:
        metrics = train(fresh, 3)
    fresh.flush()
    assert killed and [m["reward"] for m in metrics] == undisturbed[0]
    assert same(fresh.weights, undisturbed[1]), "the same updates, bit for bit"
    assert [(v, {r.policy_version for r in rs}, len(rs)) for v, _, rs in given] == [(v, {v}, 16) for v in range(3)]
    stored = pd.read_parquet(tmp_path / "replay")
    assert sorted(stored.rollout_id) == sorted({r.rollout_id for _, _, rs in given for r in rs}) and len(stored) == 48
    fresh.attach(Records())
    wait_until_healthy(fresh)


@pytest.mark.slow
def test_rollouts_outlive_the_worker_that_made_them(fresh: LatentRL) -> None:
    """What a worker puts into the object store dies with it, and RLlib's learner group would drop it with a mere
    warning."""
    requests = fresh.stream.requests_for(range(4))
    fresh.pool.submit(requests)
    answers = fresh.pool.take([r.request_id for r in requests])
    workers = {a.summary.worker for a in answers}
    for worker in workers:
        kill(fresh, worker)
    time.sleep(1.0)
    data = TrainingData(episodes_refs=[a.rollouts for a in answers])
    data.solve_refs()
    assert len(data.episodes) == 16


@pytest.mark.slow
def test_workers_that_cannot_start_are_an_error_that_says_so(
    ray_session: None, config: Config, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    settings = rllib_config(config(rollout={"num_workers": 1}), host_of(tiny_checkpoint))
    settings.env_config["worker"] = replace(settings.env_config["worker"], host=host_of(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match="no rollout worker could start"):
        settings.build_algo()
