"""A run whose episodes are agent programs: its workers, and with them their gateways, are killed; nothing is lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from chaos_tools import ROOT, WORKER, Run, assert_whole, running
from transformers import AutoTokenizer

from latent_control import LatentActionLM

pytest_plugins = ("rl_fixtures",)
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]
UPDATES_HERE = 12
PROGRAM = ROOT / "tests" / "support" / "numbers_agent.py"
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
    options = f"python: {os.environ['VERIFIERS_PYTHON']}, folder: {TASKSETS}, train: 64, heldout: 16"
    settings = (
        f"task={{name: verifiers/even_numbers, options: {{{options}}}}}",
        "actions.data=[{kind: task, task: {name: countdown}}]",
        "reward.weights={score: 1.0}",
        "rollout.turns={max_turns: 2, max_tokens: 48}",
    )
    run = Run(tmp_path / "run", model.save_pretrained(tmp_path / "checkpoint"), *settings, updates=4)
    with running(run):
        run.start().end(seconds=1700)
    assert_whole(run, 4)
    stored = run.rollouts()
    assert len(stored) == 64 and stored.failure.isna().all() and stored.reward.nunique() > 2
