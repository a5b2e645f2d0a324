"""A text environment as a task: its episodes are the prompts, its gold paths the demonstrations, and playing it is the
verdict."""

from __future__ import annotations

import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from rollout_workers.environments import family
from rollout_workers.environments.client import Lost, Worlds
from rollout_workers.environments.protocol import Step
from rollout_workers.tasks.protocol import Demonstration, Failure, LazySequence, Prompt, Score, Split, require_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\n>"
"""Ends every observation: now it is the model's turn."""
MOST_LINES = 200
SLIP_EPISODES = 50
"""Training episodes from whose gold paths a demonstrator's slips are drawn."""
WORD = re.compile(r"\w+|[^\w\s]+")
VOCABULARY = {"train": 1000, "heldout": 200}
"""Gold paths whose words make the vocabulary of a base LM trained for this task."""


def verdict(steps: Sequence[Step], *, truncated: bool) -> Score:
    """An episode's score: the sum of its turns' rewards. ``turns`` is minus their number, so that a weight makes
    episodes shorter."""
    total, success = sum(step.reward for step in steps), any(step.success for step in steps)
    parts = {"success": float(success), "score": total, "turns": -float(len(steps)), "truncated": float(truncated)}
    return Score(reward=total, success=success, parts=parts)


class EpisodeTask(ABC):
    """A task that is played in episodes of several turns (``rollout_workers.episode_player``)."""

    name: str
    parts: tuple[str, ...]

    @abstractmethod
    def prompts(self, split: Split) -> Sequence[Prompt]:
        """As ``Task``."""

    @abstractmethod
    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """As ``Task``."""

    @abstractmethod
    def score(self, prompt: Prompt, text: str) -> Score | Failure:
        """As ``Task``, of one text that stands for an episode."""

    @abstractmethod
    def opened(self, prompt: Prompt, observation: str) -> Prompt:
        """The prompt as the model is given it."""

    @abstractmethod
    def seen(
        self, tokenizer: PreTrainedTokenizerBase, observation: str, most: int, *, chat: bool, closed: bool
    ) -> list[int]:
        """Ids of an observation of at most ``most`` tokens between two responses, of which the first is ``closed`` by
        an end token or not."""

    @abstractmethod
    def judged(
        self, prompt: Prompt, texts: Sequence[str], steps: Sequence[Step], *, truncated: bool
    ) -> Score | Failure:
        """The verdict on an episode's responses, each with what came of it."""


class AgentTask(EpisodeTask):
    """The task; see the module's docstring. A prompt's text names the episode, until ``opened`` puts the opening
    observation there.

    Option ``slip`` (0): the chance at each turn that a demonstrator does what is right in another episode. What follows
    is not shown, since a gold path goes on from what is right.

    Raises:
        ValueError: an option is unknown or its value impossible.
    """

    parts: tuple[str, ...] = ("success", "score", "turns", "truncated")

    def __init__(self, name: str, options: Mapping[str, object]) -> None:
        own = dict(options)
        slip = own.pop("slip", 0.0)
        if isinstance(slip, bool) or not isinstance(slip, int | float) or not 0 <= slip < 1:
            raise ValueError(f"task.options.slip is {slip!r}; give a number from 0 to below 1")
        self.name, self.options, self.slip = name, own, float(slip)
        self._family = family(name, own)
        self._worlds: Worlds | None = None
        self._played: dict[tuple[Split, int], Demonstration] = {}
        self._actions: list[str] = []

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The episodes of the split."""
        require_split(split)
        episodes = self._family.episodes(split)
        return LazySequence(
            len(episodes),
            lambda i: Prompt(
                id=f"{self.name}/{split}/{i}", text=json.dumps(dict(episodes[i])), metadata=dict(episodes[i])
            ),
        )

    def opened(self, prompt: Prompt, observation: str) -> Prompt:
        """The prompt as the model is given it."""
        return replace(prompt, text=observation + MARK)

    def seen(
        self, tokenizer: PreTrainedTokenizerBase, observation: str, most: int, *, chat: bool, closed: bool
    ) -> list[int]:
        """The observation, as a line or a user's message."""
        from rollout_workers.tasks.encoding import encode_observation, shortened

        return encode_observation(tokenizer, shortened(tokenizer, observation, most) + MARK, chat=chat, closed=closed)

    def judged(
        self, prompt: Prompt, texts: Sequence[str], steps: Sequence[Step], *, truncated: bool
    ) -> Score | Failure:
        """The world's verdict."""
        return verdict(steps, truncated=truncated)

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """Gold paths, played when indexed; ``ValueError`` where an environment has none."""
        require_split(split)
        return LazySequence(len(self._family.episodes(split)), lambda i: self._demonstration(split, i))

    def score(self, prompt: Prompt, text: str) -> Score | Failure:
        """The verdict on actions, one a line."""
        worlds = self.worlds
        try:
            worlds.begin([prompt.metadata])
        except ValueError as error:
            return Failure(kind="environment_error", message=str(error))
        steps: list[Step] = []
        for line in text.splitlines()[:MOST_LINES]:
            outcome = worlds.step({0: line.strip()})[0]
            if isinstance(outcome, Lost):
                return Failure(kind=outcome.kind, message=outcome.message)
            steps.append(outcome)
            if outcome.terminated or outcome.truncated:
                break
        return verdict(steps, truncated=not steps or not steps[-1].terminated)

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary of some gold paths: of a base LM trained from scratch (``base.train``)."""
        found: set[str] = set()
        for split, count in VOCABULARY.items():
            demonstrations = self.demonstrations(split)  # type: ignore[arg-type]
            for demo in demonstrations[:count]:
                for text in (demo.prompt.text, demo.response, *(text for turn in demo.later for text in turn)):
                    found.update(WORD.findall(text))
        return tuple(sorted(found))

    def close(self) -> None:
        """End the process of ``worlds``."""
        if self._worlds is not None:
            self._worlds.close()

    @property
    def worlds(self) -> Worlds:
        """Where gold paths and verdicts outside of rollouts are played: in one process, started when first needed."""
        if self._worlds is None:
            self._worlds = Worlds(self.name, self.options)
        return self._worlds

    def _demonstration(self, split: Split, index: int) -> Demonstration:
        if (split, index) not in self._played:
            self._played[split, index] = self._gold(self.prompts(split)[index])
        return self._played[split, index]

    def _gold(self, prompt: Prompt) -> Demonstration:
        opening = self.worlds.begin([prompt.metadata])[0]
        actions = self.worlds.gold(0)
        if not actions:
            raise ValueError(
                f"{self.name} has no gold path for {prompt.id}; train on texts or on rollouts instead (data: kind "
                "text, replay)"
            )
        wrong = self._slips(prompt, actions)
        later: list[tuple[str, str]] = []
        for turn, (action, following) in enumerate(pairwise(actions)):
            if turn in wrong:
                break
            outcome = self.worlds.step({0: action})[0]
            if isinstance(outcome, Lost):
                raise ValueError(f"{self.name}: the gold path of {prompt.id} breaks at {action!r}: {outcome.message}")
            if outcome.terminated:
                break
            later.append((outcome.observation + MARK, wrong.get(turn + 1, following)))
        return Demonstration(prompt=self.opened(prompt, opening), response=wrong.get(0, actions[0]), later=tuple(later))

    def _slips(self, prompt: Prompt, actions: Sequence[str]) -> dict[int, str]:
        """Turn -> what is done there instead: the first slip only. The same for the same episode."""
        rng = random.Random(prompt.id)
        turn = next((t for t in range(len(actions)) if rng.random() < self.slip), None)
        if turn is None:
            return {}
        others = [action for action in self._other_actions() if action != actions[turn]]
        return {turn: rng.choice(others)} if others else {}

    def _other_actions(self) -> Sequence[str]:
        """What gold paths of some training episodes do, each action once."""
        if not self._actions:
            apart = Worlds(self.name, self.options)
            episodes = self._family.episodes("train")
            for index in range(min(SLIP_EPISODES, len(episodes))):
                apart.begin([episodes[index]])
                self._actions += [action for action in apart.gold(0) if action not in self._actions]
            apart.close()
        return self._actions
