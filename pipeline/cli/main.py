"""The installed program: the app with all its commands. ``pipeline.__main__`` alone imports this file."""

from __future__ import annotations

import logging
import signal
import sys
import traceback
from types import TracebackType

from configs.plain_text import escaped
from configs.redaction import without_secrets
from pipeline.cli import (  # noqa: F401  (each file's commands join the app when it is imported)
    cluster,
    compare,
    config,
    evaluate,
    machine,
    pages,
    rewards,
    runs,
    search,
    serving,
    steer,
    tasks,
    train,
    tune,
)
from pipeline.cli.app import app
from pipeline.cli.panels import arrange
from pipeline.runs import interrupts

arrange(app)


class _Escaped(logging.Formatter):
    """Warnings quote files, models and users."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(without_secrets(super().format(record)))


def _print_defect(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    told = without_secrets("".join(traceback.format_exception(kind, error, where)))
    print(escaped(told), end="", file=sys.stderr)


def main() -> None:
    """Entry point of the installed program."""
    interrupts.end_on_signals()
    sys.excepthook = _print_defect
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Escaped())
    try:
        app(prog_name="latent-control")
    except KeyboardInterrupt as interrupt:
        code = interrupts.exit_code(getattr(interrupt, "number", signal.SIGINT), saved=False)
        interrupts.leave(code)
        sys.exit(code)
    except SystemExit as end:
        interrupts.leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
