"""``train-q`` and ``search`` from end to end on a tiny checkpoint, and what they refuse before work starts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from rl_tools import make_runner, sample
from typer.testing import CliRunner

from configs.loading import dump_config, load_config
from configs.schema import Tracking
from pipeline.cli.main import app
from pipeline.cli.options import USAGE
from pipeline.replay.writer import ReplayWriter
from pipeline.storage import checkpoints

pytest_plugins = ("rl_fixtures",)

SHAPE = {"num_actions": 8, "policy_layers": 1, "inverse_dynamics_layers": 1, "merge_layers": 1}


@pytest.fixture(scope="module")
def run_dir(config: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 24 prompts x 4 rollouts, every other of which is said to have succeeded, and a Q head trained on
    them."""
    folder = tmp_path_factory.mktemp("search") / "run"
    runner = make_runner(config(), tiny_checkpoint)
    writer = ReplayWriter(folder / "replay", 4096, "first")
    rollouts = [
        r
        for first in range(0, 24, 4)
        for r in sample(runner, prompt_indices=tuple(range(first, first + 4)), request_id=first)
    ]
    writer.add([replace(r, reward=float(place % 2)) for place, r in enumerate(rollouts)])
    writer.close()
    (folder / "config.yaml").write_text(
        dump_config(config(actions=SHAPE | {"init": str(tiny_checkpoint), "updates": 0}, tracking={"enabled": False}))
    )
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "clone").symlink_to(tiny_checkpoint)
    found = call("train-q", str(folder), "--updates", "12", "--batch-size", "8", "--hidden", "8", "--json")
    assert found.exit_code == 0, found.output
    return folder


def call(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_train_q_leaves_a_whole_checkpoint(run_dir: Path) -> None:
    folder = run_dir / "checkpoints" / "q_head"
    assert not checkpoints.verify(folder)
    assert {path.name for path in folder.iterdir()} == {
        "q_head.json",
        "q_head.safetensors",
        "metrics.jsonl",
        "manifest.json",
    }
    info = checkpoints.read_info(folder)
    assert info["rollouts"] + info["heldout_rollouts"] == 96
    assert info["base_passes"] <= info["rollouts"]  # each rollout once
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["update"] == 12
    assert {"loss", "td_error", "auc_first", "auc_last", "auc_taken"} <= last.keys()


def test_training_is_a_function_of_its_seed(run_dir: Path, tmp_path: Path) -> None:
    heads = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        out = tmp_path / name
        words = ("--updates", "3", "--batch-size", "8", "--hidden", "8", "--seed", seed)
        assert call("train-q", str(run_dir), "--out", str(out), *words).exit_code == 0
        heads.append((out / "q_head.safetensors").read_bytes())
    assert heads[0] == heads[1] != heads[2]


SEARCH = ("--iterations", "3", "--chunk", "2", "--width", "2", "--prompts", "5")


@pytest.mark.parametrize("method", ["mcts", "mcts-q"])
@pytest.mark.parametrize("value", ["verifier", "q"])
def test_best_of_n_gets_the_same_tokens(run_dir: Path, method: str, value: str) -> None:
    words = ("--method", method, "--value", value, "--q", str(run_dir / "checkpoints" / "q_head"), *SEARCH, "--json")
    found = call("search", str(run_dir), *words)
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["greedy", "sampled", "best-of-n", method]
    longest = 16
    assert 0 <= rows["best-of-n"]["tokens_per_prompt"] - rows[method]["tokens_per_prompt"] < longest
    assert rows["greedy"]["responses_per_prompt"] == rows["sampled"]["responses_per_prompt"] == 1
    assert list(result["differences"]) == [f"{method} - best-of-n"]
    assert ("pass@n" in result["note"]) == (value == "verifier")
    again = json.loads(call("search", str(run_dir), *words).stdout)
    assert again["successes"] == result["successes"]


def test_the_table_says_what_it_is_worth(run_dir: Path) -> None:
    found = call("search", str(run_dir / "checkpoints" / "clone"), *SEARCH)
    assert found.exit_code == 0, found.output
    text = " ".join(found.stdout.split())
    for words in ("greedy", "best-of-n", "mcts - best-of-n:", "paired", "pass@n", "MB of caches", "tokens per prompt"):
        assert words in text


def test_each_result_is_kept_and_a_step_in_mlflow(run_dir: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tracked = tmp_path / "tracked"
    shutil.copytree(run_dir, tracked, symlinks=True)
    settings = load_config(run_dir / "config.yaml", [], check_paths=False)
    (tracked / "config.yaml").write_text(dump_config(settings.model_copy(update={"tracking": Tracking()})))
    words = ("search", str(tracked), "--method", "best-of-n", "--iterations", "2", "--prompts", "3")
    first, second = (call(*words, "--seed", seed) for seed in ("1", "2"))
    assert f"kept: {tracked}/search/clone_best-of-n-1.json" in first.stdout, first.output
    assert f"kept: {tracked}/search/clone_best-of-n-2.json" in second.stdout
    known = json.loads((tracked / "mlflow.json").read_text())
    client, run_id = MlflowClient(tracking_uri=known["tracking_uri"]), known["runs"]["search_clone_best-of-n"]
    history = client.get_metric_history(run_id, "best-of-n/success")
    kept = [json.loads((tracked / "search" / f"clone_best-of-n-{n}.json").read_text()) for n in (1, 2)]
    assert [point.step for point in history] == [1, 2]
    assert [point.value for point in history] == pytest.approx([one["rows"][-1]["success"] for one in kept])


def test_best_of_n_alone_draws_n(run_dir: Path) -> None:
    result = json.loads(
        call("search", str(run_dir), "--method", "best-of-n", "--iterations", "7", "--prompts", "3", "--json").stdout
    )
    assert [row["name"] for row in result["rows"]] == ["greedy", "sampled", "best-of-n"]
    assert result["rows"][-1]["responses_per_prompt"] == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "mcts-q"), "--method mcts-q --value verifier needs a Q head"),
        (("--value", "q"), "train-q RUN"),
        (("--prompts", "99999999"), "--prompts is 99999999"),
        (("--temperature", "0"), "--temperature is 0.0"),
        (("--q", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_work_is_said_before_work_starts(run_dir: Path, words: tuple[str, ...], said: str) -> None:
    found = call("search", str(run_dir), *words)
    assert found.exit_code == USAGE
    assert said in found.output


def test_a_damaged_q_head_is_refused(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    assert call("train-q", str(run_dir), "--out", str(out), "--updates", "1", "--hidden", "0").exit_code == 0
    content = (out / "q_head.json").read_text()
    (out / "q_head.json").write_text(content.replace('"span": 1', '"span": 2'))
    found = call("search", str(run_dir), "--method", "mcts-q", "--q", str(out))
    assert found.exit_code == USAGE and "damaged" in found.output


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"world_hash": "f" * 64}, "another codebook and world model .hash ffffffffffff"),
        ({"base_hash": "f" * 64}, "another base LM"),
        ({"late_blocks": 2}, "late, 2 blocks before the end"),
    ],
)
def test_a_q_head_of_another_model_is_refused(run_dir: Path, changed: dict[str, Any], said: str) -> None:
    from configs.loading import load_config
    from latent_control.search.q_head import read_q_shape
    from pipeline.experiments.search_models import load_latent, require_fit

    host = load_latent(run_dir / "checkpoints" / "clone", load_config(run_dir / "config.yaml", [], check_paths=False))
    shape = read_q_shape(run_dir / "checkpoints" / "q_head")
    require_fit(shape, host, run_dir)
    with pytest.raises(ValueError, match=said):
        require_fit(replace(shape, **changed), host, run_dir)


def test_train_q_wants_a_run(tmp_path: Path, run_dir: Path) -> None:
    assert call("train-q", str(tmp_path)).exit_code == USAGE
    found = call("train-q", str(run_dir), "--discount", "1.5")
    assert found.exit_code == USAGE and "discount is 1.5" in found.output
    (tmp_path / "full").mkdir()
    found = call("train-q", str(run_dir), "--out", str(tmp_path / "full"))
    assert found.exit_code == USAGE and "holds no Q head" in found.output
