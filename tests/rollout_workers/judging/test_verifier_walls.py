"""The walls around verifiers that are not ours: each is tried by what it must stop, and each try works where the wall
is not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout_workers.judging import walls
from rollout_workers.tasks.forks import Confinement, Forks
from rollout_workers.tasks.protocol import Failure

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or walls.judging_filters() is None, reason="the walls are Linux's, and need libseccomp"
)
JUDGE = """
import os
count = 0

def make(settings):
    def judge(row, text):
        global count
        count += 1
        names = {"got": False, "row": row, "count": count}
        exec(text, names)
        return float(names["got"])
    return judge
"""
SUMS = """
import os, time

def make(settings):
    def judge(row, text):
        time.sleep(settings["pause"])
        if text == "6*7":
            exec(settings["does"])
        return float(os.getpid() if settings["who"] else len(text))
    return judge
"""
# Each sets ``got`` where it gets through. {T} is a file that must not appear, {P} the worker, {N} a port that listens,
# {H} the home folder.
TRIES = {
    "write": "open('{T}', 'w').close(); got = True",
    "create": "import os; os.open('{T}', os.O_CREAT); got = True",
    "append": "open('{H}/secret', 'a').close(); got = True",
    "make a folder": "import os; os.mkdir('{T}'); got = True",
    "link": "import os; os.symlink('/etc', '{T}'); got = True",
    "rename": "import os; os.rename('{H}/secret', '{T}'); got = True",
    "remove": "import os; os.unlink('{H}/secret'); got = True",
    "change rights": "import os; os.chmod('{H}/secret', 0o777); got = True",
    "read the home folder": "got = bool(open('{H}/secret').read())",
    "list the home folder": "import os; got = bool(os.listdir('{H}'))",
    "read the users": "got = bool(open('/etc/passwd').read())",
    "read the worker's environment": "got = bool(open('/proc/{P}/environ', 'rb').read())",
    "read its own environment": "got = bool(open('/proc/self/environ', 'rb').read())",
    "read the worker's memory": "open('/proc/{P}/mem', 'rb').close(); got = True",
    "read the parent's memory": "import os; open(f'/proc/{{os.getppid()}}/mem', 'rb').close(); got = True",
    "shell": "import os; got = os.system('touch {T}') == 0",
    "program": "import subprocess; got = subprocess.run(['touch', '{T}']).returncode == 0",
    "exec": "import os; os.execv('/usr/bin/touch', ['touch', '{T}'])",
    "spawn": "import os; os.posix_spawn('/usr/bin/touch', ['touch', '{T}'], {{}}); got = True",
    "fork": "import os\nif not os.fork(): os._exit(0)\ngot = True",
    "thread": "import threading; threading.Thread(target=int).start(); got = True",
    "connect": "import socket; socket.create_connection(('127.0.0.1', {N}), 2); got = True",
    "datagram": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9)); got = True",
    "listen": "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); got = True",
    "local socket": "import socket; socket.socketpair(); got = True",
    "signal to the worker": "import os; os.kill({P}, 0); got = True",
    "signal to the parent": "import os; os.kill(os.getppid(), 0); got = True",
    "trace": "import ctypes, os; got = ctypes.CDLL(None).ptrace(16, {P}, 0, 0) == 0",
    "session": "import os; os.setsid(); got = True",
    "namespace": "import ctypes; got = ctypes.CDLL(None).unshare(0x10000000) == 0",
    "shared memory": "import ctypes; got = ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
    "memory file": "import os; got = os.memfd_create('x') >= 0",
    "io_uring": "import ctypes; got = ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(256)) >= 0",
    "keys": "import ctypes; got = ctypes.CDLL(None).syscall(250, 0, -3, 1) >= 0",
    "another limit": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000)); got = True",
}
NO_WONDER = ("trace", "io_uring", "read the worker's memory", "read the parent's memory", "exec", "another limit")
"""Where no wall is, these need rights or a kernel that a machine of tests may lack, or do not come back."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walls")
    (folder / "home").mkdir()
    (folder / "home" / "secret").write_text("s3cret")
    (folder / "judges").mkdir()
    (folder / "judges" / "judge_that_runs_all.py").write_text(JUDGE)
    (folder / "judges" / "judge_of_sums.py").write_text(SUMS)
    return folder


@pytest.fixture(scope="module")
def judged(place: Path) -> Iterator[Forks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place / "judges"))
        patch.setenv("HOME", str(place / "home"))
        forks = Forks(Confinement(module="judge_that_runs_all", seconds=2.0, megabytes=512))
        assert forks.call({}, [None], ["got = count"], name="test") == [2.0 - 1.0]
        yield forks
        forks.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def tried(text: str, place: Path, port: int) -> str:
    return text.format(T=place / "touched", P=os.getpid(), N=port, H=place / "home")


@pytest.mark.parametrize("name", TRIES)
def test_a_response_that_runs_as_code_gets_nowhere(judged: Forks, place: Path, port: int, name: str) -> None:
    text = tried(TRIES[name], place, port)
    verdicts = judged.call({}, [None] * 3, ["got = True", text, "got = count == 1"], name="test")
    assert verdicts[0] == 1.0 and verdicts[2] == 1.0, "the others' verdicts are their own"
    assert verdicts[1] == 0.0 or isinstance(verdicts[1], Failure), verdicts[1]
    assert not (place / "touched").exists() and (place / "home" / "secret").read_text() == "s3cret"


@pytest.mark.parametrize("name", [name for name in TRIES if name not in NO_WONDER])
def test_where_there_is_no_wall_it_gets_there(place: Path, port: int, name: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text("s3cret")
    code = "got = False\n" + tried(TRIES[name], tmp_path, port) + "\nprint(got)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30).stdout.strip()
        == "True"
    )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("bytearray(2**33)", "reward_memory"),
        ("x = [0]\nwhile True: x = x + x", "reward_memory reward_timeout"),
        ("while True: pass", "reward_timeout"),
        ("import time; time.sleep(60)", "reward_timeout"),
        ("import signal; [signal.signal(s, signal.SIG_IGN) for s in (14, 15, 24)]\nwhile True: pass", "reward_timeout"),
        ("import os; os._exit(7)", "reward_crash"),
        ("raise SystemExit(7)", "reward_error"),
        ("import ctypes; ctypes.string_at(0)", "reward_crash"),
        ("import os; os.abort()", "verifier_refused"),
        ("import os; os.fork()", "verifier_refused"),
        ("import os; os.closerange(0, 100)", "reward_crash"),
        ("import sys; sys.setrecursionlimit(10**6)\ndef f(): f()\nf()", "reward_timeout reward_memory reward_crash"),
        ("import os\n[os.write(n, b'x' * 5000) for n in range(3, 20) if os.fstat(n)]", "reward_error"),
        ("class E(Exception):\n  def __str__(self): raise self\nraise E", "reward_error"),
        ("got = 10**400", "reward_error"),
        ("got = '1'*4 + 'x'", "reward_error"),
    ],
)
def test_what_goes_wrong_is_a_failure_within_its_limit(judged: Forks, text: str, kind: str) -> None:
    started = time.perf_counter()
    before, verdict, after = judged.call({}, [None] * 3, ["got = True", text, "got = count == 1"], name="test")
    assert isinstance(verdict, Failure) and verdict.kind in kind.split(), verdict
    assert (before, after) == (1.0, 1.0) and time.perf_counter() - started < 20


LIES = (
    b"0x1p+0",
    b"1",
    b'7"}{',
    b"0x1p+99999",
    b"{" * 4000,
    b"[" * 4000,
    b"\xff\x00\x1b[2J",
    b'{"failure": "made_up", "message": ""}',
    b'{"failure": ["x"], "message": 3}',
    b"x" * 10_000_000,
    b"",
)


@pytest.mark.parametrize("lie", LIES)
def test_what_is_written_to_every_descriptor_reaches_no_other_verdict(judged: Forks, lie: bytes) -> None:
    text = f"{lie[:4000]!r} * {max(1, len(lie) // 4000)} + b'\\n'"
    lies = f"import os\nfor n in range(64):\n  try: os.write(n, {text})\n  except OSError: pass\n"
    texts = ["got = False", lies, "got = True", lies + "\nos._exit(0)", "got = False"]
    verdicts = judged.call({}, [None] * 5, texts, name="test")
    assert [verdicts[i] for i in (0, 2, 4)] == [0.0, 1.0, 0.0]
    assert all(v in (0.0, 1.0) or isinstance(v, Failure) for v in verdicts)


def test_nothing_that_a_response_changes_is_seen_by_the_next(judged: Forks) -> None:
    changes = [
        "import builtins; builtins.float = lambda x: 1.0",
        'import json; json.dumps = lambda x: \'{"value": "0x1p+0"}\'',
        "import gc; [o.update(count=99) for o in gc.get_objects() if type(o) is dict and 'count' in o]",
        "import sys; sys.modules.clear()",
        "import os; os.environ['X'] = '1'",
        "import sys; sys._getframe(1).f_globals['count'] = 50",
    ]
    for change in changes:
        _, count, environment, value = judged.call(
            {},
            [None] * 4,
            [change, "got = count == 1", "import os; got = 'X' in os.environ", "got = False"],
            name="test",
        )
        assert (count, environment, value) == (1.0, 0.0, 0.0), change


def test_the_forks_end_with_the_worker_and_the_parent_is_one(judged: Forks, place: Path) -> None:
    parents = {judged.call({}, [None], ["import os; got = os.getppid()"], name="test")[0] for _ in range(3)}
    assert len(parents) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place / "judges"))
        other = Forks(Confinement(module="judge_that_runs_all", seconds=1.0, megabytes=512))
        (pid,) = other.call({}, [None], ["import os; got = os.getppid()"], name="test")
    assert isinstance(pid, float) and pid not in parents
    other.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_batch_comes_back_in_its_order_and_equal_pairs_are_judged_once(judged: Forks) -> None:
    rows = [{"n": n % 7} for n in range(60)]
    texts = [f"import time; time.sleep({(n * 7) % 5 / 500}); got = row['n']" for n in range(60)]
    assert judged.call({}, rows, texts, name="test") == [float(n % 7) for n in range(60)]
    same = judged.call({}, [None] * 4, ["import os; got = os.getpid()"] * 4, name="test")
    assert len(set(same)) == 1


@pytest.fixture(scope="module")
def sums(place: Path) -> Iterator[Forks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place / "judges"))
        forks = Forks(Confinement(module="judge_of_sums", seconds=1.0, megabytes=512, parallel=2))
        forks.call({"pause": 0.0, "does": "pass", "who": False}, [None], ["1"], name="test")
        yield forks
        forks.close()


@pytest.mark.parametrize(
    ("does", "kind"),
    [
        ("os._exit(3)", "reward_crash"),
        ("os._exit(0)", "reward_crash"),
        ("while True: pass", "reward_timeout"),
        ("bytearray(2**33)", "reward_memory"),
        ("os.fork()", "verifier_refused"),
        ("raise KeyboardInterrupt", "reward_crash"),
    ],
)
def test_where_a_shared_fork_ends_the_others_are_judged_again(sums: Forks, does: str, kind: str) -> None:
    texts = [f"{n}+1" if n != 30 else "6*7" for n in range(70)]
    verdicts = sums.call({"pause": 0.0, "does": does, "who": False}, [None] * 70, texts, name="test")
    failure = verdicts.pop(30)
    assert isinstance(failure, Failure) and failure.kind == kind
    assert verdicts == [float(len(f"{n}+1")) for n in range(70) if n != 30]


@pytest.mark.parametrize(("pause", "most"), [(0.0, 1), (0.01, 70 // 8 + 2)])
def test_arithmetic_shares_forks_and_what_takes_long_is_spread(sums: Forks, pause: float, most: int) -> None:
    who = {"pause": pause, "does": "pass", "who": True}
    pids = sums.call(who, [None] * 70, [f"({n} + 1)/2.5 - [3, 4]" for n in range(70)], name="test")
    assert 1 + (pause > 0) <= len(set(pids)) <= most and not any(isinstance(pid, Failure) for pid in pids)


@pytest.mark.parametrize(
    "text",
    [
        "2**3",
        "7//2",
        "x",
        "1e5",
        "1_0",
        "2^3",
        "f(1)",
        "1;2",
        "1=1",
        "'1'",
        "1 2\n3",
        "0x1",
        "1j",
        "1!",
        "{1}",
        "1%2",
        "",
        "1" * 201,
    ],
)
def test_whatever_may_name_something_or_take_long_has_a_fork_of_its_own(sums: Forks, text: str) -> None:
    who = {"pause": 0.0, "does": "pass", "who": True}
    pids = sums.call(who, [None] * 3, ["1+1", text, "1+2"], name="test")
    assert pids[0] == pids[2] != pids[1]


def test_walls_that_do_not_stand_are_an_error_that_names_the_setting(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "judges" / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')\n")
    monkeypatch.setenv("PYTHONPATH", str(place / "judges"))
    forks = Forks(Confinement(module="judge_that_runs_all", seconds=2.0, megabytes=512))
    with pytest.raises(ValueError, match=r"system calls.*task\.options\.limits\.allow_unconfined: true"):
        forks.call({}, [None], ["got = True"], name="test")
    allowed = Forks(Confinement(module="judge_that_runs_all", seconds=2.0, megabytes=512, unconfined=True))
    assert allowed.call({}, [None], ["got = True"], name="test") == [1.0]
    # Landlock and the namespace stand all the same.
    reads, connects = allowed.call(
        {},
        [None] * 2,
        ["got = open('/etc/passwd').read() > ''", "import socket; socket.create_connection(('127.0.0.1', 9)); got = 1"],
        name="t",
    )
    assert isinstance(reads, Failure) and isinstance(connects, Failure)
    allowed.close()
    (place / "judges" / "pyseccomp.py").unlink()


def alone(wall: str, text: str, *, user: int | None = None) -> str:
    """What ``text`` prints behind one wall alone, in a process of its own."""
    code = (
        f"import os, socket, sys, encodings.idna\nsys.path.insert(0, {str(ROOT)!r})\nfrom rollout_workers.judging "
        "import walls\n"
    )
    code += "filters, folders = walls.judging_filters(), walls.what_python_reads()\n"
    code += "" if user is None else f"os.setgroups([]); os.setuid({user})\n"
    run = subprocess.run([sys.executable, "-c", code + wall + "\n" + text], capture_output=True, text=True, timeout=30)
    return run.stdout.strip() or (
        f"ended with {run.returncode}" if run.returncode < 0 else run.stderr.strip().rpartition("\n")[2]
    )


USERS = [
    None,
    pytest.param(65534, marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")),
]


@pytest.mark.parametrize("user", USERS)
def test_landlock_alone(place: Path, port: int, user: int | None) -> None:
    if "True" not in alone("walls.forbid_privileges(); print(walls.read_only([]) > 0)", "", user=user):
        pytest.skip("this kernel has no Landlock")
    wall, connecting = (
        "walls.forbid_privileges(); version = walls.read_only(folders)",
        tried(TRIES["connect"], place, port),
    )
    place.chmod(0o777)
    for folder in (place, *place.parents):
        if folder.stat().st_uid == os.getuid() and str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o711)
    assert "PermissionError" in alone(wall, tried(TRIES["write"], place, port), user=user)
    assert "PermissionError" in alone(wall, "print(open('/etc/passwd').read())", user=user)
    assert "PermissionError" in alone(wall, f"{connecting}\nprint(got or version < 4)", user=user)
    assert "PermissionError" in alone(
        wall, "print(os.kill(os.getppid(), 0) if version >= 6 else 'PermissionError')", user=user
    )
    assert alone("", connecting + "\nprint(got)", user=user) == "True"  # else the tries above prove nothing
    assert "root" in alone("", "print(open('/etc/passwd').readline())", user=user)


@pytest.mark.parametrize("user", USERS)
def test_the_namespace_alone(place: Path, port: int, user: int | None) -> None:
    if alone("print(walls.cut_network())", "", user=user) != "True":
        pytest.skip("no user namespaces here")
    assert "unreachable" in alone("walls.cut_network()", tried(TRIES["connect"], place, port), user=user)
    assert "unreachable" in alone("walls.cut_network()", tried(TRIES["datagram"], place, port), user=user)


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    "text",
    [
        "os.system('true')",
        "os.fork()",
        "open('/dev/null', 'w')",
        "os.open('/dev/null', os.O_RDWR)",
        "os.kill(os.getpid(), 0)",
        "os.setsid()",
        "socket.socket()",
        "os.unlink('/nonexistent')",
        "os.execv('/bin/true', ['true'])",
        "os.memfd_create('x')",
    ],
)
def test_system_calls_alone(text: str, user: int | None) -> None:
    wall = "walls.forbid_privileges(); filters[0].install(); filters[1].install()"
    assert alone(wall, text, user=user) == f"ended with {-signal.SIGSYS}"
    assert alone(wall, "print(open('/etc/hostname').readable(), sum(range(10)))", user=user) == "True 45"


@pytest.mark.parametrize("user", USERS)
def test_limits_alone(place: Path, user: int | None) -> None:
    wall = "walls.limit(megabytes=512, seconds=1, writes=False)"
    assert "MemoryError" in alone(wall, "bytearray(2**30)", user=user)
    assert alone(wall, "while True: pass", user=user) == f"ended with {-signal.SIGXCPU}"
    assert "File too large" in alone(
        "f = open(f'/tmp/limits-{os.getpid()}', 'wb', 0); os.unlink(f.name); " + wall, "f.write(b'x')", user=user
    )
    assert "Too many open files" in alone(wall, "[os.dup(0) for _ in range(100)]", user=user)
