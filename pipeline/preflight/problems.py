"""What a check returns, and how a problem names its place in the config."""

from __future__ import annotations

from typing import NamedTuple


class Findings(NamedTuple):
    """What ``check`` found, e.g.
    ``Findings(errors=["rollout.num_workers: ..."], warnings=[], notes=["prompts ..."])``."""

    errors: list[str]
    """Each prevents the run."""
    warnings: list[str]
    """What this machine cannot check, and what deserves attention."""
    notes: list[str]
    """What was looked at, and one prompt as the model sees it; for ``config check`` to print."""


def placed(place: str, error: ValueError) -> str:
    """The message with its place in the config in front, unless it names one itself."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__  # whole line: the remedy is at its end
    return text if text.startswith((f"{place}.", f"{place} ")) else f"{place}: {text}"
