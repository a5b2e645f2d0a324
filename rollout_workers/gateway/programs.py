"""One run of an agent program: its own empty working folder, its own variables, a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from configs.redaction import public_environment
from rollout_workers.tasks.child import readable

LAUNCHER = "rollout_workers.gateway.launch"
_LAST = 2000
"""Bytes of what a program wrote to stderr that are looked at."""


class AgentProgram:
    """``AgentProgram(["python", "agent.py"], {"OPENAI_API_KEY": key}, seconds=600.0)``: runs once it is made."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], *, seconds: float) -> None:
        """``variables``: on top of this process's without secrets."""
        self.seconds, self.deadline, self.late = seconds, time.monotonic() + seconds, False
        self._folder = tempfile.TemporaryDirectory(prefix="latent-control-agent-", ignore_cleanup_errors=True)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        paths = os.pathsep.join(dict.fromkeys(os.path.abspath(path) for path in sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            cwd=self._folder.name,
            env=public_environment() | {"PYTHONPATH": paths},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        # By a pipe: other users of the machine can read arguments.
        told = {"command": list(command), "environment": public_environment() | dict(variables)}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()

    def ended(self) -> bool:
        """Whether it is gone; at its deadline it is ended."""
        if self._process.poll() is None and time.monotonic() > self.deadline:
            self.late = True
            self.end()
        return self._process.poll() is not None

    def how(self) -> str:
        """In words, how it ended, with the last line it wrote to stderr."""
        if self.late:
            return f"the program ran longer than {self.seconds:g} s; raise task.options.seconds"
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - _LAST))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        said = f": {readable(lines[-1])[:300]}" if lines else ""
        return f"the program ended with {self._process.poll()}{said}"

    def end(self) -> None:
        """End it, and all that it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # at which the launcher ends it
        try:
            self._process.wait(timeout=3.0)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """End it, and remove its folder."""
        self.end()
        self._stderr.close()
        self._folder.cleanup()


def told(session: str, key: str, address: str, episode: Mapping[str, object]) -> dict[str, str]:
    """The variables that a program finds: what an OpenAI client reads by itself, and its episode."""
    return {
        "OPENAI_BASE_URL": address,
        "OPENAI_API_KEY": key,
        "LATENT_CONTROL_SESSION": session,
        "LATENT_CONTROL_EPISODE": json.dumps(dict(episode)),
    }


def allowed(names: Sequence[str]) -> dict[str, str]:
    """This process's variables of these names."""
    return {name: os.environ[name] for name in names if name in os.environ}
