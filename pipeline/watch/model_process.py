"""The process that loads a run's model, started when a page first asks for it: the page stays as fast as it was."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rollout_workers.openai_api.errors import RefusedRequest

MOST_GIB, MOST_SECONDS = 4.0, 300.0
"""Weights that are loaded where nobody says how many; an answer that takes longer ends the process."""


class ModelProcess:
    """Asks the process of one run, one question at a time; starts it again where it has ended."""

    def __init__(self, folder: Path, most_gib: float = MOST_GIB) -> None:
        self._folder, self._most = folder, most_gib
        self._lock = threading.Lock()
        self._started: tuple[subprocess.Popen[bytes], Connection] | None = None

    def ask(self, question: str, body: bytes) -> Any:
        """What ``ModelWork`` answers.

        Raises:
            RefusedRequest: the question cannot be answered, the weights are larger than stated, or the process ended.
        """
        with self._lock:
            try:
                pipe = self._pipe()
                pipe.send_bytes(json.dumps(question).encode())
                pipe.send_bytes(body)
                if not pipe.poll(MOST_SECONDS):
                    self.close()
                    raise RefusedRequest(f"the model took more than {MOST_SECONDS:g} seconds and was ended", 503)
                status, said = json.loads(pipe.recv_bytes())
            except (EOFError, OSError) as error:
                self.close()
                raise RefusedRequest("the model's process ended (did memory suffice?): ask again", 503) from error
        if status != 200:
            raise RefusedRequest(said, status)
        return said

    def close(self) -> None:
        """End the process."""
        if self._started is not None:
            process, pipe = self._started
            self._started = None
            process.kill()
            process.wait()
            with suppress(OSError):
                pipe.close()

    def _pipe(self) -> Connection:
        if self._started is None or self._started[0].poll() is not None:
            self.close()
            ours, theirs = socket.socketpair()
            words = ["-m", "pipeline.watch.model_work", str(theirs.fileno()), str(self._folder), str(self._most)]
            with theirs:
                # A program of its own, not a fork: this process has threads, and no torch.
                process = subprocess.Popen(
                    [sys.executable, *words],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
            self._started = process, Connection(ours.detach())
        return self._started[1]
