"""Published recipes of reinforcement learning by name: the settings that ``improve.recipe`` fills, each unless it is
set by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from configs.schema import RunConfig

RECIPES: dict[str, dict[str, Any]] = {
    "dapo": {
        "improve.algorithm": "grpo",
        "improve.clip_low": 0.2,
        "improve.clip_high": 0.28,
        "improve.loss_mean": "token",
        "improve.dynamic_sampling": 2.0,
        "improve.mask_truncated": True,
        "reward.overlong_share": 0.2,
    },
    "dr_grpo": {
        "improve.algorithm": "dr_grpo",
        "improve.loss_mean": "constant",
    },
    "gspo": {
        "improve.algorithm": "grpo",
        "improve.ratio": "sequence",
        "improve.loss_mean": "sequence",
        "improve.clip_low": 3e-4,
        "improve.clip_high": 4e-4,
    },
    "cispo": {
        "improve.algorithm": "grpo",
        "improve.surrogate": "cispo",
        "improve.loss_mean": "token",
        "improve.clip_low": 1.0,
        "improve.clip_high": 4.0,
    },
}
"""Dotted settings of each. Sources: ``dapo``: Yu et al., 2025, with the overlong window of its 20,480 tokens (4,096) as
a share; ``dr_grpo``: Liu et al., 2025; ``gspo``: Zheng et al., 2025, section 5.1; ``cispo``: MiniMax-M1, 2025, without
a lower bound, the upper one as TRL's documentation has it (a weight of at most 5)."""


def fill(data: dict[str, Any]) -> None:
    """Put what ``data``'s recipe says, a config as read from YAML, where nothing is said."""
    improve = data.get("improve")
    name = improve.get("recipe") if isinstance(improve, dict) else None
    for place, value in RECIPES.get(name, {}).items() if isinstance(name, str) else ():
        section, key = place.split(".")
        settings = data.setdefault(section, {})
        if isinstance(settings, dict):
            settings.setdefault(key, value)


def by_hand(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of ``config`` that are not its recipe's: dotted name -> (what is set, what the recipe has)."""
    found = {}
    for place, value in _recipe(config).items():
        section, key = place.split(".")
        mine = getattr(getattr(config, section), key)
        if mine != value:
            found[place] = (mine, value)
    return found


def filled(config: RunConfig) -> Iterator[str]:
    """A line on what the recipe has, where there is one."""
    own = by_hand(config)
    same = [f"{place}: {shown(value)}" for place, value in _recipe(config).items() if place not in own]
    if same and config.improve is not None:
        yield f"improve.recipe: {config.improve.recipe} has {', '.join(same)}"


def differing(config: RunConfig) -> Iterator[str]:
    """A line for each of the recipe's settings that was set by hand to something else."""
    for place, (mine, value) in by_hand(config).items():
        assert config.improve is not None
        yield f"{place}: {shown(mine)} is set by hand, improve.recipe: {config.improve.recipe} has {shown(value)}"


def shown(value: Any) -> str:
    """A value as in YAML."""
    return json.dumps(value).strip('"')


def _recipe(config: RunConfig) -> Mapping[str, Any]:
    return {} if config.improve is None else RECIPES.get(config.improve.recipe or "", {})
