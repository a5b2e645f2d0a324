"""Class labels of Hugging Face data sets: the numbers of old configs stay, new ones ask for the names, and it is said.
Oracle: ``datasets``' own ``int2str``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.schema import TaskConfig
from configs.yaml_text import read
from pipeline.cli.main import app
from pipeline.preflight.answers import check_answers
from rollout_workers.tasks import build_task
from rollout_workers.tasks.dataset_rows import Rows

datasets = pytest.importorskip("datasets")
NAMES = ["negative", "positive", "none of both"]
BASE = Path(__file__).resolve().parents[2] / "configs" / "models" / "countdown-1m"


def labelled() -> Any:
    """-1: no label, as test splits have it."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"text": [f"text {i}" for i in range(30)], "label": [-1, *[i % 3 for i in range(1, 30)]]}
    return datasets.Dataset.from_dict(rows, features=features)


def saved(folder: Path, kind: str) -> Path:
    if kind == "saved":
        labelled().save_to_disk(folder / "set")
        return folder / "set"
    path = folder / {"file": "rows.parquet", "repository": "set/data/train-00000-of-00001.parquet"}[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled().to_parquet(path)
    return path if kind == "file" else folder / "set"


def answers(kind: str, path: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    name = "rows" if kind == "file" else "dataset"
    task = build_task(
        TaskConfig(name=name, options={"path": str(path), "prompt": "text", "answer": "label", **options})
    )
    assert isinstance(task, Rows)
    return {item.prompt: item.answers for item in task.items()}


@pytest.mark.parametrize("kind", ["saved", "repository", "file"])
def test_numbers_stay_and_names_are_offered(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, kind)
    rows, label = labelled(), labelled().features["label"]
    plain, named = answers(kind, path), answers(kind, path, class_names=True)
    assert plain == {row["text"]: (str(row["label"]),) for row in rows}
    wanted = {row["text"]: label.int2str(row["label"]) if row["label"] >= 0 else "-1" for row in rows}
    assert named == {text: (name,) for text, name in wanted.items()}


@pytest.mark.parametrize("kind", ["saved", "repository", "file"])
def test_check_says_it_and_init_asks_for_the_names(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, kind)
    name = "rows" if kind == "file" else "dataset"
    options = {"path": str(path), "prompt": "text", "answer": "label"}
    _, warnings = check_answers(build_task(TaskConfig(name=name, options=options)))
    assert warnings == [
        f"task: 'label' of {name} are numbers of classes that have names; to ask for the names, set "
        "task.options.class_names: true"
    ]
    assert check_answers(build_task(TaskConfig(name=name, options=options | {"class_names": True}))) == ([], [])
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", str(path), "-o", "c.yaml", "--base", str(BASE)])
    assert done.exit_code == 0, done.output
    task = read((tmp_path / "c.yaml").read_text())[0]["task"]
    assert task["options"]["class_names"] is True and task["options"]["verifier"] == "exact"


def test_rows_without_classes_get_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    labelled().cast_column("label", datasets.Value("int64")).to_parquet(tmp_path / "rows.parquet")
    done = CliRunner().invoke(app, ["init", "rows.parquet", "-o", "c.yaml", "--base", str(BASE)])
    assert done.exit_code == 0, done.output
    assert "class_names" not in (tmp_path / "c.yaml").read_text()
