"""What the environments in Java share: one Java machine per child process, with as many worlds in it as are wanted."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from rollout_workers.environments.protocol import Episode

STEPS = 1_000_000
"""The simulators' own limit on steps: ours counts."""


@lru_cache(maxsize=1)
def machine(start: Callable[[], Any]) -> Any:
    """The first world, which starts the Java machine.

    Raises:
        ValueError: there is no Java.
    """
    if shutil.which("java") is None:
        raise ValueError(
            "there is no java on the PATH; install a Java runtime (Debian: apt-get install default-jre-headless)"
        )
    return start()


def another(start: Callable[[], Any], interface: str) -> Any:
    """A world of its own in the same machine (a second machine would cost half a gigabyte); ``interface`` is its class
    in Java."""
    world = copy.copy(machine(start))
    place = world._gateway.jvm
    for part in interface.split("."):
        place = getattr(place, part)
    world.server = place()
    world.close = lambda: None  # at the end of any of them the library would stop the machine for all
    return world


def interleaved(folds: Sequence[str], number: int) -> Episode:
    """Episode ``number`` of folds that take turns: every first part of a split has all of them."""
    return {"fold": folds[number % len(folds)], "number": number // len(folds)}
