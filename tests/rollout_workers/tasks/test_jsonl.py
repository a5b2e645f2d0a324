"""Rows of one's own: verifiers by hand, splits, and errors that name file, line and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_config
from configs.schema import TaskConfig
from rollout_workers.judging.pattern import pattern
from rollout_workers.tasks import build_task
from rollout_workers.tasks.verifiers import VERIFIERS


@pytest.mark.parametrize(
    ("verifier", "answer", "text", "right"),
    [
        ("exact", "New York", " new  york\n", True),
        ("exact", "New York", "New York City", False),
        ("number", "1234.5", "so it is 7, no: 1,234.50", True),
        ("number", "12", "12 or 13", False),
        ("number", "12", "none", False),
        ("contains", "cat", "The CAT sat", True),
        ("contains", "cat", "concatenate", False),
        ("regex", r"\b4[02]\b", "it is 42", True),
        ("regex", r"^42$", "it is 42", False),
    ],
)
def test_verifiers(verifier: str, answer: str, text: str, right: bool) -> None:
    found = pattern({"answer": answer}, text) if verifier == "regex" else VERIFIERS[verifier](answer, text)
    assert found is right


def task(path: Path, **options: Any) -> Any:
    return build_task(TaskConfig(name="jsonl", options={"path": str(path), **options}))


def test_rows_fall_to_splits_by_their_prompt_and_demonstrate_their_answer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"q": f"{i % 50} + 1", "a": i % 50 + 1, "kind": "sum"}) + "\n" for i in range(100))
    )
    rows = task(path, prompt="q", answer="a", verifier="number")
    train, heldout = ({p.text for p in rows.prompts(split)} for split in ("train", "heldout"))
    assert not train & heldout and len(train | heldout) == 50 and 2 < len(heldout) < 25
    demo = rows.demonstrations("heldout")[0]
    assert rows.score(demo.prompt, f"= {demo.response}").success and demo.prompt.metadata["kind"] == "sum"
    assert rows.score(demo.prompt, "").parts == {"success": 0.0, "answered": 0.0}


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ("{", {}, "line 2: not JSON"),
        ("[1]", {}, "line 2: a JSON object is wanted"),
        ('{"prompt": "b", "anwser": "1"}', {}, "line 2: no key 'answer'; did you mean 'anwser'"),
        ('{"prompt": "b", "answer": null}', {}, "line 2: 'answer' is None"),
        ('{"prompt": "b", "answer": "x"}', {"verifier": "number"}, "line 2: 'answer' is 'x' without a number"),
        ('{"prompt": "b", "answer": "("}', {"verifier": "regex"}, "line 2: 'answer' is not a regular expression"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, options: dict[str, str], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n' + line + "\n")
    with pytest.raises(ValueError) as caught:
        task(path, **options)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'verifier'"):
        task(tmp_path / "x", verifer="exact")
    with pytest.raises(ValueError, match="does not exist"):
        task(tmp_path / "x")


def test_the_path_is_relative_to_the_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "base: {model: smollm2-135m-instruct}\ntask: {name: jsonl, options: {path: rows.jsonl}}\n"
    )
    assert load_config(tmp_path / "c.yaml").task.options["path"] == str(tmp_path / "rows.jsonl")
