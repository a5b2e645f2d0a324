"""A task with few different tokens keeps few codes alive: that alone stops no run, and the remedy that a stopped run
names works when followed by the letter."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.schema import Actions
from pipeline.cli.main import app
from pipeline.runs.errors import NeedsNewRun
from pipeline.stages.offline_measures import guard_codebook

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs" / "models" / "countdown-1m"


@pytest.mark.parametrize(
    ("codes", "share", "tokens", "alive", "stops"),
    [
        (16, 0.25, 3, 3, False),  # a class, another class, the end: no more codes can be alive
        (16, 0.25, 3, 2, False),
        (16, 0.25, 3, 1, True),  # nothing is left to choose
        (16, 0.25, 100, 3, True),
        (16, 0.25, 100, 4, False),
        (64, 0.25, 40, 9, True),
        (64, 0.25, 40, 10, False),
        (2, 0.25, 50, 1, True),
        (16, 0.0, 3, 1, False),
        (16, 1.0, 1, 1, False),  # a text of one token
    ],
)
def test_the_bound_follows_the_tokens_in_use(codes: int, share: float, tokens: int, alive: int, stops: bool) -> None:
    settings = Actions(num_actions=codes, min_alive_share=share, updates=100)
    found = {"inverse_dynamics_alive_codes": float(alive)}
    if stops:
        with pytest.raises(NeedsNewRun, match=f"{alive} of {codes} codes are active .* use {tokens} different tokens"):
            guard_codebook(settings, found, 100, tokens)
    else:
        guard_codebook(settings, found, 100, tokens)


def two_classes(folder: Path, **actions: float) -> Path:
    rows = ({"prompt": f"{i % 100} {i // 3} 3 -> {i % 140} :", "answer": ["7", "8"][i % 2]} for i in range(200))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base": {"model": str(BASE)},
        "task": {"name": "rows", "options": {"path": "rows.jsonl"}},
        "actions": {"num_actions": 16, "updates": 60, "evaluate_every": 60, "batch_size": 32, **actions},
        "evaluation": None,
        "tracking": {"enabled": False},
        "report": {"enabled": False},
    }
    (folder / "c.yaml").write_text(json.dumps(config))
    return folder / "c.yaml"


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    os.chdir(folder)
    done = CliRunner().invoke(app, [*arguments, "--quiet"])
    return done.exit_code, done.output


@pytest.mark.slow
def test_three_live_codes_of_sixteen_are_enough_for_two_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = two_classes(tmp_path, usage_weight=0, entropy_weight=1)  # nothing keeps further codes alive
    code, said = run(tmp_path, "run", str(config), "--run-dir", "one")
    assert code == 0, said
    alive = re.findall(r'"inverse_dynamics_alive_codes": ([0-9.]+)', (tmp_path / "one" / "metrics.jsonl").read_text())
    assert 2 <= float(alive[-1]) < 4  # less than a quarter of 16, at which runs stopped


@pytest.mark.slow
def test_the_remedy_works_by_the_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = two_classes(tmp_path, usage_weight=0, entropy_weight=2, min_alive_share=1.0)
    code, said = run(tmp_path, "run", str(config), "--run-dir", "one")
    assert code == 1 and "the codebook has collapsed" in said and "resume" not in said, said
    command = re.search(r"with the remedy, start a new run: latent-control (.+)", said)
    assert command is not None, said
    code, said = run(tmp_path, *shlex.split(command[1]))
    assert code == 0, said
