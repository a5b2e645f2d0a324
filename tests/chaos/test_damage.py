"""Every artifact of an interrupted run, torn, with a flipped bit, or gone: found, and the resumed run ends as if
nothing had been."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos_tools import EVERY, UPDATES, Run, assert_undisturbed, running

from configs.loading import dump_config, load_config
from pipeline.integrity.audit import audit
from pipeline.rl.algorithm import LatentRL
from pipeline.rl.resume_point import resume_point
from pipeline.run import resume, run
from pipeline.runs import manifest
from pipeline.runs.events import read_events
from pipeline.runs.layout import METRICS
from pipeline.runs.metrics_log import records
from pipeline.storage import checkpoints

pytest_plugins = ("rl_fixtures",)
pytestmark = pytest.mark.timeout(3600)


def tear(path: Path) -> None:
    """What a lost tail looks like."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop(path: Path) -> None:
    """Gone."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {"torn": tear, "flipped": flip, "gone": drop}
NEWEST = f"checkpoints/improve-{2 * EVERY:08d}"
ARTIFACTS = {
    "checkpoint manifest": f"{NEWEST}/manifest.json",
    "checkpoint tree": f"{NEWEST}/learner.json",
    "checkpoint tensors": f"{NEWEST}/learner.safetensors",
    "stage's weights": "checkpoints/actions/latent_actions.safetensors",
    "stage's manifest": "checkpoints/actions/manifest.json",
    "stage's record": "stages/actions.json",
    "replay shard": "replay/run=*/part-00000001-*.parquet",
    "replay manifest": "replay/run=*/_manifest.json",
    "ledger part": f"ledger/improve/updates-{EVERY + 1:08d}-*.parquet",
    "ledger starts": "ledger/improve/_starts.jsonl",
    "events": "events.jsonl",
    "metrics": METRICS,
    "config": "config.yaml",
    "run manifest": "manifest.json",
}
CASES = [(artifact, damage) for artifact in ARTIFACTS for damage in DAMAGES]


class BrokenOff(Exception):
    """What ends the run."""


@pytest.fixture(scope="module")
def interrupted(ray_session: None, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Broken off after update 10, in this process: checkpoints at 4 and 8, a ledger part and a shard for each, and the
    audit finds nothing. What a kill leaves is that of ``test_kills.py``."""
    place, train = tmp_path_factory.mktemp("interrupted"), LatentRL.train
    found = Run(place / "run", tiny_checkpoint, "tracking.enabled=false")
    (place / "run.yaml").write_text("improve: {}\n")

    def train_or_break(algorithm: LatentRL) -> dict[str, Any]:
        if algorithm.policy.version == 2 * EVERY + 2:
            raise BrokenOff
        return train(algorithm)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(BrokenOff):
        patch.setattr(LatentRL, "train", train_or_break)
        run(load_config(place / "run.yaml", found.settings), found.folder)
    assert [one for one in audit(found.folder) if not one.passed] == []
    return found


def hurt(interrupted: Run, folder: Path, artifact: str, damage: str) -> Path:
    """A copy of the interrupted run with one artifact damaged."""
    shutil.copytree(interrupted.folder, folder / "run")
    (path,) = (folder / "run").glob(ARTIFACTS[artifact])
    DAMAGES[damage](path)
    return folder / "run"


@pytest.mark.parametrize(("artifact", "damage"), CASES)
def test_damage_is_found_and_a_whole_state_is_there_to_go_on_from(
    interrupted: Run, tmp_path: Path, artifact: str, damage: str
) -> None:
    run_dir = hurt(interrupted, tmp_path, artifact, damage)
    if (artifact, damage) != ("config", "gone"):
        try:
            failed = [one.question for one in audit(run_dir) if not one.passed]
        except ValueError as error:  # a config that is no config any more
            failed = [str(error)]
        assert failed
    found, skipped = resume_point(run_dir, "improve", stored=True)
    assert found is not None and checkpoints.verify(found) == []
    if "checkpoint" in artifact or artifact in ("replay shard", "ledger part"):
        assert found.name == f"improve-{EVERY:08d}" and skipped
    else:
        assert found.name == f"improve-{2 * EVERY:08d}" and not skipped


def settings(text: str) -> str:
    """A config without its comments, which say why a number type was chosen."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def test_a_config_that_is_none_any_more_is_put_back_and_a_changed_one_is_not_resumed(
    interrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed: list[str] = []
    monkeypatch.setattr(
        "pipeline.run.execute", lambda config, run_dir, quiet: resumed.append(dump_config(config)) or run_dir
    )
    original = (interrupted.folder / "config.yaml").read_text()
    run_dir = hurt(interrupted, tmp_path, "config", "gone")
    resume(run_dir)
    (run_dir / "config.yaml").write_text("updates: [")
    resume(run_dir)
    assert (run_dir / "config.yaml").read_text() == original
    assert [e["kind"] for e in read_events(run_dir)].count("config_restored") == 2
    (run_dir / "config.yaml").write_text(original.replace(f"updates: {UPDATES}", f"updates: {UPDATES + 1}"))
    with pytest.raises(
        ValueError, match=r"config\.yaml is not what was written.*--restore-config.*on purpose, delete manifest\.json"
    ):
        resume(run_dir)
    resume(run_dir, restore_config=True)
    assert resumed == [settings(original)] * 3 and manifest.problems(run_dir) == {}
    changed = original.replace(f"updates: {UPDATES}", f"updates: {UPDATES + 1}")
    (run_dir / "config.yaml").write_text(changed)
    (run_dir / manifest.MANIFEST).unlink()  # the remedy for what was changed on purpose
    resume(run_dir)
    assert resumed[3:] == [settings(changed)] and manifest.problems(run_dir) == {}


def test_a_flipped_digit_in_the_metrics_is_found(interrupted: Run, tmp_path: Path) -> None:
    """It is as good JSON as before."""
    shutil.copytree(interrupted.folder, tmp_path / "run")
    path = tmp_path / "run" / METRICS
    lines = path.read_text().splitlines(keepends=True)
    assert '"entropy": 2' in lines[1]
    path.write_text("".join([lines[0], lines[1].replace('"entropy": 2', '"entropy": 3'), *lines[2:]]))
    assert [record["step"] for record in records(path) if record["stage"] == "improve"][:2] == [1, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("artifact", "damage"), [case for case in CASES if case[0] != "config"])
def test_the_resumed_run_is_the_undisturbed_one(
    interrupted: Run, whole: Run, tiny_checkpoint: Path, tmp_path: Path, artifact: str, damage: str
) -> None:
    resumed = Run(hurt(interrupted, tmp_path, artifact, damage), tiny_checkpoint)
    with running(resumed):
        resumed.start().end()
    assert_undisturbed(resumed, whole)
