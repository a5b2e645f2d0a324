"""Reward functions that misbehave: each response gets its own verdict or a typed failure, never another one's."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.schema import TaskConfig
from rollout_workers.tasks import Failure, Score, build_task
from rollout_workers.tasks.rewards import Response, judge_all

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux's walls")
# The row says what happens before the reward: 10 * its number.
REWARD = """
import os, signal, subprocess, sys, threading, time

class Raises:
    def __del__(self):
        raise RuntimeError("in __del__")

kept = []

def reward(row, response):
    exec(row["does"])
    return 10 * row["n"]
"""
MISDEEDS = {
    "fork": "os.fork()",
    "fork, and the copy goes on for long": "if not os.fork(): time.sleep(0.3)",
    "fork, and the copy raises": "if not os.fork(): raise ValueError('a copy')",
    "fork, and the parent waits": "pid = os.fork()\nif not pid: os._exit(3)\nos.waitpid(pid, 0)",
    "fork, and the copy exits": "if not os.fork(): sys.exit(0)",
    "exec of a missing program": "if not os.fork(): os.execv('/no/such/program', ['x'])",
    "exec of itself": "os.execv('/no/such/program', ['x'])",
    "subprocess of a missing program": "try: subprocess.run(['/no/such/program'])\nexcept OSError: pass",
    "a program left behind": "kept.append(subprocess.Popen(['sleep', '987'], start_new_session=True))",
    "standard output": "sys.__stdout__.write('1\\n'); sys.__stdout__.flush(); print(1); os.write(1, b'{}\\n')",
    "standard error": "sys.__stderr__.write('x' * 10000); os.write(2, b'x' * 10000)",
    "every descriptor to "
    "63": 'for n in range(64):\n  try: os.write(n, b\'{"value": {"reward": "0x1p+0"}}\\n\')\n  except OSError: pass',
    "every descriptor": 'for n in range(1024):\n  try: os.write(n, b\'{"value": {"reward": "0x1p+0"}}\\n\')\n  except '
    "OSError: pass",
    "half a line to every "
    "descriptor": "for n in range(1024):\n  try: os.write(n, b'{\"id\": ')\n  except OSError: pass",
    "megabytes to every "
    "descriptor": "for n in range(1024):\n  try: os.write(n, b'[' * 5_000_000)\n  except OSError: pass",
    "close every descriptor": "os.closerange(0, 1024)",
    "close the low descriptors": "os.closerange(0, 64)",
    "raise in __del__": "Raises(); kept.append(Raises())",
    "threads left behind": "for _ in '12345': threading.Thread(target=time.sleep, args=(50,), daemon=True).start()",
    "a thread that is no daemon": "threading.Thread(target=time.sleep, args=(100,)).start()",
    "os._exit": "os._exit(0)",
    "sys.exit": "sys.exit(0)",
    "signal handlers": "for name in ('ALRM', 'TERM', 'INT', 'PIPE', 'CHLD'): signal.signal(getattr(signal, 'SIG' + "
    "name), signal.SIG_IGN)",
    "an alarm": "signal.alarm(1)",
    "recursion limit": "sys.setrecursionlimit(40)",
    "no more audit": "sys.addaudithook(lambda *a: None)",
    "megabytes printed": "print('x' * 20_000_000)",
    "json replaced": 'import json; json.dumps = lambda *a, **k: \'{"id": "x", "value": {"reward": "0x1p+0"}}\'',
    "stdout replaced": "sys.stdout = sys.stderr = None",
    "SIGKILL": "os.kill(os.getpid(), 9)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "a class as error": "class E(BaseException):\n  def __str__(self): raise self\nraise E",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("misbehaving")
    (path / "reward.py").write_text(REWARD)
    (path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i}?", "answer": "{i}"}}\n' for i in range(20)))
    return path


def built(folder: Path, file: str = "reward.py", **python: Any) -> Any:
    options = {
        "path": str(folder / "rows.jsonl"),
        "verifier": "python",
        "python": {"path": str(folder / file), **python},
        "limits": {"seconds": 2.0, "megabytes": 1024},
    }
    return build_task(TaskConfig(name="jsonl", options=options))


@pytest.fixture(scope="module", params=[True, False], ids=["processes", "no processes"])
def own(request: pytest.FixtureRequest, folder: Path) -> Any:
    return built(folder, processes=request.param)


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_every_response_gets_its_own_verdict_or_a_failure(own: Any, misdeed: str) -> None:
    count, bad = 9, (2, 5)
    rows = [{"n": n, "does": MISDEEDS[misdeed] if n in bad else "pass"} for n in range(count)]
    started = time.perf_counter()
    verdicts = own.scorer.score(rows, ["x"] * count)
    assert time.perf_counter() - started < 20
    for n, verdict in enumerate(verdicts):
        if n not in bad:
            assert isinstance(verdict, Score) and verdict.reward == 10 * n, (misdeed, n, verdict)
        else:
            assert isinstance(verdict, Failure) or verdict.reward == 10 * n, (misdeed, n, verdict)


def test_two_hundred_rewards_that_fork_are_all_their_own(folder: Path) -> None:
    task = built(folder, processes=True)
    rows = [{"n": n, "does": "if row['n'] % 3 == 0: os.fork()"} for n in range(200)]
    assert [verdict.reward for verdict in task.scorer.score(rows, ["x"] * 200)] == [10.0 * n for n in range(200)]


@pytest.mark.parametrize(
    "does",
    [
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1, 64))",
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
        "signal.setitimer(signal.ITIMER_PROF, 0.01)",
        "import json; json.loads = json.dumps = lambda *_, **__: '{\"id\": 0}'",
    ],
)
def test_what_one_response_sets_the_next_does_not_feel(folder: Path, does: str) -> None:
    works = "open(os.devnull).close(); open(os.path.join(os.getcwd(), 'written'), 'w').write('x')"
    rows = [{"n": 0, "does": works}, {"n": 1, "does": does}, *({"n": n, "does": works} for n in range(2, 6))]
    found = built(folder).scorer.score(rows, ["x"] * 6)
    assert [getattr(v, "reward", v) for v in found if v is not found[1]] == [0.0, 20.0, 30.0, 40.0, 50.0]


@LINUX
def test_what_a_reward_leaves_behind_ends_with_its_process(folder: Path) -> None:
    task = built(folder, processes=True)
    left = "import pathlib; kept.append(subprocess.Popen(['sleep', '987'], start_new_session=True)); "
    left += f"pathlib.Path({str(folder / 'pid')!r}).write_text(str(kept[-1].pid))"
    assert task.scorer.score([{"n": 1, "does": left}], ["x"])[0].reward == 10.0
    pid = int((folder / "pid").read_text())
    os.kill(pid, 0)
    task.scorer.isolation.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    # And where the process that left it is killed for being slow.
    slow = [{"n": 1, "does": left + "; time.sleep(60)"}, {"n": 2, "does": "pass"}]
    failure, after = task.scorer.score(slow, ["x"] * 2)
    assert failure.kind == "reward_timeout" and after.reward == 20.0
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


@LINUX
def test_it_all_ends_when_the_worker_is_killed(folder: Path) -> None:
    code = f"""
import sys, time
from rollout_workers.tasks.sandbox import Function, Isolation
limits = dict(seconds=5.0, megabytes=1024, processes=True)
isolation = Isolation(Function(path={str(folder / "reward.py")!r}, name="reward", **limits))
(value,) = isolation.call([{{"n": 1, "does": "row['n'] = os.getpid() / 10"}}], ["x"])
print(int(value["reward"]), flush=True)
isolation.call([{{"n": 1, "does": "time.sleep(100)"}}], ["x"])
"""
    import subprocess

    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.02)


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("hidden", [False, True], ids=["raises", "caught"])
@pytest.mark.parametrize(
    ("setting", "does"),
    [
        ("network", "import socket; socket.create_connection(('127.0.0.1', {port}), 5).close()"),
        (
            "network",
            "import urllib.request\ntry: urllib.request.urlopen('http://127.0.0.1:{port}', timeout=0.2)\nexcept "
            "TimeoutError: pass",
        ),
        (
            "network",
            "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
        ),
        ("processes", "import multiprocessing.util as m; os.waitpid(m.spawnv_passfds(b'/bin/true', [b'true'], ()), 0)"),
        ("processes", "subprocess.run(['true'], check=True)"),
        ("processes", "assert os.system('true') == 0"),
        ("processes", "pid = os.fork()\nif not pid: os._exit(0)\nos.waitpid(pid, 0)"),
    ],
)
def test_network_and_processes_are_off_and_the_failure_names_the_setting(
    folder: Path, port: int, setting: str, does: str, hidden: bool
) -> None:
    does = does.format(port=port)
    if hidden:
        does = "try:\n" + "".join(f"  {line}\n" for line in does.splitlines()) + "except OSError: pass"
    refused = built(folder).scorer.score([{"n": 1, "does": does}], ["x"])[0]
    assert isinstance(refused, Failure) and refused.kind == "reward_refused", refused
    assert f"task.options.python.{setting}: true" in refused.message
    assert built(folder, **{setting: True}).scorer.score([{"n": 1, "does": does}], ["x"])[0].reward == 10.0


@LINUX
def test_c_code_meets_the_walls_too(folder: Path) -> None:
    pytest.importorskip("pyseccomp")
    does = (
        "import ctypes; c = ctypes.CDLL(None); row['n'] = (c.fork() < 0) + 2 * (c.socket(2, 1, 0) < 0) + 4 * "
        "(c.socket(1, 1, 0) < 0)"
    )
    assert built(folder).scorer.score([{"n": 1, "does": does}], ["x"])[0].reward == 30.0


def test_a_plain_socket_is_refused_even_where_no_hook_sees_it(folder: Path) -> None:
    pytest.importorskip("pyseccomp")
    does = "import socket; socket.create_server(('127.0.0.1', 0))"
    (failure,) = built(folder).scorer.score([{"n": 1, "does": does}], ["x"])
    assert (
        isinstance(failure, Failure) and failure.kind == "reward_refused" and "python.network: true" in failure.message
    )


NUMBERS = {
    "1": 1.0,
    "True": 1.0,
    "0.5": 0.5,
    "-0.0": -0.0,
    "10**15": 1e15,
    "-7": -7.0,
    "2**53 + 1": float(2**53 + 1),
    "Decimal('0.25')": 0.25,
    "Fraction(1, 4)": 0.25,
    "np.float32(0.1)": float.fromhex("0x1.99999a0000000p-4"),
    "np.float16(0.5)": 0.5,
    "np.int64(3)": 3.0,
    "np.uint8(200)": 200.0,
    "np.bool_(True)": 1.0,
    "np.array(0.5)": 0.5,
    "np.array([[0.5]])": 0.5,
    "np.longdouble(0.5)": 0.5,
    "FloatOfOurs(0.5)": 0.5,
    "5e-324": 5e-324,
    "2e16": "reward_not_finite",
    "10**300": "reward_not_finite",
    "10**400": "reward_not_finite",
    "10**6000": "reward_not_finite",
    "-10**400": "reward_not_finite",
    "Decimal('1e999')": "reward_not_finite",
    "Fraction(10**400, 3)": "reward_not_finite",
    "Decimal('nan')": "reward_not_finite",
    "Decimal('sNaN')": "reward_not_finite",
    "float('nan')": "reward_not_finite",
    "float('inf')": "reward_not_finite",
    "-float('inf')": "reward_not_finite",
    "np.float32('inf')": "reward_not_finite",
    "np.longdouble('1e4000')": "reward_not_finite",
    "1j": "reward_invalid",
    "None": "reward_invalid",
    "'1'": "reward_invalid",
    "b'1'": "reward_invalid",
    "[1]": "reward_invalid",
    "()": "reward_invalid",
    "np.array([1, 2])": "reward_invalid",
    "np.array([])": "reward_invalid",
    "np.array('x')": "reward_invalid",
    "np.complex64(1)": "reward_invalid",
    "reward": "reward_invalid",
    "{}": "reward_invalid",
    "{'reward': '1'}": "reward_invalid",
    "{'reward': {'reward': 1}}": "reward_invalid",
    "{1: 2}": "reward_invalid",
    "{'reward': 1, 'other': 2}": "reward_invalid",
    "{'reward': 10**400}": "reward_not_finite",
    "{'reward': 1, 'success': np.bool_(False)}": 1.0,
    "{'reward': 1, 'success': float('nan')}": "reward_not_finite",
    "ItemOfItself()": "reward_invalid reward_error",
    "BadFloat(1)": "reward_error",
    "BadRepr()": "reward_invalid",
}


@pytest.fixture(scope="module")
def numbers(folder: Path) -> Any:
    (folder / "numbers_.py").write_text(
        "from decimal import Decimal\nfrom fractions import Fraction\nimport numpy as np\n"
        "class FloatOfOurs(float): pass\nclass BadFloat(int):\n  def __float__(self): raise RuntimeError('no')\n"
        "class ItemOfItself:\n  def item(self): return self\n"
        "class BadRepr:\n  def __repr__(self): raise RuntimeError('no')\n"
        "def reward(row, response): return eval(response)\n"
    )
    return built(folder, "numbers_.py")


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_of_any_size_and_type_are_taken_or_a_failure(numbers: Any, value: str) -> None:
    from configs.schema import Reward

    prompt = numbers.prompts("train")[0]
    responses = [Response(text=text, new_tokens=1, limit=4, stopped=True) for text in (value, "1")]
    verdict, after = judge_all(numbers, Reward(weights={"score": 2.0}), [prompt] * 2, responses)
    assert isinstance(after, Score) and after.reward == 2.0
    wanted = NUMBERS[value]
    if isinstance(wanted, str):
        assert isinstance(verdict, Failure) and verdict.kind in wanted.split(), verdict
    else:
        assert isinstance(verdict, Score) and verdict.reward == 2 * wanted and type(verdict.parts["score"]) is float, (
            verdict
        )
        assert math.copysign(1, verdict.parts["score"]) == math.copysign(1, wanted)


def test_torchs_numbers_are_taken(folder: Path) -> None:
    (folder / "torch_.py").write_text("import torch\ndef reward(row, response): return eval(response)\n")
    task = built(folder, "torch_.py")
    task.scorer.isolation.function = type(task.scorer.isolation.function)(
        path=str(folder / "torch_.py"), name="reward", seconds=5.0, megabytes=8192
    )
    texts = [
        "torch.tensor(0.5)",
        "torch.tensor([[0.5]])",
        "torch.tensor(True)",
        "torch.tensor(0.5, dtype=torch.bfloat16)",
        "torch.ones(2)",
    ]
    verdicts = task.scorer.score([{}] * 5, texts)
    assert [v.reward if isinstance(v, Score) else v.kind for v in verdicts] == [0.5, 0.5, 1.0, 0.5, "reward_invalid"]


def test_what_a_terminal_obeys_is_shown_escaped(folder: Path) -> None:
    verdict, printed = built(folder), "print('\\x1b[2J printed'); raise ValueError('\\x1b[31m red \\u202e')"
    failure = verdict.scorer.score([{"n": 1, "does": printed}], ["x"])[0]
    assert isinstance(failure, Failure) and "\\x1b[31m red \\u202e" in failure.message and "\x1b" not in failure.message
    assert "\x1b" not in verdict.scorer.isolation.printed
