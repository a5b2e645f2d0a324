"""The base LM's own responses as rows: all of them, of the training prompts only, repeatable, and fit to find codes
on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rl_tools import Config

from pipeline.experiments.sample_base import sample
from rollout_workers.tasks import build_task

pytest_plugins = ("rl_fixtures",)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} 7 25 -> 29 :", "answer": "25"}) + "\n" for i in range(1, 31)))
    return path


def test_responses_that_ended_become_rows(ray_session: None, config: Config, rows: Path, tmp_path: Path) -> None:
    settings = config(task={"name": "jsonl", "options": {"path": str(rows)}}, rollout={"max_new_tokens": 24})
    said: list[str] = []
    found = sample(settings, tmp_path / "a.jsonl", 12, said.append)
    train = [prompt.text for prompt in build_task(settings.task).prompts("train")]
    written = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert found["prompts"] == len(train) < 30 and found["responses"] == 12 * len(train)
    # A random LM over 160 tokens ends one response in seven within 24.
    assert 0 < found["rows"] == len(written) < found["responses"]
    assert {row["prompt"] for row in written} <= set(train)
    assert said[-1].startswith(f"sampled {12 * len(train)}/{12 * len(train)} responses")
    alone = settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"num_workers": 1})})
    sample(alone, tmp_path / "b.jsonl", 12, said.append)
    assert (tmp_path / "b.jsonl").read_text() == (tmp_path / "a.jsonl").read_text()


def test_nothing_that_ends_is_an_error(ray_session: None, config: Config, rows: Path, tmp_path: Path) -> None:
    settings = config(
        task={"name": "jsonl", "options": {"path": str(rows)}}, rollout={"max_new_tokens": 1, "num_workers": 1}
    )
    with pytest.raises(ValueError, match=r"none of \d+ responses ended within rollout.max_new_tokens=1; raise it"):
        sample(settings, tmp_path / "a.jsonl", 1, print)
    assert not (tmp_path / "a.jsonl").exists()
