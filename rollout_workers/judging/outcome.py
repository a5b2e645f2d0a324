"""How a call of foreign code ended, and how that travels."""

from __future__ import annotations

import traceback
from types import TracebackType

LONGEST = 300
"""Characters of a message."""


class TypedFailure(Exception):
    """A typed failure: kind and message."""


class Caught:
    """Keeps what a block raised. Foreign code may raise anything, and nothing of it may end this process."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return not isinstance(error, KeyboardInterrupt)

    def failure(self, file: str = "") -> dict[str, str]:
        """As it travels: the kind, and the error with the line of ``file`` that it came from."""
        assert self.error is not None
        if isinstance(self.error, TypedFailure):
            return {"failure": self.error.args[0], "message": self.error.args[1][:LONGEST]}
        kind = "reward_memory" if isinstance(self.error, MemoryError) else "reward_error"
        lines = [frame.lineno for frame in traceback.extract_tb(self.error.__traceback__) if frame.filename == file]
        place = f" (line {lines[-1]})" if lines else ""
        remedy = "; raise task.options.limits.megabytes" if kind == "reward_memory" else ""
        return {
            "failure": kind,
            "message": f"{type(self.error).__name__}: {_text(self.error)[:LONGEST]}{place}{remedy}",
        }


def _text(error: BaseException) -> str:
    """Its message; foreign errors may fail at that too."""
    with Caught() as asked:
        return str(error)
    return f"its message cannot be had ({type(asked.error).__name__})"
