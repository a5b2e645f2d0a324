"""Rewards in the open: named parts, weighted in the config, and a hash that says which definition scored a rollout."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Reward
from configs.schema import Task as TaskConfig
from rollout_workers.tasks.protocol import Failure, Prompt, Score, Task

GENERIC = ("length", "stop")
"""Parts that every task has: minus the share of ``max_new_tokens`` that was used; whether the rollout ended by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """What is judged. ``Response(text="25 - 3 = 22", new_tokens=6, limit=16, stopped=True)``."""

    text: str
    new_tokens: int
    """Generated tokens, the end token included."""
    limit: int
    """``rollout.max_new_tokens``."""
    stopped: bool
    """It ended by itself."""


def reward_hash(task: TaskConfig, reward: Reward) -> str:
    """Twelve hexadecimal digits that name a reward definition: task, its options, weights; of ``jsonl`` the rows, wherever they lie."""
    options = dict(task.options)
    if task.name == "jsonl":
        options["path"] = hashlib.sha256(Path(str(options["path"])).read_bytes()).hexdigest()
    definition = {"task": task.name, "options": options, "weights": reward.weights}
    text = json.dumps(definition, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def part_names(task: Task) -> tuple[str, ...]:
    """Every part that a weight can be put on, the task's own first."""
    return (*task.parts, *GENERIC)


def unknown_parts(task: Task, reward: Reward) -> list[str]:
    """A message for each weight on a part that ``task`` does not have."""
    known = part_names(task)
    return [f"reward.weights.{name}: {_hint(name, known, task.name)}" for name in reward.weights or () if name not in known]


def judge(task: Task, reward: Reward, prompt: Prompt, response: Response) -> Score | Failure:
    """The task's verdict with the generic parts added and the reward that the weights ask for.

    Without weights the reward is the task's own. ``success`` is always the verifier's. A part that a score lacks is
    an error of the task: ``ValueError`` names it.
    """
    verdict = task.score(prompt, response.text)
    return verdict if isinstance(verdict, Failure) else weigh(task.name, reward, verdict, response)


def weigh(task: str, reward: Reward, verdict: Score, response: Response) -> Score:
    """A verdict of ``task`` with the generic parts added and the reward that the weights ask for."""
    parts = {**verdict.parts, "length": -response.new_tokens / response.limit, "stop": float(response.stopped)}
    return Score(reward=_weighted(parts, reward.weights, task, verdict.reward), success=verdict.success, parts=parts)


def _weighted(parts: Mapping[str, float], weights: Mapping[str, float] | None, task: str, own: float) -> float:
    if weights is None:
        return own
    missing = sorted(weights.keys() - parts.keys())
    if missing:
        raise ValueError(f"reward.weights: {_hint(missing[0], tuple(parts), task)}")
    return sum(weight * parts[name] for name, weight in weights.items())


def _hint(name: str, known: tuple[str, ...], task: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{name!r} is no part of the reward of {task}; {guess}it has {', '.join(known)}"
