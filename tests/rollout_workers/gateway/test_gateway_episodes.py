"""Agent programs through the gateway: the same episodes as by the built-in player, and what is said of the others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ray.rllib.core.columns import Columns
from rl_tools import NUM_ACTIONS, WIDTH, rl_config
from toy_world import WORDS

from configs.schema import Architecture, TaskConfig
from latent_control import LatentActionLM
from latent_control.pretrained import read_shape
from learners.base_training import new_model, word_tokenizer
from learners.collate import collate
from pipeline.rl.config import algorithm_config
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.rollouts import HostSpec, Rollout, RolloutRequest
from rollout_workers.tasks import build_task

SUPPORT = Path(__file__).resolve().parents[2] / "support"
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }}</s> {% endfor %}{% if add_generation_prompt %}<s> "
    "assistant{% endif %}"
)
REQUEST = RolloutRequest(
    request_id=0, split="train", prompt_indices=(0, 1, 2, 3), seeds=(3,) * 4, group_size=2, ship_features=True,
    temperature=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, randomise: Callable[[LatentActionLM], LatentActionLM]) -> Path:
    """Eight codes on a random base that knows the toy's words and a chat template."""
    folder = tmp_path_factory.mktemp("gateway")
    tokenizer = word_tokenizer((*WORDS, "user", "assistant"))
    tokenizer.chat_template = TEMPLATE
    shape = Architecture(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        new_model(shape, tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    layers = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_layers": 1}
    model = randomise(LatentActionLM.from_base(folder / "base", num_actions=NUM_ACTIONS, seed=1, **layers))
    model.codebook.data *= 8
    return model.save_pretrained(folder / "checkpoint")


def program(*arguments: str, file: str = "keys_agent.py", **options: Any) -> TaskConfig:
    """A task that plays a program of the tests."""
    return TaskConfig(
        name="gateway/keys",
        options={"program": str(SUPPORT / file), "arguments": list(arguments), "parallel": 4, **options},
    )


def worker(checkpoint: Path, task: TaskConfig, **turns: Any) -> LMEnvRunner:
    """A rollout worker in this process."""
    limits = {"max_turns": 4, "max_tokens": 120, **turns}
    config = rl_config(checkpoint.parent / "base", rollout={"max_new_tokens": 5, "turns": limits}, task=task)
    shape = read_shape(checkpoint)
    rllib = algorithm_config(
        config, HostSpec(level="latent", checkpoint=str(checkpoint)), num_actions=NUM_ACTIONS,
        reads=shape.policy_state, late_blocks=shape.late_blocks, learning_rate=1e-2, span=shape.span,
    )  # fmt: skip
    return LMEnvRunner(config=rllib, worker_index=0)


@pytest.fixture
def played(checkpoint: Path) -> Iterator[Callable[..., list[Rollout]]]:
    """``played(task, turns=..., **request)``: the rollouts of a worker that ends with the test."""
    workers = []

    def play(task: TaskConfig, turns: dict[str, Any] | None = None, **request: Any) -> list[Rollout]:
        workers.append(worker(checkpoint, task, **(turns or {})))
        return workers[-1].sample(request=replace(REQUEST, **request))

    yield play
    for one in workers:
        one.stop()


@pytest.mark.parametrize("way", ["text", "chat"])
def test_an_episode_is_the_one_that_the_built_in_player_plays(played: Callable[..., list[Rollout]], way: str) -> None:
    ours = played(TaskConfig(name="environment/toy_world:Keys", chat=way == "chat"))
    theirs = played(program(way))
    assert len(ours) == len(theirs) == 8 and len({len(one) for one in ours}) > 2
    assert not [one.failure for one in theirs if one.failure]
    for one, other in zip(ours, theirs, strict=True):
        for name in ("prompt_tokens", "tokens", "actions", "generated", "action_versions", "turn_rewards"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        np.testing.assert_allclose(one.action_logp, other.action_logp, atol=1e-4)
        np.testing.assert_allclose(one.features, other.features, atol=1e-4)
        assert (one.policy_version, one.text, one.prompt_text) == (other.policy_version, other.text, other.prompt_text)
        assert (one.reward, one.success) == (other.reward, other.success)


# -- what is no episode to train on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "options", "kind", "said"),
    [
        ("rewrite", {}, "history_changed", "messages.1 is not what it was"),
        ("retokenise", {}, "history_changed", "its text does not begin with the last prompt and reply"),
        ("foreign_ids", {}, "history_changed", "differ from the sampled ones at token"),
        ("no_reward", {}, "reward_missing", "the program ended with 0"),
        ("no_calls", {}, "no_calls", "the program ended with 3: ZeroDivisionError"),
        ("hang", {"seconds": 2.0}, "episode_timeout", "longer than 2 s; raise task.options.seconds"),
        ("no_part", {"parts": ["style"]}, "reward_invalid", "no part 'style'"),
    ],
)
def test_what_is_wrong_with_an_episode_is_said_and_not_trained_on(
    played: Callable[..., list[Rollout]], way: str, options: dict[str, Any], kind: str, said: str
) -> None:
    (one,) = played(program(way, file="faulty_agent.py", **options), prompt_indices=(0,), seeds=(1,), group_size=1)
    assert one.failure is not None and one.failure.startswith(f"{kind}: ") and said in one.failure
    assert one.reward is None and one.finish_reason == "lost" and len(one.tokens) == len(one.action_logp) > 0
    batch = collate([one])
    assert not batch[Columns.LOSS_MASK].any() and batch["features"].shape[1] == len(one.prompt_tokens) + len(one) - 1


@pytest.mark.parametrize("way", ["ids", "tools", "stream", "parts", "hang_up"])
def test_ways_to_go_on_from_what_was_sampled(played: Callable[..., list[Rollout]], way: str) -> None:
    task = program(way, file="faulty_agent.py", **({"parts": ["style"]} if way == "parts" else {}))
    (one,) = played(task, {"max_tokens": 400}, prompt_indices=(0,), seeds=(1,), group_size=1)
    assert one.failure is None and one.reward == 0.5 and one.success
    assert 0 < one.new_tokens < len(one) and one.reward_parts.get("style", 0.25) == 0.25


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_a_program_in_another_language(played: Callable[..., list[Rollout]]) -> None:
    task = program(file="node_agent.mjs", interpreter="node")
    (one,) = played(task, {"max_tokens": 400}, prompt_indices=(0,), seeds=(1,), group_size=1)
    assert one.failure is None and one.reward == 0.5 and one.success and len(one.turn_rewards) == 2


def test_a_limit_cuts_an_episode_and_is_no_failure(played: Callable[..., list[Rollout]]) -> None:
    for turns, end in (({"max_turns": 2}, "turn_limit"), ({"max_tokens": 24}, "token_limit")):
        (one,) = played(program("endless", file="faulty_agent.py"), turns, prompt_indices=(0,), seeds=(1,),
                        group_size=1)  # fmt: skip
        assert (one.failure, one.finish_reason, one.reward) == (None, end, 0.0) and one.reward_parts["truncated"] == 1


def test_requests_that_cannot_be_recorded_are_refused_by_name(tmp_path: Path, checkpoint: Path) -> None:
    """Of each body the status and the words, asked by the program itself."""
    out = tmp_path / "said.json"
    one = worker(checkpoint, program("refusals", str(out), file="faulty_agent.py"))
    try:
        (rollout,) = one.sample(request=replace(REQUEST, prompt_indices=(0,), seeds=(1,), group_size=1))
    finally:
        one.stop()
    assert rollout.failure is None and rollout.new_tokens > 0
    said = json.loads(out.read_text())
    assert len(said) == 15
    for name, message in said.items():
        assert name.partition("=")[0] in message, name
    assert "Incorrect API key" in said["key"]


def test_a_programs_processes_end_with_the_worker(tmp_path: Path, checkpoint: Path) -> None:
    """Killed at any moment, a worker leaves none of its programs, nor what they started."""
    code = (
        "import sys\nfrom rollout_workers.gateway.programs import AgentProgram\n"
        f"AgentProgram([sys.executable, {str(SUPPORT / 'faulty_agent.py')!r}, 'children', {str(tmp_path)!r}], {{}}, "
        "seconds=300.0)\nimport time; time.sleep(300)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    finally:
        owner.kill()
        owner.wait()
    left = [int(path.stem) for path in tmp_path.glob("*.pid")]
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in left))


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Fail unless ``condition`` holds in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


# -- the task ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"task\.options\.program is '', no file; name the agent program"),
        ({"program": "nowhere.py"}, r"task\.options\.program is 'nowhere\.py', no file"),
        (
            {"program": __file__, "interpreter": "no-such-program"},
            "no-such-program is not a program; name",
        ),
        ({"program": __file__, "train": 0}, r"task\.options\.train is 0; give a number above 0"),
        ({"program": __file__, "arguments": "a"}, r"task\.options\.arguments is 'a'; give a list of texts"),
        ({"program": __file__, "parts": ["score"]}, r"task\.options\.parts is \['score'\]; name each once, none of"),
        ({"program": __file__, "path": __file__}, r"task\.options\.path: line 1 of .* is not a JSON object"),
        (
            {"program": __file__, "programm": 1},
            r"task\.options\.programm is not an option of gateway; known: .*, program, ",
        ),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task(TaskConfig(name="gateway/x", options=options))


def test_a_task_of_a_program(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": 1}\n{"question": 2}\n')
    task = build_task(TaskConfig(name="gateway/x", options={"program": __file__, "path": str(rows), "heldout": 3}))
    assert [dict(prompt.metadata) for prompt in task.prompts("train")] == [{"question": 1}, {"question": 2}]
    assert [prompt.id for prompt in task.prompts("heldout")] == [f"gateway/x/heldout/{i}" for i in range(3)]
    with pytest.raises(ValueError, match="has no demonstrations; train on texts, on rollouts"):
        task.demonstrations("train")
    assert "judged by its program" in task.score(task.prompts("train")[0], "").message  # type: ignore[union-attr]


# -- Prime's verifiers, in an environment of its own -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    "VERIFIERS_PYTHON" not in os.environ, reason="VERIFIERS_PYTHON names the interpreter of an environment with it"
)
def test_an_environment_of_verifiers_plays(played: Callable[..., list[Rollout]]) -> None:
    options = {"python": os.environ["VERIFIERS_PYTHON"], "folder": str(SUPPORT / "verifiers_tasksets"), "parallel": 2}
    found = played(
        TaskConfig(name="verifiers/even_numbers", options=options),
        {"max_tokens": 200},
        prompt_indices=(0, 1),
        seeds=(1, 1),
        group_size=1,
    )
    assert [one.failure for one in found] == [None, None]
    assert all(one.new_tokens > 0 and 0 <= one.reward <= 1 for one in found)  # type: ignore[operator]
