"""Plays tasks of one response per prompt: one batched decode, then the verifier."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rollout_workers.engines import DecodeJob, RolloutEngine
from rollout_workers.environments.client import Worlds
from rollout_workers.episode_player import PlayedEpisode, Player
from rollout_workers.gateway.player import GatewayPlayer
from rollout_workers.gateway.session import SessionLimits
from rollout_workers.gateway.task import GatewayTask
from rollout_workers.generated_row import Row, row_of
from rollout_workers.model_host import WorkerSettings
from rollout_workers.tasks import AgentTask, EpisodeTask, Prompt, Task
from rollout_workers.tasks.encoding import decode_response, encode_prompt
from rollout_workers.tasks.rewards import Response, judge_all
from rollout_workers.tools.task import ToolTask
from rollout_workers.tools.worlds import ToolWorlds


@dataclass(frozen=True, kw_only=True)
class ResponsePlayer:
    """What the responses of a worker share."""

    task: Task
    settings: WorkerSettings
    verifying: list[float] = field(default_factory=list)
    """Seconds of each call of the verifier since the list was emptied."""

    def play(self, engine: RolloutEngine, prompts: Sequence[Prompt], job: DecodeJob) -> list[PlayedEpisode]:
        """``job.repeats`` responses to each prompt, judged, prompts outer; ``job.prompts`` is not read.

        Raises:
            ValueError: a prompt is longer than ``task.max_prompt_tokens``.
        """
        encoded = self.encoded(engine, prompts)
        generation = engine.generate(replace(job, prompts=encoded))
        rows = [row_of(generation, number) for number in range(len(prompts) * job.repeats)]
        return self.judged(engine, prompts, encoded, rows)

    def encoded(self, engine: RolloutEngine, prompts: Sequence[Prompt]) -> tuple[tuple[int, ...], ...]:
        """The prompts' token ids; ``ValueError`` for one that is longer than ``task.max_prompt_tokens``."""
        return tuple(self._encode(engine, prompt) for prompt in prompts)

    def judged(
        self, engine: RolloutEngine, prompts: Sequence[Prompt], encoded: Sequence[tuple[int, ...]], rows: Sequence[Row]
    ) -> list[PlayedEpisode]:
        """The verifier's word on ``rows``, equally many for each prompt, prompts outer."""
        rollout, each = self.settings.rollout, len(rows) // len(prompts)
        places = [place for place in range(len(prompts)) for _ in range(each)]
        texts = [decode_response(engine.tokenizer, row.tokens.tolist(), rollout.stop) for row in rows]
        responses = [
            Response(text=text, new_tokens=len(row), limit=rollout.max_new_tokens, stopped=row.finish_reason == "stop")
            for row, text in zip(rows, texts, strict=True)
        ]
        started = time.perf_counter()
        verdicts = judge_all(self.task, self.settings.reward, [prompts[place] for place in places], responses)
        self.verifying.append(time.perf_counter() - started)
        return [
            PlayedEpisode(prompt=prompts[place], prompt_ids=encoded[place], row=row, text=text, verdict=verdict)
            for place, row, text, verdict in zip(places, rows, texts, verdicts, strict=True)
        ]

    def _encode(self, engine: RolloutEngine, prompt: Prompt) -> tuple[int, ...]:
        ids = encode_prompt(engine.tokenizer, prompt, chat=self.settings.task.chat)
        if len(ids) > self.settings.task.max_prompt_tokens:
            raise ValueError(
                f"prompt {prompt.id} has {len(ids)} tokens, more than "
                f"task.max_prompt_tokens={self.settings.task.max_prompt_tokens}: raise it or shorten the prompt"
            )
        return tuple(ids)

    def close(self) -> None:
        """Nothing to end."""


def player_for(settings: WorkerSettings, task: Task) -> Player | ResponsePlayer | GatewayPlayer:
    """What plays the prompts of ``task``; episodes of an environment, and agent programs, run in child processes of
    this worker."""
    if not isinstance(task, EpisodeTask):
        return ResponsePlayer(task=task, settings=settings)
    turns, about = settings.rollout.turns, settings.task
    if isinstance(task, GatewayTask):
        limits = SessionLimits(
            turns=turns,
            max_new_tokens=settings.rollout.max_new_tokens,
            max_prompt_tokens=about.max_prompt_tokens,
            stop=settings.rollout.stop,
        )
        return GatewayPlayer(task=task, limits=limits, reward=settings.reward)
    if isinstance(task, ToolTask):
        worlds: Worlds | ToolWorlds = task.worlds
    else:
        assert isinstance(task, AgentTask)
        worlds = Worlds(
            about.name,
            task.options,
            processes=turns.processes,
            step_seconds=turns.step_timeout_seconds,
            reset_seconds=turns.reset_timeout_seconds,
        )
    return Player(
        task=task,
        worlds=worlds,
        limits=turns,
        stop=settings.rollout.stop,
        reward=settings.reward,
        chat=about.chat,
        max_prompt_tokens=about.max_prompt_tokens,
    )
