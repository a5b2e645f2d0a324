"""Tasks: prompts with verifiers. ``build_task`` makes the one that a config names. Imports neither ray nor torch."""

from __future__ import annotations

import difflib

from configs.schema import Task as TaskConfig
from rollout_workers.environments import FAMILIES
from rollout_workers.tasks.agent import AgentTask
from rollout_workers.tasks.countdown import Countdown, countdown_options
from rollout_workers.tasks.jsonl import Jsonl, jsonl_options
from rollout_workers.tasks.protocol import Demonstration, Failure, Prompt, Score, Split, Task
from rollout_workers.tasks.reasoning_gym import build_reasoning_gym

__all__ = ["AgentTask", "Demonstration", "Failure", "Prompt", "Score", "Split", "Task", "build_task"]


def build_task(config: TaskConfig) -> Task:
    """The task of a config; ``ValueError`` on an unknown name or a bad option, naming the nearest known one."""
    family, _, dataset = config.name.partition("/")
    if config.name == "countdown":
        if config.shots:
            raise ValueError(f"task.shots is {config.shots}, but countdown has no few-shot examples; set task.shots to 0")
        return Countdown(countdown_options(config.options))
    if config.name == "jsonl":
        if config.shots:
            raise ValueError(f"task.shots is {config.shots}, but jsonl has no few-shot examples; put them into the prompts")
        return Jsonl(jsonl_options(config.options))
    if family == "reasoning_gym":
        return build_reasoning_gym(dataset, config.options, shots=config.shots)
    if family in FAMILIES:
        if config.shots:
            raise ValueError(f"task.shots is {config.shots}, but {family} has no few-shot examples; set task.shots to 0")
        return AgentTask(config.name, config.options)
    known = ("countdown", "jsonl", "reasoning_gym/<dataset>", *(f"{name}/<which>" for name in FAMILIES))
    near = difflib.get_close_matches(family, [name.partition("/")[0] for name in known], n=1, cutoff=0.5)
    hint = "".join(f"did you mean {name!r}? " for name in known if near and name.partition("/")[0] == near[0])
    raise ValueError(f"task.name is {config.name!r}; {hint}known: {', '.join(map(repr, known))}")
