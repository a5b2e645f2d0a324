"""``resume --restore-config`` of a run whose config has a secret: it goes on with the secret, or not at all; asterisks
never stand in a config that is used. Oracle: the file as it was written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from configs.loading import dump_config
from configs.schema import RunConfig, Tracking
from pipeline.preflight.check import tracking_problems
from pipeline.runs import manifest
from pipeline.runs.events import Events
from pipeline.runs.layout import CHECKPOINTS, CONFIG, stage_record
from pipeline.runs.repair import mend
from pipeline.storage import checkpoints
from pipeline.tracking.tracker import Tracker

SECRET = "hunter2-Zz9"
URI = f"http://me:{SECRET}@h:5000/x"


def begun(folder: Path, uri: str = URI, **sections: object) -> str:
    """A run that has a config, and nothing else yet."""
    config = RunConfig.model_validate({"base": {"model": "b"}, "tracking": {"uri": uri}} | sections)
    text = dump_config(config)
    manifest.put(folder, "config.yaml", text.encode(), keep=True)
    Events(folder).note("started", "now")
    return text


@pytest.mark.parametrize("damage", [("seed: 0", "seed: 7"), ("b\n", "other\n")])
def test_the_secret_is_that_of_the_file_it_replaces(tmp_path: Path, damage: tuple[str, str]) -> None:
    text = begun(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(*damage))
    assert path.read_text() != text
    mend(tmp_path, True)
    assert path.read_text() == text and not manifest.problems(tmp_path)
    assert SECRET not in (tmp_path / "manifest.json").read_text()


@pytest.mark.parametrize("left", [None, "{", "lines"], ids=["gone", "torn", "without the address"])
def test_it_is_that_of_the_environment_or_there_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str | None
) -> None:
    text = begun(tmp_path)
    path = tmp_path / "config.yaml"
    other = text.replace(URI, "null").replace("seed: 0", "seed: 7") if left == "lines" else left
    path.unlink() if other is None else path.write_text(other)
    for name in ("URI", "USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    with pytest.raises(
        ValueError, match=r"tracking\.uri \(http://me:\*\*\*@h:5000/x\) lacks one; set MLFLOW_TRACKING_URI"
    ):
        mend(tmp_path, True)
    assert (path.read_text() if path.exists() else None) == other  # nothing was touched
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:another@elsewhere/")  # is not the run's
    with pytest.raises(ValueError, match="lacks one"):
        mend(tmp_path, True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    mend(tmp_path, True)
    assert path.read_text() == text


def test_mlflow_s_own_variables_are_enough_for_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = begun(tmp_path)
    (tmp_path / "config.yaml").unlink()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    mend(tmp_path, True)
    assert (tmp_path / "config.yaml").read_text() == text.replace(f"me:{SECRET}@", "")


def test_asterisks_of_the_user_s_own_stay(tmp_path: Path) -> None:
    options = {"path": "rows.jsonl", "template": "*** {prompt} ***"}
    text = begun(tmp_path, "http://h/", task={"name": "jsonl", "options": options})
    (tmp_path / "config.yaml").unlink()
    mend(tmp_path, True)
    assert (tmp_path / "config.yaml").read_text() == text


@pytest.mark.parametrize("uri", ["http://me:***@h", "postgresql://h/db?user=me&password=***"])
def test_a_copy_without_its_secrets_is_not_used(tmp_path: Path, uri: str) -> None:
    """Such as MLflow's artifact, or a config that an earlier version put back."""
    config = RunConfig.model_validate({"base": {"model": "b"}, "tracking": {"uri": uri}})
    (problem,) = tracking_problems(config)
    assert problem.startswith(f"tracking.uri is {uri}, a copy without its secrets")
    with pytest.raises(ValueError, match="a copy without its secrets"):
        Tracker(config.tracking, tmp_path, group="g")
    off = Tracking(enabled=False, uri=uri)
    assert not list(tracking_problems(config.model_copy(update={"tracking": off})))
    Tracker(off, tmp_path, group="g").close()


def finished_stage(folder: Path, name: str, config: str, recorded: Mapping[str, Any]) -> None:
    """A run of ``config`` whose stage ``name`` ended, with these settings in its result."""
    (folder / CONFIG).write_text(config)
    info = {"stage": name, "config": {"seed": 0, **recorded}}
    result = folder / CHECKPOINTS / name
    checkpoints.write(result, files=lambda staging: (staging / "policy").write_text("") and None, info=info)
    (folder / stage_record(name)).parent.mkdir()
    (folder / stage_record(name)).write_text("{}")


@pytest.mark.parametrize(("now", "said"), [("4", ""), ("8", "improve.equivalent_codes: 4 before, 8 now")])
def test_keys_that_had_old_names_are_compared_by_the_new_ones(tmp_path: Path, now: str, said: str) -> None:
    """Config and result of a run of the version that wrote ``improve.aliases``."""
    sections = "base: {model: m}\nactions: {}\nclone: {}\nimprove: {aliases: %s}\nevaluation: null\n"
    finished_stage(tmp_path, "improve", sections % now, {"improve": {"aliases": 4, "updates": 150}})
    if not said:
        mend(tmp_path, restore_config=False)
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        mend(tmp_path, restore_config=False)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ("{kind: text, path: a.txt}", ""),
        ("{kind: text, path: a.txt, weight: 2}", "actions.data[0].weight: 1.0 before, 2.0 now"),
        ("{kind: text, path: a.txt}, {kind: task}", "actions.data, their number: 1 before, 2 now"),
    ],
)
def test_an_option_that_a_later_version_adds_inside_a_list_is_no_change(tmp_path: Path, now: str, said: str) -> None:
    """The result knows neither ``column`` nor ``min_reward`` of its data."""
    recorded = {"actions": {"data": [{"kind": "text", "path": "a.txt", "weight": 1.0}]}}
    config = f"base: {{model: m}}\nactions: {{data: [{now}]}}\nclone: {{}}\nevaluation: null\n"
    finished_stage(tmp_path, "actions", config, recorded)
    if not said:
        mend(tmp_path, restore_config=False)
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        mend(tmp_path, restore_config=False)
