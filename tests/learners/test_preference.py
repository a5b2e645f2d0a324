"""Preference reward models: the loss by hand, a training that learns which side is preferred, scoring in this process
and in actors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from configs.schema import RunConfig, TaskConfig
from latent_control.preference import (
    Reading,
    bradley_terry,
    encode,
    load_classifier,
    reading_of,
    require_reward_model,
    scores,
)
from pipeline.cli.main import app
from pipeline.cluster.connect import connected, cpus_wanted
from pipeline.preflight.check import check
from rollout_workers.tasks import Failure, build_task

BASE = Path(__file__).parents[2] / "configs" / "models" / "countdown-1m"
GOOD, BAD = "1 + 2 = 3", "9 / 9 = 1"


def test_bradley_terry_by_hand() -> None:
    loss, metrics = bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)
    assert metrics == {"accuracy": 0.5, "margin": 0.5}


def write_pairs(path: Path) -> Path:
    pairs = [{"prompt": f"{i} {i + 1} -> {i + 2} :", "chosen": GOOD, "rejected": BAD} for i in range(60)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by the command on pairs whose chosen side is always ``GOOD``."""
    folder = tmp_path_factory.mktemp("preference")
    arguments = [
        "reward",
        "train",
        str(write_pairs(folder / "pairs.jsonl")),
        "--base",
        str(BASE),
        "--out",
        str(folder / "model"),
    ]
    settings = ["--updates", "12", "--batch-size", "8", "--learning-rate", "1e-3", "--max-length", "64", "--json"]
    done = CliRunner().invoke(app, arguments + settings)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["heldout_accuracy"] == 1.0 and result["train_pairs"] + result["heldout_pairs"] == 60
    return folder / "model"


def task(model: Path, tmp_path: Path, **preference: Any) -> Any:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i} {i + 2} -> {i} :"}}\n' for i in range(40)))
    options = {
        "path": str(tmp_path / "rows.jsonl"),
        "verifier": "preference",
        "preference": {"model": str(model), **preference},
    }
    return build_task(TaskConfig(name="jsonl", options=options))


def test_the_preferred_side_scores_higher_on_prompts_it_never_saw(reward_model: Path, tmp_path: Path) -> None:
    rows = task(reward_model, tmp_path, batch_size=3)
    prompts = rows.prompts("heldout")[:4]
    good, bad = (rows.score_batch(prompts, [text] * len(prompts)) for text in (GOOD, BAD))
    assert all(g.reward > b.reward + 1 and g.success and not b.success for g, b in zip(good, bad, strict=True))
    assert rows.parts == ("success", "score", "answered") and rows.score(prompts[0], GOOD).reward == pytest.approx(
        good[0].reward, abs=1e-4
    )
    squashed = task(reward_model, tmp_path, squash=True).score(prompts[0], GOOD)
    assert squashed.reward == pytest.approx(1 / (1 + math.exp(-good[0].reward)), abs=1e-4)
    with pytest.raises(ValueError, match="neither answer nor response"):
        rows.demonstrations("train")[0]


def test_scores_do_not_depend_on_the_batch(reward_model: Path) -> None:
    classifier, tokenizer = load_classifier(str(reward_model))
    rows = [encode(tokenizer, "1 2 -> 3 :", " ".join(["1", "+"] * n), Reading()) for n in (0, 9, 3, 1)]
    assert scores(classifier.eval(), rows, 4) == pytest.approx(scores(classifier, rows, 1), abs=1e-4)
    assert len(encode(tokenizer, "1 " * 50, "2", Reading(max_length=7))) == 7
    assert reading_of(str(reward_model)) == Reading(max_length=64) and reading_of(str(BASE)) == Reading()
    assert reading_of(str(reward_model), max_length=9).max_length == 9


def test_what_is_no_reward_model_is_said_before_work_starts(reward_model: Path, tmp_path: Path) -> None:
    require_reward_model(str(reward_model))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .*latent-control reward train"):
        require_reward_model(str(BASE))
    task(reward_model, tmp_path)
    options = {
        "path": str(tmp_path / "rows.jsonl"),
        "verifier": "preference",
        "preference": {"model": str(BASE), "cpus_per_actor": 0.5},
    }
    config = RunConfig(
        base={"model": str(BASE)}, task={"name": "jsonl", "options": options}, evaluation={}, rollout={"num_workers": 1}
    )
    assert [e for e in check(config).errors if "not a sequence classifier with one" in e]
    assert cpus_wanted(config) == 1.5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"prompt": "a", "chosen": "b"}\n', "line 1: 'rejected' is None"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "line 1: chosen and rejected are the same"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "no pair falls to the"),
    ],
)
def test_pairs_that_cannot_be_used_are_named(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(rows)
    done = CliRunner().invoke(
        app, ["reward", "train", str(tmp_path / "pairs.jsonl"), "--base", str(BASE), "--out", str(tmp_path / "m")]
    )
    assert done.exit_code == 2 and message in done.output and not (tmp_path / "m").exists()


@pytest.fixture
def private_ray() -> Iterator[None]:
    with connected(RunConfig(base={"model": str(BASE)}, rollout={"num_workers": 2})):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("private_ray")
def test_actors_are_shared_and_score_as_this_process_does(reward_model: Path, tmp_path: Path) -> None:
    import ray

    from rollout_workers.judges.reward_models import RewardModel, reward_actor

    one, two = (task(reward_model, tmp_path, batch_size=2, cpus_per_actor=0.5) for _ in range(2))
    prompts, texts = [one.prompts("train")[i] for i in range(5)], [GOOD, BAD, "", "1 + 1 = 2", GOOD]
    verdicts = one.score_batch(prompts, texts)
    here = RewardModel(one.scorer.settings).score([p.text for p in prompts], texts)
    assert [v.reward for v in verdicts] == pytest.approx(here, abs=1e-4)
    assert [v.reward for v in two.score_batch(prompts, texts)] == pytest.approx(here, abs=1e-4)
    actors = [actor for actor in ray.util.list_named_actors() if actor.startswith("latent-control-reward-")]
    assert len(actors) == 1  # both tasks, one actor
    ray.kill(reward_actor(one.scorer.settings, 0), no_restart=True)
    assert [v.reward for v in two.score_batch(prompts, texts)] == pytest.approx(here, abs=1e-4)  # started anew
    unplaceable = task(reward_model, tmp_path, cpus_per_actor=64.0, timeout_seconds=1.0).score(prompts[0], GOOD)
    assert isinstance(unplaceable, Failure) and unplaceable.kind == "reward_timeout" and "CPUs" in unplaceable.message
