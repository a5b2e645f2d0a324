"""Tasks: prompts with verifiers. ``build_task`` makes the one that a config names. Imports neither ray nor torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from configs.schema import Task as TaskConfig
from rollout_workers.environments import FAMILIES
from rollout_workers.tasks.countdown import Countdown, countdown_options
from rollout_workers.tasks.dataset_rows import build_rows
from rollout_workers.tasks.environment_task import AgentTask
from rollout_workers.tasks.mixture import build_mixture
from rollout_workers.tasks.protocol import Demonstration, Failure, Prompt, Score, Split, Task, score_all
from rollout_workers.tasks.reasoning_gym import build_reasoning_gym
from rollout_workers.tasks.school_maths import build_gsm8k, build_math500

__all__ = ["AgentTask", "Demonstration", "Failure", "Prompt", "Score", "Split", "Task", "build_task", "score_all"]

TASKS: Mapping[str, tuple[Callable[[Mapping[str, object]], Task], str]] = {
    "countdown": (
        lambda options: Countdown(countdown_options(options)),
        "countdown has no few-shot examples; set task.shots to 0",
    ),
    "rows": (
        lambda options: build_rows("rows", options),
        "rows has no few-shot examples; put them into the prompts",
    ),
    "jsonl": (
        lambda options: build_rows("jsonl", options),
        "jsonl has no few-shot examples; put them into the prompts",
    ),
    "parquet": (
        lambda options: build_rows("parquet", options),
        "parquet has no few-shot examples; put them into the prompts",
    ),
    "dataset": (
        lambda options: build_rows("dataset", options),
        "dataset has no few-shot examples; put them into task.options.template",
    ),
    "gsm8k": (build_gsm8k, "gsm8k has no few-shot examples; put them into task.options.template"),
    "math500": (build_math500, "math500 has no few-shot examples; put them into task.options.template"),
    "mixture": (
        lambda options: build_mixture(options, build_task),
        "a mixture's shots are its members'; set shots in task.options.tasks",
    ),
}
"""How a task is made from its options, and what to say to few-shot examples."""


def build_task(config: TaskConfig) -> Task:
    """The task of a config; ``ValueError`` on an unknown name or a bad option, naming the nearest known one."""
    family, _, dataset = config.name.partition("/")
    if config.name in TASKS:
        build, no_shots = TASKS[config.name]
        if config.shots:
            raise ValueError(f"task.shots is {config.shots}, but {no_shots}")
        return build(config.options)
    if family == "reasoning_gym":
        return build_reasoning_gym(dataset, config.options, shots=config.shots)
    if family in FAMILIES:
        if config.shots:
            raise ValueError(
                f"task.shots is {config.shots}, but {family} has no few-shot examples; set task.shots to 0"
            )
        return AgentTask(config.name, config.options)
    known = (*TASKS, "reasoning_gym/<dataset>", *(f"{name}/<which>" for name in FAMILIES))
    near = difflib.get_close_matches(family, [name.partition("/")[0] for name in known], n=1, cutoff=0.5)
    hint = "".join(f"did you mean {name!r}? " for name in known if near and name.partition("/")[0] == near[0])
    raise ValueError(f"task.name is {config.name!r}; {hint}known: {', '.join(map(repr, known))}")
