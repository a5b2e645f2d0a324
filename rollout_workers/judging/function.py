"""The user's functions: a process that loads their file and calls one for one response after the other, and a parent
that tidies up.

A reward function is called with row and response and returns numbers; a tool with the arguments that a model wrote, and
returns a text.

The parent forks the process that does the work, adopts whatever that leaves behind, and ends all of it when the work or
the worker ends. The channel lies at high numbers, no copy of the process keeps it, and a line counts only with the id
of the request that is open.
"""

from __future__ import annotations

import _posixsubprocess
import contextlib
import fcntl
import importlib.util
import inspect
import numbers
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from json import dumps, loads
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from rollout_workers.judging import walls
from rollout_workers.judging.outcome import LONGEST, Caught, TypedFailure
from rollout_workers.judging.typed import decode

_LOCAL = socket.AF_UNIX
_HIGH = 200
"""Descriptors from here on: what writes to every small number does not meet the channel."""
_SETTING = ("network", "processes")
_EVENTS = {
    "network": (
        "socket.__new__",
        "socket.connect",
        "socket.bind",
        "socket.sendto",
        "socket.sendmsg",
        "socket.getaddrinfo",
        "socket.gethostbyname",
    ),
    "processes": (
        *("subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn"),
        "fork_exec",
    ),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the process; see ``rollout_workers.tasks.sandbox.Function``."""

    path: str
    name: str
    tools: list[str]
    """Names of functions that are tools, in place of the reward function ``name``"""
    place: str
    """Of the settings in the config, for messages"""
    seconds: float
    megabytes: int
    network: bool
    processes: bool
    token: str
    """The id of what the parent says."""


class Printed:
    """Stands for standard output: keeps the start of what is printed, drops the rest."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        """Takes any amount."""
        self.text += text[: max(0, LONGEST - len(self.text))]
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""

    def taken(self) -> dict[str, str]:
        """What was printed since the last time."""
        text, self.text = self.text, ""
        return {"printed": text} if text else {}


class Watch:
    """Says by name which setting would have let through what the function tried, even where the function hides the
    error."""

    def __init__(self, settings: Settings) -> None:
        self.met, self.place = "", settings.place
        off = [kind for kind in _SETTING if not getattr(settings, kind)]
        self._events = {event: kind for kind in off for event in _EVENTS[kind]}

    def start(self) -> None:
        """For the rest of the process's life: Python takes no hook away."""
        sys.addaudithook(self._hook)
        if "fork_exec" in self._events:  # what subprocess and multiprocessing call raises no event of its own
            for module, name in ((_posixsubprocess, "fork_exec"), (subprocess, "_fork_exec")):
                setattr(module, name, partial(self._hook, "fork_exec"))

    def _hook(self, event: str, arguments: Any, *_: object) -> None:
        kind = self._events.get(event)
        if kind is None or (kind == "network" and _LOCAL in (getattr(a, "family", a) for a in arguments[:2])):
            return
        self.met = f"{kind} is off for this function; set {self.place}.{kind}: true to let it ({event})"
        raise PermissionError(self.met)


def _bounds() -> tuple[object, ...]:
    """What one call may set and the next one feels: resource limits and timers."""
    kinds = [getattr(resource, name) for name in sorted(dir(resource)) if name.startswith("RLIMIT_")]
    timers = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
    return (*map(resource.getrlimit, kinds), *(any(signal.getitimer(timer)) for timer in timers))


def load_module(path: str) -> ModuleType:
    """The file as a module; neighbours of the file can be imported."""
    sys.path.append(str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("reward", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules["reward"] = module
    spec.loader.exec_module(module)
    return module


def toolbox(path: str, names: Sequence[str]) -> Any:
    """The tools of the file."""
    from rollout_workers.judging.tools import ToolFunctions

    module = load_module(path)
    return ToolFunctions({name: getattr(module, name) for name in names})


def load(path: str, name: str) -> Callable[..., Any]:
    """The function ``name`` of the file.

    Raises:
        TypeError: it cannot be called with row and response in this order, or is async.
    """
    function: Callable[..., Any] = getattr(load_module(path), name)
    if not callable(function):
        raise TypeError(f"{name} is {_shown(function)}, which cannot be called")
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        raise TypeError(f"{name} is async; write def {name}(row, response), which may call asyncio.run")
    taken: list[str] = []
    with contextlib.suppress(ValueError):  # C code does not say what it takes
        signature = inspect.signature(function)
        signature.bind({}, "")
        taken = list(signature.parameters)
    if taken[:1] == ["response"] or taken[1:2] == ["row"]:
        raise TypeError(f"{name} takes {', '.join(taken[:2])}; write def {name}(row, response), in this order")
    return function


def plain(value: Any) -> dict[str, str]:
    """Each part as a float's hexadecimal text, a bare number as ``reward``; ``Stopped`` for what is no number.

    Python's, numpy's and torch's numbers are taken, ``Decimal`` and ``Fraction``, arrays of one, and whatever is a
    ``numbers.Real``.
    """
    parts = dict(value) if isinstance(value, Mapping) else {"reward": value}
    return {str(key): _hex(child) for key, child in parts.items()}


def _hex(value: Any) -> str:
    if not isinstance(value, numbers.Real | Decimal) and callable(getattr(value, "item", None)):
        with Caught() as asked:  # numpy's and torch's; an array of several has none to give
            value = value.item()
        if asked.error is not None:
            raise TypedFailure("reward_invalid", f"returned {_shown(value)}: {asked.error}")
    if not isinstance(value, numbers.Real | Decimal):
        raise TypedFailure("reward_invalid", f"returned {_shown(value)}, not a number or a mapping of numbers")
    try:
        return float(value).hex()
    except OverflowError:
        raise TypedFailure("reward_not_finite", f"returned {_shown(value)}, more than a float holds") from None
    except ValueError:  # Decimal's signalling NaN
        raise TypedFailure("reward_not_finite", f"returned {_shown(value)}") from None


def _shown(value: Any) -> str:
    """Type and value, shortened; some values cannot be written, such as integers of 5,000 digits."""
    text = "whose value cannot be shown"
    with Caught():
        text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


class Worker:
    """The process that calls the function."""

    def __init__(self, settings: Settings, requests: BinaryIO, answers: BinaryIO) -> None:
        self.settings, self.requests, self.answers = settings, requests, answers
        self.printed, self.watch = Printed(), Watch(settings)
        self.pid = os.getpid()

    def run(self) -> None:
        """Load the file, then serve until the worker closes the pipe."""
        os.register_at_fork(after_in_child=self._leave)
        sys.stdout = sys.stderr = self.printed  # type: ignore[assignment]
        walls.limit(megabytes=self.settings.megabytes)
        self._confine()
        with Caught() as loading:
            function, about = self._loaded()
        if loading.error is not None:
            self._tell(self.settings.token, loading.failure(self.settings.path))
            return
        self._tell(self.settings.token, {"ready": self.pid, **about})
        limit, bounds = sys.getrecursionlimit(), _bounds()
        for line in self.requests:
            asked = loads(line)
            # Should the worker and the parent be gone, this process ends itself even when the function hangs.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(2 * self.settings.seconds) + 2)
            self.watch.met = ""
            with Caught() as call:
                value = function(decode(asked["row"]), asked["response"])
            sys.setrecursionlimit(max(limit, 1000))
            if os.getpid() != self.pid:
                os._exit(0)  # a copy that the function made, and that came back
            signal.alarm(0)
            said = {"value": value} if call.error is None and not self.watch.met else self._failure(call)
            # Limits that one response has set would be felt by the next: that gets a new process.
            self._tell(asked["id"], said if _bounds() == bounds else {**said, "spent": True})

    def _loaded(self) -> tuple[Callable[[Any, str], Any], dict[str, Any]]:
        """What is called for a request, and what is said of it."""
        if self.settings.tools:
            made = toolbox(self.settings.path, self.settings.tools)
            return made.call, {"schemas": made.schemas}
        function = load(self.settings.path, self.settings.name)
        return (lambda row, response: plain(function(row, response))), {}

    def _failure(self, call: Caught) -> dict[str, str]:
        if self.watch.met:
            return {"failure": "reward_refused", "message": self.watch.met}
        failure = call.failure(self.settings.path)
        # C code, which Python's hooks do not see
        for kind, number in (("network", walls.NETWORK_ERROR), ("processes", walls.PROCESS_ERROR)):
            if not getattr(self.settings, kind) and getattr(call.error, "errno", None) == number:
                failure["failure"] = "reward_refused"
                failure["message"] += f"; set {self.settings.place}.{kind}: true to let it"
        return failure

    def _confine(self) -> None:
        # First: the binding of libseccomp looks for its library with programs.
        made = walls.function_filter(network=self.settings.network, processes=self.settings.processes)
        self.watch.start()
        if made is not None:
            walls.forbid_privileges()
            made.install()

    def _leave(self) -> None:
        """In a copy of this process: it must neither read a request nor answer one."""
        with Caught():
            self.requests.close()
        with Caught():
            os.close(self.answers.fileno())

    def _tell(self, name: str, said: Mapping[str, Any]) -> None:
        # The line break before ends what the function may have written there itself.
        self.answers.write(b"\n" + dumps({"id": name, **said, **self.printed.taken()}).encode() + b"\n")
        self.answers.flush()


def watch_over(pid: int, settings: Settings, requests: int, answers: int) -> None:
    """Wait until the work or the worker is gone; end all that is left, and tell how the work ended."""
    poll = select.poll()
    poll.register(requests, 0)  # hang-ups alone: what is written there is the other process's to read
    status = None
    while status is None and not poll.poll(20):
        ended, found = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(found) if ended else None
    end_children()
    with Caught():
        os.write(answers, b"\n" + dumps({"id": settings.token, "ended": status}).encode() + b"\n")


def end_children() -> None:
    """Kill the children of this process, and those that come to it when they lose their parents, until there is
    none."""
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        for child in _children():
            with Caught():
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _children() -> list[int]:
    """Of this process, by /proc; elsewhere none is known, and the worker ends the session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with Caught():
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.append(int(folder.name))
    return found


def main() -> None:
    """Serve over the descriptors 0 and 1; afterwards these point to nothing, so what is printed does not mix with the
    answers."""
    settings = Settings(**loads(sys.argv[1]))
    requests, answers = (fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _HIGH) for number in (0, 1))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    walls.adopt_orphans()
    pid = os.fork()
    if pid:
        watch_over(pid, settings, requests, answers)
        return
    walls.die_with_parent()
    with Caught():
        Worker(settings, os.fdopen(requests, "rb"), os.fdopen(answers, "wb")).run()
        os._exit(0)
    os._exit(1)
