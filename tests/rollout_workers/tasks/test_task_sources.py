"""Parquet, data sets, GSM8K, MATH-500 and mixtures: rows read by hand-made copies of the real formats."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_config
from configs.schema import Reward, TaskConfig
from rollout_workers.tasks import Score, Task, build_task, score_all
from rollout_workers.tasks.mixture import cycle
from rollout_workers.tasks.rewards import Response, judge_all, reward_hash

ROWS = [{"q": f"{i} + 1", "a": str(i + 1), "why": f"because {i}"} for i in range(40)]


def built(name: str, **options: Any) -> Any:
    return build_task(TaskConfig(name=name, options=options))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def everything(task: Task) -> list[tuple[str, str]]:
    return [(p.text, str(p.metadata["answer"])) for split in ("train", "heldout") for p in task.prompts(split)]  # type: ignore[arg-type]


def test_parquet_reads_what_jsonl_reads(tmp_path: Path) -> None:
    keys = {"prompt": "q", "answer": "a", "response": "why"}
    one = built("jsonl", path=str(write_jsonl(tmp_path / "rows.jsonl", ROWS)), **keys)
    two = built("parquet", path=str(write_parquet(tmp_path / "rows.parquet", ROWS)), **keys)
    assert everything(one) == everything(two) and len(everything(one)) == 40
    assert two.demonstrations("train")[0].response == f"because {two.prompts('train')[0].text.split()[0]}"


def test_a_parquet_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("no")
    with pytest.raises(ValueError, match="is not a readable Parquet file"):
        built("parquet", path=str(tmp_path / "rows.parquet"))


def test_heldout_rows_of_their_own_are_taken_out_of_the_training_rows(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    held = write_jsonl(tmp_path / "held.jsonl", ROWS[:4])
    task = built("jsonl", path=str(train), heldout_path=str(held), prompt="q", answer="a", template="Q: {prompt}\nA:")
    assert [p.text for p in task.prompts("heldout")] == [f"Q: {i} + 1\nA:" for i in range(4)] and len(
        task.prompts("train")
    ) == 36
    with pytest.raises(ValueError, match=r"template is 'Q' without \{prompt\}"):
        built("jsonl", path=str(train), prompt="q", answer="a", template="Q")


def test_a_saved_data_set_is_read_with_its_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS[:30]), "test": datasets.Dataset.from_list(ROWS[30:])}
    )
    both.save_to_disk(str(tmp_path / "set"))
    task = built("dataset", path=str(tmp_path / "set"), heldout_split="test", prompt="q", answer="a")
    assert [p.text for p in task.prompts("heldout")] == [row["q"] for row in ROWS[30:]] and len(
        task.prompts("train")
    ) == 30
    with pytest.raises(ValueError, match="no split 'tset'; did you mean 'test'"):
        built("dataset", path=str(tmp_path / "set"), heldout_split="tset", prompt="q", answer="a")


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [("datasets", "dataset", {"path": "x"}), ("math_verify", "jsonl", {"path": "x", "verifier": "math"})],
)
def test_a_missing_package_is_one_sentence_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    options = {
        **options,
        "path": str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": str(i), "answer": "1"} for i in range(40)])),
    }
    with pytest.raises(ValueError, match=r"not installed; pip install -c requirements.lock -e '\.\[tasks\]'"):
        built(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": {"second": 1}}, r"task\.options\.limits\.second is not an option of jsonl; did you mean 'seconds'"),
        ({"limits": {"seconds": 0}}, r"task\.options\.limits\.seconds of jsonl is 0"),
        ({"verifier": "maths"}, r"task\.options\.verifier of jsonl is 'maths'"),
        ({"verifier": "python"}, r"task\.options\.python is missing"),
        ({"python": {"path": "x"}}, r"task\.options\.python is not used with task\.options\.verifier exact"),
        ({"python": {}}, r"task\.options\.python\.path of jsonl is missing"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built("jsonl", path=str(write_jsonl(tmp_path / "rows.jsonl", ROWS)), prompt="q", answer="a", **options)


GSM8K = [
    {"question": f"{i} and {i}?", "answer": f"They are {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i},000"}
    for i in range(3)
]


@pytest.mark.parametrize("published", [True, False])
def test_gsm8k_from_a_local_copy(tmp_path: Path, published: bool) -> None:
    if published:
        for split, rows in (("train", GSM8K), ("test", GSM8K[:1])):
            write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
        write_jsonl(tmp_path / "data" / "train_socratic.jsonl", [{"question": "other", "answer": "#### 1"}])
    else:
        for split, rows in (("train", GSM8K), ("test", GSM8K[:1])):
            write_parquet(tmp_path / "main" / f"{split}-00000-of-00001.parquet", rows)
            write_parquet(
                tmp_path / "a" / "socratic" / f"{split}-00000-of-00001.parquet",
                [{"question": "other", "answer": "#### 1"}],
            )
    task = built("gsm8k", path=str(tmp_path))
    assert [p.text for p in task.prompts("train")] == ["1 and 1?", "2 and 2?"] and len(task.prompts("heldout")) == 1
    demo = task.demonstrations("train")[1]
    assert demo.response == "They are 2+2=4.\n#### 4000"
    assert task.score(demo.prompt, demo.response).success and task.score(demo.prompt, "it is 4,000").success
    assert not task.score(demo.prompt, "4000, or 2").success


def test_math500_needs_rows_to_train_on_and_leaves_its_own_out(tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    problems = [
        {"problem": f"Half of {i}?", "solution": f"It is $\\boxed{{\\frac{{{i}}}{{2}}}}$.", "subject": "Algebra"}
        for i in range(1, 30)
    ]
    test = [{**row, "answer": row["solution"][14:-3]} for row in problems[:10]]
    path = str(write_jsonl(tmp_path / "test.jsonl", test))
    with pytest.raises(ValueError, match=r"either train .* or heldout_share"):
        built("math500", path=path)
    task = built("math500", path=path, train=str(write_jsonl(tmp_path / "math" / "train.jsonl", problems)))
    assert len(task.prompts("heldout")) == 10 and len(task.prompts("train")) == 19
    prompt = task.prompts("heldout")[0]
    assert (
        prompt.text.startswith("Half of 1?")
        and prompt.metadata["answer"] == "\\frac{1}{2}"
        and prompt.metadata["subject"] == "Algebra"
    )
    answers = ["so $\\boxed{0.5}$", "\\boxed{\\frac12}", "1/2", "2", "", "\\boxed{" * 50]
    verdicts = task.score_batch([prompt] * len(answers), answers)
    assert [isinstance(v, Score) and v.success for v in verdicts] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("weights", "order"),
    [([1.0], [0]), ([1, 1], [0, 1]), ([2, 1], [0, 1, 0]), ([0.5, 0.25], [0, 1, 0]), ([3, 1, 1], [0, 1, 0, 2, 0])],
)
def test_cycle(weights: list[float], order: list[int]) -> None:
    assert cycle(weights) == order


class TestMixture:
    """Countdown twice as often as 40 rows."""

    @pytest.fixture
    def task(self, tmp_path: Path) -> Any:
        rows = {
            "name": "jsonl",
            "options": {"path": str(write_jsonl(tmp_path / "rows.jsonl", ROWS)), "prompt": "q", "answer": "a"},
        }
        return built("mixture", tasks=[{"name": "countdown", "weight": 2.0}, rows])

    def test_prompts_come_in_proportion_and_deterministically(self, task: Any) -> None:
        prompts = task.prompts("train")
        assert Counter(p.metadata["mixture_task"] for p in prompts[:300]) == {"countdown": 200, "jsonl": 100}
        assert [p.id for p in prompts[:2]] == ["mixture/train/0", "mixture/train/1"]
        countdown = build_task(TaskConfig()).prompts("train")
        assert [prompts[i].text for i in (0, 2, 3, 5)] == [countdown[i].text for i in range(4)]
        assert len(prompts) == 1_500_000  # a million of countdown are two of three

    def test_heldout_prompts_are_there_once(self, task: Any) -> None:
        heldout = task.prompts("heldout")
        of_rows = [p.text for p in heldout if p.metadata["mixture_task"] == "jsonl"]
        assert len(of_rows) == len(set(of_rows)) > 3 and not {p.text for p in heldout} & {
            p.text for p in task.prompts("train")[:400]
        }

    def test_each_prompt_is_judged_by_its_own_task(self, task: Any) -> None:
        demos = task.demonstrations("heldout")[:6]
        verdicts = score_all(task, [d.prompt for d in demos], [d.response for d in demos])
        assert [task.score(d.prompt, d.response) for d in demos] == verdicts
        assert task.parts == ("success", "format", "answered") and all(tuple(v.parts) == task.parts for v in verdicts)  # type: ignore[union-attr]
        assert [v.parts["format"] for v in verdicts] == [1.0, 0.0, 1.0] * 2  # type: ignore[union-attr]
        assert [v.success for v in verdicts][1::3] == [True, True]  # type: ignore[union-attr]
        weighed = judge_all(
            task,
            Reward(weights={"format": 2.0}),
            [demos[0].prompt],
            [Response(text=demos[0].response, new_tokens=1, limit=2, stopped=True)],
        )
        assert weighed[0].reward == 2.0  # type: ignore[union-attr]

    def test_equal_names_are_told_apart(self) -> None:
        task = built("mixture", tasks=["countdown", {"name": "countdown", "options": {"numbers": 4}}])
        assert [p.metadata["mixture_task"] for p in task.prompts("train")[:2]] == ["countdown#1", "countdown#2"]
        assert len(task.prompts("train")[1].metadata["numbers"]) == 4

    @pytest.mark.parametrize(
        ("tasks", "message"),
        [
            ([], "is empty"),
            (["countdwn"], r"tasks\[0\] \(countdwn\).*did you mean 'countdown'"),
            (["mixture"], r"tasks\[0\] is a mixture itself"),
            ([{"name": "countdown", "wieght": 2}], "did you mean 'weight'"),
            ([{"name": "countdown", "chat": True}], r"tasks\[0\]\.chat: all of a mixture share it"),
            ([{"name": "countdown", "weight": 0}], r"tasks\.0\.weight of mixture is 0"),
        ],
    )
    def test_names_what_is_wrong(self, tasks: list[Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            built("mixture", tasks=tasks)


def test_paths_of_every_task_in_a_config_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "base: {model: smollm2-135m-instruct}\n"
        "task: {name: mixture, options: {tasks: [countdown, {name: jsonl, options: {path: rows.jsonl, python: {path: "
        "r.py}}}]}}\n"
        "actions: {data: [{kind: task, task: {name: gsm8k, options: {path: copy}}}]}\n"
        "evaluation: {retention: {kind: task, task: {name: dataset, options: {path: org/name, preference: {model: "
        "org/name}}}}}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    member = config.task.options["tasks"][1]["options"]  # type: ignore[index]
    assert member == {"path": str(tmp_path / "rows.jsonl"), "python": {"path": str(tmp_path / "r.py")}}
    assert config.actions.data[0].task.options["path"] == str(tmp_path / "copy")  # type: ignore[union-attr]
    assert config.evaluation.retention.task.options == {"path": "org/name", "preference": {"model": "org/name"}}  # type: ignore[union-attr]


def test_the_hash_is_by_what_files_say(tmp_path: Path) -> None:
    def hashed(place: str, source: str) -> str:
        rows = write_jsonl(tmp_path / place / "rows.jsonl", ROWS)
        (tmp_path / place / "r.py").write_text(source)
        member = {
            "name": "jsonl",
            "options": {"path": str(rows), "verifier": "python", "python": {"path": str(tmp_path / place / "r.py")}},
        }
        return reward_hash(TaskConfig(name="mixture", options={"tasks": ["countdown", member]}), Reward())

    assert hashed("a", "def reward(row, response): return 1") == hashed("b", "def reward(row, response): return 1")
    assert hashed("a", "def reward(row, response): return 1") != hashed("b", "def reward(row, response): return 2")
