"""The displays of a run: a live view on a terminal, plain lines elsewhere, JSON lines for programs, or nothing.

Every display gets the same calls in this order: ``begin``, then for each stage ``stage_begins``, ``step`` ...,
``stage_ends`` (with ``message`` anywhere), ``evaluation``, and ``close``.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from configs.plain_text import UNSEEN, escaped
from pipeline.console.live_view import PLAIN_MARKS, Marks, view
from pipeline.console.progress import UNITS, Ahead, RunProgress, StageProgress, clock, key_metrics, number
from pipeline.console.terminal_capture import TerminalCapture

COLUMNS = 80
LINE_SECONDS = 5.0
"""Seconds between two plain lines of a stage, at least; the first and the last are always written."""


_LINK = re.compile(r"\x1b\].*?(?:\x1b\\|\x07)")
"""Of a terminal's commands, those with a text: titles, links, the clipboard."""


def harmless(text: Text) -> Text:
    """A styled text whose letters do not steer the terminal."""
    return Text(escaped(text.plain), text.style) if UNSEEN.search(text.plain) else text


class Display:
    """Shows nothing (``--quiet``); base class of the others."""

    def begin(self, ahead: Ahead) -> None:
        """The run starts."""

    def stage_begins(self, name: str, total: int, earlier: Sequence[tuple[int, Mapping[str, float]]] = ()) -> None:
        """A stage of ``total`` updates starts; ``earlier``: (step, metrics) of those done before a restart."""

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """A logged step."""

    def stage_ends(self, name: str, *, kept: bool = False, **facts: Any) -> None:
        """A stage is done; ``kept``: before a restart. ``facts`` are for programs."""

    def message(self, text: str, kind: str = "") -> None:
        """A line of text; one with a kind is a warning."""

    def evaluation(self, result: Mapping[str, Any]) -> None:
        """The result of the evaluation."""

    def close(self) -> None:
        """The display ends."""


class Writer:
    """Writes whole lines to a stream; a closed pipe ends the lines, never the run."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._broken = False

    def line(self, text: str) -> None:
        """Write a line and flush it."""
        if self._broken:
            return
        text = escaped(text)
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except BrokenPipeError:
            self._broken = True
            if self._file is sys.stdout:  # else Python retries at exit, and complains
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except UnicodeEncodeError:
            self._file.write(text.encode("ascii", "replace").decode() + "\n")
            self._file.flush()


class PlainLines(Display):
    """Lines of at most 80 columns for logs: one per step, or per ``LINE_SECONDS`` where steps are faster, aligned
    within a stage. The ETA is the whole run's, with a + where the time of some stage is not known yet."""

    def __init__(self, file: IO[str]) -> None:
        self._writer = Writer(file)
        self._run = RunProgress(Ahead(run_dir=Path(), stages={}))
        self._widths: dict[str, int] = {}
        self._shown = 0.0
        self._unshown: tuple[StageProgress, Mapping[str, float]] | None = None

    def begin(self, ahead: Ahead) -> None:
        self._run = RunProgress(ahead)
        stages = ", ".join(f"{name} {total}" if total else name for name, total in ahead.stages.items())
        self._said(f"run {ahead.run_dir.name}: {stages}")

    def stage_begins(self, name: str, total: int, earlier: Sequence[tuple[int, Mapping[str, float]]] = ()) -> None:
        stage = self._run.begin(name, total)
        for step, metrics in earlier:
            stage.remember(step, metrics)
        self._widths.clear()
        self._shown, self._unshown = 0.0, None
        after = f", from update {earlier[-1][0]} on" if earlier else ""
        self._said(f"{name}: " + (f"{total} {UNITS.get(name, 'updates')}{after}" if total else "begins"))

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line, unless the last one was less than ``LINE_SECONDS`` ago."""
        progress = self._run.advance(stage, step, metrics)
        if not metrics:
            return
        now = time.monotonic()
        if self._shown and now - self._shown < LINE_SECONDS and step < progress.total:
            self._unshown = progress, metrics
            return
        self._shown, self._unshown = now, None
        self._writer.line(self._line(progress, metrics))

    def stage_ends(self, name: str, *, kept: bool = False, **facts: Any) -> None:
        if self._unshown is not None:
            self._writer.line(self._line(*self._unshown))
            self._unshown = None
        stage = self._run.end(name, kept=kept, seconds=facts.get("seconds"))
        self._said(f"{name}: " + ("done before, kept" if kept else f"done in {clock(stage.elapsed)}"))

    def message(self, text: str, kind: str = "") -> None:
        """Write the text, with the time and 'warning' if it has a kind."""
        self._writer.line(f"{time.strftime('%H:%M:%S')} warning: {text}" if kind else text)

    def _said(self, text: str) -> None:
        self._writer.line(f"{time.strftime('%H:%M:%S')} {text}")

    def _line(self, stage: StageProgress, metrics: Mapping[str, float]) -> str:
        """Key metrics in columns; those that do not fit into 80 characters are left out."""
        width = len(str(stage.total))
        count = f" {stage.step:>{width}}/{stage.total}" if stage.total else ""
        line, tail = f"{stage.name:<8}{count}", ""
        if stage.tokens_per_second is not None:
            tail = f"  {stage.tokens_per_second:>5.0f} tok/s"
        seconds, unknown = self._run.left()
        tail += f"  ETA {clock(seconds)}{'+' * bool(unknown)}" if stage.seconds else ""
        for name, value in key_metrics(metrics):
            self._widths[name] = max(len(number(value)), self._widths.get(name, 5))
            part = f"  {name} {number(value):>{self._widths[name]}}"
            # Room for the longest ETA, so that the number of columns stays constant.
            if len(line) + len(part) + max(len(tail), 13 + 13 * (stage.tokens_per_second is not None)) > COLUMNS:
                break
            line += part
        return line + tail


class LiveView(Display):
    """The live view (``pipeline.console.live_view``) below all other output; its last state stays on the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._run = RunProgress(Ahead(run_dir=Path(), stages={}))
        self._marks = Marks() if console.encoding.lower().startswith("utf") else PLAIN_MARKS
        self._captured = TerminalCapture(self._other) if console.file is sys.stdout else None
        self.live = Live(console=console, refresh_per_second=4, get_renderable=self._picture, vertical_overflow="crop")

    def begin(self, ahead: Ahead) -> None:
        self._run = RunProgress(ahead)
        self._console.print(escaped(f"run {ahead.run_dir.name}"), markup=False, highlight=False, style="bold")
        if self._captured is not None:
            self._console.file = self._captured.start(sys.stdout)
        self.live.start(refresh=True)

    def stage_begins(self, name: str, total: int, earlier: Sequence[tuple[int, Mapping[str, float]]] = ()) -> None:
        stage = self._run.begin(name, total)
        for step, metrics in earlier:
            stage.remember(step, metrics)

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._run.advance(stage, step, metrics)

    def stage_ends(self, name: str, *, kept: bool = False, **facts: Any) -> None:
        self._run.end(name, kept=kept, seconds=facts.get("seconds"))

    def message(self, text: str, kind: str = "") -> None:
        """Print it above the view; warnings stay in the view too."""
        text = escaped(text)
        if kind:
            self._run.troubles.append((time.time(), text))
        self._console.print(text, markup=False, highlight=False, style="yellow" if kind else "")

    def close(self) -> None:
        """Leave the last state on the screen."""
        if not self.live.is_started:
            return
        if self._captured is not None:
            self._captured.stop()
        self.live.stop()
        if self._captured is not None:
            self._console.file.close()
            self._console.file = sys.stdout

    def _other(self, line: str) -> None:
        """Output of libraries and child processes."""
        self._console.print(harmless(Text.from_ansi(_LINK.sub("", line))), highlight=False)

    def _picture(self) -> Group:
        width, height = self._console.size
        return Group(*map(harmless, view(self._run, width=width, height=height - 1, marks=self._marks)))


def automatic(console: Console | None = None) -> Display:
    """The live view where stdout is a terminal that can move its cursor, plain lines elsewhere."""
    # rich's own rule would take FORCE_COLOR, which CI services set, for a terminal.
    console = console or Console(file=sys.stdout, highlight=False, force_terminal=sys.stdout.isatty())
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console)
    return PlainLines(console.file)
