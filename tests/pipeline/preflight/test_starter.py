"""A config for one's own rows: what is read off them, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.loading import load_config
from pipeline.cli.main import app
from pipeline.cli.options import USAGE
from pipeline.preflight import init_config
from pipeline.preflight.check import check
from rollout_workers.tasks.countdown import Countdown

ROOT = Path(__file__).resolve().parents[3]
BASE = ROOT / "configs" / "models" / "countdown-1m"


def rows_file(path: Path, count: int = 40, **more: list[str]) -> Path:
    task = Countdown()
    lines = [
        {"problem": (demo := task.demonstrations("train")[i]).prompt.text, "answer": demo.response}
        | {key: values[i % len(values)] for key, values in more.items()}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_keys_verifier_and_slices_are_read_off_the_rows(tmp_path: Path) -> None:
    found = init_config.look(
        rows_file(tmp_path / "rows.jsonl", level=["easy", "hard"], source=["one"], note=[str(i) for i in range(40)])
    )
    assert (found.rows, found.slices, found.unused) == (40, ("level",), ("level", "source", "note"))
    wanted = {"prompt": "problem", "answer": "answer", "verifier": "exact"}
    assert wanted.items() <= found.task.options.items()
    assert list(found.answers) == [Countdown().demonstrations("train")[i].response for i in range(40)]
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text("".join(f'{{"question": "1 + {i}", "answer": "1,{i:03d}.5"}}\n' for i in range(20)))
    assert init_config.look(numbers).task.options["verifier"] == "number"


def test_the_config_passes_its_check_and_fits_the_answers(tmp_path: Path) -> None:
    rows_file(tmp_path / "rows.jsonl", level=["easy", "hard"])
    done = CliRunner().invoke(
        app, ["init", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "mine.yaml"), "--base", str(BASE)]
    )
    assert done.exit_code == 0, done.output
    config = load_config(tmp_path / "mine.yaml")
    errors = check(config).errors
    assert len(errors) == 2 and all(error.endswith("made by latent-control sample CONFIG") for error in errors)
    (tmp_path / "mine-samples.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("problem", "prompt"))
    assert not check(config).errors
    # 11 words and </s>, and a quarter on top
    assert config.rollout.max_new_tokens == 12 + 4
    assert config.evaluation is not None and config.evaluation.slices == ("level",)
    assert "path: rows.jsonl" in (tmp_path / "mine.yaml").read_text()
    again = CliRunner().invoke(
        app, ["init", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "mine.yaml"), "--base", str(BASE)]
    )
    assert again.exit_code == USAGE and "exists already" in again.output


def test_what_cannot_be_guessed_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"frage": "1 + {i}", "antwort": "{i}"}}\n' for i in range(25)))
    with pytest.raises(
        ValueError, match="which key holds the prompt\\? Rows have frage, antwort; name it with --prompt-key"
    ):
        init_config.look(path)
    with pytest.raises(ValueError, match="--prompt-key frag: not every row has it; did you mean 'frage'"):
        init_config.look(path, "frag")
    assert init_config.look(path, "frage", "antwort").task.options["prompt"] == "frage"
    path.write_text('{"prompt": "1", "answer": "2"}\n')
    with pytest.raises(ValueError, match="has 1 rows; give at least 20"):
        init_config.look(path)
    with pytest.raises(ValueError, match="does not exist"):
        init_config.look(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("seconds", "updates"),
    [
        ({}, (600, 500, 100)),
        ({"actions": 3000.0, "improve": 600.0}, (600, 500, 100)),
        ({"actions": 7200.0}, (300, 250, 50)),
        ({"actions": 36000.0, "improve": 36000.0}, (150, 100, 20)),
    ],
)
def test_a_first_run_takes_an_hour_at_most(seconds: dict[str, float], updates: tuple[int, int, int]) -> None:
    config = {name: {"updates": n} for name, n in (("actions", 600), ("clone", 500), ("improve", 100))} | {"seed": 0}
    found = init_config.sized(config, seconds)
    assert tuple(found[name]["updates"] for name in ("actions", "clone", "improve")) == updates
    assert config["actions"]["updates"] == 600 and found["seed"] == 0
