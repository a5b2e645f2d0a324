"""The error that ends a run, and the first line of any error."""

from __future__ import annotations


class RunError(RuntimeError):
    """Ends a run and is no defect of the code: its message is for the user, with the remedy."""


def first_line(error: BaseException) -> str:
    """What an error says, without its details: Ray's messages are pages."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
