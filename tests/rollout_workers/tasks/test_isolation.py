"""Reward functions in a process of their own: whatever they do, the caller gets a verdict or a typed failure."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from configs.schema import TaskConfig
from rollout_workers.tasks import Failure, Score, build_task
from rollout_workers.tasks.sandbox import Function, Isolation

REWARD = """
import ctypes, os, sys, time
calls = 0

def reward(row, response):
    global calls
    calls += 1
    if response == "raise":
        raise KeyError("no such key")
    if response == "exit":
        sys.exit(3)
    if response == "die":
        os._exit(7)
    if response == "hang":
        while True:
            pass
    if response == "sleep":
        time.sleep(60)
    if response == "hungry":
        return len(bytearray(2**32))
    if response == "segfault":
        ctypes.string_at(0)
    if response == "print":
        print("x" * 100_000)
        os.write(1, b"y" * 1000)
    if response == "nan":
        return float("nan")
    if response == "text":
        return "good"
    if response == "parts":
        return {"reward": 1, "style": 0.5}
    if response == "environment":
        return float("SECRET" in os.environ)
    if response == "calls":
        return calls
    if response == "own pid":
        return os.getpid()
    return float(response == row["answer"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward")
    (path / "reward.py").write_text(REWARD)
    (path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i}?", "answer": "{i}"}}\n' for i in range(20)))
    return path


def task(folder: Path, *, seconds: float = 5.0, **python: Any) -> Any:
    own = {"path": str(folder / "reward.py"), **python}
    options = {
        "path": str(folder / "rows.jsonl"),
        "verifier": "python",
        "python": own,
        "limits": {"seconds": seconds, "megabytes": 1024},
    }
    return build_task(TaskConfig(name="jsonl", options=options))


@pytest.fixture(scope="module")
def own(folder: Path) -> Any:
    return task(folder)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("raise", "reward_error", "KeyError: 'no such key' (line 9)"),
        ("exit", "reward_error", "SystemExit: 3"),
        ("die", "reward_crash", "ended with 7"),
        ("segfault", "reward_crash", "ended with -11"),
        ("hungry", "reward_memory", "MemoryError"),
        ("nan", "reward_not_finite", "reward is nan"),
        ("text", "reward_invalid", "returned str 'good', not a number"),
        ("parts", "reward_invalid", "style"),
    ],
)
def test_what_goes_wrong_is_a_failure_of_that_response_alone(own: Any, text: str, kind: str, message: str) -> None:
    prompt = own.prompts("train")[0]
    right, wrong, failure, again = own.score_batch([prompt] * 4, [str(prompt.metadata["answer"]), "?", text, "calls"])
    assert isinstance(failure, Failure) and failure.kind == kind and message in failure.message
    assert right == Score(reward=1.0, success=True, parts={"success": 1.0, "score": 1.0, "answered": 1.0})
    assert isinstance(wrong, Score) and wrong.reward == 0.0 and isinstance(again, Score)


@pytest.mark.parametrize("text", ["hang", "sleep"])
def test_a_function_that_does_not_come_back_is_ended(folder: Path, text: str) -> None:
    slow = task(folder, seconds=0.5)
    prompt = slow.prompts("train")[0]
    before = slow.score(prompt, "own pid").reward
    started = time.perf_counter()
    failure, after = slow.score_batch([prompt] * 2, [text, "own pid"])
    assert time.perf_counter() - started < 20  # not the minute that it would sleep
    assert failure == Failure(
        kind="reward_timeout", message="no answer within 0.5 s; raise task.options.limits.seconds"
    )
    assert after.reward != before
    with pytest.raises(ProcessLookupError):
        os.kill(int(before), 0)


def test_what_is_printed_does_not_mix_with_the_answers_and_is_known(own: Any) -> None:
    prompt = own.prompts("train")[0]
    verdicts = own.score_batch([prompt] * 3, ["print", str(prompt.metadata["answer"]), "?"])
    assert [verdict.reward for verdict in verdicts] == [0.0, 1.0, 0.0] and own.scorer.isolation.printed == "x" * 300


def test_the_workers_environment_stays_its_own_and_the_process_stays(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    own.scorer.isolation.close()
    prompt = own.prompts("train")[0]
    assert own.score(prompt, "environment").reward == 0.0
    assert [own.score(prompt, "calls").reward for _ in range(2)] == [2.0, 3.0]
    assert own.score(prompt, "own pid").reward != os.getpid()


def test_a_large_batch_crosses_the_pipe(own: Any) -> None:
    prompt = own.prompts("train")[0]
    started = time.perf_counter()
    verdicts = own.score_batch([prompt] * 2000, ["z" * 2000] * 2000)  # 4 MB in: far more than a pipe holds
    assert [verdict.reward for verdict in verdicts] == [0.0] * 2000 and time.perf_counter() - started < 20


def test_parts_and_success_are_the_functions_own(folder: Path) -> None:
    (folder / "parts.py").write_text(
        "def judge(row, response):\n    return {'reward': 0.5, 'success': True, 'style': len(response)}\n"
    )
    own = task(folder, path=str(folder / "parts.py"), function="judge", parts=["style"])
    assert own.parts == ("success", "score", "style", "answered")
    assert own.score(own.prompts("train")[0], "four") == Score(
        reward=0.5, success=True, parts={"success": 1.0, "score": 0.5, "style": 4.0, "answered": 1.0}
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "does not exist"),
        ("def reward(row, response:\n", "is not Python"),
        ("def rewards(row, response): return 1\n", "did you mean 'rewards'"),
    ],
)
def test_a_file_without_the_function_is_said_when_the_task_is_built(
    folder: Path, source: str | None, message: str
) -> None:
    path = folder / "wrong.py"
    path.unlink(missing_ok=True)
    if source is not None:
        path.write_text(source)
    with pytest.raises(ValueError, match=message):
        task(folder, path=str(path))


def test_a_file_that_does_not_load_is_an_error_and_not_a_failure(folder: Path) -> None:
    (folder / "broken.py").write_text("import no_such_package\ndef reward(row, response): return 1\n")
    own = task(folder, path=str(folder / "broken.py"))
    with pytest.raises(ValueError, match=r"does not load: ModuleNotFoundError.*line 1"):
        own.score(own.prompts("train")[0], "x")


def test_a_regular_expression_that_backtracks_for_ever_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i}", "answer": "^(a+)+$"}}\n' for i in range(20)))
    options = {"path": str(tmp_path / "rows.jsonl"), "verifier": "regex", "limits": {"seconds": 0.5}}
    rows = build_task(TaskConfig(name="jsonl", options=options))
    prompt = rows.prompts("train")[0]
    verdict = rows.score(prompt, "a" * 40 + "!")
    assert isinstance(verdict, Failure) and verdict.kind == "reward_timeout"
    assert rows.score(prompt, "aaa").success  # type: ignore[union-attr]


def test_the_process_ends_with_its_owner(folder: Path) -> None:
    isolation = Isolation(Function(path=str(folder / "reward.py"), name="reward", seconds=5.0, megabytes=1024))
    (pid,) = isolation.call([{"answer": "1"}], ["own pid"])
    assert not isinstance(pid, Failure)
    del isolation
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid["reward"]), 0)


def test_modules_in_the_folder_of_temporary_files_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative PYTHONPATH is that of the worker, not of the folder that the child works in."""
    (tmp_path / "types.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", "", "nowhere"]))
    (tmp_path / "reward.py").write_text("def reward(row, response):\n    return 0.5")
    function = Function(path=str(tmp_path / "reward.py"), name="reward", seconds=5.0, megabytes=1024)
    assert Isolation(function).call([{}], ["x"]) == [{"reward": 0.5}]
