"""``run --watch``: the page of ``watch`` beside a run, for as long as the run works."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.runs.layout import CONFIG

LOOK_SECONDS = 0.2


@contextmanager
def watching(run_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Serve the page from when the run folder has its config; its link is said, and opened where there is a
    desktop."""
    over, started = threading.Event(), list[subprocess.Popen[str]]()

    def serve() -> None:
        while not (run_dir / CONFIG).is_file():
            if over.wait(LOOK_SECONDS):
                return
        words = [sys.executable, "-m", "pipeline", "watch", str(run_dir)]
        started.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True))
        stdout = started[0].stdout
        assert stdout is not None
        line = stdout.readline().strip()
        say(line)
        if sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
            webbrowser.open(next((word for word in line.split() if word.startswith("http")), ""))
        for _ in stdout:  # a full pipe would stop it
            pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        for process in started:
            process.terminate()
            process.wait()
