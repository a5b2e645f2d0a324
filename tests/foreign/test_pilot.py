"""A pilot of a user's own config, and of a verifier of one's own: what it trains, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.loading import load_config
from pipeline.cli.main import app
from pipeline.experiments import pilot

BASE = Path(__file__).parents[2] / "configs" / "models" / "countdown-1m"
OWN = """
base: {{model: {base}}}
task:
  name: jsonl
  shots: 1
  options: {{path: rows.jsonl, answer: gold, verifier: python, python: {{path: judge.py}}}}
reward: {{weights: {{success: 1.0, length: 0.1}}}}
actions: {{num_actions: 8, data: [{{kind: task, task: {{name: jsonl, options: {{path: not-there-samples.jsonl}}}}}}]}}
clone: {{}}
improve: {{warmup_updates: 9, algorithm: rloo, group_size: 3, token_learning_rate: 0.002}}
rollout: {{max_new_tokens: 9, stop: ["29"]}}
gates: ["success >= 0.9"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n} 7 25 -> 29 :", "gold": "25"} for n in range(1, 41)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text("def reward(row, response):\n    return 1.0\n\n\nmine = reward\n")
    (tmp_path / "own.yaml").write_text(OWN.format(base=BASE))
    return tmp_path


def trained(folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """The config that a pilot would train, which is not started."""
    taken: dict[str, Any] = {}

    def stop(*given: Any, **_: Any) -> dict[str, Any]:
        taken["config"] = given[1]
        raise ValueError("stopped here")

    monkeypatch.setattr(pilot, "pilot", stop)
    done = CliRunner().invoke(app, ["pilot", *arguments, "--out", str(folder / "out")])
    return done, taken.get("config", {})


def test_a_config_of_ones_own_is_tried_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, config = trained(folder, [str(folder / "own.yaml"), "improve.group_size=5"], monkeypatch)
    assert "stopped here" in done.output and done.exit_code == 1
    own = load_config(folder / "own.yaml", ["improve.group_size=5"], check_paths=False).model_dump(mode="json")
    for section in ("base", "task", "reward", "rollout"):
        assert config[section] == own[section]
    assert config["improve"] == own["improve"] | {"token_baseline": True}
    assert config["actions"]["num_actions"] == 8 and config["clone"] and not config["gates"]
    written = load_config(folder / "out" / "pilot.yaml")  # the trial that was checked
    assert written.improve is not None and written.improve.token_baseline and written.rollout.stop == ("29",)


def test_a_verifier_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["--prompts", str(folder / "rows.jsonl"), "--base", str(BASE), "--answers", "gold", "--heldout", "8"]
    done, config = trained(folder, [*rows, "--verifier", f"{folder / 'judge.py'}:mine"], monkeypatch)
    assert "stopped here" in done.output
    options = config["task"]["options"]
    assert options["verifier"] == "python" and options["python"] == {
        "path": str(folder / "judge.py"),
        "function": "mine",
    }
    done, config = trained(folder / "none", [*rows, "--verifier", str(folder / "gone.py")], monkeypatch)
    assert done.exit_code == 2 and "gone.py" in done.output and not config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("actions.init=codes", "actions.init: a pilot finds its own codes"),
        ("improve.level=token", "improve.level: a pilot has both sides"),
        ("--prompts", "give a config, or rows by --prompts FILE, and not both"),
    ],
)
def test_what_a_pilot_cannot_be_of(folder: Path, monkeypatch: pytest.MonkeyPatch, change: str, said: str) -> None:
    more = [change, str(folder / "rows.jsonl")] if change.startswith("--") else [change]
    done, config = trained(folder, [str(folder / "own.yaml"), *more], monkeypatch)
    assert done.exit_code == 2 and said in done.output and not config


def test_neither_config_nor_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, _ = trained(folder, [], monkeypatch)
    assert done.exit_code == 2 and "give a config, or rows by --prompts FILE" in done.output
