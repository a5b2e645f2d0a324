"""An agent program as a task: its episodes are the prompts, and playing it is the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rollout_workers.environments import COMMON, family
from rollout_workers.environments.agent_programs import Programs
from rollout_workers.tasks.environment_task import AgentTask
from rollout_workers.tasks.protocol import Demonstration, Failure, Prompt, Score, Split

KINDS = ("gateway", "verifiers")


class GatewayTask(AgentTask):
    """``gateway/<name>``: played by ``GatewayPlayer``; there is nothing to play it without a policy.

    Raises:
        ValueError: an option is unknown or its value impossible.
    """

    def __init__(self, name: str, options: Mapping[str, object]) -> None:
        super().__init__(name, options)
        made = family(name, {key: value for key, value in options.items() if key not in COMMON})
        assert isinstance(made, Programs)
        self.programs = made
        self.parts = (*AgentTask.parts, *made.parts)
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(
                f"task.options.parts is {list(made.parts)}; name each once, none of {', '.join(AgentTask.parts)}"
            )

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """``ValueError``: a program shows no right answers."""
        raise ValueError(
            f"{self.name} has no demonstrations; train on texts, on rollouts or on another task's (data: kind text, "
            "replay, or task with its own task:)"
        )

    def score(self, prompt: Prompt, text: str) -> Score | Failure:
        """A failure: the program judges while it plays."""
        return Failure(kind="gateway_episode", message=f"{self.name} is judged by its program, while it plays")
