"""The base LM's own responses as rows: all of them, of the training prompts only, repeatable, and fit to find codes
on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rl_tools import Config
from typer.testing import CliRunner

from configs.loading import dump_config
from configs.schema import RunConfig
from pipeline.cli.main import app
from pipeline.experiments.sample_base import sample
from rollout_workers.tasks import build_task
from rollout_workers.tasks.sampled_ids import COLUMN

pytest_plugins = ("rl_fixtures",)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} 7 25 -> 29 :", "answer": "25"}) + "\n" for i in range(1, 31)))
    return path


def settings_of(config: Config, rows: Path, *, options: dict[str, Any] | None = None, **rollout: Any) -> RunConfig:
    task = {"name": "jsonl", "options": {"path": str(rows), **(options or {})}}
    return config(task=task, rollout={"max_new_tokens": 24, "num_workers": 1, **rollout})


def written(settings: RunConfig) -> str:
    """As a file: `sample` needs no stages."""
    return dump_config(settings.model_copy(update={"improve": None}))


def test_responses_that_ended_become_rows(ray_session: None, config: Config, rows: Path, tmp_path: Path) -> None:
    settings = settings_of(config, rows)
    said: list[str] = []
    found = sample(settings, tmp_path / "a.jsonl", 12, said.append)
    train = [prompt.text for prompt in build_task(settings.task).prompts("train")]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert found.prompts == len(train) < 30 and found.responses == 12 * len(train)
    # A random LM over 160 tokens ends one response in seven within 24.
    assert 0 < len(found.rows) == len(lines) < found.responses
    assert {row["prompt"] for row in lines} <= set(train)
    assert not any(row[COLUMN]["truncated"] for row in lines)
    assert said[-1].startswith(f"sampled {12 * len(train)}/{12 * len(train)} responses")


@pytest.mark.slow
def test_two_workers_sample_what_one_does(ray_session: None, config: Config, rows: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        sample(settings_of(config, rows, num_workers=workers), tmp_path / f"{workers}.jsonl", 12, print)
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text() != ""


def test_nothing_that_ends_is_kept_and_said(ray_session: None, config: Config, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(written(settings_of(config, rows, max_new_tokens=1)))
    done = CliRunner().invoke(app, ["sample", str(tmp_path / "c.yaml"), "--samples", "1"])
    assert done.exit_code == 0, done.output
    assert "did not end within rollout.max_new_tokens=1" in done.output and "kept, marked as truncated" in done.output
    assert "prompts: '" in done.output and "7 25 -> 29 :'" in done.output
    lines = [json.loads(line) for line in (tmp_path / "c-samples.jsonl").read_text().splitlines()]
    assert lines and all(row[COLUMN]["truncated"] for row in lines)


@pytest.mark.slow
def test_rewards_that_fail_are_counted_and_named(ray_session: None, config: Config, rows: Path, tmp_path: Path) -> None:
    """On every response: exit code 1. On some: 0. The rows are written all the same."""
    (tmp_path / "judge.py").write_text("def reward(row, response):\n    return row['gold']\n")
    options = {"verifier": "python", "python": {"path": str(tmp_path / "judge.py")}}
    (tmp_path / "c.yaml").write_text(written(settings_of(config, rows, options=options)))
    done = CliRunner().invoke(app, ["sample", str(tmp_path / "c.yaml"), "--samples", "4"])
    assert done.exit_code == 1, done.output
    count = 4 * len(build_task(settings_of(config, rows).task).prompts("train"))
    assert f"{count} of {count} responses could not be judged: " in done.output and "KeyError" in done.output
    assert "success is nan" not in done.output and (tmp_path / "c-samples.jsonl").is_file()
    (tmp_path / "judge.py").write_text("def reward(row, response):\n    return 1.0 if len(response) % 5 else [][0]\n")
    done = CliRunner().invoke(
        app, ["sample", str(tmp_path / "c.yaml"), "--samples", "4", "-o", str(tmp_path / "d.jsonl")]
    )
    assert done.exit_code == 0 and "responses could not be judged: " in done.output and "IndexError" in done.output
    assert "success is 1.000" in done.output


@pytest.mark.slow
def test_responses_end_at_strings(ray_session: None, config: Config, rows: Path, tmp_path: Path) -> None:
    """A base that never ends by itself: with a string that it does say, its rows end, and have no more of it."""
    settings = settings_of(config, rows, stop=["3", "+"])
    found = sample(settings, tmp_path / "a.jsonl", 6, print)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(lines) > found.responses / 2
    assert not any("3" in row["answer"] or "+" in row["answer"] for row in lines)
