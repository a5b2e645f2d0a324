"""A task of one response as episodes in which the model may call tools before it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from configs.schema import Tools
from rollout_workers.environments.protocol import Step
from rollout_workers.tasks.environment_task import EpisodeTask
from rollout_workers.tasks.protocol import Demonstration, Failure, LazySequence, Prompt, Score, Split, Task
from rollout_workers.tools.worlds import ToolWorlds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ToolTask(EpisodeTask):
    """``task`` with tools: its verifier judges the response without a call, or the last one.

    Raises:
        ValueError: the task has several turns already.
    """

    def __init__(self, task: Task, tools: Tools) -> None:
        if isinstance(task, EpisodeTask):
            raise ValueError(f"task.tools: {task.name} has several turns and actions of its own; leave tools out")
        self.name, self.task, self.worlds = task.name, task, ToolWorlds(tools)
        self.parts = (*task.parts, "turns", "truncated")

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Those of the task, with the tools."""
        found = self.task.prompts(split)
        return LazySequence(len(found), lambda i: self.opened(found[i], ""))

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """Those of the task, which call nothing, to prompts with the tools."""
        found = self.task.demonstrations(split)
        return LazySequence(len(found), lambda i: replace(found[i], prompt=self.opened(found[i].prompt, "")))

    def score(self, prompt: Prompt, text: str) -> Score | Failure:
        """The verifier's word on a response, as if it were the first."""
        return self.judged(prompt, [text], [], truncated=False)

    def opened(self, prompt: Prompt, observation: str) -> Prompt:
        """The prompt with the tools."""
        return replace(prompt, tools=self.worlds.schemas)

    def seen(
        self, tokenizer: PreTrainedTokenizerBase, observation: str, most: int, *, chat: bool, closed: bool
    ) -> list[int]:
        """The results as messages of the role tool."""
        from rollout_workers.openai_api.conversation import worded
        from rollout_workers.tasks.encoding import encode_turns, shortened

        turns = [
            {
                "role": "tool",
                "name": result["name"],
                "tool_call_id": f"call{place:05d}",
                "content": shortened(tokenizer, result["content"], most),
            }
            for place, result in enumerate(json.loads(observation))
        ]
        return encode_turns(tokenizer, worded(turns, [], str(tokenizer.chat_template))[0], closed=closed)

    def judged(
        self, prompt: Prompt, texts: Sequence[str], steps: Sequence[Step], *, truncated: bool
    ) -> Score | Failure:
        """The verifier's word on the last response."""
        score = self.task.score(prompt, texts[-1])
        if isinstance(score, Failure):
            return score
        more = {"turns": -float(len(texts)), "truncated": float(truncated)}
        return replace(score, parts={**score.parts, **more})

    def close(self) -> None:
        """End the tools' process."""
        self.worlds.close()
