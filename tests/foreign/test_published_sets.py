"""Published data sets are read whole: every shard, every subject; what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.schema import TaskConfig
from rollout_workers.tasks import build_task

SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()  # noqa: SIM905
BOXES = {"\\boxed 2": "2", "\\fbox{7}": "7", "\\boxed\\frac12": "\\frac12", "\\boxed{1}$, no: $\\boxed{2}": "2"}


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def gsm8k(*names: str) -> list[dict[str, Any]]:
    return [{"question": f"{name}?", "answer": f"So\n#### {i},000"} for i, name in enumerate(names, 1)]


def asked(task: Any, split: str = "train") -> set[str]:
    return {prompt.text.partition("?")[0] for prompt in task.prompts(split)}


def built(name: str, **options: Any) -> Any:
    return build_task(TaskConfig(name=name, options=options))


def test_all_shards_of_gsm8k(tmp_path: Path) -> None:
    for n in range(3):
        parquet(tmp_path / "main" / f"train-{n:05}-of-00003.parquet", gsm8k(f"a{n}", f"b{n}"))
        parquet(tmp_path / "socratic" / f"train-{n:05}-of-00003.parquet", gsm8k(f"other{n}"))
    parquet(tmp_path / "main" / "test-00000-of-00001.parquet", gsm8k("t"))
    task = built("gsm8k", path=str(tmp_path))
    assert asked(task) == {f"{c}{n}" for c in "ab" for n in range(3)} and asked(task, "heldout") == {"t"}
    (tmp_path / "main" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"main lacks train-00001-of-00003 of 3 shards; copy them"):
        built("gsm8k", path=str(tmp_path))


def test_two_copies_of_a_split_are_not_read_as_one(tmp_path: Path) -> None:
    for place in ("old", "new"):
        for split in ("train", "test"):
            parquet(tmp_path / place / f"{split}-00000-of-00001.parquet", gsm8k(split, place))
    with pytest.raises(ValueError, match=r"holds train more than once \(.*new.*old.*\); give the folder of one copy"):
        built("gsm8k", path=str(tmp_path))
    assert asked(built("gsm8k", path=str(tmp_path / "old"))) == {"train"}  # "old" is held out


def test_a_solution_without_a_number_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        parquet(
            tmp_path / f"{split}-00000-of-00001.parquet", [*gsm8k(split), {"question": "x?", "answer": "#### many"}]
        )
    with pytest.raises(ValueError, match=r"train.*row 2: the answer after '####' is 'many', not a number"):
        built("gsm8k", path=str(tmp_path))


@pytest.mark.parametrize("published", [True, False])
def test_all_subjects_of_math(tmp_path: Path, published: bool) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"problem": "t?", "solution": "$\\boxed{1}$", "answer": "1"}) + "\n")
    for k, subject in enumerate(SUBJECTS):
        box = list(BOXES)[k % len(BOXES)]
        row = {"problem": f"{subject}?", "solution": f"It is ${box}$.", "type": subject, "level": "Level 1"}
        if published:  # a file for each problem
            place = tmp_path / "MATH" / "train" / subject / f"{17 * k}.json"
            place.parent.mkdir(parents=True)
            place.write_text(json.dumps(row, indent=4))
        else:
            parquet(tmp_path / "MATH" / subject / "train-00000-of-00001.parquet", [row])
    task = built("math500", path=str(test), train=str(tmp_path / "MATH"))
    assert asked(task) == set(SUBJECTS)
    found = {prompt.metadata["problem"]: prompt.metadata["answer"] for prompt in task.prompts("train")}
    assert list(found.values()) == [list(BOXES.values())[k % len(BOXES)] for k in range(len(SUBJECTS))]
    one = tmp_path / "MATH" / "train" / "algebra" if published else tmp_path / "MATH" / "algebra"
    if not published:
        assert asked(built("math500", path=str(test), train=str(one))) == {"algebra"}
    for file in [*one.glob("*.json"), *one.glob("*.parquet")]:
        file.unlink()
    with pytest.raises(ValueError, match="lacks algebra of MATH's 7 subjects for train"):
        built("math500", path=str(test), train=str(tmp_path / "MATH"))


def test_a_folder_of_rows_that_lacks_a_shard(tmp_path: Path) -> None:
    for n in (0, 1, 2, 4):
        parquet(
            tmp_path / f"train-{n:05}-of-00005-abc.parquet", [{"prompt": f"{n}{i}?", "answer": "1"} for i in range(9)]
        )
    with pytest.raises(ValueError, match="lacks train-00003-of-00005 of 5 shards"):
        built("parquet", path=str(tmp_path))
    parquet(tmp_path / "train-00003-of-00005-abc.parquet", [{"prompt": f"3{i}?", "answer": "1"} for i in range(9)])
    task = built("parquet", path=str(tmp_path))
    assert len(task.prompts("train")) + len(task.prompts("heldout")) == 45


def lines(path: Path, *prompts: str, answer: str = "1") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": f"{prompt}?", "answer": answer}) + "\n" for prompt in prompts))


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("train/a.jsonl", "dev/a.jsonl")])
def test_files_of_several_splits_are_not_trained_on_alike(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, prompts in zip(names, ("abcd", "xy"), strict=True):
        lines(tmp_path / name, *prompts)
    other = "test" if "test.jsonl" in names else "dev"
    with pytest.raises(
        ValueError, match=rf"several splits \(train, {other}\).*split: train and heldout_split: {other}"
    ):
        built("rows", path=str(tmp_path))
    task = built("dataset", path=str(tmp_path), split="train", heldout_split=other)
    assert asked(task) == set("abcd") and asked(task, "heldout") == set("xy")
    apart = built("rows", path=str(tmp_path), heldout_path=str(tmp_path / names[1]))
    assert asked(apart) == set("abcd") and asked(apart, "heldout") == set("xy")


@pytest.mark.parametrize("task", ["rows", "dataset"])
def test_configurations_of_a_data_set_are_not_read_as_one(tmp_path: Path, task: str) -> None:
    """As GSM8K has the same questions in ``main`` and ``socratic``; MATH's subjects are parts of one."""
    lines(tmp_path / "main" / "train.jsonl", *"abcdef")
    lines(tmp_path / "socratic" / "train.jsonl", *"abcde", "g", answer="step by step")
    with pytest.raises(
        ValueError, match=r"main and .*socratic hold the same 5 prompts: configurations .* folder of one"
    ):
        built(task, path=str(tmp_path))
    chosen = built(task, path=str(tmp_path / "main"))
    assert asked(chosen) | asked(chosen, "heldout") == set("abcdef")
    if task == "dataset":
        chosen = built(task, path=str(tmp_path), subset="socratic")
        assert asked(chosen) | asked(chosen, "heldout") == set("abcdeg")
    lines(tmp_path / "socratic" / "train.jsonl", *"ghijk", "a")
    parts = built(task, path=str(tmp_path))
    assert asked(parts) | asked(parts, "heldout") == set("abcdefghijk")
