"""``config check`` plays rows' own answers through their verifier; ``task check`` finds no less and exits the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.schema import TaskConfig
from pipeline.cli.main import app
from pipeline.cli.options import FAILED, USAGE
from pipeline.preflight import answers
from pipeline.preflight.answers import check_answers
from rollout_workers.tasks import build_task

BASE = Path(__file__).resolve().parents[2] / "configs" / "models" / "countdown-1m"
BAD = {
    "math": ["\\frac{1}{", "$$", "\\boxed{"],
    "number": ["none at all", "1/0", "9" * 20_000],
    "contains": ["\u200b"],
    "regex": ["(", "a{2,1}", "*"],
}
FINE = {
    "math": ["\\sqrt{2}", "A", "(A)", "2,3", "10^{-3}", "yes", "10:30", "x=1"],
    "number": ["1,234", "½", "1e-3", "#### 7", "-7 degrees"],
    "contains": ["北京", "7", "New York", "C++", "?"],
    "exact": ["北京", "7", "New York", "\\sqrt{2}", "４２"],
    "regex": ["^\\d+$", "yes|no", "7"],
}


def rows_of(folder: Path, given: list[str], *more: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    rows = [{"prompt": f"{i} + {i} =", "answer": answer} for i, answer in enumerate(given)] + list(more)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(folder: Path, path: Path, **options: Any) -> Path:
    config = folder / "config.yaml"
    task = {"name": "jsonl", "options": {"path": str(path), "heldout_share": 0.4, **options}}
    config.write_text(json.dumps({"base": {"model": str(BASE)}, "task": task}))
    return config


def said(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*arguments])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize(("verifier", "answer"), [(verifier, answer) for verifier in BAD for answer in BAD[verifier]])
def test_an_answer_that_its_verifier_cannot_read_is_refused_by_both(tmp_path: Path, verifier: str, answer: str) -> None:
    good = ["1", "2", "3", "4", "5", "6", "7"]
    config = configured(tmp_path, path := rows_of(tmp_path, [*good[:4], answer, *good[4:]]), verifier=verifier)
    remedy = "mend or remove the row" if verifier == "contains" else "task.options.verifier: exact"
    for command in (["config", "check"], ["task", "check", "--prompts", "2"]):
        code, text = said(*command, str(config))
        assert code == USAGE and f"{path}, line 5" in text and "mend" in text and remedy in text, text


@pytest.mark.parametrize("verifier", FINE)
def test_answers_that_are_right_by_their_own_verifier_pass(tmp_path: Path, verifier: str) -> None:
    path = rows_of(tmp_path, FINE[verifier])
    task = build_task(TaskConfig(name="jsonl", options={"path": str(path), "verifier": verifier, "heldout_share": 0.4}))
    assert check_answers(task) == ([], [])


def test_the_first_few_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    path = rows_of(tmp_path, ["1", *(f"\\frac{{{i}}}{{" for i in range(9)), "2"])
    task = build_task(TaskConfig(name="jsonl", options={"path": str(path), "verifier": "math", "heldout_share": 0.4}))
    errors, _ = check_answers(task)
    assert len(errors) == 4 and errors[-1] == "task: 6 more of 11 answers of jsonl are so"


def test_a_sample_is_said_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST", {"exact": 8})
    path = rows_of(tmp_path, [f"{i}" for i in range(30)], {"prompt": "again?", "answer": "7"})
    task = build_task(TaskConfig(name="jsonl", options={"path": str(path)}))
    (line,) = check_answers(task)[1]
    assert "8 of 30 answers of jsonl were judged" in line and "22 were left out" in line


def test_members_of_a_mixture_are_looked_at(tmp_path: Path) -> None:
    rows = {"path": str(rows_of(tmp_path, ["1", "2", "\\frac{1}{", "4"])), "verifier": "math", "heldout_share": 0.4}
    task = build_task(TaskConfig(name="mixture", options={"tasks": ["countdown", {"name": "jsonl", "options": rows}]}))
    errors, _ = check_answers(task)
    assert len(errors) == 1 and "rows.jsonl, line 3: the answer" in errors[0] and "verifier math" in errors[0]


def test_a_reward_function_that_fails_on_an_answer(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def reward(row, response): return 1 / len(row['answer'] or 'x')")
    python = {"path": str(tmp_path / "reward.py")}
    config = configured(tmp_path, rows_of(tmp_path, ["1", "2", "3"]), verifier="python", python=python)
    assert said("config", "check", str(config))[0] == 0 and said("task", "check", str(config))[0] == 0
    config = configured(tmp_path, rows_of(tmp_path, ["1", "", "3", "4"]), verifier="python", python=python)
    assert said("config", "check", str(config))[0] == 0
    (tmp_path / "reward.py").write_text("def reward(row, response): return 1 / len(row['answer'])")
    for command in ("config", "task"):
        code, text = said(command, "check", str(config))
        assert code == USAGE and "line 2" in text and "ZeroDivisionError" in text and "mend the function" in text, text


def test_task_check_finds_what_config_check_finds_in_a_task(tmp_path: Path) -> None:
    config = configured(tmp_path, rows_of(tmp_path, ["1", "2", "3", "4"]))
    config.write_text(json.dumps({**json.loads(config.read_text()), "reward": {"weights": {"succes": 1.0}}}))
    found = [said(command, "check", str(config)) for command in ("config", "task")]
    assert [code for code, _ in found] == [USAGE, USAGE] and all("did you mean 'success'" in text for _, text in found)
    assert FAILED != USAGE
