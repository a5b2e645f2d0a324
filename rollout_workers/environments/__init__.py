"""Text environments behind one protocol; ``family`` makes the one that a task's name and options say. Imports nothing
heavy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from rollout_workers.environments.agent_programs import AgentPrograms, VerifiersPrograms
from rollout_workers.environments.alfworld import Alfworld
from rollout_workers.environments.gymnasium import GymnasiumText
from rollout_workers.environments.protocol import Environment, Episode, Family, Step
from rollout_workers.environments.scienceworld import ScienceWorld
from rollout_workers.environments.textworld_express import TextWorldExpress

__all__ = ["FAMILIES", "Environment", "Episode", "Family", "Step", "family"]


def _imported(path: str, **options: Any) -> Family:
    """A family of one's own, ``<module>:<callable>``, found like any import."""
    module, _, name = path.partition(":")
    try:
        made: Family = getattr(import_module(module), name)(**options)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"task.name is 'environment/{path}'; write environment/<module>:<class>, importable here: {error}"
        ) from error
    return made


FAMILIES: Mapping[str, Callable[..., Family]] = {
    "textworld_express": TextWorldExpress,
    "scienceworld": ScienceWorld,
    "alfworld": Alfworld,
    "gymnasium": GymnasiumText,
    "environment": _imported,
    "gateway": AgentPrograms,
    "verifiers": VerifiersPrograms,
}
COMMON = ("slip",)
"""Options of all agents' tasks, which ``AgentTask`` keeps to itself."""


def family(name: str, options: Mapping[str, Any]) -> Family:
    """The family of ``textworld_express/coin``; ``ValueError`` names an option that it does not have."""
    kind, _, which = name.partition("/")
    if not which:
        raise ValueError(f"task.name is {name!r}; say which one: {kind}/...")
    known = list(inspect.signature(FAMILIES[kind]).parameters)[1:]
    unknown = sorted(options.keys() - set(known)) if kind != "environment" else []
    if unknown:
        raise ValueError(f"task.options.{unknown[0]} is not an option of {kind}; known: {', '.join([*known, *COMMON])}")
    return FAMILIES[kind](which, **options)
