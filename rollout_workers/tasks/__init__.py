"""Tasks: prompts with verifiers. ``build_task`` makes the one that a config names. Imports neither ray nor torch."""

from __future__ import annotations

import difflib

from configs.schema import Task as TaskConfig
from rollout_workers.tasks.countdown import Countdown, countdown_options
from rollout_workers.tasks.jsonl import Jsonl, jsonl_options
from rollout_workers.tasks.protocol import Demonstration, Failure, Prompt, Score, Split, Task
from rollout_workers.tasks.reasoning_gym import build_reasoning_gym

__all__ = ["Demonstration", "Failure", "Prompt", "Score", "Split", "Task", "build_task"]


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
    near = difflib.get_close_matches(family, ("countdown", "jsonl", "reasoning_gym"), n=1, cutoff=0.5)
    hint = f"did you mean {'reasoning_gym/<dataset>' if near[0] == 'reasoning_gym' else near[0]!r}? " if near else ""
    raise ValueError(f"task.name is {config.name!r}; {hint}known: 'countdown', 'jsonl', 'reasoning_gym/<dataset>'")
