"""ScienceWorld (Wang et al., 2022): thirty tasks of school science in Java. ``pip install scienceworld``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rollout_workers.environments.java import STEPS, another, interleaved
from rollout_workers.environments.protocol import Episode, Step
from rollout_workers.lazy_sequence import LazySequence

EPISODES = 10_000
FULL_SCORE = 100.0


class ScienceWorld:
    """``scienceworld/<task>`` (``boil``, ``find-living-thing``, ...), or several with commas.

    Options: ``simplifications`` as the simulator names them, with commas (``easy`` is all); ``heldout`` the folds of
    variations that are held out, in turn (the paper's seen and unseen are ``dev`` and ``test``).
    """

    def __init__(self, which: str, simplifications: str = "", heldout: Sequence[str] = ("dev", "test")) -> None:
        if not heldout or set(heldout) - {"dev", "test"}:
            raise ValueError(f"task.options.heldout is {list(heldout)}; name some of dev, test")
        self.tasks, self.simplifications, self.heldout = which.split(","), simplifications, tuple(heldout)

    def episodes(self, split: Literal["train", "heldout"]) -> Sequence[Episode]:
        """Task, fold, and the number of a variation in it, counted round: how many there are only the simulator
        knows."""

        def episode(number: int) -> Episode:
            turn, task = divmod(number, len(self.tasks))
            return {"task": self.tasks[task], **interleaved(("train",) if split == "train" else self.heldout, turn)}

        return LazySequence(EPISODES, episode)

    def make(self) -> ScienceWorldWorld:
        """A laboratory."""
        return ScienceWorldWorld(self.simplifications)


def _start() -> Any:
    from scienceworld import ScienceWorldEnv

    return ScienceWorldEnv("", envStepLimit=STEPS)


class ScienceWorldWorld:
    """One laboratory. Opening: the task, then what is to be seen."""

    def __init__(self, simplifications: str) -> None:
        self.world = another(_start, "scienceworld.runtime.pythonapi.PythonInterface")
        self.simplifications = simplifications

    def reset(self, episode: Episode) -> str:
        """Begin a variation of a task."""
        world = self.world
        world.load(episode["task"], 0, self.simplifications)
        variations = getattr(world, f"get_variations_{episode['fold']}")()
        world.load(
            episode["task"],
            variations[episode["number"] % len(variations)],
            self.simplifications,
            generateGoldPath=True,
        )
        look, info = world.reset()
        self.score = 0.0
        return f"{info['taskDesc'].strip()}\n{look.strip()}"

    def step(self, text: str) -> Step:
        """Act; the reward is what the score gains, of 1 in all. The simulator ends a failed task with a score below
        0."""
        observation, _, ended, info = self.world.step(text)
        score = max(0.0, float(info["score"])) / FULL_SCORE
        gained, self.score = score - self.score, score
        return Step(observation=observation.strip(), reward=gained, terminated=bool(ended), success=score >= 1.0)

    def gold(self) -> list[str]:
        """The simulator's own gold path."""
        return list(self.world.get_gold_action_sequence())
