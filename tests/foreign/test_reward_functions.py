"""Reward functions as people define them: found, or refused by name with the reason; rows without answers are taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.schema import TaskConfig
from rollout_workers.tasks import Score, build_task
from rollout_workers.tasks.scorer_options import Limits, Python
from rollout_workers.tasks.scorers import build_scorer

FOUND = {
    "def": "def reward(row, response): return 1",
    "annotated": "from collections.abc import Callable\ndef f(row, response): return 1\nreward: Callable = f",
    "in if": "if True:\n    def reward(row, response): return 1",
    "in else": "if False:\n    pass\nelse:\n    def reward(row, response): return 1",
    "in try": "try:\n    import nothing_such\nexcept ImportError:\n    def reward(row, response): return 1",
    "in with": "import contextlib\nwith contextlib.suppress(OSError):\n    def reward(row, response): return 1",
    "in for": "for reward in [lambda row, response: 1]: pass",
    "async one way": "def reward(row, response): return 1\nif False:\n    async def reward(row, response): return 1",
    "instance": "class Reward:\n    def __call__(self, row, response): return 1\nreward = Reward()",
    "partial": "import functools\ndef f(n, row, response): return n\nreward = functools.partial(f, 1)",
    "lambda": "reward = lambda row, response: 1",
    "walrus": "(reward := lambda row, response: 1)",
    "unpacked": "reward, other = (lambda row, response: 1), 2",
    "imported": "from mine import reward",
    "imported as": "from mine import f as reward",
    "star": "from mine import *",
    "defaults": "def reward(row, response, scale=1, **more): return scale",
    "stars": "def reward(*given): return len(given) - 1",
    "method": "class R:\n    def f(self, row, response): return 1\nreward = R().f",
    "decorated": "import functools\n@functools.lru_cache\ndef f(x): return 1\ndef reward(row, response): return f(1)",
}
REFUSED = {
    "async": ("async def reward(row, response): return 1", "defines async def reward"),
    "async in if": ("if True:\n    async def reward(row, response): return 1", "defines async def reward"),
    "class": ("class reward:\n    def __call__(self, row, response): return 1", "defines class reward"),
    "module": ("import math as reward", "defines the module reward"),
    "within def": ("def make():\n    def reward(row, response): return 1", "defines no 'reward'"),
    "no value": ("from collections.abc import Callable\nreward: Callable", "defines no 'reward'"),
    "other name": ("def rewrad(row, response): return 1", "did you mean 'rewrad'"),
    "async alias": ("async def f(row, response): return 1\nreward = f", "reward is async"),
    "async instance": (
        "class R:\n    async def __call__(self, row, response): return 1\nreward = R()",
        "reward is async",
    ),
    "async partial": (
        "import functools\nasync def f(n, row, response): return 1\nreward = functools.partial(f, 1)",
        "is async",
    ),
    "a number": ("reward = 7", "reward is int 7, which cannot be called"),
    "one argument": ("def reward(response): return 1", "too many positional arguments"),
    "three arguments": ("def reward(row, response, third): return 1", "missing a required argument: 'third'"),
    "another order": ("def reward(response, row): return 1", "takes response, row; write def reward(row, response)"),
    "star without": ("from math import *", "no attribute 'reward'"),
    "deleted": ("def reward(row, response): return 1\ndel reward", "no attribute 'reward'"),
}


def built(folder: Path, source: str, rows: list[Any] | None = None) -> Any:
    (folder / "reward.py").write_text(source)
    (folder / "mine.py").write_text("def f(row, response): return 1\nreward = f\n")
    rows = rows or [{"prompt": f"{i}?", "answer": str(i)} for i in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    python = {"path": str(folder / "reward.py")}
    options = {"path": str(folder / "rows.jsonl"), "verifier": "python", "python": python}
    return build_task(TaskConfig(name="jsonl", options=options))


@pytest.mark.parametrize("how", FOUND)
def test_found(tmp_path: Path, how: str) -> None:
    task = built(tmp_path, FOUND[how])
    verdict = task.score(task.prompts("train")[0], "x")
    assert isinstance(verdict, Score) and verdict.reward == 1.0


@pytest.mark.parametrize("how", REFUSED)
def test_refused_by_name(tmp_path: Path, how: str) -> None:
    source, message = REFUSED[how]
    with pytest.raises(ValueError) as caught:
        task = built(tmp_path, source)
        task.score(task.prompts("train")[0], "x")
    assert message in str(caught.value) and str(tmp_path / "reward.py") in str(caught.value)


def test_success_is_true_or_false(tmp_path: Path) -> None:
    task = built(tmp_path, "def reward(row, response): return {'reward': 1, 'success': float(response)}")
    given = ["1", "0", "-1", "0.5", "2"]
    found = task.score_batch([task.prompts("train")[0]] * len(given), given)
    assert [verdict.success if isinstance(verdict, Score) else verdict.kind for verdict in found] == [
        *(True, False),
        *["reward_invalid"] * 3,
    ]


@pytest.mark.parametrize("name", ["answered", "length", "stop", "success", "score", "reward"])
def test_parts_do_not_have_names_of_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / "reward.py").write_text("def reward(row, response): return 1")
    with pytest.raises(ValueError, match=f"task.options.python.parts names '{name}', which every score has"):
        build_scorer("python", Limits(), Python(path=str(tmp_path / "reward.py"), parts=("mine", name)), None)


def test_answers_of_any_kind_or_none_reach_the_function_as_they_are(tmp_path: Path) -> None:
    answers = [None, ["a", 1], {"x": [1.5, None]}, True, "", 7, 2.0, [], {}]
    rows = [{"prompt": f"{i}?", "answer": answer} for i, answer in enumerate(answers)] + [{"prompt": "none"}]
    shown = "def reward(row, response): return repr(row.get('answer', 'absent')) == response"
    task = built(tmp_path, shown, rows)
    by_prompt = {p.text: p for split in ("train", "heldout") for p in task.prompts(split)}
    for row in rows:
        assert task.score(by_prompt[row["prompt"]], repr(row.get("answer", "absent"))).reward == 1.0, row
