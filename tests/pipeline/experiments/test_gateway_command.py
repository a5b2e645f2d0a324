"""The command ``gateway``: a program plays with a finished run's policy, and its episodes can be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.schema import DataSource
from pipeline.cli.main import app
from pipeline.replay.dataset import read_rollouts
from pipeline.replay.reader import ReplayReader

pytest_plugins = ("rl_fixtures",)
SUPPORT = Path(__file__).resolve().parents[2] / "support"


@pytest.mark.slow
def test_episodes_of_a_program_become_rollouts(ray_session: None, finished_run: Path, tmp_path: Path) -> None:
    """Twice the same seed is stored once; greedy ones are others."""
    words = ["gateway", str(finished_run), "--program", str(SUPPORT / "numbers_agent.py"), "--episodes", "2", "--json"]
    words += ["-o", str(tmp_path / "out")]
    found = [CliRunner().invoke(app, [*words, *more]) for more in ([], ["--samples", "1"], ["--greedy"])]
    assert [one.exit_code for one in found] == [0, 0, 0], found[0].output
    results = [json.loads(one.output[one.output.index("{") :]) for one in found]
    assert [one["episodes"] for one in results] == [2, 2, 2] and [one["stored"] for one in results] == [2, 0, 2]
    assert all(one["failures"] == {} and 0 <= one["reward"] <= 1 and one["tokens"] > 2 for one in results)
    rows = list(ReplayReader(tmp_path / "out", shuffle=False).rows())
    assert len(rows) == 4 and {row["prompt_id"] for row in rows} == {
        f"gateway/numbers_agent/heldout/{i}" for i in (0, 1)
    }
    assert all(len(row["turn_rewards"]) == 2 and not row["generated"].all() for row in rows)
    assert read_rollouts([DataSource(kind="replay", path=str(tmp_path / "out"))], world=rows[0]["world_hash"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "the run's task is countdown, no agent program; name one with --program FILE"),
        (["--program", "nowhere.py"], "--program: nowhere.py does not exist"),
    ],
)
def test_what_is_missing_is_said(finished_run: Path, tmp_path: Path, more: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["gateway", str(finished_run), "-o", str(tmp_path / "out"), *more])
    assert result.exit_code != 0 and said in " ".join(result.output.split())
