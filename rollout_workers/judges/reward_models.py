"""Preference reward models at work: in Ray actors of their own that all rollout workers share, or in this process
without Ray."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError

from latent_control import preference
from rollout_workers.tasks.protocol import Failure
from rollout_workers.tasks.scorer_options import Preference

TRIES = 3
"""The actors go with the worker that started them; another worker then starts new ones."""
PAUSE = 1.0
"""Seconds between tries: until Ray has forgotten a dead actor's name."""


class RewardModel:
    """A loaded reward model."""

    def __init__(self, settings: Preference) -> None:
        self.settings = settings
        self.reading = preference.reading_of(settings.model, chat=settings.chat, max_length=settings.max_length)
        gpu = torch.cuda.is_available()
        classifier, self.tokenizer = preference.load_classifier(
            settings.model, torch.bfloat16 if gpu else torch.float32
        )
        self.classifier = classifier.to("cuda" if gpu else "cpu").eval()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The score of each response to its prompt."""
        rows = [preference.encode(self.tokenizer, p, r, self.reading) for p, r in zip(prompts, responses, strict=True)]
        return preference.scores(self.classifier, rows, self.settings.batch_size)


class RewardModels:
    """All copies of a reward model; ``ValueError`` when there is none at that place."""

    def __init__(self, settings: Preference) -> None:
        self.settings = settings
        preference.require_reward_model(settings.model)
        self._local: RewardModel | None = None
        self._actors: list[Any] = []
        """Kept, for an actor ends when the one who started it lets go of it."""
        self._turn = 0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float | Failure]:
        """Scores; the batch is cut among the actors."""
        if not ray.is_initialized():
            self._local = self._local or RewardModel(self.settings)
            return list(self._local.score(prompts, responses))
        for tried in range(TRIES):
            try:
                return self._asked(prompts, responses)
            except GetTimeoutError:
                message = (
                    f"no reward model answered within {self.settings.timeout_seconds:g} s; are there CPUs and "
                    "GPUs for its actors?"
                )
                return [Failure(kind="reward_timeout", message=message)] * len(responses)
            except RayActorError as error:
                self._actors = []
                if tried + 1 == TRIES:
                    return [Failure(kind="reward_crash", message=str(error)[:300])] * len(responses)
                time.sleep(PAUSE)
        raise AssertionError("the last try returns")

    def _asked(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float | Failure]:
        self._actors = self._actors or [reward_actor(self.settings, number) for number in range(self.settings.actors)]
        actors = self._actors
        size = max(self.settings.batch_size, -(-len(responses) // len(actors)))
        parts = []
        for start in range(0, len(responses), size):
            actor = actors[self._turn % len(actors)]
            self._turn += 1
            parts.append(actor.score.remote(prompts[start : start + size], responses[start : start + size]))
        return [score for part in ray.get(parts, timeout=self.settings.timeout_seconds) for score in part]


def reward_actor(settings: Preference, number: int) -> Any:
    """Actor ``number`` of a reward model: the one that is there, whichever worker started it, or a new one."""
    name = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16]
    return (
        ray.remote(RewardModel)
        .options(
            name=f"latent-control-reward-{name}-{number}",
            get_if_exists=True,
            num_cpus=settings.cpus_per_actor,
            num_gpus=settings.gpus_per_actor,
            max_restarts=-1,
        )
        .remote(settings)
    )
