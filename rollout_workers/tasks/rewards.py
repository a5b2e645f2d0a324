"""Rewards in the open: named parts, weighted in the config, and a hash that says which definition scored a rollout."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Reward, TaskConfig
from configs.task_options import sections, task_paths
from rollout_workers.tasks.protocol import Failure, Prompt, Score, Task, score_all

GENERIC = ("length", "stop")
"""Parts that every task has: minus the share of ``max_new_tokens`` that was used; whether the rollout ended by
itself."""
OVERLONG = "overlong"
"""The part that ``reward.overlong_share`` adds."""
_SMALL = 2**20
NO_DEFINITION = {"base_url", "budget", "cache", "key_variable", "retries", "seconds", "parallel"}
"""Options of a judge that say how it is reached, not what it says."""


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
    """Twelve hexadecimal digits that name a reward definition: task, its options, weights; of files the content counts,
    not the place.

    Of a folder (a data set, a reward model) names and sizes count, and the files of up to a megabyte: hashing weights
    takes too long.
    """
    named = copy.deepcopy({"name": task.name, "options": task.options})
    for judge in sections(named, "judge"):
        for name in NO_DEFINITION & judge.keys():
            del judge[name]
    for options, key, _ in task_paths(named):
        options[key] = _content(Path(str(options[key])))
    definition: dict[str, object] = {"task": task.name, "options": named["options"], "weights": reward.weights}
    if task.tools is not None:
        definition["tools"] = task.tools.model_dump() | {"path": _content(Path(task.tools.path))}
    if reward.overlong_share is not None:
        definition["overlong_share"] = reward.overlong_share
    text = json.dumps(definition, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _content(path: Path) -> str:
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        return str(path)  # an id of the hub
    digest = hashlib.sha256()
    for file in sorted(f for f in path.rglob("*") if f.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode() + (file.read_bytes() if size <= _SMALL else b""))
    return digest.hexdigest()


def part_names(task: Task, reward: Reward) -> tuple[str, ...]:
    """Every part that a weight can be put on, the task's own first."""
    return (*task.parts, *GENERIC, *([OVERLONG] if reward.overlong_share is not None else []))


def unknown_parts(task: Task, reward: Reward) -> list[str]:
    """A message for each weight on a part that ``task`` does not have."""
    known = part_names(task, reward)
    return [
        f"reward.weights.{name}: {_hint(name, known, task.name)}" for name in reward.weights or () if name not in known
    ]


def judge(task: Task, reward: Reward, prompt: Prompt, response: Response) -> Score | Failure:
    """The task's verdict with the generic parts added and the reward that the weights ask for.

    Without weights the reward is the task's own. ``success`` is always the verifier's. A part that a score lacks is
    an error of the task: ``ValueError`` names it.
    """
    return judge_all(task, reward, [prompt], [response])[0]


def judge_all(
    task: Task, reward: Reward, prompts: Sequence[Prompt], responses: Sequence[Response]
) -> list[Score | Failure]:
    """``judge`` for many at once: some verifiers are much faster so."""
    verdicts = score_all(task, prompts, [response.text for response in responses])
    return [
        verdict if isinstance(verdict, Failure) else weigh(task.name, reward, verdict, response)
        for response, verdict in zip(responses, verdicts, strict=True)
    ]


def weigh(task: str, reward: Reward, verdict: Score, response: Response) -> Score:
    """A verdict of ``task`` with the generic parts added and the reward that the weights ask for."""
    parts = {**verdict.parts, "length": -response.new_tokens / response.limit, "stop": float(response.stopped)}
    if reward.overlong_share is not None:
        parts[OVERLONG] = overlong(response.new_tokens, response.limit, reward.overlong_share)
    return Score(reward=_weighted(parts, reward, task, verdict.reward), success=verdict.success, parts=parts)


def overlong(new_tokens: int, limit: int, share: float) -> float:
    """0 up to (1 - share) of ``limit``, then down a line to -1 at ``limit`` (Yu et al., 2025, "DAPO", equation 13)."""
    return min(0.0, (limit - share * limit - new_tokens) / (share * limit))


def _weighted(parts: Mapping[str, float], reward: Reward, task: str, own: float) -> float:
    weights = reward.weights or {}
    missing = sorted(weights.keys() - parts.keys())
    if missing:
        raise ValueError(f"reward.weights: {_hint(missing[0], tuple(parts), task)}")
    total = own if reward.weights is None else sum(weight * parts[name] for name, weight in weights.items())
    unnamed = reward.overlong_share is not None and OVERLONG not in weights
    return total + parts[OVERLONG] if unnamed else total


def _hint(name: str, known: tuple[str, ...], task: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{name!r} is not a part of the reward of {task}; {guess}it has {', '.join(known)}"
