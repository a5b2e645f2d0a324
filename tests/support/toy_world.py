"""A pure-Python text world for the tests of agents, as a family of one's own and as a Gymnasium environment."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, Literal

import gymnasium

from rollout_workers.environments.protocol import Episode, Step
from rollout_workers.lazy_sequence import LazySequence

ROOMS, STEPS = 4, 12
WORDS = ("room", "key", "go", "left", "right", "take", "wait", "taken", "nothing", ">", ".", *map(str, range(ROOMS)))


class Keys:
    """``environment/toy_world:Keys``: rooms in a row, a key in one of them; ``delay`` seconds before a world is
    made."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay

    def episodes(self, split: Literal["train", "heldout"]) -> Sequence[Episode]:
        """Fold and seed."""
        return LazySequence(100, lambda i: {"fold": split, "seed": i + (1000 if split == "heldout" else 0)})

    def make(self) -> KeyWorld:
        """A world."""
        time.sleep(self.delay)
        return KeyWorld()


class KeyWorld:
    """A quarter for reaching the key's room, the rest for taking the key. ``wait N`` takes N seconds, ``crash`` raises,
    ``die`` exits."""

    def reset(self, episode: Episode) -> str:
        """Seeds 0 to 3: rooms 3 2 3 2, keys 1 1 0 0; the next four are their mirror images, and so on."""
        print("a world may print")  # must not reach the pipe
        seed = episode["seed"]
        self.room, self.key = 3 - seed % 2, 1 - seed // 2 % 2
        if seed // 4 % 2:
            self.room, self.key = 3 - self.room, 3 - self.key
        self.steps, self.reached = 0, False
        return self._look()

    def step(self, text: str) -> Step:
        """Act."""
        self.steps += 1
        words = text.split()
        if words[:1] == ["wait"]:
            time.sleep(float(words[1]))
        if text == "crash":
            raise LookupError("crashed")
        if text == "die":
            os._exit(3)
        if text in ("go left", "go right"):
            self.room = min(ROOMS - 1, max(0, self.room + (1 if words[1] == "right" else -1)))
            reward, self.reached = (
                (0.25 if self.room == self.key and not self.reached else 0.0),
                self.reached or self.room == self.key,
            )
            return Step(observation=self._look(), reward=reward, truncated=self.steps >= STEPS)
        if text == "take key" and self.room == self.key:
            return Step(observation="taken .", reward=0.75, terminated=True, success=True)
        return Step(observation="nothing .", reward=0.0, truncated=self.steps >= STEPS)

    def gold(self) -> list[str]:
        """Straight to the key."""
        return ["go right" if self.key > self.room else "go left"] * abs(self.key - self.room) + ["take key"]

    def _look(self) -> str:
        return f"room {self.room} . key {self.key} ."


class GymKeys(gymnasium.Env[str, str]):
    """The same for Gymnasium."""

    observation_space, action_space = gymnasium.spaces.Text(100), gymnasium.spaces.Text(100)

    def __init__(self, unused: int = 0) -> None:
        self.keys = KeyWorld()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin."""
        return self.keys.reset({"seed": seed}), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act."""
        step = self.keys.step(action)
        return step.observation, step.reward, step.terminated, step.truncated, {}

    def gold(self) -> list[str]:
        """Straight to the key."""
        return self.keys.gold()


gymnasium.register("Keys-v0", GymKeys, disable_env_checker=True, order_enforce=False)
