"""Agent programs of any language: their episodes, and how one is started. They play by ``rollout_workers.gateway``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from rollout_workers.environments.protocol import Environment, Episode
from rollout_workers.lazy_sequence import LazySequence

ADAPTER = Path(__file__).resolve().parents[1] / "gateway" / "verifiers_adapter.py"
_AGENT = {"runtime": {"type": "subprocess"}, "harness": {"id": "latent_control_here"}}
"""How an environment's agent runs where ``env.agent`` does not say: the chat loop, beside the adapter."""
LARGEST_EPISODE = 64 << 10
"""Bytes of a line of ``path``: it is given to the program as an environment variable."""


class AgentPrograms:
    """``gateway/<name>``. Options: ``program`` a file; ``interpreter`` what runs it (default: this Python for ``.py``,
    else the file itself); ``arguments``; ``train``, ``heldout`` numbers of episodes, or ``path``, ``heldout_path``
    files whose lines are the episodes, JSON objects; ``seconds`` of an episode; ``parallel`` programs at once;
    ``parts`` names of further parts of the reward; ``variables`` that the program may see, secret ones too.

    Raises:
        ValueError: an option's value is impossible.
    """

    def __init__(
        self,
        which: str,
        program: str = "",
        interpreter: str | None = None,
        arguments: Sequence[str] = (),
        train: int = 1000,
        heldout: int = 200,
        path: str | None = None,
        heldout_path: str | None = None,
        seconds: float = 600.0,
        parallel: int = 16,
        parts: Sequence[str] = (),
        variables: Sequence[str] = (),
    ) -> None:
        if not program or not Path(program).is_file():
            raise ValueError(
                f"task.options.program is {program!r}, no file; name the agent program, e.g. program: agent.py"
            )
        if interpreter is not None and shutil.which(interpreter) is None:
            raise ValueError(f"task.options.interpreter: {interpreter} is no program; name one, or leave it out")
        if interpreter is None and not program.endswith(".py") and not os.access(program, os.X_OK):
            raise ValueError(
                f"task.options.program: {program} is not executable; run chmod +x, or name what runs it by interpreter"
            )
        for name, value in (("train", train), ("heldout", heldout), ("seconds", seconds), ("parallel", parallel)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"task.options.{name} is {value!r}; give a number above 0")
        for name, names in (("arguments", arguments), ("parts", parts), ("variables", variables)):
            if isinstance(names, str) or not all(isinstance(one, str) for one in names):
                raise ValueError(f"task.options.{name} is {names!r}; give a list of texts")
        own = interpreter or (sys.executable if program.endswith(".py") else None)
        self.command = [*([own] if own else []), str(Path(program).absolute()), *arguments]
        self.seconds, self.parallel = float(seconds), int(parallel)
        self.parts, self.variables = tuple(parts), tuple(variables)
        self._rows = {"train": _rows("path", path), "heldout": _rows("heldout_path", heldout_path)}
        self._counts = {"train": int(train), "heldout": int(heldout)}

    def episodes(self, split: Literal["train", "heldout"]) -> Sequence[Episode]:
        """The lines of the split's file, or numbers."""
        if (rows := self._rows[split]) is not None:
            return rows
        return LazySequence(self._counts[split], lambda i: {"split": split, "number": i})

    def make(self) -> Environment:
        """There is no world here."""
        raise ValueError("an agent program is played by the gateway, not step by step")


class VerifiersPrograms(AgentPrograms):
    """``verifiers/<taskset>``: an environment of Prime's ``verifiers`` (0.4). Options: ``python``, the interpreter of
    an environment that has the package and the taskset; ``folder`` of a taskset that is not installed; ``env``, the
    environment's own config; ``success_at``; and of ``gateway`` ``train``, ``heldout`` (the taskset's first tasks, and
    those behind them), ``seconds``, ``parallel``, ``variables``.

    Raises:
        ValueError: an option's value is impossible.
    """

    def __init__(
        self,
        which: str,
        python: str = "",
        folder: str | None = None,
        env: Mapping[str, object] | None = None,
        success_at: float = 1.0,
        train: int = 1000,
        heldout: int = 200,
        seconds: float = 600.0,
        parallel: int = 4,
        variables: Sequence[str] = (),
    ) -> None:
        if not python or shutil.which(python) is None:
            raise ValueError(
                f"task.options.python is {python!r}, no program; name the interpreter that has verifiers, e.g. "
                "python: venv-verifiers/bin/python"
            )
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"task.options.folder: {folder} is no folder; name the one that has the taskset")
        if not isinstance(env or {}, Mapping):
            raise ValueError(f"task.options.env is {env!r:.80}; give a mapping, as verifiers' own [env] block")
        given = dict(env or {})
        given["taskset"] = {**dict(given.get("taskset") or {}), "id": which}  # type: ignore[call-overload]
        given.setdefault("agent", _AGENT)
        asked = {"env": given, "train": int(train), "folder": folder, "success_at": success_at}
        super().__init__(
            which,
            program=str(ADAPTER),
            interpreter=python,
            arguments=[json.dumps(asked)],
            train=train,
            heldout=heldout,
            seconds=seconds,
            parallel=parallel,
            variables=variables,
        )


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
                f"task.options.{option}: line {number} of {path} is no JSON object of at most {LARGEST_EPISODE} bytes"
            )
        found.append(row)
    if not found:
        raise ValueError(f"task.options.{option}: {path} has no lines; give at least one episode")
    return found
