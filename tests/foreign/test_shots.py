"""Examples before the prompts of a user's own rows: which rows they are, how they read, and that they are asked no
more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_config
from configs.schema import TaskConfig
from rollout_workers.tasks import build_task


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twenty sums; every prompt twice."""
    return written(tmp_path / "rows.jsonl", [{"prompt": f"{n % 20} + 1 =", "answer": n % 20 + 1} for n in range(40)])


def texts(task: Any, split: str) -> list[str]:
    return [prompt.text for prompt in task.prompts(split)]


def test_the_first_rows_to_train_on_are_the_examples_and_are_asked_no_more(rows: Path) -> None:
    options = {"path": str(rows), "verifier": "number"}
    plain = build_task(TaskConfig(name="jsonl", options=options))
    shown = build_task(TaskConfig(name="jsonl", options=options, shots=2))
    first, second = list(dict.fromkeys(texts(plain, "train")))[:2]
    answers = [str(int(text.split()[0]) + 1) for text in (first, second)]
    head = f"{first} {answers[0]}\n\n{second} {answers[1]}\n\n"
    assert texts(shown, "heldout") == [head + text for text in texts(plain, "heldout")]
    assert texts(shown, "train") == [head + t for t in texts(plain, "train") if t not in (first, second)]
    # The verifier sees the row, not the examples: their numbers are no answer.
    prompt = shown.prompts("heldout")[0]
    assert shown.score(prompt, str(int(prompt.metadata["answer"]))).success  # type: ignore[call-overload,union-attr]
    assert not shown.score(prompt, answers[0]).success  # type: ignore[union-attr]


def test_a_file_of_examples_and_the_template_around_each(rows: Path, tmp_path: Path) -> None:
    held = build_task(TaskConfig(name="jsonl", options={"path": str(rows)})).prompts("heldout")[0].text
    shots = [{"prompt": "7 + 7 =", "answer": 14, "why": "Twice seven is 14"}, {"prompt": held, "answer": 0, "why": "x"}]
    named = written(tmp_path / "shots.jsonl", shots)
    rows.write_text(
        "".join(json.dumps({**json.loads(line), "why": "so"}) + "\n" for line in rows.read_text().splitlines())
    )
    options = {"path": str(rows), "shots_path": str(named), "template": "Q: {prompt}\nA:", "response": "why"}
    task = build_task(TaskConfig(name="jsonl", options=options, shots=2))
    head = f"Q: 7 + 7 =\nA: Twice seven is 14\n\nQ: {held}\nA: x\n\nQ: "
    assert all(text.startswith(head) for split in ("train", "heldout") for text in texts(task, split))
    asked = [text.removeprefix(head) for split in ("train", "heldout") for text in texts(task, split)]
    assert asked and f"{held}\nA:" not in asked


def test_conversations_show_examples_as_turns(tmp_path: Path) -> None:
    def row(n: int) -> dict[str, Any]:
        return {
            "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{n}+1"}],
            "answer": n + 1,
        }

    path = written(tmp_path / "rows.jsonl", [row(n) for n in range(30)])
    task = build_task(TaskConfig(name="jsonl", options={"path": str(path)}, chat=True, shots=1))
    for split in ("train", "heldout"):
        for prompt in task.prompts(split):
            roles, contents = zip(*prompt.turns, strict=True)
            assert roles == ("system", "user", "assistant", "user") and contents[0] == "Add."
            assert int(contents[1].split("+")[0]) + 1 == int(contents[2]) and contents[1] != contents[3]


def test_what_cannot_be_shown_is_refused_with_the_remedy(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.shots is 30, but the rows to train on have \d+ prompts; set fewer"):
        build_task(TaskConfig(name="jsonl", options={"path": str(rows)}, shots=30))
    with pytest.raises(ValueError, match=r"shots_path is .*, but task\.shots is 0; set task\.shots"):
        build_task(TaskConfig(name="jsonl", options={"path": str(rows), "shots_path": str(rows)}))
    config = tmp_path / "c.yaml"  # the path is relative to the config, as others are
    task = "{name: jsonl, shots: 1, options: {path: rows.jsonl, shots_path: rows.jsonl}}"
    config.write_text(f"base: {{model: {tmp_path}}}\ntask: {task}\n")
    assert load_config(config, []).task.options["shots_path"] == str(rows)


def test_members_of_a_mixture_have_their_own_examples(rows: Path) -> None:
    members = [{"name": "jsonl", "options": {"path": str(rows)}, "shots": 1}, "countdown"]
    task = build_task(TaskConfig(name="mixture", options={"tasks": members}))
    assert ["\n\n" in text for text in texts(task, "heldout")[:4]] == [True, False, True, False]
