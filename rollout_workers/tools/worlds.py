"""What a model's words come to where it may call tools: the results, as the next observation, or the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property

from configs.schema import Tools
from rollout_workers.environments.client import Lost
from rollout_workers.environments.protocol import Episode, Step
from rollout_workers.openai_api.tool_calls import split_calls
from rollout_workers.tasks.protocol import Failure
from rollout_workers.tasks.sandbox import Function, Isolation

MOST_CALLS = 16
"""Of one response; the others are answered by an error."""
TOO_MANY = f"Error: at most {MOST_CALLS} calls in a response"


class ToolWorlds:
    """Stands where a worker has the worlds of an environment: an episode goes on while the model calls tools.

    Tools keep nothing between calls: the process that runs them is shared by all episodes, and started again where one
    hangs, crashes or sets limits of its own.
    """

    def __init__(self, settings: Tools) -> None:
        self.settings = settings
        self._isolation = Isolation(
            Function(
                path=settings.path,
                name=", ".join(settings.functions),
                tools=settings.functions,
                place="task.tools",
                seconds=settings.seconds,
                megabytes=settings.megabytes,
                network=settings.network,
                processes=settings.processes,
                variables=settings.variables,
            )
        )

    @cached_property
    def schemas(self) -> tuple[Mapping[str, object], ...]:
        """The tools as a chat template takes them; ``ValueError`` where their file cannot be loaded."""
        self._isolation.start()
        return tuple(self._isolation.schemas)

    def begin(self, episodes: Sequence[Episode]) -> list[str]:
        """Nothing opens an episode but its prompt."""
        return [""] * len(episodes)

    def step(self, actions: Mapping[int, str]) -> dict[int, Step | Lost]:
        """The results of each response's calls, a JSON list of ``{"name", "content"}``; one without calls is the
        last."""
        return {slot: self._step(text) for slot, text in actions.items()}

    def close(self) -> None:
        """End the tools' process."""
        self._isolation.close()

    def _step(self, text: str) -> Step:
        _, calls = split_calls(text, self.settings.functions)
        if not calls:
            return Step(observation="", reward=0.0, terminated=True)
        heard, more = calls[:MOST_CALLS], calls[MOST_CALLS:]
        results = [{"name": call.name, "content": self._called(call.name, call.arguments)} for call in heard]
        results += [{"name": call.name, "content": TOO_MANY} for call in more]
        return Step(observation=json.dumps(results), reward=0.0)

    def _called(self, name: str, arguments: str) -> str:
        """A result, or the error in words: arguments are the model's, so it is told what comes of them."""
        found = self._isolation.tool(name, json.loads(arguments))
        return f"Error: {found.message}" if isinstance(found, Failure) else found
