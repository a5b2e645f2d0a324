"""``init`` on whatever rows people have: it says at once what to do, or what it writes is taken by the next command."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from configs.loading import load_config
from configs.schema import RunConfig
from pipeline.cli.main import app
from pipeline.preflight.check import check
from pipeline.preflight.init_config import look, samples_of
from rollout_workers.tasks import TASKS, build_task

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs" / "models" / "countdown-1m"
SIZE = 40
PROMPTS = [f"{i + 1} {i + 2} 3 -> {i + 5} :" for i in range(SIZE)]
ANSWERS = [f"{i + 1} + 3 = {i + 4}" for i in range(SIZE)]


def named(prompt: str, answer: str) -> list[dict[str, Any]]:
    return [{prompt: p, answer: a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def comma(path: Path, between: str = ",") -> Path:
    path.write_text(
        "\n".join(between.join(row) for row in [("question", "solution"), *zip(PROMPTS, ANSWERS, strict=True)])
    )
    return path


def shards(path: Path, names: list[str]) -> Path:
    path.mkdir()
    rows, each = named("input", "output"), SIZE // len(names)
    for number, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows[number * each : (number + 1) * each]), path / name)
    return path


def saved(path: Path, *splits: str) -> Path:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows, each = named("text", "label"), SIZE // max(1, len(splits))
    if not splits:
        datasets.Dataset.from_list(rows).save_to_disk(path)
        return path
    found = {name: datasets.Dataset.from_list(rows[k * each : (k + 1) * each]) for k, name in enumerate(splits)}
    datasets.DatasetDict(found).save_to_disk(path)
    return path


def talk(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


MAKERS: dict[str, tuple[Callable[[Path], Path], int | None]] = {
    "rows.jsonl": (lambda p: lines(p, named("prompt", "answer")), None),
    "rows.ndjson": (lambda p: lines(p, named("problem", "solution")), None),
    "lines.json": (lambda p: lines(p, named("question", "target")), None),
    "array.json": (lambda p: p.write_text(json.dumps(named("instruction", "output"))) and p, None),
    "document.json": (lambda p: p.write_text(json.dumps({"data": named("query", "completion")})) and p, None),
    "rows.csv": (comma, None),
    "rows.tsv": (lambda p: comma(p, "\t"), None),
    "rows.jsonl.gz": (
        lambda p: p.write_bytes(gzip.compress(lines(p, named("input", "label")).read_bytes())) and p,
        None,
    ),
    "rows.parquet": (lambda p: pq.write_table(pa.Table.from_pylist(named("text", "label")), p) or p, None),
    "one split": (lambda p: shards(p, ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]), None),
    "plain shards": (lambda p: shards(p, ["a/0.parquet", "a/1.parquet", "b/0.parquet", "b/1.parquet"]), None),
    "hub layout": (
        lambda p: shards(
            p, ["data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet", "data/validation-0.parquet"]
        ),
        10,
    ),
    "folders of splits": (lambda p: shards(p, ["train/0.parquet", "dev/0.parquet"]), 20),
    "saved": (saved, None),
    "saved splits": (lambda p: saved(p, "train", "test"), 20),
    "messages.jsonl": (
        lambda p: lines(p, [{"messages": talk(a, b)} for a, b in zip(PROMPTS, ANSWERS, strict=True)]),
        None,
    ),
    "prompt messages.jsonl": (
        lambda p: lines(
            p,
            [
                {"prompt": talk(a, b)[:1], "reward_model": {"ground_truth": b}}
                for a, b in zip(PROMPTS, ANSWERS, strict=True)
            ],
        ),
        None,
    ),
    "prompt completion.jsonl": (
        lambda p: lines(
            p, [{"prompt": talk(a, b)[:1], "completion": talk(a, b)[1:]} for a, b in zip(PROMPTS, ANSWERS, strict=True)]
        ),
        None,
    ),
    "nested.jsonl": (
        lambda p: lines(
            p,
            [
                {"question": a, "answer": {"value": b, "aliases": [b]}, "extra": {"answer": b}}
                for a, b in zip(PROMPTS, ANSWERS, strict=True)
            ],
        ),
        None,
    ),
    "several.jsonl": (
        lambda p: lines(p, [{"question": a, "answers": [b, b + " !"]} for a, b in zip(PROMPTS, ANSWERS, strict=True)]),
        None,
    ),
    "squad.json": (
        lambda p: (
            p.write_text(
                json.dumps(
                    [
                        {"question": a, "answers": {"text": [b], "answer_start": [0]}}
                        for a, b in zip(PROMPTS, ANSWERS, strict=True)
                    ]
                )
            )
            and p
        ),
        None,
    ),
    "own columns.jsonl": (
        lambda p: lines(p, [{**row, "response": ["a"], "latent_control": 1} for row in named("prompt", "answer")]),
        None,
    ),
}


def init(rows: Path, *arguments: str) -> tuple[int, str, Path]:
    out = rows.parent / "mine.yaml"
    done = CliRunner().invoke(app, ["init", str(rows), "-o", str(out), "--base", str(BASE), *arguments])
    return done.exit_code, done.output, out


def as_sampled(config: RunConfig, path: Path) -> None:
    """A file as ``sample`` writes it: an answer to each training prompt."""
    demos = build_task(config.task).demonstrations("train")
    lines(samples_of(path), [{"prompt": demo.prompt.text, "answer": demo.response} for demo in demos])


@pytest.mark.parametrize("name", MAKERS)
def test_what_init_writes_is_taken(tmp_path: Path, name: str) -> None:
    make, heldout = MAKERS[name]
    extra = ("--answer-key", "answers.text") if name == "squad.json" else ()
    code, said, out = init(make(tmp_path / name), *extra)
    assert code == 0, said
    config = load_config(out, check_paths=False)
    assert config.task.name in TASKS
    task = build_task(config.task)
    sides = len(task.prompts("train")), len(task.prompts("heldout"))
    assert sum(sides) == (30 if name == "hub layout" else SIZE) and sides[1] == (heldout or sides[1])
    assert config.evaluation is not None and config.evaluation.prompts == sides[1]
    assert {demo.prompt.text: demo.response for demo in task.demonstrations("train")}.items() <= dict(
        zip(PROMPTS, ANSWERS, strict=True)
    ).items()
    as_sampled(config, out)
    assert check(load_config(out)).errors == []


def test_what_is_held_out_is_not_asked_for_twice(tmp_path: Path) -> None:
    """21 rows: a fifth by hash is seldom four; prompts that repeat make it rarer."""
    code, said, out = init(
        lines(tmp_path / "rows.jsonl", [{"prompt": PROMPTS[i % 3], "answer": "1"} for i in range(21)])
    )
    assert code == 0, said
    config = load_config(out, check_paths=False)
    assert config.evaluation is not None
    assert config.evaluation.prompts == len(build_task(config.task).prompts("heldout")) > 0


def test_the_answer_of_a_choice_is_not_the_list_of_choices(tmp_path: Path) -> None:
    """As ARC and CommonsenseQA are published."""
    choices = {"text": ["one", "two"], "label": ["A", "B"]}
    rows = [{"question": p, "choices": choices, "answerKey": "AB"[i % 2]} for i, p in enumerate(PROMPTS)]
    found = look(lines(tmp_path / "rows.jsonl", rows))
    assert found.task.options["answer"] == "answerKey" and set(found.answers) == {"A", "B"}


@pytest.mark.parametrize(
    ("answer", "verifier"),
    [
        ("7 - 4 = 3\n#### {}", "number"),
        (r"So $\boxed{{{}}}$.", "number"),
        (r"So $\boxed{{{}x}}$.", "math"),
        ("It is {}.", "exact"),
    ],
)
def test_answers_that_are_marked_in_a_solution_are_judged_alone(tmp_path: Path, answer: str, verifier: str) -> None:
    rows = [{"question": p, "answer": answer.format(i)} for i, p in enumerate(PROMPTS)]
    assert look(lines(tmp_path / "rows.jsonl", rows)).task.options["verifier"] == verifier


def test_keys_are_known_in_capitals_too(tmp_path: Path) -> None:
    rows = [{"Question": p, "Answer": i, "question_id": i} for i, p in enumerate(PROMPTS)]
    options = look(lines(tmp_path / "rows.jsonl", rows)).task.options
    assert (options["prompt"], options["answer"]) == ("Question", "Answer")


def test_codes_and_lengths_follow_the_rows(tmp_path: Path) -> None:
    long = " ".join(["7"] * 600)
    rows = [{"prompt": f"{PROMPTS[i]} {long}", "answer": ["7", "8"][i % 2]} for i in range(SIZE)]
    code, said, out = init(lines(tmp_path / "rows.jsonl", rows))
    assert code == 0, said
    config = load_config(out, check_paths=False)
    assert config.actions is not None and config.actions.num_actions == 4  # 7, 8, the end, and one to spare
    assert config.task.max_prompt_tokens == 1 + len(rows[0]["prompt"].split())
    assert config.actions.max_length is None  # as long as a prompt and a response together
    many = [{"prompt": PROMPTS[i], "answer": " ".join(str(n) for n in range(3 * i, 3 * i + 3))} for i in range(SIZE)]
    out.unlink()
    assert init(lines(tmp_path / "rows.jsonl", many))[0] == 0
    assert load_config(out, check_paths=False).actions.num_actions == 64  # type: ignore[union-attr]


REFUSED: dict[str, tuple[list[dict[str, Any]], tuple[str, ...], str]] = {
    "null answer": (
        [{"prompt": p, "answer": None if i == 7 else "1"} for i, p in enumerate(PROMPTS)],
        (),
        "line 8: 'answer' is None, not a text or number; mend or remove the row",
    ),
    "empty answer": (
        [{"prompt": p, "answer": "" if i == 5 else "1"} for i, p in enumerate(PROMPTS)],
        (),
        "line 6: 'answer' is ''",
    ),
    "no key": (
        [{"frage": p, "antwort": "1"} for p in PROMPTS],
        (),
        "which key holds the prompt? Rows have frage, antwort; name it with --prompt-key KEY",
    ),
    "mapping": (
        [{"prompt": p, "answer": {"a": 1, "b": 2}} for p in PROMPTS],
        (),
        "which key holds the answer? Rows have prompt, answer, answer.a, answer.b; name it with --answer-key",
    ),
    "talks": (
        [{"messages": [{"role": "system", "content": "Be brief."}, *talk(p, "1")]} for p in PROMPTS],
        (),
        "'messages' holds conversations of several turns; add --chat",
    ),
    "no template": ([{"messages": talk(p, "1")} for p in PROMPTS], ("--chat",), "has no chat template"),
    "bytes": (
        [{"prompt": p, "answer": {}} for p in PROMPTS],
        (),
        "Rows have prompt, answer; name it with --answer-key KEY ('answer' holds {}, which no task reads)",
    ),
    "pictures": (
        [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, *talk(p, "1")]} for p in PROMPTS],
        ("--chat",),
        "name it with --prompt-key KEY ('messages' holds [{'role': 'user', 'content': [{'type': 'image_url'}]}, ",
    ),
    "unanswered": ([{"messages": talk(p, "1")[:1]} for p in PROMPTS], (), "which key holds the answer?"),
    "few": ([{"prompt": p, "answer": "1"} for p in PROMPTS[:4]], (), "has 4 rows; give at least 20"),
    "key": (
        [{"prompt": p, "answer": "1"} for p in PROMPTS],
        ("--answer-key", "anser"),
        "--answer-key anser: not every row has it; did you mean 'answer'?",
    ),
    "one prompt": (
        [{"prompt": "1", "answer": "1"} for _ in PROMPTS],
        (),
        "no row falls to the train split; add rows with other prompts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_said_at_once(tmp_path: Path, name: str) -> None:
    rows, arguments, words = REFUSED[name]
    code, said, out = init(lines(tmp_path / "rows.jsonl", rows), *arguments)
    assert code == 2 and words in said and not out.exists(), said


def test_no_rows_at_all(tmp_path: Path) -> None:
    for name, words in (
        ("none.csv", "does not exist"),
        ("empty", "holds no .jsonl"),
        ("notes.docx", "is a zip archive; unpack it first"),
    ):
        if name == "empty":
            (tmp_path / name).mkdir()
        if name == "notes.docx":
            (tmp_path / name).write_bytes(b"PK\x03\x04\xff\xfe")
        code, said, _ = init(tmp_path / name)
        assert code == 2 and words in said, said


CHECKED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str | None]] = {
    "well": (named("prompt", "answer"), {}, None),
    "null": ([*named("prompt", "answer"), {"prompt": "1", "answer": None}], {}, "line 41: 'answer' is None"),
    "other key": (named("prompt", "solution"), {}, "line 1: no key 'answer'"),
    "no number": (
        [*named("prompt", "answer")[:9], {"prompt": "1", "answer": "x"}],
        {"verifier": "number"},
        "line 10: 'answer' is 'x'",
    ),
    "one prompt": ([{"prompt": "1", "answer": "1"}] * 9, {}, "no row falls to the train split"),
    "template": (named("prompt", "answer"), {"template": "Q"}, "without {prompt}"),
}


@pytest.mark.parametrize("name", CHECKED)
def test_task_check_and_config_check_agree(tmp_path: Path, name: str) -> None:
    rows, options, words = CHECKED[name]
    lines(tmp_path / "rows.jsonl", rows)
    task = {"name": "rows", "options": {"path": "rows.jsonl", **options}}
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"base": {"model": str(BASE)}, "task": task, "actions": {}, "evaluation": None}))
    task_check, config_check = (CliRunner().invoke(app, [kind, "check", str(config)]) for kind in ("task", "config"))
    assert (task_check.exit_code, config_check.exit_code) == ((0, 0) if words is None else (2, 2))
    if words is not None:
        assert words in task_check.output and words in config_check.output
        assert config_check.output.count(words) == 1


def test_config_check_finds_rows_without_a_text_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def reward(row, response):\n    return 1\n")
    rows = [{"prompt": p, "answer": "1" if i else None, "worked": "1"} for i, p in enumerate(PROMPTS)]
    options = {"path": "rows.jsonl", "verifier": "python", "python": {"path": "reward.py"}}
    lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "c.yaml").write_text(
        json.dumps({"base": {"model": str(BASE)}, "task": {"name": "rows", "options": options}, "actions": {}})
    )
    (error,) = check(load_config(tmp_path / "c.yaml")).errors
    assert error.startswith("actions.data[0]: ") and "set task.options.response" in error
    assert check(load_config(tmp_path / "c.yaml", ["task.options.response=worked"])).errors == []
