"""The child process that runs worlds: a line of JSON in, a line of JSON out, until its parent closes the pipe.

``python -m rollout_workers.environments.server '{"name": "textworld_express/coin", "options": {}}'``
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from dataclasses import asdict
from typing import Any, TextIO

from rollout_workers.environments import family
from rollout_workers.environments.protocol import Environment, Family

# What a world may raise on odd input; what lies outside ends the process, and its parent says so.
ERRORS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, ImportError)


def answer(worlds: dict[int, Environment], kind: Family, request: dict[str, Any]) -> Any:
    """The result of one request: ``{"slot": 3, "call": "reset", "episode": {...}}``, ``step`` with ``text``, or
    ``gold``."""
    slot, call = request["slot"], request["call"]
    if call == "reset":
        if slot not in worlds:
            worlds[slot] = kind.make()
        return worlds[slot].reset(request["episode"])
    if call == "step":
        return asdict(worlds[slot].step(request["text"]))
    assert call == "gold", f"unknown call {call!r}"
    return list(worlds[slot].gold())


def serve(kind: Family, lines: queue.SimpleQueue[str], out: TextIO) -> None:
    """Answer requests for ever."""
    worlds: dict[int, Environment] = {}
    while True:
        request = json.loads(lines.get())
        try:
            reply = {"result": answer(worlds, kind, request)}
        except ERRORS as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()


def read(lines: queue.SimpleQueue[str]) -> None:
    """Hand on what the parent writes; when it is gone, go too, even where a world hangs."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def main() -> None:
    """Serve the family named in the first argument. Whatever a world prints goes to stderr, never between the
    answers."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    named = json.loads(sys.argv[1])
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=read, args=(lines,), daemon=True).start()
    serve(family(named["name"], named["options"]), lines, out)


if __name__ == "__main__":
    main()
