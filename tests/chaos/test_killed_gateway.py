"""Runs whose episodes are agent programs: ours, an unchanged agent of an SDK, an environment of ``verifiers``; workers,
and with them their gateways, are killed, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from chaos_tools import ROOT, WORKER, Run, assert_whole, running
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from configs.schema import Architecture
from latent_control import LatentActionLM
from latent_control.text import encode_messages
from learners.base_training import new_model, word_tokenizer
from pipeline.integrity.audit import audit

pytest_plugins = ("rl_fixtures",)
pytestmark = [pytest.mark.timeout(7200), pytest.mark.slow]
UPDATES_HERE = 12
PROGRAM = ROOT / "tests" / "support" / "numbers_agent.py"
AGENT = ROOT / "tests" / "support" / "agent_with_two_tools.py"
TASKSETS = ROOT / "tests" / "support" / "verifiers_tasksets"
SETTINGS = (
    f"task={{name: gateway/numbers, options: {{program: {PROGRAM}, parallel: 8}}}}",
    "actions.data=[{kind: task, task: {name: countdown}}]",
    "reward.weights={score: 1.0}",
    "rollout.turns={max_turns: 2, max_tokens: 48}",
)


def programs() -> list[int]:
    """The programs that are at work."""
    every = psutil.process_iter(["cmdline"])
    return [one.pid for one in every if str(PROGRAM) in (one.info["cmdline"] or [])]


def test_a_killed_gateway_costs_nothing_and_episodes_train(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Which calls are decoded together hangs on when they come, so weights equal those of another run to rounding only:
    what must hold is that every episode is there once, whole, and that the audit finds nothing."""
    run = Run(tmp_path / "hurt", tiny_checkpoint, *SETTINGS, updates=UPDATES_HERE)
    with running(run):
        run.start()
        for update in (2, 5):
            run.reach(update)
            run.actors(WORKER)[0].kill()
        run.end()
    assert_whole(run, UPDATES_HERE)
    stored = run.rollouts()
    assert len(stored) == 16 * UPDATES_HERE >= 64 and stored.failure.isna().all()
    assert all(len(turns) == 2 for turns in stored.turn_rewards)
    rewards = [record["reward"] for record in run.metrics()]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1, rewards
    assert not programs()


@pytest.fixture
def calling(tmp_path: Path) -> Path:
    """A checkpoint whose base LM has learned one conversation by heart: two calls, each with its result, an answer."""
    calls = [json.dumps({"name": name, "arguments": {"a": a, "b": 4 if a == 5 else 3}}, separators=(",", ":"))
             for name, a in (("add", 2), ("times", 5))]  # fmt: skip
    said = [f"<tool_call> {calls[0]} </tool_call>", f"<tool_call> {calls[1]} </tool_call>", "20"]
    turns = [{"role": "system", "content": "Use the tools."}, {"role": "user", "content": "(2 + 3) * 4?"}]
    for words, result in zip(said, ("5", "20", ""), strict=True):
        turns += [{"role": "assistant", "content": words}, {"role": "tool", "content": result}]
    tokenizer = word_tokenizer([*{word for turn in turns for word in [turn["role"], *turn["content"].split()]}])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}<s> "
        "assistant{% endif %}{# knows the role tool #}"
    )
    ids = torch.tensor([encode_messages(tokenizer, turns[:-1])])
    torch.manual_seed(5)
    lm = new_model(Architecture(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
                   tokenizer)  # fmt: skip
    steps = torch.optim.Adam(lm.parameters(), 1e-2)
    for _ in range(150):
        steps.zero_grad()
        lm(input_ids=ids, labels=ids).loss.backward()
        steps.step()
    for part in (lm, tokenizer):
        part.save_pretrained(tmp_path / "base")
    layers = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_layers": 1}
    return LatentActionLM.from_base(tmp_path / "base", num_actions=8, seed=1, **layers).save_pretrained(tmp_path / "c")


@pytest.mark.skipif("AGENTS_PYTHON" not in os.environ, reason="AGENTS_PYTHON names an interpreter with openai-agents")
def test_an_unchanged_agent_of_the_openai_sdk_is_trained(calling: Path, tmp_path: Path) -> None:
    """It calls one tool, then the other with its result, then answers: three turns, each recorded as it was sampled."""
    options = f"program: {AGENT}, interpreter: {os.environ['AGENTS_PYTHON']}, parallel: 2"
    settings = (
        f"task={{name: gateway/sdk, options: {{{options}}}}}",
        "actions.data=[{kind: task, task: {name: countdown}}]",
        "reward.weights={score: 1.0}",
        "rollout.num_workers=1",
        "rollout.turns={max_turns: 5, max_tokens: 120}",
        "improve.prompts_per_update=2",
        "improve.group_size=2",
    )
    run = Run(tmp_path / "run", calling, *settings, updates=2)
    with running(run):
        run.start().end(seconds=3000)
    stored = run.rollouts()
    assert len(stored) == 8 and stored.failure.isna().all() and stored.success.all()
    assert [one for one in audit(run.folder) if not one.passed] == []
    assert sorted(set(stored.policy_version)) == [0, 1]
    for one in stored.itertuples():
        assert len(one.turn_rewards) == 3 and len(one.tokens) == len(one.actions) == len(one.action_logp)
        assert 9 <= sum(one.generated) < len(one.tokens), "results are there, and are not trained on"


@pytest.mark.skipif(
    "VERIFIERS_PYTHON" not in os.environ, reason="VERIFIERS_PYTHON names the interpreter of an environment with it"
)
def test_64_episodes_of_a_verifiers_environment_train(
    tiny_base: Path, tmp_path: Path, randomise: Callable[[LatentActionLM], LatentActionLM]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(base)
    layers = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_layers": 1}
    model = randomise(LatentActionLM.from_base(base, num_actions=8, seed=1, **layers))
    model.codebook.data *= 8
    options = f"python: {os.environ['VERIFIERS_PYTHON']}, folder: {TASKSETS}, train: 64, heldout: 16, parallel: 8"
    settings = (
        f"task={{name: verifiers/even_numbers, options: {{{options}}}}}",
        "rollout.num_workers=1",
        "actions.data=[{kind: task, task: {name: countdown}}]",
        "reward.weights={score: 1.0}",
        "rollout.turns={max_turns: 2, max_tokens: 48}",
    )
    run = Run(tmp_path / "run", model.save_pretrained(tmp_path / "checkpoint"), *settings, updates=4)
    with running(run):
        run.start().reach(1, seconds=3000)
        run.actors(WORKER)[0].kill()
        run.end(seconds=3000)
    assert_whole(run, 4)
    stored = run.rollouts()
    assert len(stored) == 64 and stored.failure.isna().all() and stored.reward.nunique() > 2
