"""Episodes of several turns: the mask by hand, log-probabilities against a teacher-forced pass, what ends an episode,
the way to disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from rl_tools import NUM_ACTIONS, WIDTH, rl_config, update
from toy_world import WORDS

from configs.checks import cross_field_problems
from configs.schema import Architecture, DataSource, ImproveOffline, Reward, RunConfig, TaskConfig, Turns
from latent_control import LatentActionLM
from latent_control.algorithms.common import Outcomes
from latent_control.algorithms.reinforce_pp import reinforce_pp
from latent_control.decoding import prefill
from latent_control.decoding.rescoring import choices
from latent_control.distributions import action_log_probs
from latent_control.pretrained import array_hash, read_shape
from learners.base_training import encode_rows, new_model, word_tokenizer
from learners.collate import Places, choice_starts, collate, moved_rewards
from pipeline.data.batches import training_batches
from pipeline.preflight.check import check
from pipeline.replay.dataset import read_rollouts, rollout_batches
from pipeline.replay.reader import ReplayReader
from pipeline.replay.schema import MANIFEST
from pipeline.replay.writer import ReplayWriter
from pipeline.rl.config import algorithm_config
from pipeline.storage.atomic import sha256_file
from rollout_workers.engines import DecodeJob
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.episode_player import PlayedEpisode, Player
from rollout_workers.generated_row import joined, row_of
from rollout_workers.rollouts import HostSpec, PolicyVersion, Rollout, RolloutRequest
from rollout_workers.tasks import AgentTask, Failure, Score, build_task
from rollout_workers.tasks.encoding import encode_episode, encode_observation, shortened

TOY = TaskConfig(name="environment/toy_world:Keys")
TOKENIZER = word_tokenizer((*WORDS, "wait", "60", "crash", "user", "assistant"))
END = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    """Token ids of words; ``/`` is the end token."""
    return [END if word == "/" else TOKENIZER.convert_tokens_to_ids(word) for word in text.split()]


# -- a scripted engine: everything by hand -----------------------------------------------------------------------------


class Script:
    """Says the next line of each episode's script, ``/`` being the end token; remembers what it was asked."""

    tokenizer = TOKENIZER

    def __init__(self, *scripts: Sequence[str]) -> None:
        self.scripts, self.jobs, self.turn = scripts, [], 0
        self.by_seed: dict[int, int] = {}

    def generate(self, job: DecodeJob) -> Any:
        """Codes count from 10 in every turn, their log-probabilities are -0.5."""
        from latent_control.records import Generation

        self.jobs.append(job)
        openings = [tuple(prompt) for prompt in job.prompts] if not self.turn else self.openings
        self.openings = openings
        alive = [next(i for i, start in enumerate(openings) if prompt[: len(start)] == start) for prompt in job.prompts]
        lines = [ids(self.scripts[i][self.turn]) for i in alive]
        self.turn += 1
        length = max(map(len, lines))
        tokens, actions = torch.zeros(len(lines), length, dtype=torch.long), torch.full((len(lines), length), -1)
        for row, line in enumerate(lines):
            tokens[row, : len(line)], actions[row, : len(line)] = torch.tensor(line), torch.arange(10, 10 + len(line))
        return Generation(
            tokens=tokens,
            actions=actions,
            action_logp=torch.where(actions >= 0, -0.5, 0.0),
            lengths=torch.tensor([len(line) for line in lines]),
            finish_reasons=tuple("stop" if line[-1] == END else "length" for line in lines),
            versions=torch.where(actions >= 0, self.turn, -1),
        )


@pytest.fixture(scope="module")
def player() -> Iterator[Callable[..., Player]]:
    """``player(max_turns=..., reward=...)``; one child process for all that only differ in limits."""
    task = build_task(TOY)
    assert isinstance(task, AgentTask)

    def make(reward: Reward | None = None, **limits: Any) -> Player:
        task.worlds.step_seconds = limits.get("step_timeout_seconds", 30.0)
        return Player(
            task=task,
            worlds=task.worlds,
            limits=Turns(**limits),
            reward=reward or Reward(),
            chat=False,
            max_prompt_tokens=64,
        )

    yield make
    task.close()


def play(player: Player, *scripts: Sequence[str], max_new_tokens: int = 4) -> list[PlayedEpisode]:
    """Episode i of seed i says what script i has."""
    job = DecodeJob(prompts=(), repeats=1, seeds=tuple(range(len(scripts))), max_new_tokens=max_new_tokens)
    return player.play(Script(*scripts), [player.task.prompts("train")[i] for i in range(len(scripts))], job)  # type: ignore[arg-type]


def test_an_episode_is_one_row_with_a_mask(player: Callable[..., Player]) -> None:
    """Room 2, key in 1: left, then take."""
    _, played = play(player(), ["go left /", "go left /", "take key /"], ["go left /", "take key /", "never said /"])
    assert list(played.prompt_ids) == [TOKENIZER.bos_token_id, *ids("room 2 . key 1 . >")]
    row = played.row
    assert row.tokens.tolist() == ids("go left / room 1 . key 1 . > take key /")
    assert row.generated.tolist() == [True] * 3 + [False] * 7 + [True] * 3
    assert row.actions.tolist() == [10, 11, 12] + [0] * 7 + [10, 11, 12]
    assert row.action_logp.tolist() == [-0.5] * 3 + [0.0] * 7 + [-0.5] * 3
    assert row.versions.tolist() == [1] * 3 + [-1] * 7 + [2] * 3
    assert (row.finish_reason, played.text) == ("terminated", "go left\ntake key")
    assert played.turn_rewards.tolist() == [0.25, 0.75]
    parts = {"success": 1.0, "score": 1.0, "turns": -2.0, "truncated": 0.0, "length": -6 / 64, "stop": 1.0}
    assert played.verdict == Score(reward=1.0, success=True, parts=parts)
    assert played.prompt.text == "room 2 . key 1 .\n>"


def test_every_turn_decodes_the_live_episodes_on_streams_of_their_own(player: Callable[..., Player]) -> None:
    engine = Script(["go left /", "go left /", "take key /"], ["go left /", "take key /"])
    one = player()
    one.play(
        engine,
        [one.task.prompts("train")[i] for i in range(2)],
        DecodeJob(prompts=(), repeats=1, seeds=(7, 8), max_new_tokens=4),
    )  # type: ignore[arg-type]
    assert [len(job.prompts) for job in engine.jobs] == [2, 2, 1]
    seeds = [seed for job in engine.jobs for seed in job.seeds]
    assert len(set(seeds)) == 5
    assert engine.jobs[1].prompts[0] == (*engine.jobs[0].prompts[0], *ids("go left / room 2 . key 1 . >"))


def test_what_cuts_an_episode_is_said(player: Callable[..., Player]) -> None:
    wander = ["go right /"] * 20
    turns = play(player(max_turns=3), wander)[0]
    assert (turns.row.finish_reason, turns.turn_rewards.tolist()) == ("turn_limit", [0.0] * 3)
    assert turns.row.tokens[-3:].tolist() == ids("go right /")  # what is seen last is followed by nothing
    assert (
        isinstance(turns.verdict, Score)
        and turns.verdict.parts["truncated"] == 1.0
        and turns.verdict.parts["stop"] == 0.0
    )
    # Prompt 8 + 3 + 7 + 3 + 7 tokens; a third response of 4 would pass 31.
    tokens = play(player(max_tokens=31), wander)[0]
    assert tokens.row.finish_reason == "token_limit" and int(tokens.row.generated.sum()) == 6 and len(tokens.row) == 13
    assert len(play(player(max_tokens=32), wander)[0].turn_rewards) == 3
    assert play(player(max_turns=20), wander)[0].row.finish_reason == "environment_limit"  # the world's own, after 12


def test_a_response_that_is_cut_is_closed_by_an_end_token_it_did_not_say(player: Callable[..., Player]) -> None:
    row = play(player(max_turns=2), ["go left go left", "take key /"])[0].row
    assert row.tokens.tolist() == ids("go left go left / nothing . > take key /")
    assert row.generated.tolist() == [True] * 4 + [False] * 4 + [True] * 3


def test_an_episode_that_hangs_is_masked_and_its_neighbour_goes_on(player: Callable[..., Player]) -> None:
    hung, fine = play(player(step_timeout_seconds=1.0), ["go left /", "wait 60 /"], ["go left /", "take key /"])
    assert isinstance(hung.verdict, Failure) and hung.verdict.kind == "environment_timeout"
    assert (hung.row.finish_reason, hung.row.generated.sum(), len(hung.turn_rewards)) == ("lost", 6, 1)
    assert isinstance(fine.verdict, Score) and fine.verdict.success


def test_weights_and_long_observations(player: Callable[..., Player]) -> None:
    weights = Reward(weights={"success": 1.0, "turns": 0.1})
    assert play(player(weights, max_turns=2), *[["go left /", "take key /"]] * 2)[1].verdict.reward == pytest.approx(
        0.8
    )  # type: ignore[union-attr]
    row = play(player(max_observation_tokens=2, max_turns=2), ["go left /", "go left /"])[0].row
    assert row.tokens[3:6].tolist() == ids("room 2 >")


# -- texts and token ids -----------------------------------------------------------------------------------------------


def test_gold_paths_are_encoded_as_they_are_played(player: Callable[..., Player]) -> None:
    task = player().task
    demo = task.demonstrations("train")[1]
    tokens, spoken = encode_episode(TOKENIZER, demo, chat=False)
    played = play(player(max_turns=2), *[["go left /", "take key /"]] * 2)[1]
    assert tokens == [*played.prompt_ids, *played.row.tokens.tolist()]
    assert spoken == [False] * len(played.prompt_ids) + played.row.generated.tolist()
    rows, targets = encode_rows(TOKENIZER, [demo], 64)
    assert rows[0].tolist() == tokens
    assert targets[0].tolist() == [token if mine else -100 for token, mine in zip(tokens, spoken, strict=True)]


def test_a_demonstrator_slips_at_the_stated_share_of_turns_and_ends_there() -> None:
    gold, slipping = AgentTask(TOY.name, {}), AgentTask(TOY.name, {"slip": 0.4})
    turns = slips = 0
    for right, found in zip(gold.demonstrations("train"), slipping.demonstrations("train"), strict=True):
        asked = [right.response, *(response for _, response in right.later)]
        said = [found.response, *(response for _, response in found.later)]
        wrong = [turn for turn, (a, b) in enumerate(zip(asked, said, strict=False)) if a != b]
        assert wrong == [len(said) - 1] * len(wrong) and (wrong or said == asked)
        assert set(said) <= {"go left", "go right", "take key"}
        assert [seen for seen, _ in found.later] == [seen for seen, _ in right.later[: len(said) - 1]]
        turns, slips = turns + len(said), slips + len(wrong)
    again = AgentTask(TOY.name, {"slip": 0.4}).demonstrations("train")
    assert [again[i] for i in range(9)] == [slipping.demonstrations("train")[i] for i in range(9)]
    assert abs(slips / turns - 0.4) < 4 * (0.4 * 0.6 / turns) ** 0.5
    for impossible in (1, -0.1, True, "much"):
        with pytest.raises(ValueError, match=r"task\.options\.slip is"):
            AgentTask(TOY.name, {"slip": impossible})
    gold.close()
    slipping.close()


def test_observations_in_a_chat_template() -> None:
    tokenizer = word_tokenizer((*WORDS, "user", "assistant"))
    tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} {{ m.content }}</s> {% endfor %}{% if add_generation_prompt %}<s> "
        "assistant{% endif %}"
    )
    demo = build_task(TOY).demonstrations("train")[1]
    tokens, spoken = encode_episode(tokenizer, demo, chat=True)
    said = (
        "<s> user room 2 . key 1 . > </s> <s> assistant go left </s> <s> user room 1 . key 1 . > </s> <s> "
        "assistant take key </s>"
    )
    assert tokenizer.decode(tokens).split() == said.split()
    marked = [word for word, mine in zip(said.split(), spoken, strict=True) if mine]
    assert " ".join(marked) == "go left </s> take key </s>"
    cut = encode_observation(tokenizer, "room", chat=True, closed=False)
    assert cut == [END, *encode_observation(tokenizer, "room", chat=True, closed=True)]
    assert shortened(tokenizer, "room 1 . key", 2) == "room 1" and shortened(tokenizer, "room  1", 2) == "room  1"


def test_offline_batches_take_the_loss_on_responses_only() -> None:
    task = build_task(TOY)
    batches = training_batches(
        (DataSource(),), task=task, tokenizer=TOKENIZER, chat=False, batch_size=4, max_length=20, seed=0
    )
    batch = next(batches)
    for row, mask in zip(batch.input_ids.tolist(), batch.response_mask.tolist(), strict=True):
        said = (
            TOKENIZER.decode([token for token, mine in zip(row, mask, strict=True) if mine])
            .replace("</s>", " </s>")
            .split()
        )
        assert set(said) <= {"go", "left", "right", "take", "key", "</s>"} and said[2] == "</s>"
        seen = [token for token, mine in zip(row, mask, strict=True) if not mine]
        assert END not in seen and TOKENIZER.convert_tokens_to_ids("go") not in seen


# -- a real engine and learner -----------------------------------------------------------------------------------------


KINDS: dict[str, dict[str, Any]] = {
    "span 1": {"policy_layers": 1},
    "span 2": {"policy_layers": 1, "span": 2},
    "mlp": {"policy_kind": "mlp", "policy_width": 16},
}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    randomise: Callable[[LatentActionLM], LatentActionLM],
) -> Path:
    """Eight codes on a random base that knows the toy's words."""
    folder = tmp_path_factory.mktemp("agents")
    shape = Architecture(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        new_model(shape, TOKENIZER).save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    layers = {"inverse_dynamics_layers": 1, "merge_layers": 1, **KINDS[request.param]}
    model = randomise(LatentActionLM.from_base(folder / "base", num_actions=NUM_ACTIONS, seed=1, **layers))
    model.codebook.data *= 8
    return model.save_pretrained(folder / "checkpoint")


def configured(checkpoint: Path, **improve: Any) -> tuple[RunConfig, Any]:
    """A run's config on the toy, and RLlib's."""
    turns = {"max_turns": 4, "max_tokens": 120}
    config = rl_config(
        checkpoint.parent / "base", improve=improve, rollout={"max_new_tokens": 5, "turns": turns}, task=TOY
    )
    shape = read_shape(checkpoint)
    host = HostSpec(level="latent", checkpoint=str(checkpoint))
    return config, algorithm_config(
        config,
        host,
        num_actions=NUM_ACTIONS,
        reads=shape.policy_state,
        late_blocks=shape.late_blocks,
        learning_rate=config.improve.learning_rate,
        span=shape.span,
    )


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> Iterator[LMEnvRunner]:
    """A worker in this process."""
    made = LMEnvRunner(config=configured(checkpoint)[1], worker_index=0)
    yield made
    made.stop()


REQUEST = RolloutRequest(
    request_id=0,
    split="train",
    prompt_indices=(0, 1, 2, 3),
    seeds=(3,) * 4,
    group_size=4,
    ship_features=True,
    temperature=0.9,
)


@pytest.fixture(scope="module")
def rollouts(runner: LMEnvRunner) -> list[Rollout]:
    return runner.sample(request=REQUEST)


def test_stored_log_probabilities_are_those_of_one_teacher_forced_pass(
    checkpoint: Path, rollouts: list[Rollout]
) -> None:
    """Codes, tokens, log-probabilities and features of turns that were decoded apart, against one pass over each whole
    row."""
    model = LatentActionLM.from_pretrained(checkpoint)
    span, seen = model.config.span, 0
    for r in rollouts:
        row = torch.from_numpy(np.concatenate([r.prompt_tokens, r.tokens])).long()[None]
        with torch.no_grad():
            features = model.features(row[:, :-1])
            log_probs = action_log_probs(model.policy_logits(features)[0], temperature=0.9)[len(r.prompt_tokens) - 1 :]
            codes = torch.from_numpy(r.actions).long()
            final = features.read("final")[0, len(r.prompt_tokens) - 1 :]
            emitted = model.world_logits_from_codes(final, model.codebook[codes]).argmax(-1).numpy()
        chosen = choices(r.generated, len(r), span)
        found = log_probs.gather(1, codes[:, None])[:, 0].numpy()
        assert np.allclose(r.action_logp[chosen], found[chosen], atol=2e-5)
        assert not r.action_logp[~chosen].any() and (r.action_logp[chosen] < 0).all()
        assert np.array_equal(emitted[r.mask], r.tokens[r.mask])
        read = features.read(model.config.policy_state)[0].numpy()
        read = read[len(r.prompt_tokens) - 1 :] * r.mask[:, None] if model.policy.stateless else read
        assert r.features is not None and np.allclose(r.features, read, atol=2e-5)
        assert len(r.tokens) == len(r.generated) == len(r.actions) == len(r.action_logp)
        seen += int((~r.mask).sum())
    assert seen > 100 and len({len(r) for r in rollouts}) >= 3
    assert all(r.truncated == (r.finish_reason != "terminated") for r in rollouts)


def test_an_episode_does_not_depend_on_its_company(runner: LMEnvRunner, rollouts: list[Rollout]) -> None:
    alone = runner.sample(request=replace(REQUEST, prompt_indices=(2,), seeds=(3,)))
    for one, same in zip(alone, rollouts[8:12], strict=True):
        assert (
            one.rollout_id == same.rollout_id
            and np.array_equal(one.tokens, same.tokens)
            and np.array_equal(one.actions, same.actions)
        )
    assert len({r.text for r in rollouts}) > 4


def test_turns_go_on_from_what_the_base_has_read(
    runner: LMEnvRunner, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same episodes without a prefix tree; with one, openings are read once and turns cost what is new in them."""
    tree = runner.engine.tree
    assert tree is not None and tree.computed > 0
    tree.computed = tree.reused = 0
    monkeypatch.setattr(prefill, "SHARED_TOKENS", 1)
    again = runner.sample(request=replace(REQUEST, seeds=(4,) * 4))
    # New in a turn: the last token of the one before, which was never fed, and the observation; less where two
    # episodes went the same way.
    assert 0 < tree.computed <= sum(int((~r.mask).sum() + (np.diff(r.mask.astype(int)) == 1).sum()) for r in again)
    runner.engine.tree = None
    try:
        alone = runner.sample(request=REQUEST)
    finally:
        runner.engine.tree = tree
    for one, other in zip(rollouts, alone, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.actions.tolist() == other.actions.tolist()
        np.testing.assert_allclose(one.action_logp, other.action_logp, atol=1e-4)
        np.testing.assert_allclose(one.features, other.features, atol=1e-4)


def test_token_counts_leave_observations_out(runner: LMEnvRunner, rollouts: list[Rollout]) -> None:
    _, (summary, _) = runner.sample_request(REQUEST)
    assert (
        summary.tokens == sum(int(r.generated.sum()) for r in rollouts) == sum(count for *_, count in summary.policies)
    )
    assert set(summary.part_means) == {"success", "score", "turns", "truncated", "length", "stop"}


def test_greedy_baselines_are_whole_episodes(runner: LMEnvRunner) -> None:
    found = runner.sample(request=replace(REQUEST, greedy_baseline=True))
    greedy = runner.sample(request=replace(REQUEST, group_size=1, temperature=0.0))
    assert [r.baseline for r in found] == [r.reward for r in greedy for _ in range(4)]


@pytest.mark.parametrize("credit", ["episode", "turn"])
def test_worker_and_learner_agree_and_observations_train_nothing(
    checkpoint: Path, runner: LMEnvRunner, credit: str
) -> None:
    _, rllib = configured(checkpoint, algorithm="reinforce_pp", credit=credit)
    learner = rllib.build_learner(spaces={DEFAULT_MODULE_ID: (rllib.observation_space, rllib.action_space)})
    weights = learner.module[DEFAULT_MODULE_ID].get_state(inference_only=True)
    policy = PolicyVersion(version=0, weights_hash=array_hash(weights), weights=weights)
    rewarded = [
        replace(r, reward=None if r.reward is None else float(i % 3))
        for i, r in enumerate(runner.sample(request=replace(REQUEST, policy=policy, temperature=1.0)))
    ]
    metrics = update(learner, rewarded)
    assert metrics["logp_gap"] < 2e-5 and metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    moved = {name: value.copy() for name, value in learner.module[DEFAULT_MODULE_ID].get_state().items()}
    # The same again with other numbers at observed tokens: nothing may change.
    again = rllib.build_learner(spaces={DEFAULT_MODULE_ID: (rllib.observation_space, rllib.action_space)})
    noisy = [
        replace(r, actions=np.where(r.mask, r.actions, 5), action_logp=np.where(r.mask, r.action_logp, -9))
        for r in rewarded
    ]
    update(again, noisy)
    after = again.module[DEFAULT_MODULE_ID].get_state()
    assert any(not np.array_equal(weights[name], value) for name, value in moved.items())
    assert all(np.array_equal(after[name], value) for name, value in moved.items())


def test_the_token_level_baseline_plays_too(checkpoint: Path) -> None:
    config, _ = configured(checkpoint)
    host = HostSpec(level="token", checkpoint=str(checkpoint.parent / "base"), token_blocks=1)
    rllib = algorithm_config(config, host, num_actions=2, reads="late", late_blocks=1, learning_rate=1e-3)
    learner = rllib.build_learner(spaces={DEFAULT_MODULE_ID: (rllib.observation_space, rllib.action_space)})
    worker = LMEnvRunner(config=rllib, worker_index=0)
    found = worker.sample(request=replace(REQUEST, temperature=1.0))
    worker.stop()
    assert all(np.array_equal(r.actions[r.mask], r.tokens[r.mask]) and not r.actions[~r.mask].any() for r in found)
    assert update(learner, found)["logp_gap"] < 2e-5


@pytest.mark.parametrize(
    ("improve", "reward", "message"),
    [
        ({"algorithm": "grpo", "credit": "turn"}, {}, "grpo compares whole rollouts"),
        ({"algorithm": "ppo", "credit": "turn"}, {"weights": {"success": 1.0}}, "set score: 1.0, or null"),
    ],
)
def test_credit_by_turn_needs_an_algorithm_and_a_reward_that_know_turns(
    tmp_path: Path, improve: dict[str, Any], reward: dict[str, Any], message: str
) -> None:
    (found,) = [m for m in cross_field_problems(rl_config(tmp_path, improve=improve, reward=reward)) if "credit" in m]
    assert message in found


def test_preflight_begins_an_episode_and_knows_the_window(checkpoint: Path) -> None:
    config, _ = configured(checkpoint)
    assert not [e for e in check(config).errors if "turns" in e or "task" in e]
    turns = config.rollout.turns.model_copy(update={"max_tokens": 5000})
    long = config.model_copy(update={"rollout": config.rollout.model_copy(update={"turns": turns})})
    assert "rollout.turns.max_tokens: 5000 passes the window of 512; set at most 512" in check(long).errors
    broken = config.model_copy(update={"task": TaskConfig(name="alfworld/all", options={"data": "nowhere"})})
    assert any(e.startswith("task: alfworld/all cannot begin") for e in check(broken).errors)


# -- what the learner is told, by hand ---------------------------------------------------------------------------------


def test_codes_are_chosen_anew_with_each_response() -> None:
    mask = np.array([1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1], bool)
    assert choices(mask, 11, 1).tolist() == mask.tolist()
    assert choices(mask, 11, 2).astype(int).tolist() == [1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1]
    assert choices(np.empty(0, bool), 5, 2).astype(int).tolist() == [1, 0, 1, 0, 1]


def episode(**changes: Any) -> Rollout:
    """Prompt of 2, then 2 generated, 2 observed, 3 generated."""
    values: dict[str, Any] = dict.fromkeys(Rollout.__dataclass_fields__, "")
    values |= {
        "rollout_id": "a",
        "prompt_id": "toy/train/0",
        "prompt_tokens": np.array([1, 5], np.int32),
        "reward": 1.5,
        "success": True,
    }
    values |= {
        "tokens": np.array([7, 8, 9, 9, 6, 6, 2], np.int32),
        "actions": np.array([3, 4, 0, 0, 1, 2, 3], np.int32),
    }
    values |= {
        "action_logp": np.array([-1, -2, 0, 0, -3, -4, -5], np.float32),
        "generated": np.array([1, 1, 0, 0, 1, 1, 1], bool),
    }
    values |= {
        "turn_rewards": np.array([0.25, 0.75], np.float32),
        "action_versions": np.empty(0, np.int32),
        "support": np.empty(0, np.int32),
        "reward_parts": {},
    }
    values |= {
        "policy_version": 0,
        "seed": 0,
        "worker": 0,
        "created": 1.0,
        "level": "latent",
        "failure": None,
        "world_hash": "w",
    }
    return Rollout(**values | dict.fromkeys(("features", "events", "event_logp", "baseline")) | changes)


def test_collate_masks_observations() -> None:
    batch = collate([episode()])
    assert batch["tokens"].tolist() == [[1, 5, 7, 8, 9, 9, 6, 6]]
    assert batch[Columns.LOSS_MASK].int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 1]]
    assert batch[Columns.ACTIONS].tolist() == [[0, 3, 4, 0, 0, 1, 2, 3]]
    assert collate([episode()], 2)[Columns.LOSS_MASK].int().tolist() == [[0, 1, 0, 0, 0, 1, 0, 1]]
    assert not collate([episode(reward=None)])[Columns.LOSS_MASK].any()


def test_turn_rewards_count_where_they_came() -> None:
    """0.25 in the first turn, 0.75 in the second, and 0.5 more that the weights put on the end."""
    mask = collate([episode()])[Columns.LOSS_MASK]
    moved = moved_rewards([episode()], choice_starts([episode()], False), mask)
    assert moved.tolist() == [[0, 0, 0.25, 0, 0, 0, 0, -0.25]]
    assert moved_rewards([episode(turn_rewards=np.empty(0, np.float32))], [2], mask).any().item() is False
    places = Places(mask)
    outcomes = Outcomes(
        rewards=torch.tensor([1.5]),
        valid=torch.tensor([True]),
        group_size=1,
        taken=places.taken,
        penalties=places.gather(moved),
    )
    assert outcomes.step_rewards().tolist() == [[0, 0.25, 0, 0, 1.25]]
    assert outcomes.totals().tolist() == [[1.5]]
    advantages = reinforce_pp(outcomes).advantages[0]
    assert advantages[0] == advantages[1] > advantages[2] == advantages[4]


def test_the_row_of_an_episode_has_the_last_turns_features() -> None:
    script = Script(["go left /"])
    job = DecodeJob(prompts=((1, 2),), repeats=1, seeds=(0,), max_new_tokens=4)
    turn = replace(row_of(script.generate(job), 0), features=np.ones((4, 2)))
    last = replace(turn, features=np.full((9, 2), 2.0), event_logp=None)
    whole = joined([turn, last], [[5, 5]], "terminated")
    assert whole.features is last.features and whole.tokens.tolist() == [*turn.tokens, 5, 5, *turn.tokens]


# -- replay ------------------------------------------------------------------------------------------------------------


def test_the_replay_buffer_holds_the_mask(tmp_path: Path) -> None:
    writer = ReplayWriter(tmp_path, 100, "a")
    single = episode(
        rollout_id="b", prompt_id="toy/train/1", generated=np.empty(0, bool), turn_rewards=np.empty(0, np.float32)
    )
    writer.add([episode(), single])
    with pytest.raises(ValueError, match="2 marks generated for 7 tokens"):
        writer.add([episode(rollout_id="c", generated=np.ones(2, bool))])
    writer.close()
    first, second = ReplayReader(tmp_path, shuffle=False).rows()
    assert (
        first["generated"].tolist() == [True, True, False, False, True, True, True] and first["generated"].dtype == bool
    )
    assert first["turn_rewards"].tolist() == [0.25, 0.75]
    assert second["generated"].tolist() == [] == second["turn_rewards"].tolist()
    shuffled = {row["rollout_id"]: row["generated"].sum() for row in ReplayReader(tmp_path, seed=1).rows()}
    assert shuffled == {"a": 5, "b": 0}
    stored = read_rollouts([DataSource(kind="replay", path=str(tmp_path))], world="w")
    batch = next(rollout_batches(stored, ImproveOffline(batch_size=8, baseline="all", data=()), seed=0))
    wanted = {0: [0, 0, 1, 1, 0, 0, 1, 1, 1], 1: [0, 0, 1, 1, 1, 1, 1, 1, 1]}
    assert set(batch.index.tolist()) == {0, 1}
    for number, mask in zip(batch.index.tolist(), batch.response_mask.int().tolist(), strict=True):
        assert mask == wanted[number]
    source = DataSource(kind="replay", path=str(tmp_path))
    rows = training_batches(
        (source,), task=build_task(TOY), tokenizer=TOKENIZER, chat=False, batch_size=4, max_length=64, seed=0
    )
    assert {tuple(mask) for mask in next(rows).response_mask.int().tolist()} <= {
        tuple(mask) for mask in wanted.values()
    }


def test_shards_of_schema_3_are_read(tmp_path: Path) -> None:
    writer = ReplayWriter(tmp_path, 100, "a")
    writer.add([episode(generated=np.empty(0, bool), turn_rewards=np.empty(0, np.float32))])
    writer.close()
    (path,) = (tmp_path / "run=a").glob("*.parquet")
    table = pq.read_table(path, partitioning=None).drop_columns(["generated", "turn_rewards", "support"])
    about = json.loads(table.schema.metadata[b"latent_control.replay"]) | {"schema_version": 3}
    path.unlink()
    (tmp_path / "run=a" / MANIFEST).unlink()
    old = path.with_name("old.parquet")
    pq.write_table(table.replace_schema_metadata({b"latent_control.replay": json.dumps(about)}), old)
    old.rename(path.with_name(f"part-00000000-{sha256_file(old)[:8]}.parquet"))
    reader = ReplayReader(tmp_path)
    assert not reader.quarantined
    (row,) = reader.rows()
    assert row["tokens"].tolist() == [7, 8, 9, 9, 6, 6, 2]
    assert row["generated"].tolist() == [] and row["generated"].dtype == bool and row["turn_rewards"].tolist() == []
