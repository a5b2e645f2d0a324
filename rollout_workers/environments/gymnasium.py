"""Any Gymnasium environment that is played in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

from rollout_workers.environments.protocol import Episode, Step
from rollout_workers.lazy_sequence import LazySequence

HELDOUT_SEED = 1_000_000


class GymnasiumText:
    """``gymnasium/<id>``. Observations are shown as text.

    Options: ``modules`` imported first, so that they register it; ``settings`` of the environment; ``actions`` names
    for a discrete action space, in its order (without them the text itself is the action); ``instruction`` put before
    the first observation; ``train``, ``heldout`` numbers of episodes (seeds). Success is ``info["success"]``, else a
    positive reward at the end. The environment's own method ``gold``, if it has one, gives gold paths.
    """

    def __init__(
        self,
        which: str,
        modules: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        actions: Sequence[str] = (),
        instruction: str = "",
        train: int = 1000,
        heldout: int = 1000,
    ) -> None:
        self.which, self.modules, self.settings = which, tuple(modules), dict(settings or {})
        self.actions, self.instruction, self.sizes = list(actions), instruction, {"train": train, "heldout": heldout}

    def episodes(self, split: Literal["train", "heldout"]) -> Sequence[Episode]:
        """Seeds."""
        first = 0 if split == "train" else HELDOUT_SEED
        return LazySequence(self.sizes[split], lambda i: {"seed": first + i})

    def make(self) -> GymnasiumWorld:
        """An environment."""
        import gymnasium

        for module in self.modules:
            import_module(module)
        return GymnasiumWorld(gymnasium.make(self.which, **self.settings), self.actions, self.instruction)


class GymnasiumWorld:
    """One environment."""

    def __init__(self, world: Any, actions: list[str], instruction: str) -> None:
        self.world, self.actions, self.instruction = world, actions, instruction

    def reset(self, episode: Episode) -> str:
        """Begin with a seed."""
        observation, _ = self.world.reset(seed=episode["seed"])
        return f"{self.instruction}\n{observation}".strip()

    def step(self, text: str) -> Step:
        """Act; a text that is no action's name costs a turn and does nothing."""
        if self.actions and text not in self.actions:
            return Step(observation=f"Nothing happens. You can: {', '.join(self.actions)}.", reward=0.0)
        observation, reward, ended, cut, info = self.world.step(self.actions.index(text) if self.actions else text)
        success = bool(info.get("success", ended and reward > 0))
        return Step(
            observation=str(observation),
            reward=float(reward),
            terminated=bool(ended),
            truncated=bool(cut),
            success=success,
        )

    def gold(self) -> list[str]:
        """The environment's own, if it has any."""
        found = getattr(self.world.unwrapped, "gold", None)
        return [] if found is None else list(found())
