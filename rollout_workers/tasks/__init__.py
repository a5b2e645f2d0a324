"""Tasks: prompts with verifiers. ``build_task`` makes the one that a config names. Imports neither ray nor torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from configs.schema import TaskConfig
from rollout_workers.environments import FAMILIES
from rollout_workers.gateway.task import KINDS, GatewayTask
from rollout_workers.tasks.countdown import Countdown, CountdownOptions
from rollout_workers.tasks.dataset_rows import build_rows
from rollout_workers.tasks.environment_task import AgentTask, EpisodeTask
from rollout_workers.tasks.instructions import Instructions, InstructionsOptions
from rollout_workers.tasks.mixture import build_mixture
from rollout_workers.tasks.protocol import Demonstration, Failure, Prompt, Score, Split, Task, options_of, score_all
from rollout_workers.tasks.reasoning_gym import build_reasoning_gym
from rollout_workers.tasks.school_maths import build_gsm8k, build_math500
from rollout_workers.tools.task import ToolTask

__all__ = [
    "AgentTask",
    "Demonstration",
    "EpisodeTask",
    "Failure",
    "Prompt",
    "Score",
    "Split",
    "TaskConfig",
    "build_task",
    "score_all",
]

ROWS = ("rows", "jsonl", "parquet", "dataset")
TASKS: Mapping[str, Callable[[TaskConfig], Task]] = {
    "countdown": lambda config: Countdown(options_of(CountdownOptions, "countdown", config.options)),
    "instructions": lambda config: Instructions(options_of(InstructionsOptions, "instructions", config.options)),
    **dict.fromkeys(ROWS, lambda config: build_rows(config.name, config.options, shots=config.shots)),
    "gsm8k": lambda config: build_gsm8k(config.options),
    "math500": lambda config: build_math500(config.options),
    "mixture": lambda config: build_mixture(config.options, build_task),
}
"""How a task is made."""
NO_SHOTS = {
    **{name: f"{name} has no few-shot examples; set task.shots to 0" for name in ("countdown", "instructions")},
    **{name: f"{name} has no few-shot examples; put them into task.options.template" for name in ("gsm8k", "math500")},
    "mixture": "a mixture's shots are its members'; set shots in task.options.tasks",
}
"""What to say to few-shot examples."""


def build_task(config: TaskConfig) -> Task:
    """The task of a config; ``ValueError`` on an unknown name or a bad option, naming the nearest known one."""
    task = _named(config)
    return task if config.tools is None else ToolTask(task, config.tools)


def _named(config: TaskConfig) -> Task:
    """The task of this name."""
    family, _, dataset = config.name.partition("/")
    if config.shots and config.name in NO_SHOTS:
        raise ValueError(f"task.shots is {config.shots}, but {NO_SHOTS[config.name]}")
    if config.name in TASKS:
        return TASKS[config.name](config)
    if family == "reasoning_gym":
        return build_reasoning_gym(dataset, config.options, shots=config.shots)
    if family in FAMILIES:
        if config.shots:
            raise ValueError(
                f"task.shots is {config.shots}, but {family} has no few-shot examples; set task.shots to 0"
            )
        return (GatewayTask if family in KINDS else AgentTask)(config.name, config.options)
    known = (*TASKS, "reasoning_gym/<dataset>", *(f"{name}/<which>" for name in FAMILIES))
    near = difflib.get_close_matches(family, [name.partition("/")[0] for name in known], n=1, cutoff=0.5)
    hint = "".join(f"did you mean {name!r}? " for name in known if near and name.partition("/")[0] == near[0])
    raise ValueError(f"task.name is {config.name!r}; {hint}known: {', '.join(map(repr, known))}")
