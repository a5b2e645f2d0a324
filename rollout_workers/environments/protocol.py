"""What a text environment is. Imports nothing heavy: children that only run a world read this too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Episode = Mapping[str, Any]
"""What ``reset`` needs to know of an episode; JSON, and the prompt's metadata (evaluation can be sliced by it)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What came of an action. ``Step(observation="You take the coin.", reward=1.0, terminated=True, success=True)``."""

    observation: str
    reward: float
    """Of this turn alone."""
    terminated: bool = False
    """The world has ended."""
    truncated: bool = False
    """The world has cut the episode, e.g. by a step limit of its own."""
    success: bool = False
    """The goal is reached."""


class Environment(Protocol):
    """One world; it repeats itself exactly when reset to the same episode and given the same actions."""

    def reset(self, episode: Episode) -> str:
        """Begin ``episode``; the opening observation, which says what is to be done."""
        ...

    def step(self, text: str) -> Step:
        """Act. Any text must be borne: what makes no sense is answered by an observation that says so."""
        ...

    def gold(self) -> Sequence[str]:
        """Actions that solve the episode just reset; none where there are none. Called before the first step only."""
        ...


class Family(Protocol):
    """A kind of environment with its episodes, known without starting it."""

    def episodes(self, split: Literal["train", "heldout"]) -> Sequence[Episode]:
        """The episodes of a split, disjoint between splits."""
        ...

    def make(self) -> Environment:
        """A new world; called in the child process, where heavy things may be imported and shared."""
        ...
