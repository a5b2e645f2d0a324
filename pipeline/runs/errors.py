"""The error that ends a run, and the first line of any error."""

from __future__ import annotations


class RunError(RuntimeError):
    """An error that ends a run but is not a defect of the code; its message names the remedy for the user."""


class NeedsNewRun(ValueError):
    """An error that another setting prevents, which a run that has begun does not take: message and override."""

    def __init__(self, message: str, override: str) -> None:
        super().__init__(message, override)
        self.override = override

    def __str__(self) -> str:
        return str(self.args[0])


class AtWorkError(RunError):
    """Another process works on the run; nothing was started."""


def first_line(error: BaseException) -> str:
    """What an error says, without its details: Ray's messages are pages."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
