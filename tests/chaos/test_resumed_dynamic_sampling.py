"""A run with dynamic sampling and a curriculum over few prompts: no update holds a group of equal rewards, ledger and
replay buffer know all that was sampled, and a kill changes nothing."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chaos_tools import EVERY, PROMPTS, Run, running

from pipeline.integrity.audit import audit
from pipeline.rl import ledger

pytest_plugins = ("rl_fixtures",)
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]

UPDATES = 7


REWARD = """
def reward(row, response):
    return float(sum(map(ord, response)) % 2)
"""


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Twelve prompts, two rollouts each, of which half have equal rewards by chance.

    No prefix cache: a prompt that comes again has its states from it, which differ in last bits from those that a
    resumed worker computes.
    """
    numbers = itertools.islice(itertools.combinations((2, 3, 5, 7, 8, 9), 3), 12)
    rows = [{"prompt": f"{a} {b} {c} -> {a + b + c} :", "answer": str(a + b + c)} for a, b, c in numbers]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(REWARD)
    options = f"path: {tmp_path / 'rows.jsonl'}, heldout_share: 0.1, verifier: python"
    return [
        f"task={{name: jsonl, options: {{{options}, python: {{path: {tmp_path / 'reward.py'}}}}}}}",
        *("reward.weights=null", "improve.group_size=2", "improve.dynamic_sampling=6", "improve.curriculum=0.5"),
        "rollout.prefix_cache_mb=0",
    ]


def rows_of(run: Run) -> list[ledger.Attempt]:
    """The ledger without what differs from start to start."""
    return [replace(one, worker=0, attempt=0) for one in ledger.read(run.folder, "improve").attempts]


def test_no_update_has_tied_groups_and_a_killed_run_ends_as_one_that_was_left_alone(
    tiny_checkpoint: Path, tmp_path: Path, settings: list[str]
) -> None:
    left, killed = (Run(tmp_path / name, tiny_checkpoint, *settings, updates=UPDATES) for name in ("left", "killed"))
    with running(left.start()):
        left.end()
    with running(killed.start()):
        killed.reach(EVERY + 1)
        killed.signal()
        killed.end(expected=-9)
        killed.start().end()

    metrics, attempts = left.metrics(), rows_of(left)
    assert [one["tied_groups"] for one in metrics] == [0.0] * UPDATES
    outcomes = Counter(one.outcome for one in attempts)
    assert outcomes["trained"] == UPDATES * PROMPTS
    assert outcomes["tied"] == sum(one["extra_groups"] for one in metrics) > UPDATES
    assert outcomes["passed"] == sum(one["prompts_passed"] for one in metrics) > 0
    stored = left.rollouts()
    assert len(stored) == 2 * (outcomes["trained"] + outcomes["tied"]) and stored.rollout_id.is_unique

    for run in (left, killed):
        assert [one for one in audit(run.folder) if not one.passed] == []
    (prompts,) = [one.answer for one in audit(left.folder) if one.question == "prompts"]
    assert f"{outcomes['tied']} left out" in prompts and f"{outcomes['passed']} passed over" in prompts
    assert rows_of(killed) == attempts
    assert [one["reward"] for one in killed.metrics()] == [one["reward"] for one in metrics]
    found, wanted = killed.weights(), left.weights()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_audit_names_a_group_that_was_left_out_though_its_rewards_differ(
    tiny_checkpoint: Path, tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", tiny_checkpoint, *settings, updates=2)
    with running(run.start()):
        run.end()
    read = ledger.read

    def wrong(run_dir: Path, stage: str) -> ledger.Recorded:
        recorded = read(run_dir, stage)
        mixed = next(one for one in recorded.attempts if one.outcome == "trained" and not one.equal_rewards)
        parts = [
            replace(p, attempts=tuple(replace(a, outcome="tied") if a == mixed else a for a in p.attempts))
            for p in recorded.parts
        ]
        return replace(recorded, parts=tuple(parts))

    monkeypatch.setattr(ledger, "read", wrong)
    (found,) = [one for one in audit(run.folder) if one.question == "prompts"]
    assert not found.passed and "was left out as tied, but its rewards are [0.0, 1.0]" in found.answer
