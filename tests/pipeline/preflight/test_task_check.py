"""``task check`` on tasks that are well and on tasks that are not, and the examples of docs/tasks.md."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.schema import TaskConfig
from pipeline.cli.main import app
from pipeline.preflight import task_check
from rollout_workers.tasks import Prompt, Score
from rollout_workers.tasks.countdown import Countdown

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


def checked(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["task", "check", *arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


def test_a_task_that_is_well() -> None:
    code, result = checked("countdown", "task.options.skill=1.0", "task.options.numbers=4", "--prompts", "8")
    assert code == 0 and result["problems"] == [] and result["warnings"] == []
    rows = {row["answers"]: row for row in result["rows"]}
    assert rows["gold"]["success"] == 1.0 and rows["gold"]["number"] == 8 and rows["gold"]["ms_each"] > 0
    assert all(rows[kind]["success"] == 0.0 for kind in ("of others", "scrambled", "odd"))
    assert result["splits"]["heldout"]["prompts"] == 10_000 and result["splits"]["train"]["different"] > 400


def test_demonstrations_that_do_not_solve_are_worth_a_look() -> None:
    code, result = checked("countdown", "task.options.skill=0.0", "--prompts", "4")
    assert code == 0 and "gold answers succeed in 0% only" in result["warnings"][0]
    assert "the reward carries no training signal" in result["warnings"][-1]


class Moody(Countdown):
    """Another verdict each time, and the held-out prompts in training."""

    calls = 0

    def prompts(self, split: Any) -> Sequence[Prompt]:
        """Always the held-out ones."""
        return super().prompts("heldout")

    def score(self, prompt: Prompt, text: str) -> Score:
        """Counts."""
        Moody.calls += 1
        return Score(reward=float(Moody.calls), success=False, parts={"success": 0.0})


def test_a_task_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_workers.tasks.build_task", lambda _: Moody())  # once by the builder
    monkeypatch.setattr(task_check, "build_task", lambda _: Moody())  # and its twin
    problems = task_check.check(TaskConfig(), count=4, seed=0)["problems"]
    assert any("prompts are in both splits" in p for p in problems)
    assert any("not deterministic: 4 of 4 gold answers" in p for p in problems)
    assert any("parts of a score and of the task differ by format" in p for p in problems)


def test_a_reward_that_fails_on_gold_answers_is_wrong_and_printing_is_said(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i}?", "answer": "{i}"}}\n' for i in range(30)))
    (tmp_path / "reward.py").write_text(
        "def reward(row, response):\n    print('here')\n    return 1 / (response != row['answer'])\n"
    )
    options = f"task.options={{path: {tmp_path}/rows.jsonl, verifier: python, python: {{path: {tmp_path}/reward.py}}}}"
    code, result = checked("jsonl", options, "--prompts", "4")
    assert code == 2 and len(result["problems"]) == 1 and "ZeroDivisionError" in result["errors"][0]
    assert "4 gold answers could not be judged, e.g. reward_error: ZeroDivisionError" in result["problems"][0]
    assert any("prints, which is not shown: 'here" in warning for warning in result["warnings"])


def test_usage_errors_exit_with_2() -> None:
    for arguments in (["countdwn"], ["countdown", "task.options.numbrs=3"], ["no.yaml"]):
        done = CliRunner().invoke(app, ["task", "check", *arguments])
        assert done.exit_code == 2 and "error:" in done.output


def blocks(marker: str) -> list[tuple[str, str]]:
    """(what the marker says, the fenced block after it)"""
    return re.findall(rf"<!-- {marker}:? ?([\w.]*) -->\n```\w+\n(.*?)```", DOCS, re.DOTALL)


def test_the_examples_of_the_docs_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    for name, text in blocks("file"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = [line.split()[1:] for _, block in blocks("run") for line in block.splitlines()]
    assert len(commands) == 3 and len(blocks("file")) == 5
    for command in commands:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0 and done.output.rstrip().endswith("ok"), done.output


def test_the_docs_name_every_task_and_verifier() -> None:
    from typing import get_args

    from rollout_workers.tasks import TASKS
    from rollout_workers.tasks.scorer_options import Verifier

    assert all(f"`{name}`" in DOCS for name in (*TASKS, *get_args(Verifier)))
