"""Starts an agent program and outlives it: ends all that it started when it, or the rollout worker, is gone.

Reads one line of JSON, ``{"command": [...], "environment": {...}}``; the pipe it comes by stays open as long as the
worker lives.
"""

from __future__ import annotations

import json
import os
import select
import sys

from rollout_workers.judging import walls
from rollout_workers.judging.function import end_children

NOT_STARTED = 127


def main() -> int:
    """The program's exit status, as a shell gives it."""
    asked = json.loads(sys.stdin.buffer.readline())
    if walls.LINUX:
        walls.adopt_orphans()
    pid = os.fork()
    if not pid:
        _become(asked["command"], asked["environment"])
    poll, status = select.poll(), None
    poll.register(0, 0)  # hang-ups alone
    while status is None and not poll.poll(20):
        ended, found = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(found) if ended else None
    end_children()
    return 1 if status is None else status if status >= 0 else 128 - status


def _become(command: list[str], environment: dict[str, str]) -> None:
    if walls.LINUX:
        walls.die_with_parent()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(2, f"{command[0]}: {error}\n".encode())
    os._exit(NOT_STARTED)


if __name__ == "__main__":
    sys.exit(main())
