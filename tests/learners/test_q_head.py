"""The Q head: its targets by hand, transitions of stored rollouts, learning where the answer is known, saving, AUC."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rl_tools import Config, make_runner, sample

from configs.schema import DataSource
from latent_control import LatentActionLM
from latent_control.pretrained import world_hash
from latent_control.records import RolloutBatch
from latent_control.search.q_head import (
    SHAPE,
    WEIGHTS,
    QHead,
    QShape,
    best_supported,
    double_dqn_targets,
    load_q_head,
    q_loss,
    save_q_head,
    supported,
)
from learners.features import FeatureCache
from learners.q_head import QLearner, QSettings, Transitions, transitions
from pipeline.evaluation.statistics import auc
from pipeline.replay.dataset import read_rollouts
from pipeline.replay.writer import ReplayWriter
from pipeline.stages.q_head import measures, new_head

pytest_plugins = ("rl_fixtures",)


def shape(**changed) -> QShape:
    return QShape(
        **{
            "width": 4,
            "hidden": 16,
            "num_actions": 2,
            "span": 1,
            "reads": "late",
            "late_blocks": 2,
            "support": 0.1,
            "world_hash": "w",
            "base_hash": "b",
        }
        | changed
    )


def test_double_dqn_targets_by_hand():
    """The online network chooses, the target network judges; a rollout's end is its reward alone."""
    found = double_dqn_targets(
        rewards=torch.tensor([0.0, 0.25, 1.0]),
        last=torch.tensor([False, False, True]),
        online_next=torch.tensor([[1.0, 2.0], [5.0, 3.0], [9.0, 0.0]]),
        target_next=torch.tensor([[0.8, 0.4], [0.6, 7.0], [9.0, 9.0]]),
        discount=0.5,
    )
    # online takes code 1: 0 + 0.5 * 0.4; online takes code 0, though the target likes 1 better: 0.25 + 0.5 * 0.6; the
    # end: 1
    torch.testing.assert_close(found, torch.tensor([0.2, 0.55, 1.0]))


def test_loss_by_hand():
    q = torch.tensor([[0.5, 0.0], [0.0, 1.0]], requires_grad=True)
    loss, metrics = q_loss(q, torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), positions=2.0)
    assert float(loss.detach()) == pytest.approx((0.5 * 0.25 + 0.5 * 1.0) / 2)
    loss.backward()
    assert q.grad.tolist() == [[-0.25, 0.0], [0.0, 0.5]]  # only the codes that were taken
    assert float(metrics["td_error"]) == pytest.approx(0.75)


def test_codes_the_policy_would_not_take_are_left_out_of_the_maximum():
    logits = torch.tensor([[0.0, -2.0, -3.0]])  # probabilities 1 : 0.135 : 0.0498
    support = supported(logits, 0.1)
    assert support.tolist() == [[True, True, False]]
    assert best_supported(torch.tensor([[0.25, 0.5, 9.0]]), support).tolist() == [0.5]


def stored() -> RolloutBatch:
    """Two rollouts: prompt of 2 and 3 generated tokens; prompt of 1 and 2 generated ones, padded."""
    return RolloutBatch(
        input_ids=torch.tensor([[5, 6, 7, 8, 9], [5, 7, 9, 0, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        response_mask=torch.tensor([[False, False, True, True, True], [False, True, True, False, False]]),
        actions=torch.tensor([[0, 0, 1, 2, 3], [0, 4, 5, 0, 0]]),
        advantages=torch.zeros(2),
        index=torch.tensor([10, 11]),
    )


@torch.no_grad()
def test_transitions_of_stored_rollouts(make_model):
    model, batch = make_model(), stored()
    states = FeatureCache(model, 1.0)(batch)
    found = transitions(model, states, batch, torch.tensor([1.0, 0.5]), 0.1)
    assert found.actions.tolist() == [1, 2, 3, 4, 5]
    assert found.rewards.tolist() == [0, 0, 1.0, 0, 0.5]
    assert found.last.tolist() == [False, False, True, False, True]
    assert found.rollouts.tolist() == [0, 0, 0, 1, 1]
    # The state before the first generated token of the first rollout: after its prompt of two tokens.
    torch.testing.assert_close(found.states[0], model.features(torch.tensor([[5, 6]])).late[0, -1])


@torch.no_grad()
def test_transitions_with_spans_are_one_per_code(make_model):
    model, batch = make_model(span=2), stored()
    found = transitions(model, FeatureCache(model, 1.0)(batch), batch, torch.tensor([1.0, 0.5]), 0.1)
    assert found.actions.tolist() == [1, 3, 4]
    assert found.rewards.tolist() == [0, 1.0, 0.5]


def test_features_are_computed_once(make_model):
    cache = FeatureCache(make_model(), 1.0)
    cache(stored())
    cache(stored())
    assert cache.computed == 2


def chain() -> Transitions:
    """State 0: code 0 leads to state 1, code 1 to state 2. In state 1 code 1 earns 1, in state 2 nothing does; all
    pairs are seen."""
    eye = torch.eye(4)
    states, actions, rewards, last = [], [], [], []
    for first in (0, 1):
        for second in (0, 1):
            states += [eye[0], eye[1 + first]]
            actions += [first, second]
            rewards += [0.0, float(first == 0 and second == 1)]
            last += [False, True]
    return Transitions(
        states=torch.stack(states),
        actions=torch.tensor(actions),
        rewards=torch.tensor(rewards),
        support=torch.ones(8, 2, dtype=torch.bool),
        last=torch.tensor(last),
        rollouts=torch.arange(8) // 2,
    )


def test_a_toy_is_learned_to_its_true_values():
    torch.manual_seed(0)
    learner = QLearner(QHead(shape()), QSettings(updates=1500, learning_rate=1e-2, discount=0.9, target_every=20))
    for _ in range(1500):
        learner.update(chain())
    with torch.no_grad():
        q = learner.head(torch.eye(4)[:3])
    # By hand: Q(0, 0) = 0.9 * 1, Q(0, 1) = 0.9 * 0; Q(1, .) = 0, 1; Q(2, .) = 0, 0
    torch.testing.assert_close(q, torch.tensor([[0.9, 0.0], [0.0, 1.0], [0.0, 0.0]]), atol=0.03, rtol=0)


def test_the_target_network_follows_periodically():
    learner = QLearner(QHead(shape()), QSettings(target_every=2))
    learner.update(chain())
    assert not torch.equal(learner.target.out.bias, learner.head.out.bias)
    learner.update(chain())
    assert torch.equal(learner.target.out.bias, learner.head.out.bias)


def test_a_head_starts_at_one_half_and_comes_back_from_disk(tmp_path: Path):
    head = QHead(shape())
    assert head(torch.randn(3, 4)).tolist() == [[0.5, 0.5]] * 3
    torch.nn.init.normal_(head.out.weight)
    save_q_head(head, tmp_path)
    again = load_q_head(tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(again(x), head(x)) and again.shape == head.shape


def test_what_is_wrong_with_a_saved_head_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match="train-q"):
        load_q_head(tmp_path)
    save_q_head(QHead(shape()), tmp_path)
    content = json.loads((tmp_path / SHAPE).read_text())
    content["shape"]["num_actions"] = 3
    (tmp_path / SHAPE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"out\.bias"):
        load_q_head(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot read"):
        load_q_head(tmp_path)


def test_settings_that_cannot_work_are_all_named():
    with pytest.raises(ValueError, match=r"updates is 0.*discount is 2.*heldout_share is 0"):
        QSettings(updates=0, discount=2, heldout_share=0)


def test_auc_by_hand():
    # pairs (0.9, 0.1), (0.9, 0.5) won, (0.5, 0.1) won, (0.5, 0.5) tied: 3.5 of 4
    assert auc(np.array([0.9, 0.1, 0.5, 0.5]), np.array([True, False, True, False])) == 3.5 / 4
    assert auc(np.array([1.0, 2.0]), np.array([True, True])) is None


def test_success_is_the_verifiers_whatever_is_rewarded(config: Config, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Where success earns 0.2, no rollout counted as one."""
    rollouts = sample(make_runner(config(), tiny_checkpoint))
    writer = ReplayWriter(tmp_path / "replay", 64, "a")
    good = [number % 3 == 0 for number in range(len(rollouts))]
    writer.add([replace(r, success=s, reward=0.3 * s - 0.1) for r, s in zip(rollouts, good, strict=True)])
    writer.close()
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    held = read_rollouts([DataSource(kind="replay", path=str(tmp_path))], world=world_hash(model))
    found = measures(model, new_head(model, QSettings(), seed=0), held)
    assert found["auc_last"] == 0.5, "a new head ranks all alike"
