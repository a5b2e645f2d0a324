"""TextWorld-Express (Jansen and Cote, 2022): text games in Java, about a thousand steps a second. ``pip install
textworld-express``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rollout_workers.environments.java import STEPS, another, interleaved
from rollout_workers.environments.protocol import Episode, Step
from rollout_workers.lazy_sequence import LazySequence

GAMES = ("cookingworld", "twc", "coin", "mapreader", "arithmetic", "sorting", "simonsays", "peckingorder")
SEEDS: Mapping[str, int] = {"train": 30_000, "dev": 10_000, "test": 20_000}
"""First held-out seed of each fold; training has those from 0 on. Folds have other objects, recipes or words (not in
every game)."""
TRAIN_EPISODES, HELDOUT_EPISODES = 10_000, 1000


class TextWorldExpress:
    """Options: ``game`` the game's own settings, e.g. ``{numLocations: 3}``; ``heldout`` the folds that are held out,
    in turn."""

    def __init__(
        self, which: str, game: Mapping[str, int] | None = None, heldout: Sequence[str] = ("train", "test")
    ) -> None:
        if which not in GAMES:
            raise ValueError(f"task.name: textworld_express has no game {which!r}; it has {', '.join(GAMES)}")
        if not heldout or set(heldout) - SEEDS.keys():
            raise ValueError(f"task.options.heldout is {list(heldout)}; name some of {', '.join(SEEDS)}")
        self.which, self.heldout = which, tuple(heldout)
        self.settings = ",".join(f"{name}={int(value)}" for name, value in (game or {}).items())

    def episodes(self, split: Literal["train", "heldout"]) -> Sequence[Episode]:
        """Fold and seed."""
        if split == "train":
            return LazySequence(TRAIN_EPISODES, lambda i: {"fold": "train", "seed": i})

        def heldout(number: int) -> Episode:
            place = interleaved(self.heldout, number)
            return {"fold": place["fold"], "seed": SEEDS[place["fold"]] + place["number"]}

        return LazySequence(HELDOUT_EPISODES * len(self.heldout), heldout)

    def make(self) -> TextWorldExpressWorld:
        """A game."""
        return TextWorldExpressWorld(self.which, self.settings)


def _start() -> Any:
    from textworld_express import TextWorldExpressEnv

    return TextWorldExpressEnv(envStepLimit=STEPS)


class TextWorldExpressWorld:
    """One game. Opening: the task, then what is to be seen."""

    def __init__(self, game: str, settings: str) -> None:
        self.world = another(_start, "textworldexpress.runtime.PythonInterface")
        self.world.load(game, settings)

    def reset(self, episode: Episode) -> str:
        """Begin the game of a fold and seed."""
        look, info = self.world.reset(seed=episode["seed"], gameFold=episode["fold"], generateGoldPath=True)
        return f"{info['taskDescription'].strip()}\n{look.strip()}"

    def step(self, text: str) -> Step:
        """Act; the reward is what the score gains."""
        observation, reward, _, info = self.world.step(text)
        ended, success = bool(info["tasksuccess"] or info["taskfailure"]), bool(info["tasksuccess"])
        ended = ended or info["score"] >= 1.0
        return Step(
            observation=observation.strip(),
            reward=float(reward),
            terminated=ended,
            success=success or info["score"] >= 1.0,
        )

    def gold(self) -> list[str]:
        """The game's own gold path, without its looks around: the opening has shown that already."""
        return [action for action in self.world.getGoldActionSequence() if action != "look around"]
