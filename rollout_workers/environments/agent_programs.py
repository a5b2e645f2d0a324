"""Agent programs of any language: their episodes, and how one is started. They play by ``rollout_workers.gateway``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rollout_workers.environments.protocol import Environment, Episode
from rollout_workers.lazy_sequence import LazySequence

ADAPTER = Path(__file__).resolve().parents[1] / "gateway" / "verifiers_adapter.py"
_AGENT = {"runtime": {"type": "subprocess"}, "harness": {"id": "latent_control_here"}}
"""How an environment's agent runs where ``env.agent`` does not say: the chat loop, beside the adapter."""
LARGEST_EPISODE = 64 << 10
"""Bytes of a line of ``path``: it is given to the program as an environment variable."""


@dataclass
class Programs:
    """Episodes that are numbers, and how they are played: what all kinds of agent programs have."""

    which: str
    _: KW_ONLY
    command: Sequence[str] = field(init=False)
    """What is started for each episode."""
    parts: Sequence[str] = field(init=False, default=())
    """Names of further parts of the reward."""
    train: int = 1000
    """Numbers of episodes."""
    heldout: int = 200
    seconds: float = 600.0
    """Of an episode."""
    parallel: int = 16
    """Programs at once."""
    variables: Sequence[str] = ()
    """Names of variables that the program may see, secret ones too."""

    def __post_init__(self) -> None:
        for name in ("train", "heldout", "seconds", "parallel"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"task.options.{name} is {value!r}; give a number above 0")
        self.require_texts("variables")

    def require_texts(self, name: str) -> None:
        """``ValueError`` where an option is no list of texts."""
        texts = getattr(self, name)
        if isinstance(texts, str) or not all(isinstance(one, str) for one in texts):
            raise ValueError(f"task.options.{name} is {texts!r}; give a list of texts")

    def episodes(self, split: Literal["train", "heldout"]) -> Sequence[Episode]:
        """Numbers."""
        return LazySequence(int(getattr(self, split)), lambda i: {"split": split, "number": i})

    def make(self) -> Environment:
        """There is no world here."""
        raise ValueError("an agent program is played by the gateway, not step by step")


@dataclass(kw_only=True)
class AgentPrograms(Programs):
    """``gateway/<name>``, with its options.

    Raises:
        ValueError: an option's value is impossible.
    """

    program: str = ""
    """The file."""
    interpreter: str | None = None
    """What runs it; ``None``: this Python for ``.py``, else the file itself."""
    arguments: Sequence[str] = ()
    path: str | None = None
    """A file whose lines are the episodes, JSON objects, in place of numbers."""
    heldout_path: str | None = None
    parts: Sequence[str] = ()

    def __post_init__(self) -> None:
        program, interpreter = self.program, self.interpreter
        if not program or not Path(program).is_file():
            raise ValueError(
                f"task.options.program is {program!r}, no file; name the agent program, e.g. program: agent.py"
            )
        if interpreter is not None and shutil.which(interpreter) is None:
            raise ValueError(f"task.options.interpreter: {interpreter} is not a program; name one, or leave it out")
        if interpreter is None and not program.endswith(".py") and not os.access(program, os.X_OK):
            raise ValueError(
                f"task.options.program: {program} is not executable; run chmod +x, or name what runs it by interpreter"
            )
        super().__post_init__()
        self.require_texts("arguments")
        self.require_texts("parts")
        own = interpreter or (sys.executable if program.endswith(".py") else None)
        self.command = [*([own] if own else []), str(Path(program).absolute()), *self.arguments]
        self._rows = {"train": _rows("path", self.path), "heldout": _rows("heldout_path", self.heldout_path)}

    def episodes(self, split: Literal["train", "heldout"]) -> Sequence[Episode]:
        """The lines of the split's file, or numbers."""
        rows = self._rows[split]
        return super().episodes(split) if rows is None else rows


@dataclass(kw_only=True)
class VerifiersPrograms(Programs):
    """``verifiers/<taskset>``, an environment of Prime's ``verifiers`` (0.4), with its options; held-out tasks are
    those behind the first ``train``.

    Raises:
        ValueError: an option's value is impossible.
    """

    python: str = ""
    """The interpreter of an environment that has the package and the taskset."""
    folder: str | None = None
    """Of a taskset that is not installed."""
    env: Mapping[str, Any] | None = None
    """The environment's own config; ``None``: its chat loop runs beside the adapter."""
    success_at: float = 1.0
    parallel: int = 4

    def __post_init__(self) -> None:
        if not self.python or shutil.which(self.python) is None:
            raise ValueError(
                f"task.options.python is {self.python!r}, no program; name the interpreter that has verifiers, e.g. "
                "python: venv-verifiers/bin/python"
            )
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ValueError(f"task.options.folder: {self.folder} is not a folder; name the one that has the taskset")
        if not isinstance(self.env or {}, Mapping):
            raise ValueError(f"task.options.env is {self.env!r:.80}; give a mapping, as verifiers' own [env] block")
        super().__post_init__()
        given = {"agent": _AGENT, **(self.env or {})}
        given["taskset"] = {**given.get("taskset", {}), "id": self.which}
        asked = {"env": given, "train": self.train, "folder": self.folder, "success_at": self.success_at}
        self.command = [self.python, str(ADAPTER), json.dumps(asked)]


def _rows(option: str, path: str | None) -> list[Episode] | None:
    """The JSON objects in a file, one a line."""
    if path is None:
        return None
    found: list[Episode] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"task.options.{option}: {path} cannot be read ({error}); give a JSON-lines file") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if len(line.encode()) <= LARGEST_EPISODE else None
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(
                f"task.options.{option}: line {number} of {path} is not a JSON object of at most "
                f"{LARGEST_EPISODE} bytes"
            )
        found.append(row)
    if not found:
        raise ValueError(f"task.options.{option}: {path} has no lines; give at least one episode")
    return found
