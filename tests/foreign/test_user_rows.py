"""A user's row is the user's: our names overwrite no column, and whatever the file holds arrives at the reward as it
is. The reward functions here compare with values written out by hand."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.schema import TaskConfig
from pipeline.evaluation.slices import labels
from rollout_workers.tasks import Failure, Score, build_task
from rollout_workers.tasks.row_files import Row
from rollout_workers.tasks.row_values import value_at


def built(path: Path, **options: Any) -> Any:
    return build_task(TaskConfig(name="rows", options={"path": str(path), **options}))


def rows_file(folder: Path, *rows: dict[str, Any]) -> Path:
    """The rows, each under ten prompts, so that both splits have some."""
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{n} {i}", **row}) + "\n" for n, row in enumerate(rows) for i in range(10))
    )
    return path


def every_demonstration(task: Any) -> list[Any]:
    return [demo for split in ("train", "heldout") for demo in task.demonstrations(split)]


def seen_by_reward(folder: Path, task_path: Path, expression: str, **options: Any) -> Any:
    """What ``expression`` of the first training row is, in the process of a reward function."""
    (folder / "reward.py").write_text(
        "import datetime\nfrom decimal import Decimal\n\ndef reward(row, response):\n"
        f"    assert {expression}, row\n    return 1.0\n"
    )
    task = built(task_path, verifier="python", python={"path": str(folder / "reward.py")}, **options)
    prompts = [task.prompts(split)[0] for split in ("train", "heldout")]
    for verdict in task.score_batch(prompts, ["1", "1"]):
        assert isinstance(verdict, Score) and verdict.success, getattr(verdict, "message", verdict)
    return prompts[0].metadata


@pytest.mark.parametrize("theirs", ["a draft", ["99", "98"], None, {"text": "no"}, 7])
def test_a_column_named_response_is_not_trained_on(tmp_path: Path, theirs: object) -> None:
    task = built(rows_file(tmp_path, {"answer": "4", "response": theirs}))
    assert {demo.response for demo in every_demonstration(task)} == {"4"}
    assert task.prompts("train")[0].metadata["response"] == theirs


def test_the_option_still_names_the_text_to_train_on(tmp_path: Path) -> None:
    rows = rows_file(tmp_path, {"answer": "4", "worked": "2 and 2 is 4", "response": "no"})
    task = built(rows, response="worked")
    assert {demo.response for demo in every_demonstration(task)} == {"2 and 2 is 4"}
    prompt = task.prompts("train")[0]
    assert prompt.metadata["response"] == "no" and task.score(prompt, "4").success
    with pytest.raises(ValueError, match=r"line 1: no key 'wrked'; did you mean 'worked'"):
        built(rows, response="wrked")


def test_renamed_keys_stay_and_the_users_own_prompt_and_answer_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    mine = {"q": "2 + 2?", "a": 4, "answer": {"draft": 5}, "prompt": ["mine"], "latent_control": "mine too"}
    path.write_text("".join(json.dumps({**mine, "q": f"{i} + 2?"}) + "\n" for i in range(10)))
    task = built(path, prompt="q", answer="a", verifier="exact")
    prompt = task.prompts("train")[0]
    assert dict(prompt.metadata) == {**mine, "q": prompt.text}
    assert task.score(prompt, "4").success and not task.score(prompt, "5").success
    assert {demo.response for demo in every_demonstration(task)} == {"4"}
    # Where the user has no such column, the names of the options lead to the values, as they always did.
    path.write_text("".join(json.dumps({"q": f"{i}?", "a": {"b": 4}}) + "\n" for i in range(10)))
    row = dict(built(path, prompt="q", answer="a.b").prompts("train")[0].metadata)
    assert row == {"q": row["q"], "a": {"b": 4}, "prompt": row["q"], "answer": 4}


def test_a_mixture_takes_no_column_away(tmp_path: Path) -> None:
    rows = rows_file(tmp_path, {"answer": "4", "mixture_task": "mine"})
    (tmp_path / "reward.py").write_text("def reward(row, response):\n    return row['mixture_task'] == 'mine'\n")
    options = {"path": str(rows), "verifier": "python", "python": {"path": str(tmp_path / "reward.py")}}
    task = build_task(
        TaskConfig(name="mixture", options={"tasks": ["countdown", {"name": "rows", "options": options}]})
    )
    prompt = task.prompts("heldout")[1]
    assert prompt.metadata["mixture_task"] == "rows"
    assert task.score(prompt, "4").success  # type: ignore[union-attr]


HUGE = 2**200 + 1
JSON_VALUES = [
    ("1", "1 and type(row['answer']) is int"),
    ("1.5", "1.5"),
    ("true", "True"),
    ("null", "None"),
    ('""', "''"),
    ('["a", 1, null]', "['a', 1, None]"),
    ('{"a": {"1": [true]}}', "{'a': {'1': [True]}}"),
    (str(HUGE), str(HUGE)),
    (str(2**53 + 1), str(2**53 + 1)),
    ('"\\u2028"', "chr(0x2028)"),
]


def test_a_reward_sees_values_as_in_the_json(tmp_path: Path) -> None:
    fields = ", ".join(f'"v{i}": {text}' for i, (text, _) in enumerate(JSON_VALUES))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}", "answer": {JSON_VALUES[0][0]}, {fields}}}\n' for i in range(9)))
    checks = " and ".join(f"row['v{i}'] == {value}" for i, (_, value) in enumerate(JSON_VALUES))
    seen_by_reward(tmp_path, path, f"{checks} and float(response) == row['answer']")


@pytest.mark.parametrize("answer", [None, [], ["a"], {}, {"a": 1}, True, "", float("nan")])
def test_a_reward_function_needs_no_answer(tmp_path: Path, answer: object) -> None:
    rows = rows_file(tmp_path, {"answer": answer})
    seen_by_reward(tmp_path, rows, "'answer' in row")
    task = built(rows, verifier="python", python={"path": str(tmp_path / "reward.py")})
    if answer in ("", None, [], {}):
        with pytest.raises(ValueError, match=r"neither answer nor response: set task\.options\.response"):
            task.demonstrations("train")[0]


def test_a_mistyped_answer_key_is_found_under_a_reward_function_too(tmp_path: Path) -> None:
    rows = rows_file(tmp_path, {"answer": "4"})
    (tmp_path / "reward.py").write_text("def reward(row, response):\n    return 1\n")
    with pytest.raises(ValueError, match="no key 'anwser'; did you mean 'answer'"):
        built(rows, answer="anwser", verifier="python", python={"path": str(tmp_path / "reward.py")})


def parquet(folder: Path, **columns: pa.Array) -> Path:
    size = len(next(iter(columns.values())))
    prompts = pa.array([f"row {i}" for i in range(size)], pa.large_string())
    pq.write_table(pa.table({"prompt": prompts, **columns}), folder / "rows.parquet")
    return folder / "rows.parquet"


def test_a_reward_sees_values_as_in_the_parquet(tmp_path: Path) -> None:
    noon = datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.UTC)
    path = parquet(
        tmp_path,
        answer=pa.array([Decimal("4.10")] * 9, pa.decimal128(38, 2)),
        day=pa.array([noon.date()] * 9),
        when=pa.array([noon.replace(tzinfo=None)] * 9, pa.timestamp("us")),
        nano=pa.array([1714566600000000001] * 9, pa.timestamp("ns")),
        zoned=pa.array([noon] * 9, pa.timestamp("ms", tz="UTC")),
        took=pa.array([datetime.timedelta(days=1, milliseconds=5)] * 9),
        kind=pa.array(["sum"] * 9).dictionary_encode(),
        nested=pa.array([{"a": [{"b": 1}], "c": None}] * 9),
        nothing=pa.nulls(9),
        blob=pa.array([b"\x00\xff"] * 9),
        big=pa.array([2**63] * 9, pa.uint64()),
        narrow=pa.array([0.1] * 9, pa.float32()),
        truth=pa.array([False] * 9),
    )
    seen_by_reward(
        tmp_path,
        path,
        "row['answer'] == Decimal('4.10') and type(row['answer']) is Decimal and str(row['answer']) == '4.10'"
        " and row['day'] == datetime.date(2024, 5, 1)"
        " and row['when'] == datetime.datetime(2024, 5, 1, 12, 30)"
        " and row['nano'].replace(microsecond=0) == datetime.datetime(2024, 5, 1, 12, 30)"
        " and row['zoned'] == datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.timezone.utc)"
        " and row['took'] == datetime.timedelta(days=1, milliseconds=5)"
        " and row['kind'] == 'sum' and row['nested'] == {'a': [{'b': 1}], 'c': None} and row['nothing'] is None"
        " and row['blob'] == b'\\x00\\xff' and row['big'] == 2 ** 63 and row['narrow'] == 0.1"
        " and row['truth'] is False",
    )


@pytest.mark.parametrize(
    ("answers", "verifier", "right", "wrong", "trained"),
    [
        (pa.array([4.0] * 9), "exact", ["4", "4.0"], ["4.00", "5"], "4"),
        (pa.array([4.5] * 9), "exact", ["4.5"], ["4"], "4.5"),
        (pa.array([0.1] * 9, pa.float32()), "exact", ["0.1"], ["0.10000000149011612"], "0.1"),
        (pa.array([1e-7] * 9), "exact", ["0.0000001", "1e-07"], ["0"], "0.0000001"),
        (pa.array([Decimal("4.00")] * 9), "exact", ["4", "4.00"], ["4.0"], "4"),
        (pa.array([Decimal("4.00")] * 9), "number", ["it is 4"], ["it is 400"], "4"),
        (
            pa.array([Decimal("12345678901234567890123456789012345678")] * 9),
            "exact",
            ["12345678901234567890123456789012345678"],
            ["12345678901234567890123456789012345679"],
            "12345678901234567890123456789012345678",
        ),
        (pa.array([datetime.date(2024, 5, 1)] * 9), "exact", ["2024-05-01"], ["2024-05-02"], "2024-05-01"),
        (pa.array(["yes"] * 9).dictionary_encode(), "exact", ["Yes"], ["no"], "yes"),
        (pa.array([True] * 9), "exact", ["true", "True"], ["false", "1"], "true"),
        (
            pa.array([["Paris", "City of Light"]] * 9),
            "contains",
            ["it is Paris", "the city of light"],
            ["Lyon"],
            "Paris",
        ),
        (pa.array([[1.0, 2.0]] * 9), "number", ["1", "2"], ["3", "12"], "1"),
    ],
)
def test_answers_of_any_type(
    tmp_path: Path, answers: pa.Array, verifier: str, right: list[str], wrong: list[str], trained: str
) -> None:
    task = built(parquet(tmp_path, answer=answers), verifier=verifier)
    prompt = task.prompts("train")[0]
    verdicts = task.score_batch([prompt] * len(right + wrong), right + wrong)
    assert [v.success for v in verdicts] == [True] * len(right) + [False] * len(wrong)
    assert task.demonstrations("train")[0].response == trained


@pytest.mark.parametrize("verifier", ["math", "regex"])
def test_any_of_several_answers_is_right_in_the_processes_too(tmp_path: Path, verifier: str) -> None:
    if verifier == "math":
        pytest.importorskip("math_verify", reason="math-verify is not installed")
    task = built(rows_file(tmp_path, {"answer": ["7", 8.0]}), verifier=verifier)
    verdicts = task.score_batch([task.prompts("train")[0]] * 3, ["7", "8", "9"])
    assert [isinstance(v, Failure) or v.success for v in verdicts] == [True, True, False]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "'answer' is None, not a text or number; mend or remove the row"),
        ("", "'answer' is '', not"),
        ([], r"'answer' is \[\], not"),
        (["a", None], r"'answer' is \['a', None\], not"),
        ({"text": "4"}, r".*set task.options.answer to a key inside it, e.g. answer.text"),
        (float("nan"), "'answer' is nan, not"),
        (float("inf"), "'answer' is inf, not"),
        (["a", {"b": 1}], r"'answer' is \['a', \{'b': 1\}\], not"),
    ],
)
def test_what_is_no_answer_is_named(tmp_path: Path, answer: object, words: str) -> None:
    with pytest.raises(ValueError, match=f"rows.jsonl, line 1: {words}"):
        built(rows_file(tmp_path, {"answer": answer}))


def test_names_with_dots_of_their_own_within_others() -> None:
    row: Row = {"a.b": {"c.d": 1, "e": [{"f.g": 2}]}, "a": {"b": {"c": {"d": 3}}}}
    assert [value_at(row, key) for key in ("a.b.c.d", "a.b.e.0.f.g", "a.b.c")] == [1, 2, {"d": 3}]
    for key in ("a.b.x", "a.b.", ".a", "a.b.e.1", ""):
        with pytest.raises(KeyError):
            value_at(row, key)


def test_dotted_keys_lead_into_mappings_and_lists(tmp_path: Path) -> None:
    row = {"in": [{"text": "2 + 2?"}], "reward_model": {"ground_truth": 4}, "a.b": "literal"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "in": [{"text": f"{i}?"}]}) + "\n" for i in range(9)))
    task = built(path, prompt="in.0.text", answer="reward_model.ground_truth", verifier="number")
    assert task.prompts("heldout")[0].text.endswith("?") and task.score(task.prompts("train")[0], "4").success
    assert built(path, prompt="in.0.text", answer="a.b").demonstrations("train")[0].response == "literal"
    with pytest.raises(ValueError, match=r"line 1: no key 'in.1.text'; set task.options.prompt to one of 'in'"):
        built(path, prompt="in.1.text", answer="a.b")


SYSTEM, USER, MODEL = ("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4")


@pytest.mark.parametrize("spelled", ["messages", "parts", "sharegpt"])
def test_conversations_are_prompt_and_answer(tmp_path: Path, spelled: str) -> None:
    roles = {"user": "human", "assistant": "gpt", "system": "system"}

    def message(role: str, content: str) -> dict[str, Any]:
        if spelled == "sharegpt":
            return {"from": roles[role], "value": content}
        return {"role": role, "content": [{"type": "text", "text": content}] if spelled == "parts" else content}

    path = tmp_path / "rows.jsonl"
    talks = [[SYSTEM, ("user", f"{i}?"), ("assistant", "one"), USER, MODEL] for i in range(9)]
    path.write_text("".join(json.dumps({"m": [message(*turn) for turn in talk]}) + "\n" for talk in talks))
    task = built(path, prompt="m", answer="m", template="{prompt} Now!")
    prompt = task.prompts("train")[0]
    assert prompt.turns[0] == SYSTEM and prompt.turns[-1] == ("user", "2 + 2? Now!") and len(prompt.turns) == 4
    assert prompt.text.startswith("Be brief.\n\n") and prompt.text.endswith("?\n\none\n\n2 + 2? Now!")
    assert task.demonstrations("train")[0].response == "4" and task.score(prompt, "4").success


def test_a_conversation_without_an_answer_is_named(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "2?"}]
    with pytest.raises(ValueError, match=r"line 1: 'm' is .*not a text or number"):
        built(rows_file(tmp_path, {"m": talk}), prompt="m", answer="m")
    task = built(rows_file(tmp_path, {"m": talk, "answer": "4"}, {"m": [*talk, *talk], "answer": "4"}), prompt="m")
    assert {len(p.turns) for split in ("train", "heldout") for p in task.prompts(split)} == {1, 2}


def test_few_prompts_fall_to_both_splits(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for share in (0.001, 0.999):
        path.write_text("".join(json.dumps({"prompt": "ab"[i % 2], "answer": "1"}) + "\n" for i in range(8)))
        task = built(path, heldout_share=share)
        sides = [{p.text for p in task.prompts(split)} for split in ("train", "heldout")]
        assert sorted(map(len, sides)) == [1, 1] and not sides[0] & sides[1]
    path.write_text('{"prompt": "a", "answer": "1"}\n')
    with pytest.raises(ValueError, match="no row falls to the train split; add rows with other prompts"):
        built(path)


def test_rows_of_sample_carry_their_ids_and_those_of_older_versions_are_read(tmp_path: Path) -> None:
    ids = {"tokenizer": "9f", "prompt": [5], "response": [7, 2], "truncated": False}
    new = built(rows_file(tmp_path, {"answer": "4", "latent_control": ids}))
    found = new.demonstrations("train")[0].ids
    assert found is not None and (found.prompt, found.response) == ((5,), (7, 2))
    for theirs in ({}, {"latent_control": "a note of the user's"}):
        old = built(rows_file(tmp_path, {"answer": "4", **theirs}))
        assert old.demonstrations("train")[0].ids is None and old.demonstrations("train")[0].response == "4"


@pytest.mark.parametrize(
    ("odd", "name"),
    [(float("nan"), "nan"), (float("-inf"), "-inf"), (2**2000, "inf"), (10**400, "inf"), (None, "missing")],
)
def test_a_number_that_is_none_spoils_no_slice(odd: object, name: str) -> None:
    """Columns with gaps come as NaN from pandas; bins are those of the numbers."""
    for kind in (float, int, Decimal):
        found = labels("x", [*({"x": kind(i)} for i in range(20)), {"x": odd}])
        assert found[:20] == ["0 to 4"] * 5 + ["5 to 9"] * 5 + ["10 to 14"] * 5 + ["15 to 19"] * 5 and found[20] == name
